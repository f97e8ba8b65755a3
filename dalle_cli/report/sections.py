"""The pictures of a report: sheets that training drew, what was drawn for prompts, and picture files beside them."""

import statistics
from pathlib import Path

from PIL import Image

from dalle_cli.report import images as gallery
from dalle_cli.report.images import Drawn, Set
from dalle_cli.report.markup import Html, count, el, join
from dalle_cli.report.scan import Findings, Training

AT_FIRST = 10  # prompts that are in sight; the others unfold
NO_SIDES: dict[str, int] = {}
SMALL, SIDE, SMALL_SIDE = 64, 160, 96  # pixels: a picture up to so large is shown by whole pixels; sides on the page


def sheets(found: Findings) -> Html:
    """What each training drew of held-out data, by update."""
    drawn = [training for training in found.trainings if training.sheets]
    parts = [_stepper(training, gallery.SHEET_BYTES // len(drawn), found) for training in drawn]
    return join(part for part in parts if part)


def _stepper(training: Training, most: int, found: Findings) -> Html:
    chosen = gallery.spread(training.sheets)
    pictures = {path: gallery.read(path) for path in chosen}
    for path, picture in pictures.items():
        if isinstance(picture, str):
            found.notes.append(f"{found.name(path)}: {picture}")
    whole = [(path, picture) for path, picture in pictures.items() if isinstance(picture, Image.Image)]
    whole.reverse()  # the last matters most
    shown = gallery.show([picture for _, picture in whole], most)
    figures = [
        _sheet(path, picture, uri) for (path, picture), uri in zip(whole, shown.uris, strict=True) if uri is not None
    ][::-1]
    if not figures:
        return Html()
    rest = len(training.sheets) - len(figures)
    told = f"{len(figures)} of {count(len(training.sheets), 'sheet')} shown. " if rest else ""
    told += "Made smaller as JPEG." if shown.lossy else ""
    last = len(figures) - 1
    slider = el("input", {"type": "range", "min": 0, "max": last, "value": last, "aria-label": "update"})
    parts = (*figures, el("label", None, "first", slider, "last") if last else "")
    note = el("p", {"class": "faint"}, told) if told else ""
    return join((el("h3", None, training.name), el("div", {"class": "stepper"}, *parts), note))


def _sheet(path: Path, picture: Image.Image, uri: str) -> Html:
    when = f"after {count(int(path.stem), 'update')}" if path.stem.isdecimal() else path.stem
    image = el("img", {"src": uri, "alt": f"sheet {when}", "width": picture.width, "height": picture.height})
    return el("figure", None, el("figcaption", None, when), image)


def samples(found: Findings) -> Html:
    """What was drawn, by prompt, the best first where it is scored."""
    sets = gallery.sets(found.of_kind("images"))
    return join(_set(one, gallery.DRAWN_BYTES // len(sets), found) for one in sets)


def _set(one: Set, most: int, found: Findings) -> Html:
    drawn = [place for group in one.prompts.values() for place in group]
    # The first of each prompt before any second, so that what there is no room for is missing evenly.
    ranks = [number for group in one.prompts.values() for number in range(len(group))]
    order = sorted(range(len(drawn)), key=lambda number: (ranks[number], number))
    pictures = [drawn[number].picture() for number in order]
    shown = gallery.show(pictures, most)
    figures = {number: (picture, uri) for number, picture, uri in zip(order, pictures, shown.uris, strict=True)}
    if shown.left_out:
        found.notes.append(f"{one.item.name}: {count(shown.left_out, 'picture')} more than the page has room for")
    lone = all(len(group) == 1 for group in one.prompts.values())
    blocks: dict[str, list[Html]] = {text: [] for text in one.prompts}
    texts = [text for text, group in one.prompts.items() for _ in group]
    for number, (place, text) in enumerate(zip(drawn, texts, strict=True)):
        picture, uri = figures[number]
        if uri:
            first = one.source is not None and place.score is not None
            blocks[text].append(_picture(place, picture, uri, text, "first" if first and not lone else None, lone))
    body = _cards(blocks) if lone else _strips(blocks)
    return join((el("h3", None, one.item.label), el("p", {"class": "faint"}, _told(one, shown.lossy)), body))


def _picture(place: Drawn, picture: Image.Image, uri: str, text: str, look: str | None, captioned: bool) -> Html:
    """A picture on the page, small ones enlarged by a whole factor; its score, and its prompt where it stands alone."""
    longest = max(picture.size)
    factor = max(1, -(-SMALL_SIDE // longest)) if longest <= SMALL else min(1.0, SIDE / longest)
    sides = {"width": round(picture.width * factor), "height": round(picture.height * factor)}
    image = el("img", {"src": uri, "alt": text, "class": "small" if longest <= SMALL else None, **sides})
    score = "" if place.score is None else f"{place.score:.3f}"
    told = (text, el("span", {"class": "faint"}, f" {score}") if score else "") if captioned else (score,)
    caption = el("figcaption", None, *told) if captioned or score else ""
    return el("figure", {"class": look}, image, caption)


def _cards(blocks: dict[str, list[Html]]) -> Html:
    return el("div", {"class": "cards"}, *(figure for group in blocks.values() for figure in group))


def _strips(blocks: dict[str, list[Html]]) -> Html:
    """A row for each prompt."""
    rows = [
        el("div", {"class": "prompt"}, el("h4", None, text), el("div", {"class": "strip"}, *group))
        for text, group in blocks.items()
        if group
    ]
    if len(rows) <= AT_FIRST + 2:
        return join(rows)
    unfold = el("summary", None, count(len(rows) - AT_FIRST, "more prompt"))
    return join((*rows[:AT_FIRST], el("details", {"class": "rest"}, unfold, *rows[AT_FIRST:])))


def _told(one: Set, lossy: bool) -> str:
    """What stands here, of how many."""
    parts = [f"{count(one.rows, 'picture')} of {count(one.n_prompts, 'prompt')}"]
    if one.source:
        parts = [f"The best by CLIP among {one.each} for each of {count(one.n_prompts, 'prompt')}, framed"]
        if any(len(group) > 1 for group in one.prompts.values()):
            parts.append(f"beside it others of {one.source.label}, as they were drawn")
    if one.scores:
        low, high = min(one.scores), max(one.scores)
        told = f"score (cosine): median {statistics.median(one.scores):.3f}"
        parts.append(f"{told}, {low:.3f} to {high:.3f}" if len(one.scores) > 1 else told)
    if len(one.prompts) < one.n_prompts:
        parts.append(f"the first {len(one.prompts)} prompts are shown")
    if lossy:
        parts.append("as JPEG")
    return "; ".join(parts) + "."


def loose(found: Findings, beside_scores: set[Path]) -> Html:
    """Picture files in the folder, folded where the page shows pictures anyhow."""
    paths = [path for path in found.pictures if path not in beside_scores]
    shut = bool(found.of_kind("images"))
    parts = []
    for path, image in files(paths, found).items():
        parts.append(el("details", {"class": "loose", "open": not shut}, el("summary", None, found.name(path)), image))
    return join(parts)


def files(paths: list[Path], found: Findings) -> dict[Path, Html]:
    """Picture files as images, those that can be read and that there is room for."""
    images: dict[Path, Html] = {}
    most = gallery.LOOSE_BYTES // max(1, len(paths))
    for path in paths:
        picture = None if path.suffix.lower() == ".svg" else gallery.read(path)
        if picture is None:
            uri, sides, fault = gallery.drawing(path, most), NO_SIDES, "too large"
        elif isinstance(picture, str):
            uri, sides, fault = None, NO_SIDES, picture
        else:
            (uri,) = gallery.show([picture], most).uris
            sides, fault = {"width": picture.width, "height": picture.height}, "too large for the page"
        if uri:
            images[path] = el("img", {"src": uri, "alt": found.name(path), **sides})
        else:
            found.notes.append(f"{found.name(path)}: left out, {fault}")
    return images
