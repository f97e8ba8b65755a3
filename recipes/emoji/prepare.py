"""Turn the emoji images of three npm packages, and the captions of a fourth, into WebDataset tars.

Run `python recipes/emoji/prepare.py CACHE OUT`, CACHE being a folder into which `npm pack` fetched PACKAGES. OUT then
holds train.tar and test.tar; nothing withheld (see `split`) is in train.tar. surplus.txt lists the skin tones that
prior and CLIP are trained without. more.tar has further styles (vectors.py), from which only the prior learns; nothing
of them is measured. `--small` writes small.tar instead, the pairs that lie in the repository.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import vectors
from PIL import Image

Row = dict[str, object]

PACKAGES = {  # style -> package and version, as `npm pack` takes them; "captions" is no style
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "captions": "emojibase-data@17.0.0",
}
PICTURES = {
    "fluent": "package/assets/",
    "noto": "package/img/google/64/",
    "twemoji": "package/img/twitter/64/",
}
STYLES = tuple(sorted(PICTURES))  # the split counts them in this order, whichever are asked for
SAID = {
    "en": {"fluent": "fluent 3d", "noto": "noto", "twemoji": "twemoji"},
    "ko": {"fluent": "플루언트 3D", "noto": "노토", "twemoji": "트위모지"},
}
SAID = {language: {**names, **vectors.SAID[language]} for language, names in SAID.items()}
WRONG_FILES = {("fluent", "1f63a")}  # a copy of the cat face under the name of the grinning cat
# Territories sampled with the flag of the country they belong to: where images are equal, these give way.
BORROWED_FLAGS = ("bv", "cp", "cq", "dg", "ea", "hm", "mf", "sj", "um")
FAMILY = re.compile(r"family(:|$)")
TONES = {f"1f3f{digit}" for digit in "bcdef"}

SMALL_COUNT = 600
SMALL_GROUPS = re.compile(
    r"animal-|plant-|food-|drink|face-|cat-face|monkey-face|heart|sky-weather|transport-(?!sign)|"
    r"place-(building|geographic|other)|sport|game|event|musical|clothing|household|tool|light-video|science"
)


@dataclass(frozen=True)
class Emoji:
    """What emojibase says of one code in one language."""

    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


@dataclass(frozen=True)
class EmojiImage:
    """One image on white, at the package's own size."""

    style: str
    stem: str
    code: str
    image: Image.Image


# Codes and the split


def code_of(name: str) -> str:
    """The code that images and captions are joined on: `1F441-FE0F` -> `1f441`, `a9` -> `00a9`."""
    return "-".join(part.zfill(4) for part in name.lower().split("-") if part not in ("fe0f", "fe0e"))


def base_of(code: str) -> str:
    """The code of the concept, which is the same for all skin tones."""
    return "-".join(part for part in code.split("-") if part not in TONES)


def split(style: str, code: str) -> str:
    """`train`, `withheld-concept` (in every style) or `withheld-style` (in exactly this one), by the concept's hash.

    A further style goes with the one that it is akin to.
    """
    number = int(hashlib.sha256(base_of(code).encode()).hexdigest(), 16)
    if number % 20 == 0:
        return "withheld-concept"
    if number % 20 <= 3 and STYLES[number // 20 % len(STYLES)] == vectors.KIN.get(style, style):
        return "withheld-style"
    return "train"


# Captions


def said(label: str) -> str:
    """An English label as a phrase: `man: light skin tone` -> `man with light skin tone`."""
    head, _, rest = label.partition(": ")
    if not rest:
        return label
    if head in ("flag", "keycap"):
        return f"flag of {rest}" if head == "flag" else f"keycap {rest}"
    facts = rest.split(", ")
    having = [fact for fact in facts if re.search(r"skin tone|hair|beard", fact)]
    of = [fact for fact in facts if fact not in having and fact not in ("bald", "facing right")]
    text = f"bald {head}" if "bald" in facts else head
    text += " facing right" if "facing right" in facts else ""
    text += f" of {' and '.join(of)}" if of else ""
    return text + (f" with {' and '.join(having)}" if having else "")


# fmt: off
MASS = frozenset((
    "bacon", "badminton", "baguette bread", "bread", "broccoli", "butter", "camping", "candy", "canned food",
    "construction", "cooked rice", "cooking", "coral", "curry rice", "field hockey", "fire", "flatbread", "fog",
    "garlic", "high voltage", "ice", "lacrosse", "mate", "meat on bone", "oden", "ping pong", "popcorn",
    "pouring liquid", "sake", "salt", "shaved ice", "soap", "spaghetti", "sushi", "tennis", "thread", "wood",
    "yarn",
))
# fmt: on


def with_article(phrase: str, group: str) -> str:
    """Put "a" or "an" before a phrase which names one thing; others are left as they are."""
    plural = phrase.endswith("s") and not phrase.endswith(("ss", "us"))
    thing = group in ("animals-nature", "food-drink", "travel-places", "activities", "objects")
    if not thing or plural or phrase in MASS or not phrase[0].islower() or re.search("o.clock$|-thirty$", phrase):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "eu", "ewe", "one"))
    return f"{'an' if vowel else 'a'} {phrase}"


def captions(emoji: Emoji, style: str, language: str) -> list[str]:
    """Several ways to ask for one image; the last names no style."""
    name = SAID[language][style]
    if language == "ko":
        head, _, rest = emoji.label.partition(": ")
        phrase = f"{rest.replace(',', '')} {head}".strip()
        return [f"{name} 스타일의 {phrase} 이모지", f"{phrase}, {name}", f"{phrase} 이모지, {name} 스타일", phrase]
    phrase = said(emoji.label)
    noun = with_article(phrase, emoji.group)
    found = [f"a {name} style emoji of {noun}", f"{phrase}, {name}", f"{name} emoji of {noun}"]
    words = [word for word in phrase.lower().split() if len(word) > 2]
    tags = [tag for tag in emoji.tags if tag not in phrase.lower() and not any(word in tag for word in words)]
    if tags:
        found.append(f"{phrase}, {', '.join(tags[:2])}, {name}")
    return [*found, noun]


# Packages


def archive_name(cache: Path, package: str) -> Path:
    """Where `npm pack` puts a package: `@scope/name@1.0.0` -> `scope-name-1.0.0.tgz`."""
    return cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")


def archive(cache: Path, package: str) -> Path:
    """The package in the cache, or the end with a line about how to fetch it."""
    path = archive_name(cache, package)
    if not path.exists():
        sys.exit(f"expected {path.name} in {cache}, found none; run: npm pack --pack-destination {cache} {package}")
    return path


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted files in a package."""
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.isfile() and wanted(member.name) and (stream := tar.extractfile(member)) is not None:
                yield member.name, stream.read()


def read_labels(cache: Path, language: str) -> dict[str, Emoji]:
    """What emojibase says of every code, skin tones included."""
    names = (f"package/{language}/data.json", "package/en/messages.json")
    files = {name: json.loads(data) for name, data in members(archive(cache, PACKAGES["captions"]), names.__contains__)}
    groups = {entry["order"]: entry["key"] for entry in files[names[1]]["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in files[names[1]]["subgroups"]}
    table = {}
    for entry in files[names[0]]:
        for variant in (entry, *entry.get("skins", ())):
            group, subgroup = groups.get(entry.get("group"), ""), subgroups.get(entry.get("subgroup"), "")
            table[code_of(variant["hexcode"])] = Emoji(variant["label"], tuple(entry.get("tags", ())), group, subgroup)
    return table


def on_white(image: Image.Image) -> Image.Image:
    """Composite a picture of any mode on white and pad it with white to a square."""
    rgba = image.convert("RGBA")
    side = max(rgba.size)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    return canvas.convert("RGB")


def read_images(cache: Path, style: str) -> list[EmojiImage]:
    """The images of one style, in the order in which the first of equal ones is to be kept."""
    found = []
    folder = PICTURES[style]
    for name, data in members(archive(cache, PACKAGES[style]), lambda name: name.startswith(folder)):
        stem = Path(name).stem
        found.append(EmojiImage(style, stem, code_of(stem), on_white(Image.open(io.BytesIO(data)))))
    flags = {"-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in flag) for flag in BORROWED_FLAGS}
    return sorted(found, key=lambda p: (p.code in flags, p.code != base_of(p.code), p.stem))


def read_vectors(cache: Path, style: str, labels: dict[str, Emoji], size: int) -> list[EmojiImage]:
    """The images of a further style that may be learned from, without skin tones."""
    codes = {vectors.slug(emoji.label): code for code, emoji in sorted(labels.items()) if code == base_of(code)}
    files = vectors.read(archive(cache, vectors.PACKAGES[style]), codes)
    free = [(code, svg) for code, svg in files if split(style, code) == "train"]
    return [EmojiImage(style, code, code, on_white(vectors.render(svg, size))) for code, svg in sorted(free)]


def choose(emojis: list[EmojiImage], labels: dict[str, Emoji]) -> tuple[list[EmojiImage], dict[str, int]]:
    """Drop what has no caption, is a wrong file, equals an earlier image or shows a family; count each."""
    counts = dict.fromkeys(("files", "no caption", "wrong file", "equal picture", "family"), 0)
    seen: set[bytes] = set()
    kept = []
    for emoji in emojis:
        counts["files"] += 1
        pixels = hashlib.sha256(emoji.image.tobytes()).digest()
        if emoji.code not in labels:
            counts["no caption"] += 1
        elif (emoji.style, emoji.code) in WRONG_FILES:
            counts["wrong file"] += 1
        elif pixels in seen:
            counts["equal picture"] += 1
        else:
            seen.add(pixels)
            if FAMILY.match(labels[emoji.code].label):
                counts["family"] += 1
            else:
                kept.append(emoji)
    return sorted(kept, key=lambda p: p.stem), counts


def counted(style: str, emojis: list[EmojiImage], labels: dict[str, Emoji]) -> list[EmojiImage]:
    """What `choose` keeps of a style, and a line about what it does not."""
    kept, counts = choose(emojis, labels)
    print(f"{style}: {len(kept)} pairs of {', '.join(f'{n} {what}' for what, n in counts.items())}", file=sys.stderr)
    return kept


def surplus(emojis: list[EmojiImage], toned: int) -> list[str]:
    """Ids of the variants by skin tone beyond `toned` of each concept and style, chosen by a hash: half of all."""
    variants: dict[tuple[str, str], list[EmojiImage]] = {}
    for emoji in emojis:
        if emoji.code != base_of(emoji.code):
            variants.setdefault((emoji.style, base_of(emoji.code)), []).append(emoji)
    found = []
    for family in variants.values():
        family.sort(key=lambda p: hashlib.sha256(f"{p.style} {p.code}".encode()).digest())
        found += [f"{p.style}-{p.stem}" for p in family[toned:]]
    return sorted(found)


# Writing


def describe(image: EmojiImage, labels: dict[str, dict[str, Emoji]]) -> Row:
    """The JSON member of an image."""
    style, code = image.style, image.code
    emoji = next(iter(labels.values()))[code]
    return {
        "caption": [text for lang, table in labels.items() for text in captions(table[code], style, lang)],
        "label": emoji.label,
        "style": style,
        "code": code,
        "base": base_of(code),
        "group": emoji.group,
        "split": split(style, code),
    }


def encode(image: Image.Image, size: int) -> bytes:
    """Reduce an image to `size` pixels and write it as PNG."""
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_tar(path: Path, emojis: list[EmojiImage], labels: dict[str, dict[str, Emoji]], size: int) -> None:
    """Write images and captions as one WebDataset tar whose bytes depend on nothing else."""
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for emoji in emojis:
            row = json.dumps(describe(emoji, labels), ensure_ascii=False, sort_keys=True)
            for suffix, data in ((".json", row.encode()), (".png", encode(emoji.image, size))):
                info = tarfile.TarInfo(f"{emoji.style}-{emoji.stem}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    partial.replace(path)


def small(emojis: list[EmojiImage], labels: dict[str, Emoji]) -> list[EmojiImage]:
    """About 600 Noto images that are easy to name: no skin tones, people, flags or signs, and nothing withheld."""
    whole = ("animals-nature", "food-drink")
    plain = [p for p in emojis if base_of(p.code) == p.code and split(p.style, p.code) == "train"]
    fit = [p for p in plain if SMALL_GROUPS.match(labels[p.code].subgroup)]
    # Animals, plants and food are kept whole; the rest is thinned by a hash, which favours no kind.
    fit.sort(key=lambda p: (labels[p.code].group not in whole, hashlib.sha256(p.code.encode()).digest()))
    return sorted(fit[:SMALL_COUNT], key=lambda p: p.stem)


def main() -> None:
    """Write the tars and say what was dropped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, nargs="?", help="folder with the packages that npm pack fetched")
    parser.add_argument("out", type=Path, nargs="?", help="folder to write into")
    parser.add_argument("--size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--styles", nargs="+", default=list(STYLES), choices=STYLES, help="(all)")
    parser.add_argument("--language", nargs="+", default=["en"], choices=sorted(SAID), help="of the captions (en)")
    parser.add_argument("--toned", type=int, default=1, help="skin tones of a concept and style not in surplus.txt (1)")
    parser.add_argument("--small", action="store_true", help="write small.tar only: about 600 Noto pairs")
    parser.add_argument("--packages", action="store_true", help="print the packages to fetch, and stop")
    args = parser.parse_args()
    if args.packages:
        print("\n".join((*PACKAGES.values(), *vectors.PACKAGES.values())))
        return
    if args.cache is None or args.out is None:
        parser.error("name the folder of the packages and the folder to write into")
    args.out.mkdir(parents=True, exist_ok=True)
    labels = {language: read_labels(args.cache, language) for language in args.language}
    table = labels[args.language[0]]
    kept: list[EmojiImage] = []
    for style in ["noto"] if args.small else sorted(args.styles):
        kept += counted(style, read_images(args.cache, style), table)
    parts = {"train": [p for p in kept if split(p.style, p.code) == "train"]}
    parts["test"] = [p for p in kept if split(p.style, p.code) != "train"]
    for name, part in {"small": small(kept, table)}.items() if args.small else parts.items():
        write_tar(args.out / f"{name}.tar", part, labels, args.size)
        print(f"{args.out / name}.tar: {len(part)} pairs", file=sys.stderr)
    if not args.small:
        more: list[EmojiImage] = []
        for style in sorted(vectors.PACKAGES):
            more += counted(style, read_vectors(args.cache, style, table, args.size), table)
        write_tar(args.out / "more.tar", more, labels, args.size)
        print(f"{args.out / 'more'}.tar: {len(more)} pairs of further styles", file=sys.stderr)
        ids = surplus(parts["train"], args.toned)
        (args.out / "surplus.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        print(f"{args.out / 'surplus.txt'}: {len(ids)} pairs by skin tone", file=sys.stderr)


if __name__ == "__main__":
    main()
