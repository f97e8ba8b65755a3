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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 3.6 / 32, "large": 6.1 / 32}  # radius as a share of the picture's side
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

MARGIN = 0.75 / 32  # the picture's edge keeps this clear, so that it shows the background
GAP = 2.5 / 32  # least distance between two objects along their axis
SIDESTEP = 4 / 32  # most offset across that axis
SUPERSAMPLE = 4
LATTICE = 8  # centres lie on an 8x8 lattice: a world small enough for a prior that learns in minutes


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


def _polygon_star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star, point up: outer radius 1.12, inner radius 0.5."""
    angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)  # folded into one half of a point
    outer, inner = 1.12, np.array([0.5 * np.sin(np.pi / 5), 0.5 * np.cos(np.pi / 5)])
    radius = np.hypot(u, v)
    x, y = radius * np.sin(angle), radius * np.cos(angle)
    return np.asarray(inner[0] * (outer - y) >= x * (outer - inner[1]))


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u right, v down, in radii from the centre) lie in a shape: any shape of floats -> bool."""
    if shape == "circle":
        return np.asarray(u * u + v * v <= 1)
    if shape == "ring":
        square = u * u + v * v
        return np.asarray((square <= 1.05**2) & (square >= 0.56**2))
    if shape == "square":
        return np.asarray(np.maximum(abs(u), abs(v)) <= 0.9)
    if shape == "triangle":
        return np.asarray((v <= 0.85) & (abs(u) <= (v + 1.05) * (1.05 / 1.9)))
    if shape == "cross":
        low, high = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
        return np.asarray((low <= 0.35) & (high <= 1.08))
    return _polygon_star(u, v)


# How far each shape reaches from its centre, in radii: left and right, up, down.
REACH: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9),
    "triangle": (1.05, 1.05, 0.85),
    "star": (1.07, 1.12, 0.91),
    "cross": (1.08, 1.08, 1.08),
    "ring": (1.05, 1.05, 1.05),
}


def coverage(shape: str, x: float, y: float, radius: float, width: int) -> np.ndarray:
    """Share of every pixel that a shape covers: centre and radius in pixels -> (width, width) float32 in [0, 1]."""
    fine = (np.arange(width * SUPERSAMPLE, dtype=np.float64) + 0.5) / SUPERSAMPLE
    hit = inside(shape, ((fine - x) / radius)[None, :], ((fine - y) / radius)[:, None])
    return np.asarray(hit.reshape(width, SUPERSAMPLE, width, SUPERSAMPLE).mean(axis=(1, 3), dtype=np.float32))


def draw(scene: Scene, rng: np.random.Generator, width: int = 32) -> np.ndarray:
    """Draw a scene, background and places at random: -> (width, width, 3) uint8."""
    picture = np.empty((width, width, 3), np.float32)
    picture[:] = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    for thing, (x, y) in zip(scene.things, place(scene, rng), strict=True):
        alpha = coverage(thing.shape, x * width, y * width, SIZES[thing.size] * width, width)[..., None]
        picture = picture * (1 - alpha) + np.asarray(COLORS[thing.color], np.float32) * alpha
    return np.rint(picture).astype(np.uint8)


def _bounds(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """How far an object reaches towards the top left and the bottom right: two (x, y), shares of the side."""
    side, up, down = REACH[thing.shape]
    radius = SIZES[thing.size]
    return np.array([side, up]) * radius, np.array([side, down]) * radius


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Random centres (x, y), as shares of the side, on the lattice, which obey the relation with a clear gap."""
    while True:
        centers = [(round(x * LATTICE) / LATTICE, round(y * LATTICE) / LATTICE) for x, y in _anywhere(scene, rng)]
        if _fits(scene, centers):
            return centers


def _fits(scene: Scene, centers: list[tuple[float, float]]) -> bool:
    """Whether all lies within the margin, and two objects within reach of the relation and apart by the gap."""
    for thing, center in zip(scene.things, centers, strict=True):
        low, high = _bounds(thing)
        if np.any(center - low < MARGIN) or np.any(center + high > 1 - MARGIN):
            return False
    if scene.relation is None:
        return True
    axis = 0 if scene.relation in ("left", "right") else 1
    near, far = (1, 0) if scene.relation in ("right", "below") else (0, 1)
    ends = centers[near][axis] + _bounds(scene.things[near])[1][axis]
    begins = centers[far][axis] - _bounds(scene.things[far])[0][axis]
    return bool(begins - ends >= GAP and abs(centers[0][1 - axis] - centers[1][1 - axis]) <= SIDESTEP)


def _anywhere(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres off the lattice."""
    first = _bounds(scene.things[0])
    if scene.relation is None:
        x, y = rng.uniform(MARGIN + first[0], 1 - MARGIN - first[1])
        return [(float(x), float(y))]
    swap = scene.relation in ("right", "below")  # things in reading order: the left or upper one comes first
    near, far = (scene.things[1], scene.things[0]) if swap else (scene.things[0], scene.things[1])
    axis = 0 if scene.relation in ("left", "right") else 1
    (near_lo, near_hi), (far_lo, far_hi) = _bounds(near), _bounds(far)
    centers = np.zeros((2, 2))
    room = 1 - 2 * MARGIN - GAP - near_lo[axis] - near_hi[axis] - far_lo[axis] - far_hi[axis]
    before, between, _, _ = rng.dirichlet(np.ones(4)) * room  # slack: before, between (at most), after
    centers[0, axis] = MARGIN + before + near_lo[axis]
    centers[1, axis] = centers[0, axis] + near_hi[axis] + GAP + between + far_lo[axis]
    across = 1 - axis
    low = MARGIN + np.maximum(near_lo[across], far_lo[across])
    high = 1 - MARGIN - np.maximum(near_hi[across], far_hi[across])
    step = rng.uniform(-SIDESTEP, SIDESTEP)
    middle = rng.uniform(low + abs(step) / 2, high - abs(step) / 2)
    centers[:, across] = middle - step / 2, middle + step / 2
    pair = [(float(x), float(y)) for x, y in centers]
    return pair[::-1] if swap else pair


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say a scene in words drawn at random."""
    named = [str(thing) for thing in scene.things]
    if scene.relation is None:
        return str(rng.choice(ONE_TEMPLATES)).format(a=named[0])
    template = str(rng.choice(TWO_TEMPLATES))
    return template.format(a=named[0], b=named[1], rel=RELATION_WORDS[scene.relation])


def random_scene(rng: np.random.Generator, unseen: bool, single: float = 0.5) -> Scene:
    """Draw a scene that holds no held-out pair, or, where `unseen`, at least one."""
    while True:
        things = tuple(
            Thing(str(rng.choice(list(SIZES))), str(rng.choice(list(COLORS))), str(rng.choice(SHAPES)))
            for _ in range(1 if rng.random() < single else 2)
        )
        scene = Scene(things, str(rng.choice(RELATIONS)) if len(things) == 2 else None)
        if scene.has_held_out_pair() == unseen and len(set(things)) == len(things):
            return scene


def sample(seed: int, stream: int, index: int, unseen: bool, width: int = 32) -> tuple[Scene, np.ndarray, str]:
    """Scene, picture and caption number `index` of a stream: a function of its arguments only."""
    rng = np.random.default_rng([seed, stream, index])
    scene = random_scene(rng, unseen)
    return scene, draw(scene, rng, width), caption(scene, rng)


def _members(samples: Iterable[tuple[np.ndarray, str]]) -> Iterator[tuple[str, bytes]]:
    for index, (picture, text) in enumerate(samples):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG", compress_level=6)
        yield f"{index:06d}.png", png.getvalue()
        yield f"{index:06d}.txt", (text + "\n").encode()


def write_tar(path: Path, samples: Iterable[tuple[np.ndarray, str]]) -> None:
    """Write pictures and captions as one WebDataset tar whose bytes depend on nothing else."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in _members(samples):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


def _prompts(seed: int, stream: int, count: int, unseen: bool) -> str:
    """Different scenes, one caption a line."""
    lines: dict[Scene, str] = {}
    index = 0
    while len(lines) < count:
        rng = np.random.default_rng([seed, stream, index])
        scene = random_scene(rng, unseen)
        lines.setdefault(scene.canonical(), caption(scene, rng))
        index += 1
    return "".join(line + "\n" for line in lines.values())


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
    train = (sample(args.seed, 0, i, False, args.size)[1:] for i in range(args.count))
    truth = (sample(args.seed, 1, i, i % 2 == 1, args.size)[1:] for i in range(args.truth))
    write_tar(args.out / "train.tar", train)
    write_tar(args.out / "truth.tar", truth)
    (args.out / "prompts-seen.txt").write_text(_prompts(args.seed, 2, args.prompts, False), "utf-8")
    (args.out / "prompts-unseen.txt").write_text(_prompts(args.seed, 3, args.prompts, True), "utf-8")


if __name__ == "__main__":
    main()
