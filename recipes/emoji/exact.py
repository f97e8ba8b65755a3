"""Find the things in an image of the emoji's world and say whether it shows what its caption states: nothing learned.

Every thing, in every size and at every place where the grammar may put it, is compared with the image in lightness, which
is the same in all colors; the best few are then compared in all their colors. Run `python recipes/emoji/exact.py SPRITES.tar
IMAGES.safetensors` (an artifact with `images` and `text`) or `... truth.tar`; `--table NAME=STEM ...` compares one sample
with the best by CLIP; `--self-check` scores scenes that are rendered for it, spoiled ones and shuffled captions.

Shapes: N images, P places, K templates; images are (64, 64, 3) uint8.
"""

import argparse
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import grammar
import hues
import numpy as np
import things
import world
from grammar import Item, Scene
from hues import Floats
from PIL import Image, ImageFilter
from sprites import Pixels
from world import BASE, CELL, LARGE, PART, PET, SIDE, SMALL, WHOLE, World

TOP = 6  # templates of a place that are compared in all colors
LEAST_FIT = 0.45  # share of the ink that a template explains, below which it is nothing
LIT = 70.0  # RGB distance from the background of a pixel that is ink
DIRT = 24  # pixels of ink outside of all that was found, from which there is something more
MORE = 6.0  # squared lightness that each further thing must explain
GAP = slice(PART, SIDE - PET)  # columns between walker and walked, where only the leash is
GROUND_NAMES = tuple(things.GROUNDS)


@dataclass(frozen=True)
class Found:
    """A thing in an image: upper left corner and size in pixels; `color` is "" for its own; `fit` is at most 1."""

    thing: str
    color: str
    worn: str
    style: str
    x: int
    y: int
    size: int
    fit: float


@dataclass(frozen=True)
class Reading:
    """What is in an image; `walked` where the first has the second on a leash, `more` where there is other ink."""

    objects: tuple[Found, ...]
    ground: str
    walked: bool
    more: bool


class Layout(NamedTuple):
    """Places that things may have together; `spots` are (size, x, y)."""

    spots: tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=1)
def layouts() -> tuple[Layout, ...]:
    """One thing, two that do not overlap, three and four equal ones; those of a walk are compared by themselves."""
    found = [Layout(((size, x, y),)) for size in (WHOLE, SMALL) for x, y in product(world.cells(size), repeat=2)]
    places = list(product(world.cells(PART), repeat=2))
    for (x, y), (p, q) in combinations(places, 2):
        if max(abs(x - p), abs(y - q)) >= PART:
            found.append(Layout(((PART, x, y), (PART, p, q))))
    for a, b in world.pair_spots("with", SMALL, LARGE):
        found.append(Layout(((SMALL, *a), (LARGE, *b))))
    for count in (3, 4):
        size, spots = world.count_spots(count)
        found += [Layout(tuple((size, *spot) for spot in own)) for own in spots]
    return tuple(found)


def lightness(images: Floats) -> Floats:
    """(..., 3) float in [0, 255] -> (...) in [0, 1]."""
    return (images.max(-1) + images.min(-1)) / np.float32(510)


def find_grounds(images: Pixels) -> list[str]:
    """The background of each image: that which most pixels are near to."""
    colors = np.array(list(things.GROUNDS.values()), np.float32)
    distance = np.abs(images[:, :, :, None].astype(np.float32) - colors).max(-1)
    own = np.where(distance.min(-1) < 20, distance.argmin(-1), len(colors))
    return [GROUND_NAMES[int(np.bincount(o.ravel(), minlength=len(colors) + 1)[:-1].argmax())] for o in own]


class Bank(NamedTuple):
    """Templates of one shape: what each shows, and its lightness above the background's, (K, pixels) float32."""

    items: list[tuple[Item, str]]
    flat: Floats

    def gains(self, windows: Floats) -> Floats:
        """By how much each template reduces the squared error: (..., pixels) -> (..., K)."""
        return 2 * windows @ self.flat.T - (self.flat**2).sum(1)


class Scorer:
    """Reads images of a world; templates are made when they are first needed."""

    def __init__(self, own: World) -> None:
        self.world = own
        self.bank = lru_cache(maxsize=None)(self._bank)
        self.shown = lru_cache(maxsize=1 << 15)(self._shown)
        self.dressed = [Item(name, worn=worn) for name in own.wearers for worn in own.worn[name]]
        walkers = set(own.walkers)
        self.walkers = [*map(Item, own.walkers), *(item for item in self.dressed if item.thing in walkers)]

    # Templates

    def _shown(self, item: Item, style: str, size: int, ground: str) -> Floats:
        """A thing on a background, in the window of its size; with what it wears, in a column as wide as the image."""
        if item.worn:
            stamps = self.world.figure(item, size, CELL if size == WHOLE else 0, BASE)
            return world.compose(stamps, things.GROUNDS[ground]).astype(np.float32)
        stamp = world.Stamp(self.world.sprites.get(item.thing, size, item.color, style), 0, 0)
        return world.compose([stamp], things.GROUNDS[ground])[:size, :size].astype(np.float32)

    def walker(self, item: Item, row: int, ground: str) -> Floats:
        """A walker that stands on a row: (64, 32, 3)."""
        legs = things.table()[item.thing].walks == "legs"
        stamps = self.world.figure(item, PART, 0, row - PART - CELL * legs, legs)
        return world.compose(stamps, things.GROUNDS[ground])[:, :PART].astype(np.float32)

    def _bank(self, kind: str, number: int, ground: str) -> Bank:
        """All templates of a `plain` size, of what is `worn` at x = `number`, or of `walker`s on row `number`."""
        items: list[tuple[Item, str]]
        if kind == "plain":
            items = [(Item(name), "noto") for name in self.world.names]
            items += [(Item(name), "flat") for name in self.world.sprites.flat if number == WHOLE]
            shown = [self._shown(item, style, number, ground) for item, style in items]
        elif kind == "worn":
            items = [(item, "noto") for item in self.dressed]
            shown = [self._whole(item, "noto", (WHOLE, number, BASE), ground) for item in self.dressed]
        else:
            items = [(item, "noto") for item in self.walkers if number in self.world.grounds(item)]
            shown = [self.walker(item, number, ground) for item, _ in items]
        base = lightness(np.array(things.GROUNDS[ground], np.float32))
        return Bank(items, np.stack([(lightness(s) - base).ravel() for s in shown]))

    def _whole(self, item: Item, style: str, spot: tuple[int, int, int], ground: str) -> Floats:
        """The image of one thing alone."""
        size, x, y = spot
        stamps = [world.Stamp(self.world.sprites.get(item.thing, size, item.color, style), x, y)]
        if item.worn:
            stamps = self.world.figure(item, size, x, y)
        return world.compose(stamps, things.GROUNDS[ground]).astype(np.float32)

    def colors(self, item: Item) -> list[Item]:
        """A thing in its own color and in each other one."""
        return [item, *(replace(item, color=color) for color in self.world.sprites.choices(item.thing))]

    # Reading

    def read(self, images: Sequence[Pixels]) -> list[Reading]:
        """What is in each image."""
        stack = np.stack(list(images))
        grounds = find_grounds(stack)
        readings: dict[int, Reading] = {}
        for ground in set(grounds):
            own = [n for n, name in enumerate(grounds) if name == ground]
            for start in range(0, len(own), 64):
                part = own[start : start + 64]
                readings |= zip(part, self._read(stack[part].astype(np.float32), ground), strict=True)
        return [readings[n] for n in range(len(stack))]

    def _read(self, images: Floats, ground: str) -> list[Reading]:
        """Images of one background: (N, 64, 64, 3) float32."""
        excess = lightness(images) - lightness(np.array(things.GROUNDS[ground], np.float32))
        best: dict[tuple[int, int, int], Floats] = {}
        gains: dict[tuple[int, int, int], Floats] = {}
        for size in (WHOLE, LARGE, PART, SMALL):
            for x, y in product(world.cells(size), repeat=2):
                window = excess[:, y : y + size, x : x + size].reshape(len(images), -1)
                gains[size, x, y] = self.bank("plain", size, ground).gains(window)
                best[size, x, y] = gains[size, x, y].max(1)
        order = list(best)
        table = np.stack([*best.values(), np.zeros(len(images), np.float32)], 1)
        index = np.full((len(layouts()), 4), len(order))
        for n, layout in enumerate(layouts()):
            index[n, : len(layout.spots)] = [order.index(spot) for spot in layout.spots]
        totals = table[:, index].sum(-1) - MORE * (index < len(order)).sum(1)
        flat = excess.reshape(len(images), -1)
        worn = {x: self.bank("worn", x, ground).gains(flat) for x in world.cells(WHOLE)}
        column = excess[:, :, :PART].reshape(len(images), -1)
        walks = {row: self.bank("walker", row, ground).gains(column) for row in (40, 48, 56, 64)}
        found = []
        for n, image in enumerate(images):
            layout = layouts()[int(totals[n].argmax())]
            cord = self._cord(image, excess[n], ground)
            row = max(walks, key=lambda row: walks[row][n].max() + best[PET, SIDE - PET, row - PET][n])
            walk = walks[row][n].max() + best[PET, SIDE - PET, row - PET][n] + cord - 2 * MORE
            alone = max(worn[x][n].max() for x in worn) - MORE
            if cord > 0 and walk > max(totals[n].max(), alone):
                pet = (PET, SIDE - PET, row - PET)
                found.append(self._walk(image, ground, row, walks[row][n], pet, gains[pet][n]))
            elif len(layout.spots) == 1 or alone > totals[n].max():
                spot = max((s for s in order if s[0] in (WHOLE, SMALL)), key=lambda s: best[s][n])
                found.append(self._alone(image, ground, spot, gains[spot][n], {x: worn[x][n] for x in worn}))
            else:
                objects = tuple(self._object(image, ground, s, gains[s][n]) for s in layout.spots)
                found.append(self._reading(image, ground, objects, False))
        return found

    def _cord(self, image: Floats, excess: Floats, ground: str) -> float:
        """The squared lightness of the red in the gap of a walk; 0 where no leash runs through it."""
        gap = image[:, GAP]
        red = (gap[..., 0] - gap[..., 1:].mean(-1)) - (lambda g: g[0] - (g[1] + g[2]) / 2)(things.GROUNDS[ground])
        seen = red > 50
        crossed = seen.any(0).sum() >= CELL - 2 and (seen.sum(0) <= CELL).all()
        return float((excess[:, GAP][seen] ** 2).sum()) if crossed else 0.0

    def _walk(
        self, image: Floats, ground: str, row: int, walkers: Floats, spot: tuple[int, int, int], pets: Floats
    ) -> Reading:
        """Walker and walked."""
        items = self.bank("walker", row, ground).items
        column, options = image[:, :PART], []
        for k in np.argsort(walkers)[-TOP:]:
            for item in self.colors(items[k][0]):
                options.append((float(((column - self.walker(item, row, ground)) ** 2).sum()), item))
        error, item = min(options, key=lambda option: option[0])
        blank = ((column - things.GROUNDS[ground]) ** 2).sum()
        legs = CELL * (things.table()[item.thing].walks == "legs")
        first = Found(item.thing, item.color, item.worn, "noto", 0, row - PART - legs, PART, 1 - error / float(blank + 1))
        return self._reading(image, ground, (first, self._object(image, ground, spot, pets)), True)

    def _alone(
        self, image: Floats, ground: str, spot: tuple[int, int, int], plain: Floats, worn: dict[int, Floats]
    ) -> Reading:
        """One thing, which may wear something."""
        options = [(*self.bank("plain", spot[0], ground).items[k], spot) for k in np.argsort(plain)[-TOP:]]
        for x, gains in worn.items():
            items = self.bank("worn", x, ground).items
            options += [(*items[k], (WHOLE, x, BASE)) for k in np.argsort(gains)[-TOP:]]
        best = None
        for item, style, (size, x, y) in options:
            for own in self.colors(item) if style == "noto" else [item]:
                error = float(((image - self._whole(own, style, (size, x, y), ground)) ** 2).sum())
                if best is None or error < best[0]:
                    best = (error, Found(own.thing, own.color, own.worn, style, x, y, size, 0.0))
        assert best is not None
        blank = float(((image - things.GROUNDS[ground]) ** 2).sum())
        return self._reading(image, ground, (replace(best[1], fit=1 - best[0] / (blank + 1)),), False)

    def _object(self, image: Floats, ground: str, spot: tuple[int, int, int], gains: Floats) -> Found:
        """The thing at a place."""
        size, x, y = spot
        window, items = image[y : y + size, x : x + size], self.bank("plain", size, ground).items
        options = [item for k in np.argsort(gains)[-TOP:] if items[k][1] == "noto" for item in self.colors(items[k][0])]
        errors = [float(((window - self.shown(item, "noto", size, ground)) ** 2).sum()) for item in options]
        best = int(np.argmin(errors))
        blank = float(((window - things.GROUNDS[ground]) ** 2).sum())
        return Found(options[best].thing, options[best].color, "", "noto", x, y, size, 1 - errors[best] / (blank + 1))

    def _reading(self, image: Floats, ground: str, objects: tuple[Found, ...], walked: bool) -> Reading:
        left = np.sqrt(((image - things.GROUNDS[ground]) ** 2).sum(-1)) > LIT
        for o in objects:
            if o.worn or walked:
                left[:, : SIDE if o.worn and not walked else SIDE - PET] = False
            left[o.y : o.y + o.size, o.x : o.x + o.size] = False
        return Reading(tuple(o for o in objects if o.fit >= LEAST_FIT), ground, walked, bool(left.sum() > DIRT))

    # Captions

    def compare(self, reading: Reading, scene: Scene) -> dict[str, bool]:
        """Which facts of a scene an image shows: those that its caption names, and `right` for all there is to it."""
        own = self.world.sprites.own
        wanted = [i for item in scene.items for i in [item] * item.count]
        objects = reading.objects
        pairs = Counter((o.thing, o.color) for o in objects)
        asked = Counter((i.thing, "" if i.color == own(i.thing) else i.color) for i in wanted)
        facts = {
            "thing": {o.thing for o in objects} == {i.thing for i in wanted},
            "color": pairs == asked,
            "count": len(objects) == len(wanted) and not reading.more,
            "ground": reading.ground == scene.ground,
            "style": all(o.style == scene.style for o in objects),
            "worn": Counter((o.thing, o.worn) for o in objects) == Counter((i.thing, i.worn) for i in wanted),
            "walked": reading.walked == (scene.relation == "walks"),
            "relation": self._related(objects, scene),
            "size": self._sized(objects, scene),
        }
        said = {"thing", "ground"} | ({"color"} if any(i.color for i in scene.items) else set())
        said |= {"count"} if scene.kind == "count" else set()
        said |= {"style"} if scene.kind == "style" else set()
        said |= {"worn"} if any(i.worn for i in scene.items) else set()
        said |= {"walked"} if scene.relation == "walks" else set()
        said |= {"relation"} if scene.relation else set()
        said |= {"size"} if any(i.size for i in scene.items) else set()
        return {name: value for name, value in facts.items() if name in said} | {"right": all(facts.values())}

    def _related(self, objects: Sequence[Found], scene: Scene) -> bool:
        """Whether two things stand as a scene says."""
        if not scene.relation:
            return True
        names = [item.thing for item in scene.items]
        if len(objects) != 2 or sorted(o.thing for o in objects) != sorted(names):
            return False
        a, b = sorted(objects, key=lambda o: names.index(o.thing))
        if scene.relation in ("with", "walks"):
            return scene.relation == "with" or (a.x < b.x and objects[0].thing == a.thing)
        across, down = b.x - a.x + (b.size - a.size) / 2, b.y - a.y + (b.size - a.size) / 2
        if abs(across) > abs(down):
            return scene.relation in ("beside", "left" if across > 0 else "right")
        return scene.relation == ("above" if down > 0 else "below")

    def _sized(self, objects: Sequence[Found], scene: Scene) -> bool:
        """Whether things have the sizes that a scene gives them."""
        if scene.kind in ("count", "worn", "walked"):
            return True
        alone = len(scene.items) == 1
        sizes = {"small": SMALL, "large": WHOLE if alone else LARGE, "": WHOLE if alone else PART}
        return {(o.thing, o.size) for o in objects} == {(i.thing, sizes[i.size]) for i in scene.items}

    def verdicts(self, images: Sequence[Pixels], scenes: Sequence[Scene]) -> list[dict[str, bool]]:
        """What `compare` says of each image and its scene."""
        return [self.compare(r, s) for r, s in zip(self.read(images), scenes, strict=True)]


def summary(scenes: Sequence[Scene], verdicts: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Shares of images that are right, and of those that show each fact, for each kind of scene and for `all`."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({scene.kind for scene in scenes})):
        own = [v for s, v in zip(scenes, verdicts, strict=True) if kind in ("all", s.kind)]
        names = dict.fromkeys(name for v in own for name in v)
        shares = {name: float(np.mean([v[name] for v in own if name in v])) for name in names}
        found[kind] = {"images": float(len(own)), "right": shares.pop("right"), **shares}
    return found


# Self-check and command line


def degrade(pixels: Pixels, how: str, seed: int = 0) -> Pixels:
    """Spoil an image: `blur` (Gaussian, 0.6), `jpeg` (quality 60, full chroma), `noise` (sigma 8) or `codec`, blur and noise."""
    image = Image.fromarray(pixels)
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60, subsampling=0)
        return np.asarray(Image.open(buffer))
    if how in ("blur", "codec"):
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)))
    if how in ("noise", "codec"):
        noise = np.random.default_rng(seed).normal(0, 8, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    return pixels


def self_check(scorer: Scorer, count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Shares on fresh ground truth, of which half is withheld where it can be, on spoiled truth and shuffled captions."""
    kinds = [(kind, False) for kind in (*scorer.world.kinds, "ground")] + [(kind, True) for kind in world.NEW]
    sampled = [scorer.world.sample(seed, "check", i, *kinds[i % len(kinds)]) for i in range(count)]
    images = [image for _, image, _ in sampled]
    scenes = [grammar.parse(captions[i % 2]) for i, (_, _, captions) in enumerate(sampled)]
    found = {"truth": summary(scenes, scorer.verdicts(images, scenes))}
    for how in ("blur", "jpeg", "noise", "codec"):
        spoiled = [degrade(image, how, i) for i, image in enumerate(images)]
        found[how] = summary(scenes, scorer.verdicts(spoiled, scenes))
    shuffled = [scenes[i] for i in np.random.default_rng(seed).permutation(count)]
    return found | {"shuffled": summary(shuffled, scorer.verdicts(images, shuffled))}


def _read(path: Path) -> tuple[list[Pixels], list[str]]:
    """Images and captions of an `images` artifact, or of a tar that world.py wrote."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            files = {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}
        names = [n for n in sorted(files) if n.endswith(".png")]
        images = [np.asarray(Image.open(io.BytesIO(files[n])).convert("RGB")) for n in names]
        return images, [json.loads(files[n[:-4] + ".json"])["caption"][0] for n in names]
    from dalle_cli.artifacts import open_artifact

    artifact = open_artifact(path)
    stored = artifact.array("images")
    return [np.asarray(stored[i]).transpose(1, 2, 0) for i in range(len(stored))], list(artifact.strings("text"))


def score(scorer: Scorer, path: Path) -> dict[str, dict[str, float]]:
    """`summary` of a file of images."""
    images, texts = _read(path)
    scenes = [grammar.parse(text) for text in texts]
    return summary(scenes, scorer.verdicts(images, scenes))


def show(found: dict[str, dict[str, float]]) -> str:
    """A table of shares, a kind of scene in each line."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = [f"{'':10}" + "".join(f"{name:>10}" for name in names)]
    for kind, row in found.items():
        cells = (f"{row[n]:10.0f}" if n == "images" else f"{row[n]:10.1%}" if n in row else f"{'':10}" for n in names)
        lines.append(f"{kind:10}" + "".join(cells))
    return "\n".join(lines)


def table(scorer: Scorer, sets: Sequence[str]) -> str:
    """Shares of every candidate and of the best by CLIP, for NAME=STEM with STEM.images and STEM.best.safetensors."""
    rows = [f"{'right':28}{'prompts':>9}{'one sample':>12}{'best of':>9}{'reranked':>10}"]
    for name, _, stem in (entry.partition("=") for entry in sets):
        every, best = (score(scorer, Path(f"{stem}.{kind}.safetensors"))["all"] for kind in ("images", "best"))
        each = every["images"] / best["images"]
        rows.append(f"{name:28}{best['images']:9.0f}{every['right']:12.1%}{each:9.0f}{best['right']:10.1%}")
    return "\n".join(rows)


def main() -> None:
    """Print the shares of images that match their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sprites", type=Path, help="tar that sprites.py wrote")
    parser.add_argument("images", type=Path, nargs="?", help="artifact with images and their captions, or a tar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--self-check", action="store_true", help="score ground truth that is rendered for it")
    parser.add_argument("--count", type=int, default=1200, help="scenes of the self-check (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the self-check (%(default)s)")
    parser.add_argument("--table", nargs="+", metavar="NAME=STEM", help="compare all candidates with the best of each")
    args = parser.parse_args()
    scorer = Scorer(World(args.sprites))
    if args.table:
        print(table(scorer, args.table))
    elif args.self_check:
        checked = self_check(scorer, args.count, args.seed)
        print(json.dumps(checked) if args.json else "\n\n".join(f"{name}\n{show(own)}" for name, own in checked.items()))
    elif args.images is None:
        parser.error("name an artifact of images, or give --self-check")
    else:
        found = score(scorer, args.images)
        print(json.dumps(found) if args.json else show(found))


if __name__ == "__main__":
    main()
