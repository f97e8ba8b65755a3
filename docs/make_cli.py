"""Write docs/cli.md to stdout, from the help of `dalle` and of its commands, without importing torch.

Run `make docs`. The help is laid out at a width of 100 columns, whatever the terminal, so that it is the same anywhere.
"""

import sys
from typing import Any

import typer.main

from dalle_cli.cli import STAGES, app, load_stage

WIDTH = 100
HEAD = """# Command reference

Made from the commands' own `--help` by `make docs`; edit the help, not this page.

A command takes its inputs as arguments and writes to `-o`. It prints the path of what it wrote to standard output, so
commands chain in a pipe; everything else goes to standard error. The exit status is 0; 1 for an error that a person can
mend, in one line; 2 for wrong usage; 130 after an interruption.
"""


def context_of(command: Any, name: str, parent: Any = None) -> Any:
    """A command's context, as if called without arguments, laid out at WIDTH."""
    widths = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    return command.make_context(name, [], parent, resilient_parsing=True, **widths)


def help_of(context: Any) -> str:
    """The help of a command."""
    text: str = context.get_help()
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def stage_help(root: Any, name: str) -> str:
    """One command: its help without the example, which follows as a block of its own that can be copied."""
    command = root.command.get_command(root, name)
    command.epilog = None
    shown = help_of(context_of(command, name, root))
    return f"### dalle {name}\n\n```text\n{shown}\n```\n\n```sh\n{load_stage(name).EXAMPLE}\n```\n"


def render() -> str:
    """The whole page."""
    root = context_of(typer.main.get_command(app), "dalle")
    parts = [HEAD, f"```text\n{help_of(root)}\n```\n"]
    for title, stages in STAGES.items():
        parts.append(f"## {title}\n")
        parts += [stage_help(root, name) for name in stages]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
