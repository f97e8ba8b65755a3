"""`dalle push`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "dalle push model/ owner/repo --private"
LEFT = (".run", ".log")  # what stages leave beside the weights they write


def run(
    model: Annotated[str, typer.Argument(metavar="BUNDLE", help="A folder, or the name of a shipped bundle.")],
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="owner/repo; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private; one that is public is refused.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="What the commit is about.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="For the model card, as mit; else what the card names.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Leave behind what belongs to no bundle; delete the repository's other files."),
    ] = False,
) -> None:
    """Put a bundle into a hub's repository, with a model card."""
    from dalle_cli import console
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.hub import card
    from dalle_cli.hub import transfer as hub

    if model.startswith(hub.SCHEME):
        raise DalleError(f"expected a bundle on this machine, found {model}; `dalle pull {model} -o FOLDER` fetches it")
    target = hub.parse(repository).name
    folder = bundle.locate(model)
    files = _files(folder, force)
    weights = bundle.whole(files)
    path, old = folder / card.CARD, card.read(folder)
    text = card.write(old, target, weights, card.read_scores(folder), license)
    if card.license_of(text) is None:
        console.warn("the model card names no license: nobody may use this bundle; give --license ID")
    if text != old:
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    files = sorted({*files, path})
    url, commit = hub.upload(
        repository, files, message or f"{target.rpartition('/')[2]}: {len(weights)} weights", private, force
    )
    size = sum(file.stat().st_size for file in files)
    console.result(url, files=len(files), bytes=f"{size:,}", commit=commit[:7])


def _files(folder: Path, force: bool) -> list[Path]:
    """The files of a bundle in this folder: safetensors, JSON, model card, licenses.

    Raises:
        DalleError: no folder; something else lies there, and is not to be left behind; JSON that is none.
    """
    import json

    from dalle_cli.errors import DalleError
    from dalle_cli.hub import transfer as hub

    if not folder.is_dir():
        raise DalleError(f"expected a bundle, found a file: {folder}; give the folder that holds it")
    there = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(LEFT))
    files = [path for path in there if path.is_file() and hub.BUNDLE_FILE.fullmatch(path.name)]
    other = [path.name for path in there if path not in files]
    if other and not force:
        raise DalleError(
            f"expected safetensors, JSON, README.md and licenses, found {other[0]} in {folder}; "
            "take it out, or give --force to leave it behind"
        )
    for file in (file for file in files if file.suffix == ".json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DalleError(f"expected JSON, found {error}: {file}; make it again") from None
    return files
