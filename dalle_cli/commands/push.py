"""`dalle push`."""

from typing import Annotated

import typer

EXAMPLE = "dalle push model/ owner/repo --private"


def run(
    model: Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder, or the name of a shipped bundle.")],
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="owner/repo; created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private; refuse one that is public.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The message of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="License for the model card, such as mit; by default the card's.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Skip files that belong to no bundle; delete the repository's other files.")
    ] = False,
) -> None:
    """Upload a bundle to a hub, with a model card."""
    from dalle_cli import console
    from dalle_cli.artifacts.text import write_text
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles, card, transfer

    if model.startswith(transfer.SCHEME):
        raise DalleError(f"expected a bundle on this machine, found {model}; `dalle pull {model} -o FOLDER` fetches it")
    target = transfer.parse(repository).name
    folder = bundles.locate(model)
    files = bundles.files_of(folder, force)
    weights = bundles.whole(files)
    path, old = folder / card.CARD, card.read(folder)
    text = card.write(old, target, weights, card.read_scores(folder), license)
    if card.license_of(text) is None:
        console.warn("the model card names no license, so nobody may use this bundle; give --license ID")
    if text != old:
        write_text(path, text)
    files = sorted({*files, path})
    message = message or f"{target.rpartition('/')[2]}: {len(weights)} weights"
    url, commit = transfer.upload(repository, files, message, private, force)
    size = sum(file.stat().st_size for file in files)
    console.result(url, files=len(files), bytes=f"{size:,}", commit=commit[:7])
