"""The paper's data filters (Ramesh et al. 2021, app. C); all but `max_pixels` are off by default.

The paper drops captions that are not English with a trained classifier; `min_latin` looks at the script only.
"""

import re
from dataclasses import dataclass

from dalle_cli.data.skips import BadSample

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?"
    r"|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DATE = (
    rf"\d{{1,2}}(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH},?\s+\d{{4}}"  # 12 May 2014
    rf"|{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}"  # May 12, 2014
    rf"|{_MONTH},?\s+\d{{4}}"  # May 2014
    r"|\d{4}[-/.:]\d{1,2}[-/.:]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}"  # 2014-05-12, 12.5.14
)
_TIME = r"\d{1,2}:\d{2}(?::\d{2})?(?:\s*[ap]\.?m\.?)?"
_PHRASE = (
    r"(?:(?:photo|photograph|picture|image|video|file|screenshot)s?\s+)?"
    r"(?:photographed|taken|captured|shot|posted|published|uploaded|added|updated|created|recorded|seen|pictured)"
    r"(?:\s+(?:on|in|at|by))?"
)
_BOILERPLATE = re.compile(rf"\b(?:{_PHRASE}\s+)?(?:on\s+)?(?:{_DATE})(?:,?\s+(?:at\s+)?{_TIME})?", re.IGNORECASE)


def is_boilerplate(caption: str) -> bool:
    """Whether dates and phrases such as "photographed on 12 May 2014" are at least half of the caption."""
    rest = _BOILERPLATE.sub("", caption)
    return rest != caption and 2 * len(rest.strip()) <= len(caption)


def latin_share(caption: str) -> float:
    """The share of a caption's letters that are Latin, in [0, 1]; 1 if it has no letters."""
    letters = [c for c in caption if c.isalpha()]
    return sum(c < "\u0250" or "\u1e00" <= c < "\u1f00" for c in letters) / len(letters) if letters else 1.0


@dataclass(frozen=True)
class Filters:
    """Which samples to skip; each is counted with its reason."""

    min_caption_chars: int = 0  # the paper drops "very short" captions, without a number
    drop_boilerplate: bool = False  # captions that are mostly a date, see is_boilerplate
    min_latin: float = 0.0  # least share of Latin letters in a caption
    max_aspect: float = 0.0  # longer side over shorter; 0 = off; the paper keeps [1/2, 2], so 2.0
    max_pixels: int = 64_000_000  # width x height, read from the header before any pixel is decoded

    def captions(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """The captions that pass.

        Raises:
            BadSample: none passes, or there is none.
        """
        if not captions:
            raise BadSample("without caption")
        reasons = [self._reason(caption) for caption in captions]
        kept = tuple(caption for caption, reason in zip(captions, reasons, strict=True) if not reason)
        if not kept:
            raise BadSample(reasons[0])
        return kept

    def _reason(self, caption: str) -> str:
        if len(caption) < self.min_caption_chars:
            return "short caption"
        if self.drop_boilerplate and is_boilerplate(caption):
            return "boilerplate caption"
        if self.min_latin and latin_share(caption) < self.min_latin:
            return "caption not in Latin script"
        return ""

    def size(self, width: int, height: int) -> None:
        """Check an image's size in pixels, as its header gives it.

        Raises:
            BadSample: too many pixels, or filtered by its aspect ratio.
        """
        if width * height > self.max_pixels:
            raise BadSample(f"oversized: {width}x{height}")
        if self.max_aspect and max(width, height) > self.max_aspect * min(width, height):
            raise BadSample(f"aspect ratio: {width}x{height}")
