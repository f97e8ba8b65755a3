"""Every command has help that can be read, examples that parse, and its place in docs/cli.md, which is fresh."""

import importlib
import importlib.util
import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from conftest import run_cli

from dalle_cli.cli import STAGES, app, load_stage

ROOT = Path(__file__).parent.parent
CLI = ROOT / "docs" / "cli.md"
SUMMARIES = {name: text for group in STAGES.values() for name, text in group.items()}


def command(name):
    return typer.main.get_command(app).get_command(None, name)


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


def test_every_module_of_commands_is_in_the_table():
    paths = [path for path in (ROOT / "dalle_cli/commands").glob("*.py") if path.stem != "__init__"]
    files = {path.stem.removesuffix("_").replace("_", "-") for path in paths}  # import_.py: a word of Python's
    assert {name for name in files if hasattr(load_stage(name), "run")} == set(SUMMARIES)


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_option_has_help(name):
    shown = run_cli(name, "--help")
    assert shown.status == 0
    assert f"Usage: dalle {name} " in shown.stdout
    assert SUMMARIES[name] == inspect.getdoc(load_stage(name).run).splitlines()[0] == command(name).help
    assert SUMMARIES[name].split()[0] in shown.stdout
    for parameter in command(name).params:
        if parameter.name != "help":
            assert parameter.help, f"dalle {name}: {parameter.name} has no help"
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
            assert parameter.metavar, f"{name} {parameter.opts} has no word for its value"
        is_n = "-n" in parameter.opts and not parameter.hidden  # everywhere the number of candidates
        assert not is_n or "--samples" in parameter.opts


@pytest.mark.parametrize("name", SUMMARIES)
def test_the_example_parses(name):
    lines = [line for line in load_stage(name).EXAMPLE.splitlines() if not line.startswith("export DALLE_MODEL=")]
    parts = [shlex.split(part) for line in lines for part in line.split(" | ")]
    assert any(words[1] == name for words in parts)
    for words in parts:
        assert words[0] == "dalle"
        command(words[1]).make_context(words[1], words[2:], resilient_parsing=False).close()
    assert command(name).epilog == load_stage(name).EXAMPLE


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize("width", ["40", "200"])
def test_help_can_be_read_and_its_example_copied(name, width):
    """Arguments and values by plain names, no bounds of 19 digits, and an example that no narrow terminal breaks."""
    shown = run_cli(name, "--help", env={"COLUMNS": width, "TERMINAL_WIDTH": width}).stdout
    usage, _, rest = shown.partition("\n\n")
    assert not set("{}<>") & set(usage)
    assert " <" not in rest
    assert "92233720" not in rest
    assert shown.endswith("Example:\n" + "".join(f"  {line}\n" for line in load_stage(name).EXAMPLE.splitlines()))
