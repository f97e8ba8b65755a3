"""The documents agree with the code: the command reference, the commands they show, the stages and kinds they list."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from dalle_cli.artifacts.kinds import KINDS, VERSION
from dalle_cli.cli import STAGES, app, load_stage

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CLI = ROOT / "docs" / "cli.md"
ARTIFACTS = ROOT / "docs" / "artifacts.md"
NAMES = [name for group in STAGES.values() for name in group]
PAGES = sorted([README, ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md")])
DTYPES = {"U8", "U16", "I32", "I64", "F16", "F32"}


@pytest.fixture(scope="module")
def root():
    group = typer.main.get_command(app)
    return group.make_context("dalle", [], resilient_parsing=True)


def commands(page):
    """Every command line of `dalle` in a page's code, pipes and continued lines taken apart."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    found = []
    for line in text.splitlines():
        for part in line.split(" | "):
            if re.match(r"\s*dalle [a-z-]+ ", part):
                found.append(part.strip())
    return found


def parse(root, line):
    """Let the command line's own parser judge; a stage is not run. Raises what it raises."""
    words = shlex.split(line, comments=True)
    stage = root.command.get_command(root, words[1])
    assert stage is not None, f"no such stage: {line}"
    return stage.make_context(words[1], words[2:], parent=root)


def test_command_reference_is_fresh_and_made_without_torch():
    code = (
        "import runpy, sys; runpy.run_path('docs/make_cli.py', run_name='__main__');"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'tokenizers'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    env = {"PATH": "", "PYTHONPATH": str(ROOT), "COLUMNS": "40", "DALLE_MODEL": "somewhere", "PYTHONUTF8": "1"}
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout == CLI.read_text(encoding="utf-8"), "docs/cli.md is stale; run `make docs`"


def test_a_stale_reference_would_be_noticed(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    before = make_cli.render()
    monkeypatch.setattr(load_stage("decode"), "EXAMPLE", "dalle decode other.safetensors")
    assert make_cli.render() != before


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_help_for_everything_and_an_example(root, name):
    stage = root.command.get_command(root, name)
    assert stage.help == next(group[name] for group in STAGES.values() if name in group)
    for parameter in stage.params:
        if parameter.name != "help":
            assert parameter.help, f"dalle {name}: {parameter.name} has no help"
    assert f"dalle {name} " in load_stage(name).EXAMPLE
    assert stage.epilog == load_stage(name).EXAMPLE


def test_readme_has_a_row_for_every_stage_in_the_order_of_help():
    rows = re.findall(r"^\| `dalle ([a-z-]+)` \| (.+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row[0] for row in rows] == NAMES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_shown_is_one_that_parses(root, page):
    for line in commands(page):
        parse(root, line.replace("FILE", "file"))


def test_the_pages_show_commands_of_every_stage(root):
    assert {shlex.split(line)[1] for line in commands(CLI)} == set(NAMES)
    assert len(commands(README)) >= 12
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(root, "dalle sample red --no-such-option 3")
    with pytest.raises(Exception, match=r"(?i)missing"):
        parse(root, "dalle train-dvae photos/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


def kind_rows():
    """The table of kinds: (kind, column) -> (dtypes, number of dimensions, always there); strings have no dtypes."""
    rows, kind = {}, ""
    text = ARTIFACTS.read_text(encoding="utf-8").partition("## Kinds")[2].partition("\n## ")[0]
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

    text = ARTIFACTS.read_text(encoding="utf-8").partition("## Config")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.MULTILINE)
    table = {kind: set(re.findall(r"`([a-z_]+)`", keys)) for kind, keys in rows}
    paths = [chain.captions, chain.codes, chain.dvae, chain.clip, chain.prior, chain.drawn, chain.images, chain.best]
    for artifact in map(open_artifact, paths):
        assert set(artifact.config) == table[artifact.kind], artifact.path.name
    run = chain.prior.with_name("prior.run")
    checkpoint = open_artifact(max(run.glob("checkpoint-*.safetensors")), "checkpoint")
    assert set(checkpoint.config) == table["weights.prior.codes"] | {"step"}
    assert {name.partition("/")[0] for name in checkpoint.headers[0].tensors} == {"model", "ema", "optimizer", "loop"}


def test_the_format_names_the_version():
    assert f"specification, version {VERSION}." in ARTIFACTS.read_text(encoding="utf-8").replace("\n", " ")
