"""The things of the world: their names in English and Korean, what they may wear, who walks and who is walked.

things.tsv has one a line. Places are shares of the thing's square in hundredths: `head` is where a hat's lower edge
lies (x, y, width), `eyes` and `neck` the middles of glasses and scarf, `waist` that of a tutu, `collar` (x, y) where a
leash ends.
`walks` is "yes", or "legs" for what is given a pair of legs when it walks something.
"""

import csv
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

TABLE = Path(__file__).parent / "things.tsv"
WORN = {  # what is worn -> where, and its width in that of the place
    "crown": ("head", 0.9),
    "top hat": ("head", 1.1),
    "party hat": ("head", 0.8),
    "cap": ("head", 1.15),
    "graduation cap": ("head", 1.2),
    "ribbon": ("head", 0.85),
    "glasses": ("eyes", 1.0),
    "sunglasses": ("eyes", 1.0),
    "scarf": ("neck", 1.0),
    "tutu": ("waist", 1.0),
}
PLACES = ("head", "eyes", "neck", "waist", "collar")
# Adjectives of Korean colors end in their own ways; each is said in two forms.
COLORS: dict[str, tuple[str, str]] = {
    "red": ("빨간", "빨간색"),
    "orange": ("주황", "주황색"),
    "yellow": ("노란", "노란색"),
    "green": ("초록", "초록색"),
    "turquoise": ("청록", "청록색"),
    "blue": ("파란", "파란색"),
    "purple": ("보라", "보라색"),
    "pink": ("분홍", "분홍색"),
    "brown": ("갈색", "갈색"),
    "gray": ("회색", "회색"),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 243, 191),
    "green": (212, 240, 208),
    "blue": (205, 226, 255),
    "purple": (230, 214, 250),
    "pink": (255, 214, 226),
    "gray": (198, 200, 206),
}


@dataclass(frozen=True)
class Thing:
    """One line of the table; `places` maps a place to its numbers."""

    icon: str
    name: str
    plural: str
    korean: str
    counter: str
    walks: str
    places: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def bare(self) -> bool:
        """Whether the name takes no article and is not counted, such as "glasses" or "cheese"."""
        return self.plural == "-"

    @cached_property
    def at(self) -> dict[str, tuple[float, ...]]:
        """Its places by name, in shares of its square."""
        return dict(self.places)

    @property
    def wears(self) -> tuple[str, ...]:
        """What can be laid on it."""
        return tuple(worn for worn, (place, _) in WORN.items() if place in self.at and worn != self.name)


@lru_cache(maxsize=1)
def table() -> dict[str, Thing]:
    """Every thing by its English name, in the order of the file."""
    found = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            places = tuple(
                (place, tuple(int(n) / 100 for n in row[place].split(","))) for place in PLACES if row[place] != "-"
            )
            walks = row["walks"].replace("-", "")
            names = (row["icon"], row["name"], row["plural"], row["korean"], row["counter"])
            found[row["name"]] = Thing(*names, walks=walks, places=places)
    return found


def article(phrase: str) -> str:
    """ "a" or "an", by the sound that a phrase begins with."""
    sounds_like_you = phrase.startswith(("uni", "use", "eu"))
    return "an" if phrase[0].lower() in "aeiou" and not sounds_like_you else "a"


def particle(word: str, pair: str) -> str:
    """A Korean word with the particle that its last sound asks for: `pair` is "이가", "을를", "은는" or "과와"."""
    code = ord(word[-1]) - 0xAC00
    return word + (pair[0] if 0 <= code < 11172 and code % 28 else pair[1])
