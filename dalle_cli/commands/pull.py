"""`dalle pull`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dalle_cli.hub.transfer import Fetched

EXAMPLE = "dalle pull hf://owner/repo@v1 -o model/"


def run(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="hf://owner/repo or hf://owner/repo@revision.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Also copy it there; else it is left in the cache."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Copy among, and over, files of something else.")] = False,
) -> None:
    """Fetch a bundle from a hub, and check it."""
    from dalle_cli import console
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.hub import transfer as hub

    fetched = hub.fetch(repository if repository.startswith(hub.SCHEME) else hub.SCHEME + repository)
    if out is not None:
        _copy(fetched, out, force)
    try:
        bundle.whole(fetched.files)
    except DalleError as error:
        console.warn(f"this bundle is not whole: {error}")
    size = sum(path.stat().st_size for path in fetched.files)
    console.result(out or fetched.folder, files=len(fetched.files), bytes=f"{size:,}", commit=fetched.commit[:7])


def _copy(fetched: "Fetched", folder: Path, force: bool) -> None:
    """Copy file by file, each all or not at all; a copy that was cut off is continued by the same command."""
    import filecmp
    import shutil

    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.errors import DalleError

    if folder.exists() and not folder.is_dir():
        raise DalleError(f"expected a folder to write to, found a file: {folder}; choose another -o")
    ours = {path.name: path for path in fetched.files}
    there = [path for path in folder.glob("*") if not path.name.startswith(".")]
    same = {p.name for p in there if p.name in ours and p.is_file() and filecmp.cmp(p, ours[p.name], shallow=False)}
    other = sorted(path.name for path in there if path.name not in same)
    if other and not force:
        raise DalleError(
            f"expected an empty folder or this very bundle, found {other[0]} in {folder}; choose another -o or --force"
        )
    for name in ours.keys() - same:
        replace_file(folder / name, lambda part, source=ours[name]: shutil.copyfile(source, part))  # type: ignore[misc]
