"""Images of single things on nothing, cut to their ink and fitted into squares of the code grid.

Run `python recipes/emoji/sprites.py CACHE OUT.tar`, CACHE being a folder into which `npm pack` fetched PACKAGES
(`--packages` prints them); it needs the package resvg-py. OUT.tar then holds each thing of things.tsv in each style,
STYLE/NAME.png, 96 pixels wide. `--only small-things.txt` writes fewer, in one style: so small.sprites.tar was made.
"""

import argparse
import importlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import hues
import numpy as np
import numpy.typing as npt
import things
from PIL import Image

Pixels = npt.NDArray[np.uint8]

HERE = Path(__file__).parent
PACKAGES = {"noto": "@iconify-json/noto@1.2.9", "flat": "@iconify-json/fluent-emoji-flat@1.2.6"}
STORED = 96  # pixels; 48, 32 and 24 are whole parts of it
MARGIN = 1 / 32  # of the side that stays free on each side, so that neighbors do not touch
MIXED = ("rainbow", "duck", "glasses")  # of several hues, whichever is measured to lead
EXTRA = ("worn-scarf", "legs")  # drawings that are no things


def draw(svg: str, width: int) -> Image.Image:
    """Render an SVG by resvg: -> RGBA image."""
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        sys.exit("expected the package resvg-py, which renders the things, found none; pip install resvg-py")
    return Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg, width=width)))).convert("RGBA")


def cut(image: Image.Image) -> Image.Image:
    """The part of an RGBA image that has ink."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0).getbbox()
    return image.crop(box) if box else image


def fit(image: Image.Image, size: int, margin: float = MARGIN) -> Image.Image:
    """The ink of an image as large as fits into a square, in its middle and down on its ground."""
    ink = cut(image)
    room = size * (1 - 2 * margin)
    scale = room / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    ink = ink.resize((width, height), Image.Resampling.HAMMING)
    square = Image.new("RGBA", (size, size))
    square.paste(ink, ((size - width) // 2, size - height - round(size * margin)))
    return square


def wide(image: Image.Image, width: int) -> Image.Image:
    """An image `width` pixels wide, as high as that makes it."""
    return image.resize((width, max(1, round(width * image.height / image.width))), Image.Resampling.HAMMING)


def art(name: str) -> str:
    """An SVG of our own."""
    return (HERE / "art" / f"{name}.svg").read_text("utf-8")


def package(path: Path) -> dict[str, str]:
    """The SVG of each icon of a package of Iconify, by name."""
    with tarfile.open(path, "r:gz") as tar:
        stream = tar.extractfile("package/icons.json")
        assert stream is not None
        table: dict[str, Any] = json.load(stream)
    parents = {name: alias["parent"] for name, alias in table.get("aliases", {}).items() if set(alias) == {"parent"}}
    icons = {}
    for name in (*table["icons"], *parents):
        icon = table["icons"].get(parents.get(name, name))
        if icon is not None:
            width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
            head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
            icons[name] = f"{head}{icon['body']}</svg>"
    return icons


def pictures(cache: Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Style, name and image of each thing in each style that has it, `STORED` pixels wide."""
    for style, spec in PACKAGES.items():
        found = sorted(cache.glob(f"{spec[1:].rpartition('@')[0].replace('/', '-')}-*.tgz"))
        if not found:
            sys.exit(f"expected {spec} in {cache}, found none; run npm pack {spec} there")
        icons = package(found[-1])
        for thing in things.table().values():
            own = thing.icon.startswith("own/")
            if own and style == "noto":
                yield (
                    style,
                    thing.name,
                    fit(draw((HERE / "art" / f"{thing.icon[4:]}.svg").read_text("utf-8"), 384), STORED),
                )
            elif not own and thing.icon in icons:
                yield style, thing.name, fit(draw(icons[thing.icon], 384), STORED)
    for extra in EXTRA:
        yield "extra", extra, wide(cut(draw(art(extra), 384)), STORED)


def measure(name: str, image: Image.Image) -> dict[str, Any]:
    """What is written down of an image: its leading hue, what that is called, and the colors it can be turned to."""
    pixels = np.asarray(image)
    own = hues.leading(pixels)
    if name in MIXED or own is None or len(turned := hues.choices(pixels, own)) < 5:
        return {}
    return {"leading": [round(x, 4) for x in own], "name": hues.name(own), "choices": turned}


def write(path: Path, images: Iterator[tuple[str, str, Image.Image]]) -> None:
    """Write images and what was measured of them as one tar whose bytes depend on nothing else."""
    facts, members = {}, []
    for style, name, image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        members.append((f"{style}/{name}.png", buffer.getvalue()))
        facts[f"{style}/{name}"] = measure(name, image) if style != "extra" else {}
    members.append(("facts.json", json.dumps(facts, indent=0).encode()))
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


class Sprites:
    """The images of a tar that `write` wrote, at any size and color; all are cached, (H, W, 4) uint8."""

    def __init__(self, path: Path) -> None:
        with tarfile.open(path) as tar:
            files = {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}
        self.facts: dict[str, dict[str, Any]] = json.loads(files.pop("facts.json"))
        self.sources = {n[:-4]: Image.open(io.BytesIO(data)).convert("RGBA") for n, data in files.items()}
        present = {name.partition("/")[2] for name in self.sources if name.startswith("noto/")}
        self.things = tuple(name for name in things.table() if name in present)
        self.flat = tuple(name for name in self.things if f"flat/{name}" in self.sources)
        self.get = lru_cache(maxsize=None)(self._get)
        self.worn = lru_cache(maxsize=None)(self._worn)

    def own(self, name: str) -> str:
        """What the color of a thing is called, "" where it has no leading hue or one without a name."""
        return str(self.facts[f"noto/{name}"].get("name", ""))

    def choices(self, name: str) -> tuple[str, ...]:
        """The other colors that a thing comes in."""
        return tuple(self.facts[f"noto/{name}"].get("choices", ()))

    def _get(self, name: str, size: int, color: str = "", style: str = "noto") -> Pixels:
        """A thing, `size` pixels wide, in its own color or in one of its choices."""
        source = self.sources[f"{style}/{name}"]
        image = np.asarray(source if size == STORED else source.resize((size, size), Image.Resampling.HAMMING))
        facts = self.facts[f"{style}/{name}"]
        if color and color != facts.get("name"):
            image = hues.turn(image, hues.Leading(*facts["leading"]), color)
        return image

    def _worn(self, name: str, width: int) -> Pixels:
        """What is worn, or the legs, `width` pixels wide."""
        names = (f"extra/worn-{name}", f"extra/{name}", f"noto/{name}")
        return np.asarray(wide(cut(next(self.sources[n] for n in names if n in self.sources)), width))


def main() -> None:
    """Write the tar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, nargs="?", help="folder with the packages that npm pack fetched")
    parser.add_argument("out", type=Path, nargs="?", help="tar to write")
    parser.add_argument("--only", type=Path, help="names of things, one a line; in one style (all, in both)")
    parser.add_argument("--packages", action="store_true", help="print the packages to fetch, and stop")
    args = parser.parse_args()
    if args.packages:
        print("\n".join(PACKAGES.values()))
        return
    if args.cache is None or args.out is None:
        parser.error("name the folder of the packages and the tar to write")
    only = args.only and args.only.read_text("utf-8").split("\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images = (p for p in pictures(args.cache) if not only or p[0] == "extra" or (p[0] == "noto" and p[1] in only))
    write(args.out, images)
    print(args.out)


if __name__ == "__main__":
    main()
