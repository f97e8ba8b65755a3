"""`dalle survey`: a blind comparison of two sets of images by people.

Sides and order are random and differ between raters. The page needs no network, resumes where a rater stopped, and
saves the votes as a file.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from dalle_cli.errors import DalleError
from dalle_cli.options import OUT, Force, Json, PromptFile, Seed, arg, opt

EXAMPLE = """dalle survey ours.best.safetensors theirs.best.safetensors --prompts prompts.txt -o survey.html
dalle survey --tally votes-anna.json votes-ben.json -o tally.json"""


Files = Annotated[
    list[Path] | None,
    arg(
        "A B | VOTES...",
        "Two images artifacts to compare by prompt, by the first image of each; with --tally, files that the page "
        "saved.",
    ),
]
Target = Annotated[
    Path | None, opt("FILE", "Where to write; else survey.html beside A, and the results of a tally on stdout.", *OUT)
]
Votes = Annotated[
    int, opt("N", "Votes wanted per caption (the paper: 5): give the page to so many people.", "--votes", min=1)
]
Tally = Annotated[bool, opt(None, "Count votes instead of making a page.", "--tally")]


def run(
    files: Files = None,
    out: Target = None,
    prompts: PromptFile = None,
    votes: Votes = 5,
    tally: Tally = False,
    seed: Seed = 0,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Let people compare two sets of images: one HTML page, and the tally of their votes."""
    given = files or []
    if tally:
        if prompts is not None:
            raise DalleError("expected files of votes alone with --tally, found --prompts; leave it out")
        _tally(given, out, seed, as_json, force)
    elif len(given) != 2:
        raise DalleError(f"expected two images artifacts to compare, found {len(given)}; give A and B, or --tally")
    elif as_json:
        raise DalleError("expected --json with --tally, found it alone; leave it out: a page is a file")
    else:
        _page(given[0], given[1], out, prompts, votes, seed, force)


def _page(a: Path, b: Path, out: Path | None, prompts: Path | None, votes: int, seed: int, force: bool) -> None:
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.artifacts.text import write_text
    from dalle_cli.pipelines.prompts import read_prompts
    from dalle_cli.report import html, survey

    target = out or a.with_name("survey.html")
    html.check_page(target, survey.GENERATOR, force)
    left, right = open_artifact(a, "images"), open_artifact(b, "images")
    texts = None if prompts is None else read_prompts(None, prompts)
    pairs = survey.pair(left, right, texts)
    write_text(target, survey.page(left, right, pairs, votes, seed))
    console.result(target, captions=len(pairs), raters_wanted=votes, megabytes=target.stat().st_size / 1e6)


def _tally(files: list[Path], out: Path | None, seed: int, as_json: bool, force: bool) -> None:
    from dalle_cli import console
    from dalle_cli.artifacts.text import check_overwrite, read_json_key, write_text
    from dalle_cli.report import survey

    if not files:
        raise DalleError("expected files of votes, found none; give those that the page saved")
    if out is not None:
        check_overwrite(out, "a tally", lambda path: read_json_key(path, "format") == survey.TALLY, force)
    found = survey.tally([survey.read_ballot(file) for file in files], seed)
    if short := found["captions_short"]:
        wanted = f"{found['votes_wanted']} votes"
        console.warn(f"{short} of {found['captions']} captions have fewer than {wanted}; let more people vote")
    if out is not None:
        write_text(out, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    if as_json:
        console.emit_json(found)
    elif out is None:
        console.emit(_text(found))
    else:
        shares = {f"majority_for_A_{name}": q["majority"] for name, q in found["questions"].items()}
        console.result(out, raters=len(found["raters"]), captions=len(found["by_caption"]), **shares)


def _text(found: dict[str, Any]) -> str:
    """The results as plain text."""
    raters, judged, captions = len(found["raters"]), len(found["by_caption"]), found["captions"]
    people = f"{raters} rater{'' if raters == 1 else 's'}"
    lines = [f"survey {found['survey'][:12]}: {judged} of {captions} captions judged by {people}"]
    for name, about in found["questions"].items():
        of = about["captions"]
        lines.append(f"{name}:")
        lines.append(f"  A wins {of['A']} captions, B {of['B']}, ties {of['tie']}")
        lines.append(f"  majority for A {_share(about['majority'], about['majority_interval'])}")
        lines.append(f"  votes for A    {_share(about['share'], about['share_interval'])}")
        if about["agreement"] is not None:
            alpha = "" if about["alpha"] is None else f", Krippendorff's alpha {about['alpha']:.2f}"
            lines.append(f"  raters agree   {about['agreement']:.1%}{alpha}")
    lines.append(f"the image on the left or on top got {found['first_share']:.1%} of the votes")
    return "\n".join(lines)


def _share(share: float | None, interval: list[float] | None) -> str:
    if share is None or interval is None:
        return "undecided"
    return f"{share:.1%} (95%: {interval[0]:.1%} to {interval[1]:.1%})"
