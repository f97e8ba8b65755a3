"""What `sample` and `generate` keep of a picture: its codes, and which of them are not drawn anew.

Shapes: W side of the code grid, S side of a picture in pixels.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from PIL import Image

    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.dvae import DVAE

WHITE = 128  # of a mask's 0 to 255, from which on it counts as white


@dataclass(frozen=True)
class Asked:
    """What the options say of a picture."""

    image: str | None = None
    keep_rows: int | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        said = {"--keep-rows": self.keep_rows, "--mask": self.mask}
        given = [name for name, value in said.items() if value is not None]
        if given and self.image is None:
            raise DalleError(f"expected --image beside {given[0]}, found none; say of which picture codes are kept")
        if len(given) == 2:
            raise DalleError("expected --keep-rows or --mask, found both; leave one out")


@dataclass(frozen=True)
class Kept:
    """Codes (W, W) int64 of a picture, whether each is kept (W, W) bool, and what a history says of that."""

    codes: Any
    cells: Any
    options: dict[str, Any]
    inputs: "dict[str, Artifact | str]"

    def __str__(self) -> str:
        return f"{int(self.cells.sum())} of {self.cells.size} codes"


def again(asked: Asked, entry: dict[str, Any], source: object) -> Asked:
    """What `sample --from` keeps: what the drawing of `source` kept, of the same files, which must be given once more.

    Raises:
        DalleError: they are not given, or others are.
    """
    from dalle_cli.artifacts import digest_bytes
    from dalle_cli.hub import bundles as bundle

    for name in ("image", "mask"):
        wanted, path = entry["inputs"].get(name), getattr(asked, name)
        if wanted is None and path is not None:
            raise DalleError(f"expected no --{name}, found {path}: {source} was drawn without; leave it out")
        if wanted is not None and path is None:
            raise DalleError(
                f"expected --{name} (sha256 {wanted[:12]}), as {source} was drawn with, found none; give that file"
            )
        if path is not None:
            bundle.check_digest(name, digest_bytes(_bytes(path, f"--{name}")), wanted, source)
    rows = entry["options"].get("keep_rows")
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise DalleError(f"expected a number of rows that {source} kept, found {rows!r}; the file lies")
    return asked if asked.keep_rows is not None else replace(asked, keep_rows=rows)


def of_bundle(asked: Asked, prior: "Artifact", model: str | None, machine: "Arithmetic") -> Kept | None:
    """As `read`, with the dVAE of `model`, which must be the prior's.

    Raises:
        DalleError: it is another, or there is none; and as `read`.
    """
    from dalle_cli.commands.drawing import decoder
    from dalle_cli.hub import bundles as bundle

    if asked.image is None:
        return None
    vae = bundle.weights(model, "weights.dvae")
    return read(asked, vae, decoder(vae, prior.fact("encoder", str), prior.path, machine), machine)


def read(asked: Asked, vae: "Artifact", dvae: "DVAE", machine: "Arithmetic") -> Kept | None:
    """Encode the picture as `encode-images` does, with the dVAE of the weights `vae`; None where there is no picture.

    Raises:
        DalleError: no picture, or no mask, that can be read; more rows than there are.
    """
    import numpy as np

    from dalle_cli.artifacts import digest_bytes
    from dalle_cli.commands.encode_images import encode
    from dalle_cli.data.augment import center

    if asked.image is None:
        return None
    grid = dvae.config.grid
    data = _bytes(asked.image, "--image")
    pixels = center(_picture(data, "--image", asked.image), dvae.config.image_size)
    codes = encode(dvae, pixels.transpose(2, 0, 1)[None].copy(), machine)[0].astype(np.int64)
    inputs: dict[str, Artifact | str] = {"dvae": vae, "image": digest_bytes(data)}
    if asked.mask is not None:
        mask = _bytes(asked.mask, "--mask")
        cells = ~touched(_picture(mask, "--mask", asked.mask), grid)
        return Kept(codes, cells, {}, {**inputs, "mask": digest_bytes(mask)})
    rows = grid // 2 if asked.keep_rows is None else asked.keep_rows
    if not 0 <= rows <= grid:
        raise DalleError(f"expected --keep-rows from 0 to {grid}, found {rows}; the codes have {grid} rows")
    return Kept(codes, np.repeat(np.arange(grid)[:, None] < rows, grid, axis=1), {"keep_rows": rows}, inputs)


def touched(mask: "Image.Image", grid: int) -> Any:
    """Which codes are drawn anew: those of whose patch, whole pixels, any is white: (W, W) bool.

    Of a mask that is not square the middle square counts, as of the picture.
    """
    import numpy as np

    side = min(mask.size)
    left, top = ((length - side) // 2 for length in mask.size)
    white = np.asarray(mask.convert("L").crop((left, top, left + side, top + side))) >= WHITE
    cuts = [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    rows = np.stack([white[cut].any(axis=0) for cut in cuts])
    return np.stack([rows[:, cut].any(axis=1) for cut in cuts], axis=1)


def _bytes(path: str, option: str) -> bytes:
    """Raises: DalleError if there is nothing to be read."""
    from dalle_cli.data import files

    try:
        return files.read(path)
    except OSError as error:
        raise DalleError(f"expected a picture, found {error.strerror or error}: {path}; check {option}") from None


def _picture(data: bytes, option: str, path: str) -> "Image.Image":
    """Raises: DalleError if it is no picture, or too large a one."""
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.images import decode
    from dalle_cli.data.skips import BadSample

    try:
        return decode(data, Filters())
    except BadSample as reason:
        raise DalleError(f"expected a picture, found {path} {reason}; check {option}") from None
