"""The colors of things: which hue leads in an image, what that color is called, and the hue turned to another color.

Shapes: an image is (H, W, 4) uint8 or, without alpha, (..., 3) float in [0, 1]. Hues are degrees.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# name -> hue, greatest saturation, and, where it is not the image's own, mean saturation
TARGETS: dict[str, tuple[float, float, float | None]] = {
    "red": (0, 0.95, None),
    "orange": (29, 1, None),
    "yellow": (51, 1, None),
    "green": (122, 0.72, None),
    "turquoise": (176, 0.8, None),
    "blue": (217, 0.9, None),
    "purple": (273, 0.75, None),
    "pink": (328, 0.9, None),
    "brown": (22, 1, 0.42),
    "gray": (0, 0, 0.0),
}
# the lightness from which an image still looks yellow when its hue is: a dark green thing would be olive
LEAST_LIGHT = {"yellow": 0.44, "orange": 0.38, "pink": 0.34}
NAMED = 0.5  # of the ink that has the leading hue, from which that is the color of the thing
LIKE = 36.0  # RGB distance from the image's own colors within which a turned one is no other color
# color, hues from and to, least saturation, greatest lightness
NAMES = (
    ("red", 0, 14, 0.7, 0.66),
    ("orange", 16, 36.5, 0.9, 0.64),
    ("yellow", 36.5, 62, 0.85, 0.72),
    ("green", 62, 165, 0.35, 0.7),
    ("blue", 190, 238, 0.5, 0.8),
    ("purple", 238, 312, 0.3, 0.7),
    ("pink", 312, 345, 0.5, 0.9),
    ("red", 345, 360, 0.6, 0.66),
)
VIVID = 0.72  # least mean saturation of a turned color, so that a brown dog becomes a blue one
NEAR, FAR = 38.0, 62.0  # degrees from the leading hue within which a pixel turns wholly, and beyond which it stays
SHARE = 0.62  # of the saturated ink within NEAR, from which a hue leads
INKED = 0.4  # of the ink that is saturated, from which an image has a hue at all


class Leading(NamedTuple):
    """An image's leading hue, mean saturation and lightness of the ink that has it, and its share of all ink."""

    hue: float
    saturation: float
    lightness: float
    share: float


def to_hsl(rgb: Floats) -> tuple[Floats, Floats, Floats]:
    """Hue in degrees, saturation and lightness in [0, 1]: (..., 3) float -> three of (...)."""
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    safe = np.where(chroma > 1e-6, chroma, 1)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sector = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    lightness = (high + low) / 2
    span = 1 - np.abs(2 * lightness - 1)
    saturation = np.where(span > 1e-6, chroma / np.where(span > 1e-6, span, 1), 0)
    return (sector * 60 * (chroma > 1e-6)).astype(np.float32), saturation.clip(0, 1), lightness


def to_rgb(hue: Floats, saturation: Floats, lightness: Floats) -> Floats:
    """The inverse of `to_hsl`."""
    reach = saturation * np.minimum(lightness, 1 - lightness)
    k = (np.array([0, 8, 4], np.float32) + hue[..., None] / 30) % 12
    wave: Floats = np.clip(np.minimum(k - 3, 9 - k), -1, 1).astype(np.float32)
    return lightness[..., None] - reach[..., None] * wave


def apart(a: Floats | float, b: float) -> Floats:
    """How far hues are from one, in degrees with sign, in [-180, 180)."""
    return (np.asarray(a, np.float32) - b + 180) % 360 - 180


def leading(image: Pixels) -> Leading | None:
    """The hue that leads in an image with alpha, or None where there is none."""
    ink = image[..., 3] > 127
    hue, saturation, lightness = to_hsl(image[ink][:, :3].astype(np.float32) / np.float32(255))
    weight = saturation * (1 - np.abs(2 * lightness - 1))  # chroma: what an eye sees of a hue
    seen = weight > 0.16
    if seen.mean() < INKED:
        return None
    places = np.arange(0, 360, 4.0)
    distance = np.abs((hue[seen][None] - places[:, None] + 180) % 360 - 180)
    soft = (np.exp(-((distance / 18) ** 2)) * weight[seen]).sum(1)
    own = distance[int(soft.argmax())]
    middle = float(places[int(soft.argmax())])
    around = own <= NEAR
    if weight[seen][around].sum() < SHARE * weight[seen].sum():
        return None
    share = weight[seen][around] / weight[seen][around].sum()
    exact = middle + float((apart(hue[seen][around], middle) * share).sum())
    return Leading(
        exact % 360,
        float((saturation[seen][around] * share).sum()),
        float(lightness[seen][around].mean()),
        float(around.sum() / ink.sum()),
    )


def name(own: Leading) -> str:
    """What a leading hue is called, or "" where people would not agree: beige, slate, coral."""
    hue, saturation, lightness, share = own
    if share < NAMED:
        return ""
    if 10 <= hue < 40 and saturation < 0.7 and lightness < 0.64:
        return "brown"
    for color, start, end, least, lightest in NAMES:
        if start <= hue < end and saturation >= least and lightness <= lightest:
            return color
    return ""


def turn(image: Pixels, own: Leading, color: str) -> Pixels:
    """The image with its leading hue turned to a named color; lightness, alpha and other hues stay."""
    hue, saturation, lightness = to_hsl(image[..., :3].astype(np.float32) / np.float32(255))
    target, most, wanted = TARGETS[color]
    gain = max(1.0, VIVID / own.saturation) if wanted is None else wanted / own.saturation
    offset = apart(hue, own.hue)
    share = np.clip((FAR - np.abs(offset)) / (FAR - NEAR), 0, 1)[..., None]
    turned = to_rgb((target + offset * 0.5) % 360, np.minimum(saturation * gain, most), lightness)
    rgb = image[..., :3] / 255 * (1 - share) + turned * share
    return np.dstack([np.rint(rgb * 255).astype(np.uint8), image[..., 3]])


def choices(image: Pixels, own: Leading) -> tuple[str, ...]:
    """The colors that a thing can be turned to and be seen to have, without that which it has."""
    ink = image[..., 3] > 127
    found = []
    for color in TARGETS:
        turned = turn(image, own, color)[ink][:, :3].astype(np.float32)
        distance = float(np.sqrt(((turned - image[ink][:, :3]) ** 2).sum(-1)).mean())
        if color != name(own) and distance > LIKE and own.lightness >= LEAST_LIGHT.get(color, 0):
            found.append(color)
    return tuple(found)
