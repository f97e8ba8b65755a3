"""Self-contained HTML pages: pictures, data and style inside, nothing from a network.

Shapes: H W pixels.
"""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.artifacts.text import check_ours, head_of


def data_uri(picture: NDArray[np.uint8] | Image.Image) -> str:
    """A picture, (3, H, W) uint8 or PIL's, as the data URI of a PNG without metadata."""
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def embed(value: object) -> str:
    """JSON that may stand inside <script type="application/json">: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def fill(template: str, slots: Mapping[str, str]) -> str:
    """A template of this folder with `{{name}}` filled in, as it stands: escape what is not HTML; `style` is page.css.

    What is filled in is not looked at for slots again.
    """
    folder = Path(__file__).parent
    known = {"style": (folder / "page.css").read_text(encoding="utf-8"), **slots}
    text = (folder / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: known[slot[1]], text)


def check_page(path: Path, generator: str, force: bool = False) -> None:
    """Refuse to replace anything but a page whose <meta name="generator"> says `generator`, unless forced.

    Raises:
        DalleError: something else lies at `path`.
    """
    tag = f'<meta name="generator" content="{generator}">'
    check_ours(path, f"a page of `{generator}`", lambda path: tag in head_of(path), force)
