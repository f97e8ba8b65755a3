"""Copies of a data set's pictures, changed a little and hidden among pictures that are no copies; what finds them.

    python tests/planted.py recipes/emoji/small.tar [--features CLIP] [--most N] [--grid PNG]

prints a table: of the copies of each kind, how many `dalle overlap` finds (recall), and what share of what it finds is
a copy where they stand among as many pictures that are none (precision).
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from conftest import run_ok
from PIL import Image, ImageEnhance

from dalle_cli.data.datasets import open_dataset


def recompressed(image, rng):
    """JPEG of quality 70."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return Image.open(file).convert("RGB")


def cropped(image, rng, share=0.05):
    """5 % of width and of height cut off, at either end or at both."""
    size = [round(side * (1 - share)) for side in image.size]
    left, top = (int(rng.integers(0, old - new + 1)) for old, new in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def cropped_more(image, rng):
    """10 %."""
    return cropped(image, rng, 0.1)


def recolored(image, rng):
    """Brightness changed by 10 or 15 %, saturation by 20 %, hue by 10 degrees, each up or down."""
    image = ImageEnhance.Brightness(image).enhance(float(rng.choice([0.85, 0.9, 1.1, 1.15])))
    image = ImageEnhance.Color(image).enhance(float(rng.choice([0.8, 1.2])))
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(rng.choice([7, 249]))  # of 256, and it goes round
    return Image.fromarray(hsv, "HSV").convert("RGB")


def resized(image, rng):
    """To half, three quarters, one and a half times or twice its size."""
    factor = float(rng.choice([0.5, 0.75, 1.5, 2]))
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)


def everything(image, rng):
    """Cropped by 5 %, recolored, resized and recompressed."""
    for change in (cropped, recolored, resized, recompressed):
        image = change(image, rng)
    return image


KINDS = {
    "recompressed": recompressed,
    "cropped 5 %": cropped,
    "cropped 10 %": cropped_more,
    "recolored": recolored,
    "resized": resized,
    "all four": everything,
}


def plant(source, folder, most=None, kinds=KINDS):
    """Write TRAIN, half of the pictures, and TEST: changed copies of them, "KIND/ID", and the other half, "other/ID".

    An exact copy that the data set itself holds of a picture of TRAIN is left out of the other half.
    """
    data = open_dataset(source, need_captions=False)
    order = np.random.default_rng(0).permutation(len(data))[:most]
    half = len(order) // 2
    known = set()
    for row in order[:half].tolist():
        image = data.read(row)
        known.add(image.tobytes())
        save(image, folder / "train" / f"{data.ids[row]}.png")
        for number, (kind, change) in enumerate(kinds.items()):
            copy = change(image, np.random.default_rng([1, row, number]))
            save(copy, folder / "test" / kind / f"{data.ids[row]}.png")
    for row in order[half:].tolist():
        image = data.read(row)
        if image.tobytes() not in known:
            save(image, folder / "test" / "other" / f"{data.ids[row]}.png")
    return folder / "train", folder / "test"


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def judge(pairs, ids, threshold, kinds=KINDS):
    """What pairs from a threshold on come to: kind -> (recall, precision, share found with its own original first).

    `precision` is that of a TEST with copies of this kind alone among as many others as there are.
    """
    closest = {}
    for pair in pairs:  # the closest first
        closest.setdefault(pair["test"], pair)
    hits = {name for name, pair in closest.items() if pair["similarity"] >= threshold}
    total = {kind: sum(name.startswith(f"{kind}/") for name in ids) for kind in (*kinds, "other")}
    found = {kind: [name for name in hits if name.startswith(f"{kind}/")] for kind in total}
    wrong = len(found["other"]) / total["other"]
    out = {}
    for kind in kinds:
        recall = len(found[kind]) / total[kind]
        right = sum(closest[name]["train"] == name.partition("/")[2] for name in found[kind]) / total[kind]
        out[kind] = (recall, recall / (recall + wrong) if recall + wrong else 1.0, right)
    return out


def table(pairs, ids, thresholds):
    """Recall and precision by kind and threshold, in Markdown."""
    judged = {t: judge(pairs, ids, t) for t in thresholds}
    lines = [
        "| copies | " + " | ".join(f"from {t:g} on" for t in thresholds) + " |",
        "|---" * (len(thresholds) + 1) + "|",
    ]
    for kind in KINDS:
        cells = (f"{judged[t][kind][0]:.1%}, {judged[t][kind][1]:.1%}" for t in thresholds)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a data set")
    parser.add_argument("--most", type=int, help="pictures of it, at random, that are used")
    parser.add_argument("--features", help="as for `dalle overlap`")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.93, 0.95, 0.97, 0.99])
    parser.add_argument("--grid", type=Path, help="of the pairs around the default threshold")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train, test = plant(args.source, Path(folder), args.most)
        out = Path(folder) / "overlap.txt"
        more = ("--features", args.features) if args.features else ()
        run_ok("overlap", train, test, "-o", out, *more, *(("--grid", args.grid) if args.grid else ()))
        pairs = json.loads(out.with_suffix(".json").read_text())["pairs"]
        ids = open_dataset(test, need_captions=False).ids
    others = [p for p in pairs if p["test"].startswith("other/")]
    count = sum(name.startswith("other/") for name in ids)
    print(f"{(len(ids) - count) // len(KINDS)} copies of each kind, {count} other pictures; recall, precision\n")
    print(table(pairs, ids, args.thresholds))
    print("\nothers that are closest to one of TRAIN:")
    for pair in others[:10]:
        print(f"{pair['similarity']:.3f} {pair['test']} {pair['train']}")


if __name__ == "__main__":
    main()
