"""Find the objects in a picture of shapes and say whether it matches its caption: no network, nothing learned.

Run `python recipes/shapes/score.py IMAGES.safetensors` (an artifact with `images` and `text`) or `... truth.tar`, or
`--self-check` for the scorer's own accuracy on ground truth, on degraded truth and on shuffled captions.
"""

import argparse
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import scenes
from PIL import Image, ImageFilter
from scenes import Scene, Thing

SIGNAL = 80.0  # RGB distance from the background where an object may begin (yellow on cream is 190 away)
SPECK = 2  # cells: a blob of no more is dirt, not an object; the smallest object (small cross, small star) covers 9
LEAST_FIT = 0.8  # share of cells in common with the best bitmap, below which a blob is no shape
PALETTE = np.array(list(scenes.COLORS.values()), np.float32)
COLOR_NAMES = tuple(scenes.COLORS)


@dataclass(frozen=True)
class Object:
    """An object found in an image: center in shares of the side, `fit` its cells in common with its bitmap."""

    thing: Thing
    x: float
    y: float
    fit: float


# Captions


def _skeletons() -> dict[str, str | None]:
    """Every template with its words filled in and "#" for an object -> relation."""
    table: dict[str, str | None] = {t.format(a="#"): None for t in scenes.ONE_TEMPLATES}
    for relation, words in scenes.RELATION_WORDS.items():
        table |= {t.format(a="#", b="#", rel=words): relation for t in scenes.TWO_TEMPLATES}
    return table


SKELETONS = _skeletons()
NAMED = re.compile(rf"\b({'|'.join(scenes.SIZES)}) ({'|'.join(COLOR_NAMES)}) ({'|'.join(scenes.SHAPES)})\b")


def parse_caption(text: str) -> Scene:
    """The scene that a caption states.

    Raises: ValueError where the words are none of the generator's.
    """
    text = " ".join(text.lower().split())
    things = tuple(Thing(size, color, shape) for size, color, shape in NAMED.findall(text))
    skeleton = NAMED.sub("#", text).rstrip(".")
    if skeleton not in SKELETONS:
        raise ValueError(f"expected a caption of the shapes world, found {text!r}")
    return Scene(things, SKELETONS[skeleton])


# Images


@lru_cache(maxsize=1)
def _bitmaps() -> list[tuple[str, str, np.ndarray]]:
    return [(shape, size, scenes.bitmap(shape, size)) for shape in scenes.SHAPES for size in scenes.SIZES]


def _blobs(labels: np.ndarray) -> list[np.ndarray]:
    """Masks of the regions of equal label, diagonals connect; -1 is no region: (H, W) int -> list of (H, W) bool."""
    left = labels.copy()
    found = []
    for start in zip(*np.nonzero(labels >= 0), strict=True):
        label = left[start]
        if label < 0:
            continue
        mask = np.zeros(labels.shape, bool)
        mask[start] = True
        while True:
            wide = np.pad(mask, 1)
            grown = np.any([wide[y : y + len(mask), x : x + len(mask)] for y in range(3) for x in range(3)], axis=0)
            grown &= left == label
            if (grown == mask).all():
                break
            mask = grown
        left[mask] = -1
        found.append(mask)
    return found


def _measure(mask: np.ndarray, color: str) -> Object:
    """Name the blob under a mask by the bitmap that has most cells in common with it, at the best place."""
    rows, columns = np.nonzero(mask)
    middle_y, middle_x = (rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2
    best = (-1.0, "", "", 0.0, 0.0)
    padded = np.pad(mask, scenes.CELLS)
    for shape, size, bits in _bitmaps():
        side = len(bits)
        y, x = int(middle_y - side / 2), int(middle_x - side / 2)
        for top, left in product((y - 1, y, y + 1), (x - 1, x, x + 1)):
            window = padded[top + scenes.CELLS :, left + scenes.CELLS :][:side, :side]
            common = int((window & bits).sum())
            fit = common / (int(mask.sum()) + int(bits.sum()) - common)
            best = max(best, (fit, shape, size, left + side / 2, top + side / 2))
    fit, shape, size, center_x, center_y = best
    return Object(Thing(size, color, shape), center_x / scenes.CELLS, center_y / scenes.CELLS, fit)


def _cells(image: np.ndarray) -> np.ndarray:
    """The image's cells, each a mean color: (H, W, 3) uint8 -> (CELLS, CELLS, 3) float32."""
    size = (scenes.CELLS, scenes.CELLS)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).astype(np.float32)


def find_ground(cells: np.ndarray) -> int:
    """Which of the backgrounds is that of `_cells`."""
    border = np.concatenate([cells[0], cells[-1], cells[1:-1, 0], cells[1:-1, -1]])
    background = np.array(scenes.BACKGROUNDS, np.float32)
    return int(((background - np.median(border, axis=0)) ** 2).sum(1).argmin())


def find_objects(image: np.ndarray) -> list[Object]:
    """The objects of an image: (H, W, 3) uint8 -> objects, those that resemble no shape included (see `fit`)."""
    cells = _cells(image)
    ground = np.array(scenes.BACKGROUNDS[find_ground(cells)], np.float32)
    # Each cell is a color's mixture with the background: the nearest one; an object's, if it is more than half color.
    excess, ink = cells - ground, PALETTE - ground
    share = np.clip((excess @ ink.T) / (ink * ink).sum(1), 0, 1)
    color = ((excess[:, :, None] - share[..., None] * ink) ** 2).sum(-1).argmin(-1)
    inked = np.take_along_axis(share, color[..., None], -1)[..., 0] > 0.5
    labels = np.where(inked & (np.linalg.norm(excess, axis=-1) > SIGNAL), color, -1)
    return [_measure(blob, COLOR_NAMES[labels[blob][0]]) for blob in _blobs(labels) if blob.sum() > SPECK]


# Agreement


@dataclass(frozen=True)
class Verdict:
    """What of an image agrees with its caption; `relation` is None where the caption states none."""

    right: bool
    count: bool
    color: bool
    shape: bool
    size: bool
    relation: bool | None


def _related(first: Object, second: Object, relation: str) -> bool:
    """Whether the first stands `relation` of the second, and clearly so: more along that axis than across it."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    return (along if relation in ("left", "above") else -along) > max(abs(across), 0.1)


def compare(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare an image (H, W, 3) uint8 with a scene."""
    objects = find_objects(image)
    count = len(objects) == len(scene.things)
    color = sorted(o.thing.color for o in objects) == sorted(t.color for t in scene.things)
    shapes = sorted(o.thing.shape if o.fit >= LEAST_FIT else "" for o in objects)
    shape = shapes == sorted(t.shape for t in scene.things)
    size = sorted(o.thing.size for o in objects) == sorted(t.size for t in scene.things)
    right, relation = False, None if scene.relation is None else False
    for order in permutations(objects) if count else ():
        agree = all(o.thing == t and o.fit >= LEAST_FIT for o, t in zip(order, scene.things, strict=True))
        if scene.relation is None:
            right = agree
            continue
        related = _related(order[0], order[1], scene.relation)
        # The relation counts by itself where the objects are distinct by color, else by shape, else by size.
        likely = _likeness(order, scene) >= _likeness(order[::-1], scene)
        relation = relation or (related and likely)
        right = right or (agree and related)
    return Verdict(right, count, color, shape, size, relation)


def _likeness(order: Sequence[Object], scene: Scene) -> int:
    """How far objects taken in this order agree with the scene's: color before shape before size."""
    pairs = [(found.thing, listed) for found, listed in zip(order, scene.things, strict=True)]
    return sum(4 * (f.color == a.color) + 2 * (f.shape == a.shape) + (f.size == a.size) for f, a in pairs)


def matches(image: np.ndarray, caption: str) -> bool:
    """Whether an image (H, W, 3) uint8 shows what its caption says: objects, colors, shapes, sizes, relation."""
    return compare(image, parse_caption(caption)).right


def score(images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """Shares of images that agree with their captions, in whole (`accuracy`) and in each respect."""
    verdicts = [compare(p, parse_caption(c)) for p, c in zip(images, captions, strict=True)]
    shares = {"pictures": float(len(verdicts)), "accuracy": float(np.mean([v.right for v in verdicts]))}
    for name in ("count", "color", "shape", "size"):
        shares[name] = float(np.mean([getattr(v, name) for v in verdicts]))
    related = [v.relation for v in verdicts if v.relation is not None]
    return shares | ({"relation": float(np.mean(related))} if related else {})


def chance(captions: Sequence[str]) -> float:
    """Expected accuracy when each image is given the caption of another one chosen at random."""
    counts = Counter(parse_caption(caption).canonical() for caption in captions)
    return sum(n * (n - 1) for n in counts.values()) / (len(captions) * (len(captions) - 1))


def spread(images: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """How images of one caption differ in what it leaves open, over all pairs of those that agree with it.

    `places` is the mean distance of an object's places in cells, `grounds` the share of pairs whose backgrounds differ,
    `pairs` how many there are.
    """
    found: dict[str, list[tuple[np.ndarray, int]]] = {}
    for image, caption in zip(images, captions, strict=True):
        if matches(image, caption):
            at = {o.thing: (o.x, o.y) for o in find_objects(image)}
            places = np.array([at[thing] for thing in parse_caption(caption).things]) * scenes.CELLS
            found.setdefault(caption, []).append((places, find_ground(_cells(image))))
    pairs = [pair for same in found.values() for pair in combinations(same, 2)]
    distances = [np.linalg.norm(a - b, axis=1).mean() for (a, _), (b, _) in pairs]
    differ = [a != b for (_, a), (_, b) in pairs]
    mean = {"places": distances, "grounds": differ}
    return {"pairs": float(len(pairs))} | {name: float(np.mean(v)) if v else 0.0 for name, v in mean.items()}


# Self-check and command line


def degrade(pixels: np.ndarray, how: str, seed: int = 0) -> np.ndarray:
    """Spoil an image: `blur` (Gaussian, radius 0.7), `jpeg` (quality 50, full chroma) or `noise` (sigma 8)."""
    image = Image.fromarray(pixels)
    if how == "blur":
        return np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)))
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=50, subsampling=0)
        return np.asarray(Image.open(buffer))
    if how == "noise":
        noise = np.random.default_rng(seed).normal(0, 8, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    return pixels


def self_check(count: int, seed: int, width: int) -> dict[str, float]:
    """Accuracy on fresh ground truth, sharp and degraded, and on shuffled captions."""
    sampled = [scenes.sample(seed, 9, i, i % 2 == 1, width) for i in range(count)]
    images, captions = [d[1] for d in sampled], [d[2] for d in sampled]
    result = {"pictures": float(count), "truth": score(images, captions)["accuracy"]}
    for how in ("blur", "jpeg", "noise"):
        result[how] = score([degrade(p, how, i) for i, p in enumerate(images)], captions)["accuracy"]
    shuffled = [captions[i] for i in np.random.default_rng(seed).permutation(count)]
    result["shuffled"] = score(images, shuffled)["accuracy"]
    result["chance"] = chance(captions)
    return result


def _members(path: Path) -> dict[str, bytes]:
    """The files of a tar that scenes.py wrote, by name."""
    with tarfile.open(path) as tar:
        return {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}


def _read(path: Path, captions: Path | None = None) -> tuple[list[np.ndarray], list[str]]:
    """Images and captions of an `images` artifact or of a tar; with `captions`, a tar, the captions of the same ids."""
    if path.suffix == ".tar":
        files = _members(path)
        names = [n for n in sorted(files) if n.endswith(".png")]
        images = [np.asarray(Image.open(io.BytesIO(files[n])).convert("RGB")) for n in names]
        return images, [files[n[:-4] + ".txt"].decode().strip() for n in names]
    from dalle_cli.artifacts import open_artifact

    artifact = open_artifact(path)
    stored = artifact.array("images")
    images = [np.asarray(stored[i]).transpose(1, 2, 0) for i in range(len(stored))]
    if captions is None:
        return images, list(artifact.strings("text"))
    files = _members(captions)
    return images, [files[f"{name}.txt"].decode().strip() for name in artifact.strings("ids")]


def table(sets: list[str]) -> str:
    """Accuracy of every candidate and of the best by CLIP, for NAME=STEM with STEM.images and STEM.best.safetensors."""
    named = [entry.partition("=")[::2] for entry in sets]
    wide = max(24, *(len(name) + len(", two objects") + 2 for name, _ in named))
    rows = [f"{'caption accuracy':{wide}}{'prompts':>9}{'one sample':>12}{'best of':>9}{'reranked':>10}"]
    for name, stem in named:
        sampled, best = (_read(Path(f"{stem}.{kind}.safetensors")) for kind in ("images", "best"))
        for label, count in (("", None), (", one object", 1), (", two objects", 2)):
            every, picked = (
                [matches(p, c) for p, c in zip(*x, strict=True) if count in (None, len(parse_caption(c).things))]
                for x in (sampled, best)
            )
            if picked:
                n, each = len(picked), len(every) // len(picked)
                rows.append(f"{name + label:{wide}}{n:9}{np.mean(every):12.1%}{each:9}{np.mean(picked):10.1%}")
    return "\n".join(rows)


def spread_table(sets: list[str], seed: int = 0) -> str:
    """Accuracy of one sample and spread of the right ones, for NAME=IMAGES; last the same of newly rendered truth."""
    sampled = [(name, *_read(Path(path))) for name, _, path in (entry.partition("=") for entry in sets)]
    captions = sampled[-1][2]
    truth = [scenes.render(parse_caption(c), np.random.default_rng([seed, i])) for i, c in enumerate(captions)]
    wide = max(24, *(len(name) + 2 for name, _, _ in sampled))
    rows = [f"{'':{wide}}{'images':>9}{'accuracy':>10}{'places apart':>14}{'other ground':>14}"]
    for name, images, texts in [*sampled, ("truth", truth, captions)]:
        right, apart = np.mean([matches(p, c) for p, c in zip(images, texts, strict=True)]), spread(images, texts)
        cells = f"{apart['places']:8.2f} cells{apart['grounds']:14.1%}"
        rows.append(f"{name:{wide}}{len(texts):9}{right:10.1%}{cells}")
    return "\n".join(rows)


def main() -> None:
    """Print the share of images that match their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?", help="artifact with images and their captions, or a tar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--self-check", action="store_true", help="score ground truth that is rendered for it")
    parser.add_argument("--count", type=int, default=2000, help="scenes of the self-check (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the self-check (%(default)s)")
    parser.add_argument("--size", type=int, default=32, choices=(32, 48, 64), help="of the self-check (%(default)s)")
    parser.add_argument("--table", nargs="+", metavar="NAME=STEM", help="compare all candidates with the best of each")
    parser.add_argument("--spread", nargs="+", metavar="NAME=IMAGES", help="how samples of one caption differ")
    parser.add_argument("--captions", type=Path, metavar="TAR", help="of which IMAGES are, where these have none")
    args = parser.parse_args()
    if args.table or args.spread:
        print(table(args.table) if args.table else spread_table(args.spread, args.seed))
        return
    if not args.self_check and args.images is None:
        parser.error("name an artifact of images, or give --self-check")
    result = (
        self_check(args.count, args.seed, args.size) if args.self_check else score(*_read(args.images, args.captions))
    )
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:10}{value:8.0f}" if name == "pictures" else f"{name:10}{value:8.2%}")


if __name__ == "__main__":
    main()
