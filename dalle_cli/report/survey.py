"""A human preference survey of two sets of images (Ramesh et al. 2021, sec. 3.1 and fig. 7): its page, its tally.

The page knows each image by a key, a hash of survey, caption and side, and votes name keys. Only hashing both sides
again tells which key is A's: neither the page nor a file of votes says it.

Shapes: N captions, C choices.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_cli import console
from dalle_cli.artifacts import Artifact, digest_bytes
from dalle_cli.errors import DalleError
from dalle_cli.report import html

QUESTIONS = {"realistic": "Which image is more realistic?", "matches": "Which image matches the caption better?"}
GENERATOR = "dalle survey"
VOTES, TALLY = "dalle survey votes", "dalle survey tally"  # the `format` of either file
VERSION = 1
SIDES = ("A", "B")
CONFIDENCE = 0.95
RESAMPLES, AT_ONCE = 10_000, 100  # of the bootstrap: in all, and in memory at once


@dataclass(frozen=True)
class CaptionPair:
    """A caption with the row of its image in A and in B."""

    caption: str
    a: int
    b: int


@dataclass(frozen=True)
class Vote:
    """A rater's answers on one caption: the side shown first (left, or on top), and the choice per question."""

    caption: str
    first: str
    chosen: dict[str, str]


@dataclass(frozen=True)
class Ballot:
    """One rater's file of votes; `inputs` are the SHA-256 of A and B, `captions` and `wanted` the survey's numbers."""

    path: Path
    rater: str
    survey: str
    inputs: tuple[str, ...]
    captions: int
    wanted: int
    votes: list[Vote]


def pair(a: Artifact, b: Artifact, prompts: Sequence[str] | None = None) -> list[CaptionPair]:
    """The captions of `prompts`, or else of both A and B, with the first image of each, which `rerank` puts best.

    Raises:
        DalleError: images have no captions, a prompt is missing on one side, or no caption is on both.
    """
    first: list[dict[str, int]] = [{}, {}]
    for side, rows in zip((a, b), first, strict=True):
        if "text" not in side:
            raise DalleError(f"expected images with their prompts, found none in {side.path}; sample them from prompts")
        for row, text in enumerate(side.strings("text")):
            rows.setdefault(text.strip(), row)
        rows.pop("", None)
    common = [caption for caption in first[0] if caption in first[1]]
    wanted = common if prompts is None else list(dict.fromkeys(prompts))
    for side, rows in zip((a, b), first, strict=True):
        if missing := [prompt for prompt in wanted if prompt not in rows]:
            rest = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
            found = f"none of {missing[0]!r}{rest} in {side.path}"
            raise DalleError(f"expected images of all prompts, found {found}; sample them, or correct --prompts")
    if not wanted:
        found = f"none in common of {a.path} and {b.path}"
        raise DalleError(f"expected captions that both have, found {found}; sample both from the same prompts")
    return [CaptionPair(caption, first[0][caption], first[1][caption]) for caption in wanted]


def key(survey: str, caption: str, side: str) -> str:
    """The name of an image in page and votes."""
    return digest_bytes("\0".join((survey, caption, side)).encode())[:16]


def page(a: Artifact, b: Artifact, pairs: Sequence[CaptionPair], wanted: int, seed: int) -> str:
    """The survey as one HTML page, in an order that reveals no side.

    Raises:
        DalleError: A and B are the same, or jinja2 is not installed.
    """
    if a.digest == b.digest:
        found = f"the same in {a.path} and {b.path}"
        raise DalleError(f"expected two sets of images to compare, found {found}; give another as B")
    identity = [VERSION, a.digest, b.digest, [[p.caption, p.a, p.b] for p in pairs], seed]
    survey = digest_bytes(json.dumps(identity).encode())
    pixels_a, pixels_b = a.array("images"), b.array("images")
    items = []
    with console.progress("survey", len(pairs), unit="captions") as advance:
        for p in pairs:
            sides = (("A", pixels_a[p.a]), ("B", pixels_b[p.b]))
            shown = sorted((key(survey, p.caption, side), html.data_uri(np.asarray(pixels))) for side, pixels in sides)
            items.append((shown, p.caption))
            advance()
    facts = {
        **{"format": VOTES, "version": VERSION, "survey": survey, "inputs": [a.digest, b.digest], "wanted": wanted},
        "questions": list(QUESTIONS.items()),
        "items": [{"caption": caption, "images": shown} for shown, caption in sorted(items)],  # by hash
    }
    styles, title = ("page.css", "survey.css"), "Which image is better?"
    return html.render("survey.html", styles, "survey.js", generator=GENERATOR, title=title, values=facts)


def read_ballot(path: Path) -> Ballot:
    """The file that a survey's page saved.

    Raises:
        DalleError: it cannot be read, is another kind of file, or its votes do not belong to the survey it names.
    """
    try:
        return _ballot(path, json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        fault = "no JSON"
    except KeyError as error:
        fault = f"no {error}"
    except TypeError:
        fault = "malformed facts"
    except OSError as error:
        fault = (error.strerror or str(error)).lower()
    except ValueError as error:
        fault = str(error)
    said = f"expected votes that a survey's page saved, found {fault} in {path}"
    raise DalleError(f"{said}; save them again, or leave the file out")


def _ballot(path: Path, value: Any) -> Ballot:
    """Raises: KeyError, ValueError or TypeError if these are no votes."""
    if not isinstance(value, dict) or value.get("format") != VOTES:
        raise ValueError("something else")
    if value["version"] != VERSION:
        raise ValueError(f"version {value['version']!r}")
    survey, rater, inputs, *numbers = (value[name] for name in ("survey", "rater", "inputs", "captions", "wanted"))
    if not all(type(n) is int and n > 0 for n in numbers) or not isinstance(inputs, list) or len(inputs) != 2:
        raise ValueError("malformed facts")
    if not all(isinstance(text, str) for text in (survey, rater, *inputs)):
        raise ValueError("malformed facts")
    if not _normalize(rater):
        raise ValueError("no rater")
    votes = [_vote(survey, entry) for entry in value["votes"]]
    if not 0 < len(votes) <= numbers[0]:
        raise ValueError(f"{len(votes)} votes on {numbers[0]} captions")
    caption, most = Counter(vote.caption for vote in votes).most_common(1)[0]
    if most > 1:
        raise ValueError(f"two votes for {caption!r}")
    return Ballot(path, rater, survey, tuple(inputs), numbers[0], numbers[1], votes)


def _vote(survey: str, entry: dict[str, Any]) -> Vote:
    caption = entry["caption"]
    sides = {key(survey, caption, side): side for side in SIDES}
    first, chosen = entry["first"], {question: entry[question] for question in QUESTIONS}
    if not {first, *chosen.values()} <= set(sides):
        raise ValueError(f"a vote of another survey for {caption!r}")
    return Vote(caption, sides[first], {question: sides[image] for question, image in chosen.items()})


def _normalize(rater: str) -> str:
    """A rater's name without case and extra space, which do not make another rater."""
    return " ".join(unicodedata.normalize("NFC", rater).casefold().split())


def _check_ballots(ballots: Sequence[Ballot]) -> None:
    first, raters = ballots[0], dict[str, Ballot]()
    for ballot in ballots:
        if ballot.survey != first.survey:
            found = f"{first.survey[:12]} in {first.path} and {ballot.survey[:12]} in {ballot.path}"
            raise DalleError(f"expected votes of one survey, found {found}; tally them apart")
        before = raters.setdefault(_normalize(ballot.rater), ballot)
        if before is not ballot:
            found = f"{ballot.rater!r} in {before.path} and in {ballot.path}"
            raise DalleError(f"expected one file of each rater, found {found}; leave one out")


def tally(ballots: Sequence[Ballot], seed: int = 0) -> dict[str, Any]:
    """The results of a survey as JSON.

    Raises:
        DalleError: files belong to several surveys, or two of them to one rater.
    """
    _check_ballots(ballots)
    votes = [vote for ballot in ballots for vote in ballot.votes]
    captions = sorted({vote.caption for vote in votes})
    counts = {}
    for question in QUESTIONS:
        chosen = Counter((vote.caption, vote.chosen[question]) for vote in votes)
        counts[question] = np.array([[chosen[caption, side] for side in SIDES] for caption in captions])
    each = counts["realistic"].sum(1)  # each vote answers both questions
    about = ballots[0]
    return {
        **{"format": TALLY, "version": VERSION, "survey": about.survey, "confidence": CONFIDENCE},
        "inputs": dict(zip(SIDES, about.inputs, strict=True)),
        "raters": sorted(ballot.rater for ballot in ballots),
        **{"captions": about.captions, "votes_wanted": about.wanted},
        "captions_short": about.captions - int((each >= about.wanted).sum()),
        "first_share": float(np.mean([side == vote.first for vote in votes for side in vote.chosen.values()])),
        "questions": {question: preference(count, seed) for question, count in counts.items()},
        "by_caption": [
            {"caption": caption, **{q: dict(zip(SIDES, counts[q][row].tolist(), strict=True)) for q in QUESTIONS}}
            for row, caption in enumerate(captions)
        ],
    }


def preference(counts: NDArray[np.int64], seed: int) -> dict[str, Any]:
    """The result of one question: votes (N, 2) for A and B; a caption's majority is the side with more votes.

    The majority share leaves out ties; its interval is Wilson's. Votes on a caption depend on each other, so the share
    of single votes has a bootstrap interval over captions.
    """
    a, b = counts.T
    won, lost = int((a > b).sum()), int((b > a).sum())
    agreement, alpha = agree(counts)
    return {
        "captions": {"A": won, "B": lost, "tie": len(counts) - won - lost},
        "majority": won / (won + lost) if won + lost else None,
        "majority_interval": wilson(won, won + lost) if won + lost else None,
        "votes": {"A": int(a.sum()), "B": int(b.sum())},
        "share": float(a.sum() / counts.sum()),
        "share_interval": bootstrap(a, counts.sum(1), seed),
        "agreement": agreement,
        "alpha": alpha,
    }


def wilson(won: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share (1927)."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    center = (won + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (won * (total - won) / total + z2 / 4)) / (total + z2)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(
    won: NDArray[np.int64], total: NDArray[np.int64], seed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(won) / sum(total), (N,) each, over captions."""
    random, shares = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // AT_ONCE):
        rows = random.integers(len(won), size=(AT_ONCE, len(won)))
        shares.append(won[rows].sum(1) / total[rows].sum(1))
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def agree(counts: NDArray[np.int64]) -> tuple[float | None, float | None]:
    """The share of other raters of a caption who agree, and Krippendorff's nominal alpha; votes are (N, C).

    Alpha is 1 where all agree, and 0 where agreement is that of chance. Without a caption of two votes both are None;
    alpha is None also where all votes are alike.
    """
    counts = counts[counts.sum(1) > 1]
    each, total = counts.sum(1), int(counts.sum())
    if not total:
        return None, None
    differ = float(((counts * (each[:, None] - counts)).sum(1) / (each - 1)).sum() / total)
    of_choice = counts.sum(0)
    by_chance = float((of_choice * (total - of_choice)).sum() / (total * (total - 1)))
    return 1 - differ, 1 - differ / by_chance if by_chance else None
