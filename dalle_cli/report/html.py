"""Self-contained HTML pages from the jinja2 templates of this room: styles, scripts and images are inside.

Whatever a template inserts is escaped. A page runs only its own script and style, and may fetch nothing.
"""

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.artifacts.text import check_overwrite, head_of
from dalle_cli.errors import DalleError
from dalle_cli.viz.charts import number

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> "Environment":
    """The templates of this room.

    Raises:
        DalleError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise DalleError(
            "expected jinja2 to write pages, found it is not installed; run pip install 'dalle-cli[report]'"
        ) from None
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {function.__name__: function for function in (number, size, count, duration, digest_source)}
    return made


def render(template: str, styles: Iterable[str], script: str, **values: object) -> str:
    """A page from a template that extends base.html, with these style sheets and this script of the folder."""
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in styles)
    code = (TEMPLATES / script).read_text(encoding="utf-8")
    return environment().get_template(template).render(style=style, script=code, **values)


def digest_source(text: str) -> str:
    """The name of an inline script or style in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def data_uri(image: NDArray[np.uint8] | Image.Image, **options: object) -> str:
    """An image, (3, H, W) uint8 or PIL's, as a data URI: PNG without metadata, or as Pillow's `options` say."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    options = options or {"format": "PNG", "optimize": True}
    file = io.BytesIO()
    image.save(file, **options)  # type: ignore[arg-type]
    return f"data:image/{str(options['format']).lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def check_page(path: Path, generator: str, force: bool = False) -> None:
    """Refuse to replace anything but a page whose <meta name="generator"> says `generator`, unless forced.

    Raises:
        DalleError: something else lies at `path`.
    """
    tag = f'<meta name="generator" content="{generator}">'
    check_overwrite(path, f"a page of `{generator}`", lambda path: tag in head_of(path), force)


def size(n_bytes: int) -> str:
    """12 kB, 3.7 MB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if n_bytes >= 10**power:
            return f"{n_bytes / 10**power:.3g} {unit}"
    return f"{n_bytes} bytes"


def count(n: int, one: str) -> str:
    """1 image, 1,200 images."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """48 s, 6 min, 3.2 h, 2.5 days."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
