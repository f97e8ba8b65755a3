"""Scenes of the emoji's world with captions in English and Korean, each a function of (seed, stream, number).

Run `python recipes/emoji/world.py SPRITES.tar OUT`, SPRITES.tar being what sprites.py wrote. OUT then holds train-*.tar
and truth.tar (WebDataset: a PNG, and JSON with the captions), and prompts/KIND-seen.txt and KIND-withheld.txt, in
Korean KIND-seen-ko.txt and so on. Nothing withheld (holdout.py) is in train-*.tar or in prompts that are called seen.
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

import grammar
import holdout
import numpy as np
import things
from grammar import Item, Scene
from PIL import Image, ImageDraw
from sprites import Pixels, Sprites

SIDE = 64  # pixels of an image
CELL = 8  # pixels of a code: sprites lie on this grid
WHOLE, PART, SMALL, LARGE = 48, 32, 24, 40  # pixels of a thing: alone, one of two, "small", "large" beside a small one
PET = 24  # pixels of what is walked; its walker is of 32
BASE = 16  # top of one that wears something
LEASH = (198, 32, 62)

# How often each kind of scene is generated for training. Pairs are learned last.
KINDS = {"thing": 0.1, "color": 0.17, "count": 0.1, "pair": 0.31, "worn": 0.14, "walked": 0.13, "style": 0.05}
RELATIONS = {"left": 0.21, "right": 0.21, "above": 0.19, "below": 0.19, "beside": 0.12, "with": 0.08}
COLORED = {"color": 1.0, "count": 0.3, "pair": 0.35, "worn": 0.12, "walked": 0.12}  # share of the kind's things
GROUNDED = 0.2  # share of scenes on a background that is not white
SIZED = 0.25  # share of pairs that name sizes
DRESSED = 0.25  # share of walkers that wear something
# What a withheld scene of a kind combines that was never shown.
NEW = {"color": "color", "pair": "pair", "worn": "worn", "walked": "walked"}

Spot = tuple[int, int]
Sample = tuple[Scene, Pixels, list[str]]


class Stamp(NamedTuple):
    """An image with alpha, and where its upper left corner lies."""

    image: Pixels
    x: int
    y: int


# Places


def cells(size: int) -> tuple[int, ...]:
    """The places of a thing along an axis."""
    return tuple(range(0, SIDE - size + 1, CELL))


@lru_cache(maxsize=64)
def pair_spots(relation: str, a: int, b: int) -> tuple[tuple[Spot, Spot], ...]:
    """Upper left corners of two things of sizes a and b, of which the first stands so to the second, side by side."""
    if relation in ("beside", "with"):
        ways = ("left", "right") if relation == "beside" else ("left", "right", "above", "below")
        return tuple(spots for way in ways for spots in pair_spots(way, a, b))
    if relation in ("right", "below"):
        return tuple((p, q) for q, p in pair_spots(grammar.OPPOSITE[relation], b, a))
    found = []
    for along, across in product(product(cells(a), cells(b)), product(cells(a), cells(b))):
        apart, aside = along[1] - along[0] - a, abs(across[0] + a / 2 - across[1] - b / 2)
        if apart >= 0 and aside <= CELL:
            p, q = zip(along, across, strict=True)
            found.append((p, q) if relation == "left" else (p[::-1], q[::-1]))
    return tuple(found)


@lru_cache(maxsize=8)
def count_spots(count: int) -> tuple[int, tuple[tuple[Spot, ...], ...]]:
    """The size of each of two to four equal things, and their places: one row of two, or two rows of one or two."""
    size = PART if count == 2 else SMALL
    ends = [(p, q) for p, q in product(cells(size), repeat=2) if q - p >= size]
    if count == 2:
        rows = [((p, y), (q, z)) for (p, q), y, z in product(ends, cells(size), cells(size))]
        return size, tuple(dict.fromkeys(tuple(sorted(r)) for r in (*rows, *(tuple(s[::-1] for s in r) for r in rows))))
    if count == 4:
        return size, tuple(tuple((x, y) for y in rows for x in row) for row, rows in product(ends, ends))
    spots = []
    for two, one, (up, down) in product(ends, cells(size), ends):
        spots += [((two[0], y), (two[1], y), (one, z)) for y, z in ((up, down), (down, up))]
    return size, tuple(tuple(sorted(s)) for s in spots)


@lru_cache(maxsize=256)
def _cord(hand: Spot, collar: Spot) -> Pixels:
    """A leash from hand to collar, on an image of its own."""
    fine = 4
    image = Image.new("RGBA", (SIDE * fine, SIDE * fine), (*LEASH, 0))
    draw = ImageDraw.Draw(image)
    middle = ((hand[0] + collar[0]) / 2, max(hand[1], collar[1]) + 4)
    line = []
    for t in np.linspace(0, 1, 24):
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
        curve = (a * h + b * m + c * e for h, m, e in zip(hand, middle, collar, strict=True))
        line.append(tuple(float(fine * (at + 0.5)) for at in curve))
    draw.line(line, fill=(*LEASH, 255), width=7, joint="curve")
    x, y = line[-1]
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=(*LEASH, 255))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def even(x: float) -> int:
    """The nearest even number: what is worn lies on a grid of two pixels."""
    return 2 * round(x / 2)


# Rendering


class World:
    """Scenes of the things of a tar of sprites."""

    def __init__(self, path: Path) -> None:
        self.sprites = Sprites(path)
        self.names = self.sprites.things
        table = things.table()
        self.worn = {name: tuple(w for w in table[name].wears if w in self.names) for name in self.names}
        self.wearers = tuple(name for name in self.names if self.worn[name])
        self.walkers = tuple(name for name in self.names if table[name].walks)
        self.pets = tuple(name for name in self.names if "collar" in table[name].at)
        self.counted = tuple(name for name in self.names if not table[name].bare)
        self.colored = tuple(name for name in self.names if self.sprites.choices(name))

    def dress(self, thing: str, worn: str, size: int, x: int, y: int) -> Stamp:
        """What a thing of this size at (x, y) wears, on its place."""
        place, factor = things.WORN[worn]
        at_x, at_y, width = things.table()[thing].at[place]
        image = self.sprites.worn(worn, max(8, even(width * factor * size)))
        height, width = image.shape[:2]
        hang = {"head": 1.0, "eyes": 0.5, "neck": 0.3, "waist": 0.5}[place]
        left, top = even(x + at_x * size - width / 2), even(y + at_y * size - height * hang)
        return Stamp(image, min(max(left, 0), SIDE - width), max(top, 0))

    def figure(self, item: Item, size: int, x: int, y: int, legs: bool = False) -> list[Stamp]:
        """A thing with its legs below and what it wears."""
        image = self.sprites.get(item.thing, size, item.color)
        stamps = [Stamp(image, x, y)]
        if legs:
            pair = self.sprites.worn("legs", 14)
            foot = np.nonzero(image[-size // 5 :, :, 3] > 127)[1]
            stamps.insert(0, Stamp(pair, even(x + foot.mean() - 6.5), y + size - 2))
        if item.worn:
            stamps.append(self.dress(item.thing, item.worn, size, x, y))
        return stamps

    def walk(self, walker: Item, pet: Item, ground: int) -> list[Stamp]:
        """A walker ahead, at the left, and one on a leash behind it; both stand on row `ground`."""
        legs = things.table()[walker.thing].walks == "legs"
        top, low = ground - PART - CELL * legs, ground - PET
        left = SIDE - PET
        body = self.sprites.get(walker.thing, PART)[PART // 2 : PART * 5 // 8, :, 3] > 127
        hand = (int(np.nonzero(body)[1].max(initial=PART // 2)) - 1, top + PART * 9 // 16)
        x, y = things.table()[pet.thing].at["collar"]
        cord = _cord(hand, (left + round(x * PET), low + round(y * PET)))
        return [*self.figure(walker, PART, 0, top, legs), *self.figure(pet, PET, left, low), Stamp(cord, 0, 0)]

    def grounds(self, walker: Item) -> tuple[int, ...]:
        """The rows that a walker can stand on."""
        legs = things.table()[walker.thing].walks == "legs"
        high = walker.worn and things.WORN[walker.worn][0] == "head"
        return tuple(row for row in (40, 48, 56, 64) if row >= PART + CELL * legs + (2 * CELL if high else 0))

    def stamps(self, scene: Scene, rng: Random) -> list[Stamp]:
        """A scene's images at random places that its caption allows."""
        first = scene.items[0]
        if scene.relation == "walks":
            return self.walk(first, scene.items[1], rng.choice(self.grounds(first)))
        if len(scene.items) == 2:
            sizes = [{"small": SMALL, "large": LARGE}.get(item.size, PART) for item in scene.items]
            spots = rng.choice(pair_spots(scene.relation, *sizes))
            return [
                s
                for item, size, spot in zip(scene.items, sizes, spots, strict=True)
                for s in self.figure(item, size, *spot)
            ]
        if first.count > 1:
            size, places = count_spots(first.count)
            return [s for spot in rng.choice(places) for s in self.figure(first, size, *spot)]
        if first.worn:
            return self.figure(first, WHOLE, rng.choice(cells(WHOLE)), BASE)
        size = SMALL if first.size == "small" else WHOLE
        image = self.sprites.get(first.thing, size, first.color, scene.style)
        return [Stamp(image, rng.choice(cells(size)), rng.choice(cells(size)))]

    def can_show(self, scene: Scene) -> bool:
        """Whether there is an image of a scene: its things come in its colors, and wear and walk what it says."""
        table, names = things.table(), [item.thing for item in scene.items]
        if not set(names) <= set(self.names) or (scene.style == "flat" and not set(names) <= set(self.sprites.flat)):
            return False
        for item in scene.items:
            colored = not item.color or item.color in (*self.sprites.choices(item.thing), self.sprites.own(item.thing))
            if not colored or (item.worn and item.worn not in self.worn[item.thing]):
                return False
            if item.count > 1 and (table[item.thing].bare or len(names) > 1):
                return False
        return scene.relation != "walks" or (names[0] in self.walkers and names[1] in self.pets)

    def render(self, scene: Scene, rng: Random) -> Pixels:
        """Draw a scene: -> (64, 64, 3) uint8."""
        return compose(self.stamps(scene, rng), things.GROUNDS[scene.ground])

    # Sampling

    def _item(self, name: str, kind: str, rng: Random, **facts: object) -> Item:
        """A thing, with a color as often as the kind has one; its own color is said as seldom as any other."""
        color = ""
        if rng.random() < COLORED.get(kind, 0) and self.sprites.choices(name):
            options = (*self.sprites.choices(name), self.sprites.own(name))
            color = rng.choice(options)
        return Item(name, color, **facts)  # type: ignore[arg-type]

    def propose(self, kind: str, rng: Random) -> Scene:
        """A scene of a kind, which may combine what is withheld."""
        if kind == "pair":
            a, b = rng.sample(self.names, 2)
            sizes = rng.choice((("small", "large"), ("large", "small"))) if rng.random() < SIZED else ("", "")
            items = (self._item(a, kind, rng, size=sizes[0]), self._item(b, kind, rng, size=sizes[1]))
            return Scene(items, rng.choices(tuple(RELATIONS), tuple(RELATIONS.values()))[0])
        if kind == "walked":
            walker, pet = rng.choice(self.walkers), rng.choice(self.pets)
            dressed = rng.random() < DRESSED and self.worn[walker]
            worn = rng.choice(self.worn[walker]) if dressed else ""
            return Scene((self._item(walker, kind, rng, worn=worn), self._item(pet, kind, rng)), "walks")
        if kind == "worn":
            # What is worn first: a tutu fits few things, and would be rare.
            worn = rng.choice(tuple(w for w in things.WORN if w in self.names))
            name = rng.choice([name for name in self.wearers if worn in self.worn[name]])
            return Scene((self._item(name, kind, rng, worn=worn),))
        if kind == "count":
            return Scene((self._item(rng.choice(self.counted), kind, rng, count=rng.choice((2, 2, 3, 4))),))
        if kind == "style":
            return Scene((Item(rng.choice(self.sprites.flat)),), style="flat")
        name = rng.choice(self.colored if kind == "color" else self.names)
        size = rng.choice(("small", "large")) if rng.random() < 0.08 else ""
        return Scene((self._item(name, kind, rng, size=size),))

    def scene(self, kind: str, rng: Random, unseen: bool = False) -> Scene:
        """A scene of a kind without what is withheld or, where `unseen`, with only the kind's own combination new."""
        wanted = {NEW[kind]} if unseen else set()
        while True:
            scene = self.propose("thing" if kind == "ground" else kind, rng)
            first, last = scene.items[0], scene.items[-1]
            if (scene.relation == "walks" and first.thing == last.thing) or (kind == "color" and not first.color):
                continue
            if {c[0] for c in holdout.withheld(scene, self.sprites.own)} != wanted:
                continue
            if kind == "ground" or rng.random() < GROUNDED:
                ground = rng.choice(tuple(things.GROUNDS)[1:])
                scene = Scene(scene.items, scene.relation, ground, scene.style)
            return scene

    def sample(self, seed: int, stream: str, number: int, kind: str = "", unseen: bool = False) -> Sample:
        """Scene, image and a caption in each language: a function of the arguments only. Without `kind`, of any."""
        rng = Random(f"{seed}/{stream}/{number}")
        kind = kind or rng.choices(self.kinds, self.weights)[0]
        scene = self.scene(kind, rng, unseen)
        image = self.render(scene, rng)
        return scene, image, [grammar.caption(scene, language, rng) for language in grammar.LANGUAGES]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of scenes that these sprites allow."""
        return tuple(kind for kind in KINDS if kind != "style" or self.sprites.flat)

    @property
    def weights(self) -> tuple[float, ...]:
        """How often each kind occurs."""
        return tuple(KINDS[kind] for kind in self.kinds)


def compose(stamps: Iterable[Stamp], ground: tuple[int, int, int]) -> Pixels:
    """Lay stamps on a background, one over another; what lies outside of the image is cut off."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = ground
    for stamp in stamps:
        x, y = max(stamp.x, 0), max(stamp.y, 0)
        part = stamp.image[y - stamp.y : SIDE - stamp.y, x - stamp.x : SIDE - stamp.x]
        window = image[y : y + part.shape[0], x : x + part.shape[1]]
        window += (part[..., :3] - window) * (part[..., 3:] * np.float32(1 / 255))
    return np.rint(image).astype(np.uint8)


# Data sets


def _members(samples: Iterable[Sample], start: int) -> Iterator[tuple[str, bytes]]:
    for number, (scene, image, captions) in enumerate(samples, start):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG", compress_level=4)
        yield f"{number:07d}.png", png.getvalue()
        row = {"caption": captions, "kind": scene.kind}
        yield f"{number:07d}.json", json.dumps(row, ensure_ascii=False).encode()


def write_tar(path: Path, samples: Iterable[Sample], start: int = 0) -> None:
    """Write scenes as one WebDataset tar whose bytes depend on nothing else."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in _members(samples, start):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


def write_prompts(world: World, folder: Path, count: int, seed: int) -> None:
    """Write a list of different prompts for each kind, seen and withheld, the same scenes in each language."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, unseen in [*((k, False) for k in (*world.kinds, "ground")), *((k, True) for k in NEW)]:
        stem, found, number = f"{kind}-{'withheld' if unseen else 'seen'}", list[list[str]](), 0
        known: set[str] = set()
        while len(found) < count and number < 50 * count:
            rng = Random(f"{seed}/{stem}/{number}")
            scene = world.scene(kind, rng, unseen)
            texts = [grammar.caption(scene, language, rng) for language in grammar.LANGUAGES]
            if known.isdisjoint(texts):
                found.append(texts)
                known.update(texts)
            number += 1
        for place, language in enumerate(grammar.LANGUAGES):
            name = stem if language == "en" else f"{stem}-{language}"
            (folder / f"{name}.txt").write_text("".join(t[place] + "\n" for t in found), "utf-8")


def main() -> None:
    """Write the data set and the test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sprites", type=Path, help="tar that sprites.py wrote")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--count", type=int, default=100_000, help="scenes to train on (%(default)s)")
    parser.add_argument("--shard", type=int, default=10_000, help="scenes of each train-*.tar (%(default)s)")
    parser.add_argument("--truth", type=int, default=2000, help="scenes in truth.tar (%(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="lines in each file of prompts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world = World(args.sprites)
    for start in range(0, args.count, args.shard):
        part = range(start, min(start + args.shard, args.count))
        samples = (world.sample(args.seed, "train", number) for number in part)
        write_tar(args.out / f"train-{start // args.shard:03d}.tar", samples, start)
    write_tar(args.out / "truth.tar", (world.sample(args.seed, "truth", number) for number in range(args.truth)))
    write_prompts(world, args.out / "prompts", args.prompts, args.seed)


if __name__ == "__main__":
    main()
