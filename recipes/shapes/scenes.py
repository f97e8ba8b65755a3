"""Scenes of one or two plain shapes with captions, written as a WebDataset tar: a world small enough to check exactly.

Run `python recipes/shapes/scenes.py OUT --count 20000`; OUT then holds train.tar, truth.tar, prompts-seen.txt and
prompts-unseen.txt. Five of the 48 colour-shape pairs never occur in train.tar or in prompts-seen.txt.
"""

import argparse
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# Farther than 100 apart in RGB, and none of them a mixture of another one with a background (an edge pixel is one).
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (210, 20, 45),
    "orange": (250, 125, 5),
    "yellow": (250, 225, 35),
    "green": (25, 150, 55),
    "cyan": (25, 195, 220),
    "blue": (25, 60, 220),
    "purple": (150, 40, 190),
    "black": (20, 20, 20),
}
CELLS = 16  # an image is 16 x 16 cells, each of one color
# Every shape, small (5 x 5 cells) and large (7 x 7).
DRAWN = {
    "circle": (".###. ##### ##### ##### .###.", "..###.. .#####. ####### ####### ####### .#####. ..###.."),
    "square": ("##### ##### ##### ##### #####", "####### ####### ####### ####### ####### ####### #######"),
    "triangle": ("..#.. ..#.. .###. .###. #####", "...#... ...#... ..###.. ..###.. .#####. .#####. #######"),
    "star": ("..#.. ##### .###. .#.#. #...#", "...#... ..###.. ####### .#####. ..###.. .##.##. #.....#"),
    "cross": ("..#.. ..#.. ##### ..#.. ..#..", "..###.. ..###.. ####### ####### ####### ..###.. ..###.."),
    "ring": (".###. #...# #...# #...# .###.", "..###.. .##.##. ##...## ##...## ##...## .##.##. ..###.."),
}
SHAPES = tuple(DRAWN)
SIZES = {"small": 5, "large": 7}  # cells along a side
BACKGROUNDS = ((255, 255, 255), (228, 228, 228), (246, 240, 224))
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

HELD_OUT = frozenset(
    {("red", "triangle"), ("yellow", "cross"), ("green", "ring"), ("blue", "star"), ("purple", "square")}
)

RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

# {a} and {b} are a size, a color and a shape, such as "small red circle"; a stands REL of b.
ONE_TEMPLATES = ("a {a}", "one {a}", "a picture of a {a}", "there is a {a}", "a single {a}")
TWO_TEMPLATES = (
    "a {a} {rel} a {b}",
    "one {a} {rel} one {b}",
    "there is a {a} {rel} a {b}",
    "a picture of a {a} {rel} a {b}",
)

SINGLE = 0.25  # share of the training scenes that have one object, which is soon learned; of the prompts it is half
GAP = 1  # least number of free cells between two objects along their axis
SIDESTEP = 1.5  # most cells by which their centres differ across it


@dataclass(frozen=True)
class Thing:
    """One object, as a caption describes it."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object, or two of which the first stands `relation` of the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def canonical(self) -> "Scene":
        """The same scene said with "left" or "above" only, so that equal scenes compare equal."""
        if self.relation in ("right", "below"):
            return Scene(self.things[::-1], OPPOSITE[self.relation])
        return self

    def has_held_out_pair(self) -> bool:
        """Whether a pair occurs which training never sees."""
        return any((thing.color, thing.shape) in HELD_OUT for thing in self.things)


def bitmap(shape: str, size: str) -> np.ndarray:
    """The cells that a shape covers: (5, 5) or (7, 7) bool."""
    rows = DRAWN[shape][list(SIZES).index(size)].split()
    return np.array([[cell == "#" for cell in row] for row in rows])


def render(scene: Scene, rng: np.random.Generator, width: int = 32) -> np.ndarray:
    """Draw a scene, background and places at random: -> (width, width, 3) uint8, width a multiple of 16."""
    cells = np.empty((CELLS, CELLS, 3), np.uint8)
    cells[:] = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    for thing, (x, y) in zip(scene.things, place(scene, rng), strict=True):
        side = SIZES[thing.size]
        cells[y : y + side, x : x + side][bitmap(thing.shape, thing.size)] = COLORS[thing.color]
    return cells.repeat(width // CELLS, axis=0).repeat(width // CELLS, axis=1)


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Random upper left cells (x, y) of the objects, which obey the relation with a clear gap."""
    sides = [SIZES[thing.size] for thing in scene.things]
    while True:
        corners = [(int(rng.integers(0, CELLS + 1 - k)), int(rng.integers(0, CELLS + 1 - k))) for k in sides]
        if scene.relation is None:
            return corners
        (x0, y0), (x1, y1) = ((x + k / 2, y + k / 2) for (x, y), k in zip(corners, sides, strict=True))
        along, across = (x1 - x0, y1 - y0) if scene.relation in ("left", "right") else (y1 - y0, x1 - x0)
        along = along if scene.relation in ("left", "above") else -along
        if along - sum(sides) / 2 >= GAP and abs(across) <= SIDESTEP:
            return corners


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say a scene in words chosen at random."""
    named = [str(thing) for thing in scene.things]
    if scene.relation is None:
        return str(rng.choice(ONE_TEMPLATES)).format(a=named[0])
    template = str(rng.choice(TWO_TEMPLATES))
    return template.format(a=named[0], b=named[1], rel=RELATION_WORDS[scene.relation])


def random_scene(rng: np.random.Generator, unseen: bool, single: float = 0.5) -> Scene:
    """Draw a scene without held-out pairs, or, where `unseen`, with one; `single`: the share of those of one object."""
    count = 1 if rng.random() < single else 2
    while True:
        things = tuple(
            Thing(str(rng.choice(list(SIZES))), str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)))
            for _ in range(count)
        )
        scene = Scene(things, str(rng.choice(RELATIONS)) if len(things) == 2 else None)
        if scene.has_held_out_pair() == unseen and len(set(things)) == len(things):
            return scene


def sample(
    seed: int, stream: int, index: int, unseen: bool, width: int = 32, single: float = 0.5
) -> tuple[Scene, np.ndarray, str]:
    """Scene, image and caption number `index` of a stream: a function of its arguments only."""
    rng = np.random.default_rng([seed, stream, index])
    scene = random_scene(rng, unseen, single)
    return scene, render(scene, rng, width), caption(scene, rng)


def _members(samples: Iterable[tuple[np.ndarray, str]]) -> Iterator[tuple[str, bytes]]:
    for index, (image, text) in enumerate(samples):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG", compress_level=6)
        yield f"{index:06d}.png", png.getvalue()
        yield f"{index:06d}.txt", (text + "\n").encode()


def write_tar(path: Path, samples: Iterable[tuple[np.ndarray, str]]) -> None:
    """Write images and captions as one WebDataset tar whose bytes depend on nothing else."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in _members(samples):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


def _prompts(seed: int, stream: int, count: int, unseen: bool) -> str:
    """Different captions, one a line, half of them of one object."""
    lines: dict[str, None] = {}
    index = 0
    while len(lines) < count:
        rng = np.random.default_rng([seed, stream, index])
        lines.setdefault(caption(random_scene(rng, unseen, single=float(len(lines) % 2 == 0)), rng))
        index += 1
    return "".join(line + "\n" for line in lines)


def main() -> None:
    """Write the data set and the test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--count", type=int, default=20000, help="scenes in train.tar (%(default)s)")
    parser.add_argument("--truth", type=int, default=1000, help="scenes in truth.tar, half never seen (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="lines in each file of prompts (%(default)s)")
    parser.add_argument("--size", type=int, default=32, choices=(32, 48, 64), help="pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train = (sample(args.seed, 0, i, False, args.size, SINGLE)[1:] for i in range(args.count))
    truth = (sample(args.seed, 1, i, i % 2 == 1, args.size)[1:] for i in range(args.truth))
    write_tar(args.out / "train.tar", train)
    write_tar(args.out / "truth.tar", truth)
    (args.out / "prompts-seen.txt").write_text(_prompts(args.seed, 2, args.prompts, False), "utf-8")
    (args.out / "prompts-unseen.txt").write_text(_prompts(args.seed, 3, args.prompts, True), "utf-8")


if __name__ == "__main__":
    main()
