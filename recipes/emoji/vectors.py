"""Further styles, which only the prior learns from: vector images out of three npm packages.

Each holds one JSON of SVG bodies by name; a name is the label that emojibase gives the code, written with hyphens.
They are rendered by resvg (`pip install resvg-py`).
"""

import importlib
import io
import json
import re
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

PACKAGES = {  # style -> package and version, as `npm pack` takes them
    "blob": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
# The publisher's other style, whose designs are akin: what is withheld there is withheld here.
KIN = {"blob": "noto", "flat": "fluent"}
SAID = {
    "en": {"blob": "noto blob", "emojione": "emojione", "flat": "fluent flat"},
    "ko": {"blob": "노토 블롭", "emojione": "이모지원", "flat": "플루언트 플랫"},
}


def slug(label: str) -> str:
    """A label as the packages write it: `flag: Côte d’Ivoire` -> `flag-cote-divoire`."""
    plain = unicodedata.normalize("NFKD", label.lower().replace("’", "").replace("'", ""))
    return re.sub(r"[^a-z0-9]+", "-", plain.encode("ascii", "ignore").decode()).strip("-")


def read(path: Path, codes: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Code and SVG of each image in a package whose name is among `codes` (slug -> code), in the order of names."""
    with tarfile.open(path, "r:gz") as tar:
        stream = tar.extractfile("package/icons.json")
        assert stream is not None
        table: dict[str, Any] = json.load(stream)
    parents = {name: alias["parent"] for name, alias in table.get("aliases", {}).items() if set(alias) == {"parent"}}
    for name in sorted({*table["icons"], *parents} & set(codes)):
        icon = table["icons"].get(parents.get(name, name))
        if icon is None:
            continue
        width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        yield codes[name], f"{head}{icon['body']}</svg>"


def render(svg: str, size: int) -> Image.Image:
    """The image, `size` pixels wide, on nothing."""
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        sys.exit("expected the package resvg-py, which renders the vector styles, found none; pip install resvg-py")
    return Image.open(io.BytesIO(bytes(resvg.svg_to_bytes(svg_string=svg, width=size))))
