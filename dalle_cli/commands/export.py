"""`dalle export`."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import ImagesArg

EXAMPLE = "dalle export radish.best.safetensors -o radish/"


def run(
    images: ImagesArg = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Where to write; by default named after the input."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder with other files.")] = False,
) -> None:
    """Write images as PNG files with a manifest, which is a data set again."""
    import json

    from PIL import Image

    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.artifacts.text import write_text
    from dalle_cli.data.manifest import IN_FOLDER
    from dalle_cli.errors import DalleError
    from dalle_cli.paths import beside, given_or_piped

    source = given_or_piped(images)
    rows = open_artifact(source, "images")
    folder = out or beside(source, "")
    if folder.exists() and not folder.is_dir():
        raise DalleError(f"expected a folder to write to, found a file: {folder}; choose another -o")
    manifest = folder / IN_FOLDER
    before = _earlier(manifest)
    if folder.is_dir() and any(folder.iterdir()) and not before and not force:
        raise DalleError(f"expected an empty folder or an earlier export, found {folder}; choose another or --force")
    ids = rows.strings("ids")
    texts = rows.strings("text") if "text" in rows else None
    scores = rows.array("score") if "score" in rows else None
    lines = []
    with console.progress("export", len(rows), unit="images") as advance:
        for row, pixels in enumerate(rows.array("images")):
            name = f"{row:06d}.png"
            image = Image.fromarray(pixels.transpose(1, 2, 0).copy())
            replace_file(folder / name, lambda part, image=image: image.save(part, format="PNG"))  # type: ignore[misc]
            line: dict[str, object] = {"image": name, "id": ids[row]}
            line |= {} if texts is None else {"caption": texts[row]}
            line |= {} if scores is None else {"score": round(float(scores[row]), 6)}
            lines.append(json.dumps(line, ensure_ascii=False))
            advance()
    write_text(manifest, "".join(f"{line}\n" for line in lines))
    for name in before[len(lines) :]:
        (folder / name).unlink(missing_ok=True)  # of an earlier export with more images
    console.result(folder, images=len(lines))


def _earlier(manifest: Path) -> list[str]:
    """The images of an earlier export, in the order of its manifest; none if the manifest is another's."""
    import json

    try:
        rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        names = [f"{row:06d}.png" for row in range(len(rows))]
        return names if all("id" in row and row["image"] == name for row, name in zip(rows, names, strict=True)) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
