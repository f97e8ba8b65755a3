"""What is in an image of the emoji's world: things, colors, what is worn and walked. Nothing is learned.

Every thing, in every size and at every place where the grammar may put it, is compared with the image in lightness,
which is the same in all colors; the best few are then compared in all their colors.

Shapes: N images, P places, K templates; images are (64, 64, 3) uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import things
import world
from grammar import Item
from hues import Floats
from sprites import Pixels
from world import BASE, CELL, LARGE, PART, PET, SIDE, SMALL, WHOLE, World

TOP = 5  # templates of a place that are compared in all colors
LEAST_FIT = 0.75  # share of the ink that a template explains, below which it is nothing
NOISE = 3 * 10.0**2  # squared error of a pixel that is forgiven: a light thing on a light background has little ink
LIT = 70.0  # RGB distance from the background of a pixel that is ink
DIRT = 24  # pixels of ink outside of all that was found, from which there is something more
MORE = 1.0  # squared lightness that each further thing must explain
GAP = slice(PART, SIDE - PET)  # columns between walker and walked, where only the leash is
GROUND_NAMES = tuple(things.GROUNDS)

Spot = tuple[int, int, int]  # size and upper left corner


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


@lru_cache(maxsize=1)
def layouts() -> tuple[tuple[Spot, ...], ...]:
    """Places (size, x, y) that things may have together: one, two that do not overlap, three and four equal ones."""
    found: list[tuple[Spot, ...]] = [
        ((size, x, y),) for size in (WHOLE, SMALL) for x, y in product(world.cells(size), repeat=2)
    ]
    places = list(product(world.cells(PART), repeat=2))
    for (x, y), (p, q) in combinations(places, 2):
        if max(abs(x - p), abs(y - q)) >= PART:
            found.append(((PART, x, y), (PART, p, q)))
    for a, b in world.pair_spots("with", SMALL, LARGE):
        found.append(((SMALL, *a), (LARGE, *b)))
    for count in (3, 4):
        size, spots = world.count_spots(count)
        found += [tuple((size, *spot) for spot in own) for own in spots]
    return tuple(found)


def lightness(images: Floats) -> Floats:
    """(..., 3) float in [0, 255] -> (...) in [0, 1]."""
    lit: Floats = (images.max(-1) + images.min(-1)) / np.float32(510)
    return lit


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
        gains: Floats = 2 * windows @ self.flat.T - (self.flat**2).sum(1)
        return gains


class Reader:
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
        """Templates of a `plain` size, of each `pet`, of what is `worn` at x = `number`, of `walker`s on that row."""
        items: list[tuple[Item, str]]
        if kind in ("plain", "pet"):
            items = [(Item(name), "noto") for name in (self.world.names if kind == "plain" else self.world.pets)]
            items += [(Item(name), "flat") for name in self.world.sprites.flat if kind == "plain" and number == WHOLE]
            shown = [self._shown(item, style, number, ground) for item, style in items]
        elif kind == "worn":
            items = [(item, "noto") for item in self.dressed]
            shown = [self._whole(item, "noto", (WHOLE, number, BASE), ground) for item in self.dressed]
        else:
            items = [(item, "noto") for item in self.walkers if number in self.world.grounds(item)]
            shown = [self.walker(item, number, ground) for item, _ in items]
        base = lightness(np.array(things.GROUNDS[ground], np.float32))
        return Bank(items, np.stack([(lightness(s) - base).ravel() for s in shown]))

    def _whole(self, item: Item, style: str, spot: Spot, ground: str) -> Floats:
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
        best: dict[Spot, Floats] = {}
        gains: dict[Spot, Floats] = {}
        for size in (WHOLE, LARGE, PART, SMALL):
            for x, y in product(world.cells(size), repeat=2):
                window = excess[:, y : y + size, x : x + size].reshape(len(images), -1)
                gains[size, x, y] = self.bank("plain", size, ground).gains(window)
                best[size, x, y] = gains[size, x, y].max(1)
        order = list(best)
        table = np.stack([*best.values(), np.zeros(len(images), np.float32)], 1)
        index = np.full((len(layouts()), 4), len(order))
        for n, layout in enumerate(layouts()):
            index[n, : len(layout)] = [order.index(spot) for spot in layout]
        totals = table[:, index].sum(-1) - MORE * (index < len(order)).sum(1)
        flat = excess.reshape(len(images), -1)
        worn = {x: self.bank("worn", x, ground).gains(flat) for x in world.cells(WHOLE)}
        column = excess[:, :, :PART].reshape(len(images), -1)
        rows, pets = (40, 48, 56, 64), dict[int, Floats]()
        walks = {row: self.bank("walker", row, ground).gains(column) for row in rows}
        for row in rows:
            window = excess[:, row - PET : row, SIDE - PET :].reshape(len(images), -1)
            pets[row] = self.bank("pet", PET, ground).gains(window)
        found = []
        for n, image in enumerate(images):
            layout = layouts()[int(totals[n].argmax())]
            cord = self._cord(image, excess[n], ground)
            row = max(rows, key=lambda row: float(walks[row][n].max() + pets[row][n].max()))
            walk = walks[row][n].max() + pets[row][n].max() + cord - 2 * MORE
            alone = max(worn[x][n].max() for x in worn) - MORE
            if cord > 0 and walk > max(totals[n].max(), alone):
                found.append(self._walk(image, ground, row, walks[row][n], pets[row][n]))
            elif len(layout) == 1 or alone > totals[n].max():
                spot = max((s for s in order if s[0] in (WHOLE, SMALL)), key=lambda s: best[s][n])
                found.append(self._alone(image, ground, spot, gains[spot][n], {x: worn[x][n] for x in worn}))
            else:
                objects = tuple(self._object(image, ground, s, gains[s][n]) for s in layout)
                found.append(self._reading(image, ground, objects, False))
        return found

    def _cord(self, image: Floats, excess: Floats, ground: str) -> float:
        """The squared lightness of the red in the gap of a walk; 0 where no leash runs through it."""
        gap = image[:, GAP]
        red = (gap[..., 0] - gap[..., 1:].mean(-1)) - (lambda g: g[0] - (g[1] + g[2]) / 2)(things.GROUNDS[ground])
        seen = red > 50
        crossed = seen.any(0).sum() >= CELL - 2 and (seen.sum(0) <= CELL).all()
        return float((excess[:, GAP][seen] ** 2).sum()) if crossed else 0.0

    def _walk(self, image: Floats, ground: str, row: int, walkers: Floats, pets: Floats) -> Reading:
        """Walker and walked."""
        spot = (PET, SIDE - PET, row - PET)
        items = self.bank("walker", row, ground).items
        column, options = image[:, :PART], []
        for k in np.argsort(walkers)[-TOP:]:
            for item in self.colors(items[k][0]):
                options.append((float(((column - self.walker(item, row, ground)) ** 2).sum()), item))
        error, item = min(options, key=lambda option: option[0])
        legs = CELL * (things.table()[item.thing].walks == "legs")
        fit = self._fit(error, column, ground, PART)
        first = Found(item.thing, item.color, item.worn, "noto", 0, row - PART - legs, PART, fit)
        return self._reading(image, ground, (first, self._object(image, ground, spot, pets, (item, row))), True)

    def _alone(self, image: Floats, ground: str, spot: Spot, plain: Floats, worn: dict[int, Floats]) -> Reading:
        """One thing, which may wear something."""
        options = [(*self.bank("plain", spot[0], ground).items[k], spot) for k in np.argsort(plain)[-TOP:]]
        among = sorted(((float(gain), x, k) for x, gains in worn.items() for k, gain in enumerate(gains)))[-TOP:]
        options += [(*self.bank("worn", x, ground).items[k], (WHOLE, x, BASE)) for _, x, k in among]
        best = None
        for item, style, (size, x, y) in options:
            for own in self.colors(item) if style == "noto" else [item]:
                error = float(((image - self._whole(own, style, (size, x, y), ground)) ** 2).sum())
                if best is None or error < best[0]:
                    best = (error, Found(own.thing, own.color, own.worn, style, x, y, size, 0.0))
        assert best is not None
        fit = self._fit(best[0], image, ground, best[1].size)
        return self._reading(image, ground, (replace(best[1], fit=fit),), False)

    def _object(
        self,
        image: Floats,
        ground: str,
        spot: Spot,
        gains: Floats,
        walker: tuple[Item, int] | None = None,
    ) -> Found:
        """The thing at a place, on the leash of a walker on a row if there is one."""
        size, x, y = spot
        window, items = image[y : y + size, x : x + size], self.bank("pet" if walker else "plain", size, ground).items
        options = [item for k in np.argsort(gains)[-TOP:] if items[k][1] == "noto" for item in self.colors(items[k][0])]
        shown = [self.shown(item, "noto", size, ground) for item in options]
        if walker:
            walks = [self.world.walk(walker[0], item, walker[1]) for item in options]
            colors = things.GROUNDS[ground]
            shown = [world.compose(stamps, colors)[y : y + size, x:].astype(np.float32) for stamps in walks]
        errors = [float(((window - own) ** 2).sum()) for own in shown]
        best = int(np.argmin(errors))
        fit = self._fit(errors[best], window, ground, size)
        return Found(options[best].thing, options[best].color, "", "noto", x, y, size, fit)

    def _fit(self, error: float, window: Floats, ground: str, size: int) -> float:
        """Which share of a window's ink is explained, a squared error left."""
        blank = float(((window - things.GROUNDS[ground]) ** 2).sum())
        return 1 - max(error - NOISE * size**2, 0) / (blank + 1)

    def _reading(self, image: Floats, ground: str, objects: tuple[Found, ...], walked: bool) -> Reading:
        left = np.sqrt(((image - things.GROUNDS[ground]) ** 2).sum(-1)) > LIT
        for o in objects:
            if o.worn or walked:
                left[:, : SIDE if o.worn and not walked else SIDE - PET] = False
            left[o.y : o.y + o.size, o.x : o.x + o.size] = False
        return Reading(tuple(o for o in objects if o.fit >= LEAST_FIT), ground, walked, bool(left.sum() > DIRT))
