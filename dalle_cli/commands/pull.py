"""`dalle pull`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "dalle pull hf://owner/repo@v1 -o model/"


def run(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="hf://owner/repo or hf://owner/repo@revision.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Also copy it there; by default it stays in the cache."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Copy into a folder with other files; replace them.")] = False,
) -> None:
    """Download a bundle from a hub, and check it."""
    from dalle_cli import console
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles, transfer

    fetched = transfer.fetch(repository)
    if out is not None:
        bundles.copy(fetched.files, out, force)
    try:
        bundles.whole(fetched.files)
    except DalleError as error:
        console.warn(f"this bundle is not whole: {error}")
    size = sum(path.stat().st_size for path in fetched.files)
    console.result(out or fetched.folder, files=len(fetched.files), bytes=f"{size:,}", commit=fetched.commit[:7])
