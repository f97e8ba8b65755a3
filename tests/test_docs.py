"""The pages agree with the code: commands, links, files, rooms, artifact kinds; and README.ko.md with README.md."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest
import typer
import typer.main
from test_imports import FLOORS

from dalle_cli.artifacts.kinds import KINDS, VERSION
from dalle_cli.cli import STAGES, app

ROOT = Path(__file__).parent.parent
README, KOREAN, ARTIFACTS = ROOT / "README.md", ROOT / "README.ko.md", ROOT / "docs" / "artifacts.md"
ARCHITECTURE, CONTRIBUTING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "contributing.md"
NAMES = [name for group in STAGES.values() for name in group]
GLOBS = ("*.md", "docs/*.md", "recipes/*/*.md", "dalle_cli/bundles/*/README.md")
PAGES = sorted(page for glob in GLOBS for page in ROOT.glob(glob))
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
DTYPES = {"U8", "U16", "I32", "I64", "F16", "F32"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(page):
    return page.read_text(encoding="utf-8")


def commands(page):
    """Every command line of `dalle` in a page's code, pipes and continued lines taken apart."""
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    lines = [part.strip() for line in text.splitlines() for part in line.split(" | ")]
    return [line for line in lines if re.match(r"dalle [a-z-]+ ", line)]


def inline_commands(page):
    """Every `dalle COMMAND ...` within a paragraph or a table but those with placeholders."""
    found = re.findall(r"`(dalle [a-z-]+ [^`]+)`", re.sub(r"\n(?=\S)", " ", FENCE.sub("", text_of(page))))
    return [line for line in found if "..." not in line and not re.search(r" [A-Z](?= |$)", line)]


def links(page):
    text = re.sub(r"<!--.*?-->", "", text_of(page), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def blocks(page):
    """The code of a page: fenced blocks, and runs of lines indented by four."""
    fenced = FENCE.findall(text_of(page))
    return fenced + re.findall(r"(?:^ {4}.*\n)+", FENCE.sub("", text_of(page)), re.MULTILINE)


def rows(page):
    return re.findall(r"^\| `dalle ([a-z-]+)` \| (.+) \| (.+) \|$", text_of(page), re.MULTILINE)


def parse(line):
    """Let the command line's own parser check a line; the command is not run. Raises what it raises."""
    root = typer.main.get_command(app).make_context("dalle", [], resilient_parsing=True)
    words = shlex.split(line, comments=True)
    stage = root.command.get_command(root, words[1])
    assert stage is not None, f"no such command: {line}"
    return stage.make_context(words[1], words[2:], parent=root)


# Commands and links


@every_page
def test_every_command_shown_is_one_that_parses(page):
    for line in [*commands(page), *inline_commands(page)]:
        with contextlib.suppress(typer.Exit):  # after --help
            parse(line.replace("FILE", "file"))


def test_wrong_commands_would_be_noticed():
    assert {shlex.split(line)[1] for line in commands(ROOT / "docs" / "cli.md")} == set(NAMES)
    assert len(commands(README)) >= 12
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse("dalle sample red --no-such-option 3")
    with pytest.raises(Exception, match=r"(?i)missing"):
        parse("dalle train-dvae photos/")


def anchors(page):
    """The anchors that a forge makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        if ":" in name:
            continue
        found = (page.parent / name) if name else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_readme_has_a_row_for_every_command_in_the_order_of_help():
    assert [row[0] for row in rows(README)] == NAMES
    assert len(text_of(README).splitlines()) <= 150


def test_the_index_lists_every_page():
    assert {"../README.md", *(page.name for page in ROOT.glob("docs/*.md"))} - {"README.md"} == set(
        links(ROOT / "docs" / "README.md")
    )


# README.ko.md


def test_the_korean_readme_shows_the_same_code():
    assert blocks(KOREAN) == blocks(README)
    assert len(blocks(README)) >= 7


def test_the_korean_readme_names_the_same_commands_and_links():
    assert [row[0] for row in rows(KOREAN)] == NAMES
    assert sorted({*links(KOREAN)} - {"README.md"}) == sorted({*links(README)} - {"README.ko.md"})
    assert len(links(KOREAN)) >= len(links(README))
    assert text_of(KOREAN).count("\n## ") == text_of(README).count("\n## ")
    quoted = [set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))) for page in (KOREAN, README)]
    assert quoted[0] == quoted[1]


# Rooms


def test_the_picture_of_the_rooms_is_the_order_of_imports():
    section = text_of(ARCHITECTURE).partition("## Import order")[2]
    picture = re.search(r"```text\n(.*?)```", section, re.DOTALL)[1]
    assert tuple(tuple(line.split()) for line in picture.splitlines()) == FLOORS


def test_every_room_has_a_row():
    section = text_of(ARCHITECTURE).partition("## Rooms")[2].partition("## Import order")[0]
    named = {cell.rstrip("/") for cell in re.findall(r"^\| `([a-z_]+/?)` \|", section, re.MULTILINE)}
    assert named == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=lambda page: page.name)
def test_files_and_names_of_the_code_exist(page):
    """A path in backquotes is a file; a constant named before `of PATH` or `in PATH` stands in that file."""
    text = FENCE.sub("", text_of(page))
    examples = {"recipe.toml", "build/NAME.txt", "utils.py"}
    places = [ROOT, ROOT / "dalle_cli", ROOT / "dalle_cli/training", ROOT / "docs"]

    def found(path):
        return next((place / path for place in places if (place / path).exists()), None)

    paths = set(re.findall(r"`([\w./]+\.(?:py|mk|toml|txt|yaml|yml|md))`", text)) - examples
    assert [path for path in paths if found(path) is None] == []
    for name, path in re.findall(r"`([A-Za-z_]\w+)` (?:of|in) `([\w/]+\.py)`", text):
        assert re.search(rf"^(?:def |class )?{name}\b", text_of(found(path)), re.MULTILINE), (name, path)


# Artifacts


def kind_rows():
    """The table of kinds: (kind, column) -> (dtypes, number of dimensions, always there); strings have no dtypes."""
    rows, kind = {}, ""
    text = text_of(ARTIFACTS).partition("## Kinds")[2].partition("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[0] == "kind" or set(cells[0]) == {"-"}:
            continue
        kind = cells[0].strip("`") or kind
        dtypes = tuple(word for word in cells[2].split() if word in DTYPES)
        shape = cells[3].strip("()").split(",") if dtypes else []
        rows[kind, cells[1].strip("`")] = (dtypes, len(shape), "always" in cells[4])
    return rows


def test_the_format_names_every_kind_and_column_as_the_code_has_them():
    expected = {}
    for kind in KINDS.values():
        for name, column in kind.columns.items():
            expected[kind.name, name] = (column.dtypes, column.ndim, column.required)
        for stem, required in kind.strings.items():
            expected[kind.name, f"{stem}.*"] = ((), 0, required)
    written = kind_rows()
    with_rows = {key: value for key, value in written.items() if KINDS[key[0]].rows}
    assert with_rows == expected
    assert {kind for kind, _ in written} == set(KINDS)


def test_the_format_names_every_key_that_headers_have(chain):
    from dalle_cli.artifacts import open_artifact

    text = text_of(ARTIFACTS).partition("## Config")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.MULTILINE)
    table = {kind: set(re.findall(r"`([a-z_]+)`", keys)) for kind, keys in rows}
    paths = [chain.captions, chain.codes, chain.dvae, chain.clip, chain.prior, chain.drawn, chain.images, chain.best]
    for artifact in map(open_artifact, paths):
        assert set(artifact.config) == table[artifact.kind], artifact.path.name
    run = chain.prior.with_name("prior.run")
    checkpoint = open_artifact(max(run.glob("checkpoint-*.safetensors")), "checkpoint")
    assert set(checkpoint.config) == table["weights.prior.codes"] | {"step"}
    assert {name.partition("/")[0] for name in checkpoint.headers[0].tensors} == {"model", "ema", "optimizer", "loop"}


def test_the_format_names_every_sampling_default():
    from dalle_cli.sampling.defaults import RULES

    text = text_of(ARTIFACTS).partition("| entry | value | of |")[2].partition("\n\n")[0]
    cells = " ".join(row[1:].partition("|")[0] for row in text.splitlines())
    assert set(re.findall(r"`(\w+)`", cells)) == set(RULES)


def test_the_format_names_the_version():
    assert f"specification, version {VERSION}." in text_of(ARTIFACTS).replace("\n", " ")
