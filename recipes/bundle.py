"""Put what a recipe has trained into one folder: the bundle that `-m` names and `dalle push` sends.

Run `python recipes/bundle.py MODEL RECIPE OUT`, MODEL being the folder with the weights and the tokenizer. The model
card is the recipe's card.md with the figures of the files; its NOTICE, if it has one, lies beside it.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dalle_cli.artifacts.container import replace_file
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles, card

PARTS = ("dvae.safetensors", "clip.safetensors", "prior.safetensors", "tokenizer.json")
MOST = 40_000_000  # bytes: it lies in the package


def make(model: Path, recipe: Path, out: Path) -> int:
    """Write the bundle and give its size in bytes.

    Raises:
        DalleError: a part is missing or does not fit the others, or the whole is too large to ship.
    """
    parts = [model / name for name in PARTS]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise DalleError(f"expected {', '.join(PARTS)} in {model}, found no {missing[0]}; train it first")
    size = sum(part.stat().st_size for part in parts)
    if size > MOST:
        raise DalleError(f"expected at most {MOST:,} bytes to ship, found {size:,}; save the weights in bfloat16")
    weights = bundles.whole(parts)
    text = (recipe / "card.md").read_text(encoding="utf-8")
    text = card.write(text, f"dalle/{recipe.resolve().name}", weights, card.read_scores(recipe), None)
    out.mkdir(parents=True, exist_ok=True)
    for part in (*parts, *recipe.glob("NOTICE")):
        replace_file(out / part.name, partial(shutil.copyfile, part))
    replace_file(out / card.CARD, lambda new: new.write_text(text, encoding="utf-8"))
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    try:
        size = make(args.model, args.recipe, args.out)
    except DalleError as error:
        print(f"bundle: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {size:,} bytes of weights and tokenizer", file=sys.stderr)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
