"""Scores of what is sampled beside those of real images: the steps of `make -C recipes/emoji scores` that are no stage.

`python recipes/emoji/scores.py STEP --help` tells of each step.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle_cli.artifacts import history, open_artifact, write_artifact
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.image_sets import REFERENCE, ImageSet, open_image_set


def titles(side: ImageSet) -> dict[str, str]:
    """A caption of each image by id, none twice: the first of its own that no image before it took.

    Raises:
        DalleError: an image without one.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for row in side.rows.tolist():
        own = side.images.ids[row]
        text = next((text for text in side.captions.get(own, ()) if text not in taken), None)
        if text is None:
            raise DalleError(f"expected a caption of its own for each image, found none for {own}; give others")
        found[own] = text
        taken.add(text)
    return found


def write_prompts(args: argparse.Namespace) -> None:
    """Write the captions of so many images, evenly spread as `evaluate --limit` has them, one a line."""
    side = open_image_set(REFERENCE, str(args.dataset), args.count)
    args.out.write_text("\n".join(titles(side).values()) + "\n", encoding="utf-8")


def write_rebuilt(args: argparse.Namespace) -> None:
    """Write what a dVAE makes of the same images, with their captions."""
    from dalle_cli.data.loader import sequential
    from dalle_cli.devices import arithmetic
    from dalle_cli.hub import bundles
    from dalle_cli.pipelines.codec import Codec

    side, machine = open_image_set(REFERENCE, str(args.dataset), args.count), arithmetic("auto", "float32")
    weights, texts = bundles.weights(args.model, "weights.dvae"), titles(side)
    codec = Codec(weights, machine)
    pixels, ids = [], []
    for rows, images in sequential(side.images, codec.size, side.rows.tolist(), 64):
        pixels.append(codec.decode(codec.encode(images)))
        ids += [side.images.ids[row] for row in rows.tolist()]
    columns = {"images": np.concatenate(pixels), "ids": ids, "text": [texts[own] for own in ids]}
    write_artifact(args.out, "images", columns, {}, history("rebuilt", {}, images=side.digest, model=weights))


def write_mistitled(args: argparse.Namespace) -> None:
    """Write the same images, each with the caption of another."""
    from dalle_cli.evaluation.retrieval import shuffled

    sampled = open_artifact(args.images, "images")
    names = sorted(set(texts := list(sampled.strings("text"))))
    other = shuffled(np.array([names.index(text) for text in texts], np.int64), args.seed)
    if other is None:
        raise DalleError(f"expected captions that differ, found none in {args.images}; sample for more prompts")
    columns = {"images": np.asarray(sampled.array("images")), "ids": list(sampled.strings("ids"))}
    columns["text"] = [names[i] for i in other.tolist()]
    write_artifact(args.out, "images", columns, {}, history("mistitled", {"seed": args.seed}, images=sampled))


def print_table(args: argparse.Namespace) -> None:
    """Print a row for each NAME=FILE that `evaluate` wrote, a column for each score, as Markdown."""
    from dalle_cli.evaluation.tables import image_rows

    names, files = zip(*(row.rsplit("=", 1) for row in args.rows), strict=True)
    tables = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    columns = [["pictures", *names], *image_rows([one["scores"][0] for one in tables])]
    columns.insert(1, ["number", *(f"{one['counts']['generated']['images']:,}" for one in tables)])
    lines = [[cell.strip() for cell in line] for line in zip(*columns, strict=True)]
    for line in (lines[0], ["---"] * len(columns), *lines[1:]):
        print(f"| {' | '.join(line)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step. Exit status: 0, or 1 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(metavar="STEP", required=True)
    made = steps.add_parser("prompts", help=write_prompts.__doc__)
    made.set_defaults(run=write_prompts)
    _images_argument(made)
    made = steps.add_parser("rebuilt", help=write_rebuilt.__doc__)
    made.set_defaults(run=write_rebuilt)
    _images_argument(made)
    made.add_argument("-m", "--model", required=True, help="a bundle with the dVAE")
    made = steps.add_parser("mistitled", help=write_mistitled.__doc__)
    made.set_defaults(run=write_mistitled)
    made.add_argument("images", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--seed", type=int, default=0, help="%(default)s")
    made = steps.add_parser("table", help=print_table.__doc__)
    made.set_defaults(run=print_table)
    made.add_argument("rows", nargs="+", metavar="NAME=FILE")
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except DalleError as error:
        print(f"scores: error: {error}", file=sys.stderr)
        return 1
    return 0


def _images_argument(made: argparse.ArgumentParser) -> None:
    made.add_argument("dataset", type=Path)
    made.add_argument("count", type=int)
    made.add_argument("out", type=Path)


if __name__ == "__main__":
    sys.exit(main())
