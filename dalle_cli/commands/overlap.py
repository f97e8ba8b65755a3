"""`dalle overlap`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.errors import DalleError
from dalle_cli.options import BatchSize, Device, Dtype, Force, OutFile, Workers

if TYPE_CHECKING:
    from dalle_cli.data.loader import Pictures
    from dalle_cli.devices import Arithmetic
    from dalle_cli.evaluation.overlap import Eye, Overlap

SIDES = ("test", "train")
HEAD = "# dalle overlap: "  # the first line of a list, by which it is known again
FORMAT = "dalle-overlap"
LARGEST = 299  # pixels that a network is shown pictures at, at most: as many as Inception-v3 looks at
EXAMPLE = """dalle overlap train.tar test.tar -o overlap.txt --sheet closest.png
dalle overlap train.tar test.tar --of train -o seen.txt
dalle train-dvae train.tar --without seen.txt -o dvae.safetensors"""


def run(
    train: Annotated[
        str, typer.Argument(metavar="TRAIN", help="What is trained on: a data set or an images artifact.")
    ],
    test: Annotated[str, typer.Argument(metavar="TEST", help="What must not be in it: likewise.")],
    out: OutFile,
    of: Annotated[
        str,
        typer.Option(metavar="SIDE", help="Whose ids to list for --without: test or train; the pairs go to a .json."),
    ] = "test",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1.0,
            max=1.0,
            metavar="X",
            help="Pictures this similar count as one; 0.5 if left out, or 0.95 of a network.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:OUTPUT]",
            help="Compare by a network's features, as in `evaluate`, not by pixels: what shows the same counts.",
        ),
    ] = None,
    neighbors: Annotated[
        int,
        typer.Option("-k", "--neighbors", min=1, metavar="N", help="Look at the N nearest of TRAIN for each of TEST."),
    ] = 8,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the pairs around the threshold, to choose it by, as PNG.")
    ] = None,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
) -> None:
    """Find pictures of one set that are in another, too."""
    from dalle_cli import console
    from dalle_cli.commands.drawing import check_png
    from dalle_cli.devices import arithmetic
    from dalle_cli.evaluation.image_sets import open_pictures
    from dalle_cli.evaluation.overlap import Overlap, Reading, candidates, compare

    if of not in SIDES:
        raise DalleError(f"expected --of test or train, found {of!r}; choose one")
    check_list(out, force)
    if sheet is not None:
        check_png(sheet, force)
    (seen, seen_digest), (new, new_digest) = open_pictures(train), open_pictures(test)
    if seen_digest == new_digest:
        console.warn("expected two sets of pictures, found the same one twice; each picture is a copy of itself")
    eye, how = open_eye(features, new, arithmetic(device, dtype)), Reading(batch_size, workers)
    pairs = compare(seen, new, candidates(seen, new, eye, neighbors, how), eye, how)
    found = Overlap(seen, new, pairs, eye.threshold if threshold is None else threshold)
    if crowded := found.crowded(neighbors):
        console.warn(
            f"expected fewer than {neighbors} copies in TRAIN of each picture, found {neighbors} of {crowded} in TEST, "
            "which may have more; raise --neighbors"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, pictures in (("train", seen), ("test", new)):
        pictures.skipped.write(out.with_name(f"{out.stem}.{name}.skipped.jsonl"))
    if sheet is not None:
        draw(sheet, found)
    write(out, found, of, {"features": eye.name, "train": seen_digest, "test": new_digest})
    skipped = {f"{name}_skipped": p.skipped.count or None for name, p in (("train", seen), ("test", new))}
    console.result(
        out,
        listed=len(found.ids(of)),
        of=f"{len(new if of == 'test' else seen)} in {of.upper()}",
        pairs=len(found.alike),
        **skipped,
    )


def open_eye(features: str | None, pictures: "Pictures", machine: "Arithmetic") -> "Eye":
    """What pictures are compared by.

    Raises:
        DalleError: no such network, or none of these pictures can be read.
    """
    from contextlib import suppress

    from dalle_cli.data.skips import BadSample
    from dalle_cli.evaluation.overlap import NetworkEye, PixelEye

    if features is None:
        return PixelEye(machine.device)
    from dalle_cli.evaluation.features import load_features

    network = load_features(features, None, machine)
    for row in range(len(pictures)):
        with suppress(BadSample):
            return NetworkEye(network, min(LARGEST, *pictures.read(row).size), machine.device)
    raise DalleError(f"expected pictures in TEST, found none of {len(pictures):,} that can be read; check them")


def beside(out: Path) -> Path:
    """Where the pairs go."""
    return out.with_suffix(".json")


def check_list(out: Path, force: bool) -> None:
    """Refuse to replace anything but what this stage wrote, unless forced.

    Raises:
        DalleError: something else lies there, or the list is to be named as the pairs are.
    """
    from dalle_cli.artifacts.text import check_ours, head_of, json_fact

    if out.suffix == ".json":
        raise DalleError(f"expected a list of ids such as {out.with_suffix('.txt')}, found {out}; the pairs go there")
    check_ours(out, "a list of ids", lambda path: head_of(path).startswith(HEAD), force)
    check_ours(beside(out), "pairs", lambda path: json_fact(path, "format") == FORMAT, force)


def write(out: Path, found: "Overlap", of: str, made: dict[str, Any]) -> None:
    """The list of ids, and the pairs beside it."""
    import json

    from dalle_cli.artifacts.text import write_text
    from dalle_cli.data.exclude import as_line

    ids, pictures = found.ids(of), found.test if of == "test" else found.train
    said = f"{len(ids)} of {len(pictures)} pictures of {of.upper()}, by {made['features']} from {found.threshold:g} on"
    lines = [HEAD + said, *map(as_line, ids)]
    table = {"format": FORMAT, **made, "of": of, "threshold": found.threshold, "ids": ids, "pairs": found.told()}
    write_text(beside(out), json.dumps(table, ensure_ascii=False, indent=1) + "\n")
    write_text(out, "".join(f"{line}\n" for line in lines))


def draw(path: Path, found: "Overlap") -> None:
    """The pairs around the threshold."""
    from dalle_cli.artifacts.container import replace_file

    image = found.sheet()
    replace_file(path, lambda part: image.save(part, format="PNG"))
