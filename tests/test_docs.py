"""Every stage has help, an example that parses, and a row in the README."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
from conftest import run_cli

from dalle_cli import cli

ROOT = Path(__file__).parent.parent
STAGES = {name: text for group in cli.STAGES.values() for name, text in group.items()}


def module(name):
    return importlib.import_module(f"dalle_cli.commands.{name.replace('-', '_')}")


def command(name):
    group = typer.main.get_command(cli.app)
    return group.get_command(None, name)


def test_every_stage_is_in_the_table():
    """A module of commands/ with a `run` is a stage; the others are what stages share."""
    files = [path.stem for path in (ROOT / "dalle_cli/commands").glob("*.py")]
    stages = {name.replace("_", "-") for name in files if hasattr(module(name), "run")}
    assert stages == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_help(name):
    shown = run_cli(name, "--help")
    assert shown.status == 0
    assert f"Usage: dalle {name} " in shown.stdout
    assert STAGES[name] == inspect.getdoc(module(name).run).splitlines()[0]
    assert STAGES[name].split()[0] in shown.stdout
    assert "Example:\n" in shown.stdout
    for parameter in command(name).params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert parameter.help, f"{name} {parameter.opts} has no help"


@pytest.mark.parametrize("name", STAGES)
def test_the_example_parses(name):
    lines = [line for line in module(name).EXAMPLE.splitlines() if not line.startswith("export DALLE_MODEL=")]
    parts = [shlex.split(part) for line in lines for part in line.split(" | ")]
    assert any(words[1] == name for words in parts)
    for words in parts:
        assert words[0] == "dalle"
        command(words[1]).make_context(words[1], words[2:], resilient_parsing=False).close()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("width", ["40", "200"])
def test_help_can_be_read_and_its_example_copied(name, width):
    """Arguments and values by plain names, no bounds of 19 digits, and an example that no narrow terminal breaks."""
    shown = run_cli(name, "--help", env={"COLUMNS": width, "TERMINAL_WIDTH": width}).stdout
    usage, _, rest = shown.partition("\n\n")
    assert not set("{}<>") & set(usage)
    assert " <" not in rest
    assert "92233720" not in rest
    assert shown.endswith("Example:\n" + "".join(f"  {line}\n" for line in module(name).EXAMPLE.splitlines()))
    for parameter in command(name).params:
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False):
            assert parameter.metavar, f"{name} {parameter.opts} has no word for its value"
        shown_n = "-n" in parameter.opts and not parameter.hidden  # everywhere the number of candidates
        assert not shown_n or "--samples" in parameter.opts


def table_rows(text):
    """The first cell of each row of each table of a Markdown text."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|") and line.count("|") > 2]


@pytest.mark.parametrize("name", STAGES)
def test_a_row_in_the_readme(name):
    rows = table_rows((ROOT / "README.md").read_text())
    assert any(re.search(rf"`(dalle )?{name}\b[^`]*`", cell) for cell in rows), name
