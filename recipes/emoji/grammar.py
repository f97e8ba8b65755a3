"""Captions of scenes in English and Korean, and the scene that a caption states: one set of templates for both ways.

A caption is built from the inside: noun phrases, what stands between them, "a picture of", the style, the background.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import things
from things import COLORS, GROUNDS, WORN, article, particle

STYLES = ("noto", "flat")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
COUNTS = {1: ("one", "1", "한"), 2: ("two", "2", "두"), 3: ("three", "3", "세"), 4: ("four", "4", "네")}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
KOREAN_SIZES = {"small": ("작은", "조그만"), "large": ("큰", "커다란")}
KOREAN_GROUNDS = {"white": ("하얀", "흰색"), **{name: COLORS[name] for name in GROUNDS if name != "white"}}
KOREAN_STYLES = {"noto": "노토", "flat": "플랫"}
WEARING = {  # Korean verbs, by what is worn or where
    "ribbon": ("단", "달고 있는"),
    "head": ("쓴", "쓰고 있는"),
    "eyes": ("쓴", "쓰고 있는"),
    "neck": ("두른", "두르고 있는"),
    "waist": ("입은", "입고 있는"),
}

# a and b are noun phrases; of Korean ones the particle that follows is in the braces. The first is the commonest.
BODIES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "left": ("{a} left of {b}", "{a} to the left of {b}", "{a} on the left of {b}"),
        "right": ("{a} right of {b}", "{a} to the right of {b}", "{a} on the right of {b}"),
        "above": ("{a} above {b}", "{a} over {b}"),
        "below": ("{a} below {b}", "{a} under {b}"),
        "beside": ("{a} next to {b}", "{a} beside {b}"),
        "with": ("{a} and {b}",),
        "walks": ("{a} walking {b}", "{a} walking {b} on a leash", "{a} that walks {b}", "{a} taking {b} for a walk"),
    },
    "ko": {
        "left": ("{b} 왼쪽에 있는 {a}", "{b} 왼쪽의 {a}", "왼쪽에 {a}, 오른쪽에 {b}"),
        "right": ("{b} 오른쪽에 있는 {a}", "{b} 오른쪽의 {a}", "오른쪽에 {a}, 왼쪽에 {b}"),
        "above": ("{b} 위에 있는 {a}", "{b} 위의 {a}"),
        "below": ("{b} 아래에 있는 {a}", "{b} 밑의 {a}"),
        "beside": ("{b} 옆에 있는 {a}", "{b} 옆의 {a}"),
        "with": ("{a과와} {b}", "{a} 그리고 {b}"),
        "walks": ("{b을를} 산책시키는 {a}", "{b을를} 산책시키고 있는 {a}", "{b과와} 산책하는 {a}"),
    },
}
WRAPPERS = {
    "en": ("{x}", "a picture of {x}", "an image of {x}", "a drawing of {x}", "an emoji of {x}"),
    "ko": ("{x}", "{x} 그림", "{x} 이미지", "{x} 이모지"),
}
STYLED = {
    "en": ("{x} in {s} style", "{x}, {s} style", "{s} style, {x}"),
    "ko": ("{s} 스타일 {x}", "{s} 스타일의 {x}", "{x}, {s} 스타일"),
}
GROUNDED = {
    "en": ("{x} on a {g} background", "{x}, {g} background", "{x} against a {g} background"),
    "ko": ("{g} 배경의 {x}", "{g} 배경에 있는 {x}", "{x}, {g} 배경"),
}
LANGUAGES = tuple(BODIES)
HANGUL = re.compile("[\uac00-\ud7a3]")


@dataclass(frozen=True)
class Item:
    """A thing as a caption names it; what the caption leaves open is empty."""

    thing: str
    color: str = ""
    size: str = ""
    worn: str = ""
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """One item, or two: the first is `left` of the second, or right, above, below, beside, with it, or `walks` it."""

    items: tuple[Item, ...]
    relation: str = ""
    ground: str = "white"
    style: str = "noto"

    @property
    def kind(self) -> str:
        """The name of what is hardest in it."""
        first = self.items[0]
        if len(self.items) == 2:
            return "walked" if self.relation == "walks" else "pair"
        if first.worn or first.count > 1:
            return "worn" if first.worn else "count"
        if self.style != "noto" or self.ground != "white":
            return "style" if self.style != "noto" else "ground"
        return "color" if first.color else "thing"

    def canonical(self) -> "Scene":
        """The same scene said with "left" or "above" only, so that equal scenes compare equal."""
        if self.relation in ("right", "below"):
            return replace(self, items=self.items[::-1], relation=OPPOSITE[self.relation])
        if self.relation in ("beside", "with"):
            return replace(self, items=tuple(sorted(self.items, key=lambda item: item.thing)))
        return self


# Captions


def _choose(rng: Random, options: tuple[str, ...]) -> str:
    """The first option, which is the plainest, in half of the cases."""
    return options[0] if len(options) == 1 or rng.random() < 0.5 else options[1 + rng.randrange(len(options) - 1)]


def _english(item: Item, rng: Random, bare: bool = False) -> str:
    thing = things.table()[item.thing]
    words = [_choose(rng, SIZES[item.size])] if item.size else []
    words += [item.color] if item.color else []
    joined = ""
    if item.worn:
        worn = things.table()[item.worn]
        if not worn.bare and rng.random() < 0.2:
            words.append(item.worn)
        else:
            one = item.worn if worn.bare else f"{article(item.worn)} {item.worn}"
            joined = f" {_choose(rng, ('wearing', 'in', 'with'))} {one}"
    phrase = " ".join((*words, thing.name if item.count == 1 else thing.plural))
    if item.count > 1:
        phrase = f"{COUNTS[item.count][rng.random() < 0.1]} {phrase}"
    elif not thing.bare and not bare:
        phrase = f"{'one' if rng.random() < 0.06 else article(phrase)} {phrase}"
    return phrase + joined


def _verbs(worn: str) -> tuple[str, ...]:
    return WEARING.get(worn, WEARING[WORN[worn][0]])


def _korean(item: Item, rng: Random, bare: bool = False) -> str:
    thing = things.table()[item.thing]
    words = [_choose(rng, KOREAN_SIZES[item.size])] if item.size else []
    words += [_choose(rng, COLORS[item.color])] if item.color else []
    words.append(thing.korean)
    counted = f"{COUNTS[item.count][2]} {thing.counter}"
    if item.count > 1 and rng.random() < 0.3:
        words.insert(0, f"{counted}의")
    elif item.count > 1 or (not bare and not item.worn and not thing.bare and rng.random() < 0.06):
        words.append(counted)
    if item.worn:
        verb = _choose(rng, _verbs(item.worn))
        words.insert(0, f"{particle(things.table()[item.worn].korean, '을를')} {verb}")
    return " ".join(words)


def caption(scene: Scene, language: str, rng: Random) -> str:
    """Say a scene in words chosen at random."""
    phrase = _english if language == "en" else _korean
    if len(scene.items) == 1:
        text = phrase(scene.items[0], rng, bare=rng.random() < 0.12)
    else:
        a, b = (phrase(item, rng, bare=language == "ko") for item in scene.items)
        text = _choose(rng, BODIES[language][scene.relation])
        text = re.sub(r"\{([ab])(..)\}", lambda m: particle(a if m[1] == "a" else b, m[2]), text).format(a=a, b=b)
    styled = scene.style != "noto" or rng.random() < 0.03
    if rng.random() < 0.25 and not styled:
        text = _choose(rng, WRAPPERS[language][1:]).format(x=text)
    if styled:
        text = _choose(rng, STYLED[language]).format(
            x=text, s={"en": scene.style}.get(language, KOREAN_STYLES[scene.style])
        )
    if scene.ground != "white" or rng.random() < 0.04:
        ground = scene.ground if language == "en" else _choose(rng, KOREAN_GROUNDS[scene.ground])
        text = _choose(rng, GROUNDED[language]).format(x=text, g=ground)
    return text


# Scenes


def _pattern(template: str, slots: dict[str, str]) -> re.Pattern[str]:
    def slot(m: re.Match[str]) -> str:
        group = slots.get(m[1], f"(?P<{m[1]}>.+)")
        return group + (f"[{m[2]}]" if m[2] else "")

    return re.compile(re.sub(r"\{([a-z])(..)?\}", slot, template))


@lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, str]]:
    """Word -> what it means, in each place of a noun phrase."""
    found: dict[str, dict[str, str]] = {
        "en": {},
        "many": {},
        "ko": {},
        "size": {},
        "color": {},
        "ground": {},
        "style": {},
    }
    for thing in things.table().values():
        found["en"][thing.name.lower()] = thing.name
        if not thing.bare:
            found["many"][thing.plural.lower()] = thing.name
        found["ko"][thing.korean] = thing.name
    for target, source in (("size", SIZES), ("size", KOREAN_SIZES), ("color", COLORS), ("ground", KOREAN_GROUNDS)):
        found[target] |= {word: name for name, words in source.items() for word in (name, *words)}
    found["style"] = {word: name for name, korean in KOREAN_STYLES.items() for word in (name, korean)}
    return found


@lru_cache(maxsize=4)
def _patterns(language: str) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    grounds, styles = ("|".join(_tables()[name]) for name in ("ground", "style"))
    slots = {"g": f"(?P<g>{grounds})", "s": f"(?P<s>{styles})"}
    order = sorted(((r, t) for r, own in BODIES[language].items() for t in own), key=lambda pair: -len(pair[1]))
    return {
        "ground": [("", _pattern(t, slots)) for t in GROUNDED[language]],
        "style": [("", _pattern(t, slots)) for t in STYLED[language]],
        "wrapper": [("", _pattern(t, {})) for t in WRAPPERS[language][1:]],
        "body": [(relation, _pattern(t, {})) for relation, t in order],
    }


def _modified(words: list[str], item: Item) -> tuple[list[str], Item]:
    """Take size and color off the front of a noun phrase."""
    if len(words) > 1 and (size := _tables()["size"].get(words[0])):
        words, item = words[1:], replace(item, size=size)
    if len(words) > 1 and (color := _tables()["color"].get(words[0])):
        words, item = words[1:], replace(item, color=color)
    return words, item


def _read_english(text: str) -> Item | None:
    for joiner in (" wearing ", " in ", " with "):
        left, found, right = text.rpartition(joiner)
        worn = _tables()["en"].get(re.sub(r"^an? ", "", right)) if found else None
        if worn in WORN:
            item = _read_english(left)
            return item and replace(item, worn=worn)
    words = text.split(" ")
    counts = {word: n for n, said in COUNTS.items() for word in said[:2]} | {"a": 1, "an": 1}
    count = counts.get(words[0], 1) if len(words) > 1 else 1
    if len(words) > 1 and words[0] in counts:
        words = words[1:]
    words, item = _modified(words, Item("", count=count))
    nouns = _tables()["en" if count == 1 else "many"]
    if (thing := nouns.get(" ".join(words))) is not None:
        return replace(item, thing=thing)
    for cut in range(1, len(words)):
        worn, thing = _tables()["en"].get(" ".join(words[:cut])), nouns.get(" ".join(words[cut:]))
        if worn in WORN and thing:
            return replace(item, thing=thing, worn=worn)
    return None


def _read_korean(text: str) -> Item | None:
    for worn in WORN:
        for verb in _verbs(worn):
            if text.startswith(front := f"{particle(things.table()[worn].korean, '을를')} {verb} "):
                item = _read_korean(text[len(front) :])
                return item and replace(item, worn=worn)
    count = 1
    for n, (_, _, word) in COUNTS.items():
        if m := re.fullmatch(rf"(?:(?P<a>.+) {word} (?P<c>\S+)|{word} (?P<d>\S+)의 (?P<b>.+))", text):
            text, count = (m["a"] or m["b"]), n
            break
    words, item = _modified(text.split(" "), Item("", count=count))
    thing = _tables()["ko"].get(" ".join(words))
    return replace(item, thing=thing) if thing else None


def _bodies(text: str, language: str) -> Iterator[Scene]:
    read = _read_english if language == "en" else _read_korean
    for relation, pattern in _patterns(language)["body"]:
        if m := pattern.fullmatch(text):
            a, b = read(m["a"]), read(m["b"])
            if a and b:
                yield Scene((a, b), relation)
    if item := read(text):
        yield Scene((item,))


def parse(text: str) -> Scene:
    """The scene that a caption states.

    Raises: ValueError where the words are none of the generator's.
    """
    text = " ".join(text.split()).rstrip(".")
    language = "ko" if HANGUL.search(text) else "en"
    rest, told = text.lower(), {"ground": "white", "style": "noto"}
    for part in ("ground", "style", "wrapper"):
        for _, pattern in _patterns(language)[part]:
            if m := pattern.fullmatch(rest):
                rest = m["x"]
                if part in told:
                    told[part] = _tables()[part][m[part[0]]]
                break
    for scene in _bodies(rest, language):
        return replace(scene, ground=told["ground"], style=told["style"])
    raise ValueError(f"expected a caption of the emoji's world, found {text!r}")
