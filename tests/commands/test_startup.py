"""Help and info answer at once: neither of them imports what they have no need of."""

import json
import os
import subprocess
import sys
import time

import pytest
from artifact_files import sparse

from dalle_cli.cli import STAGES

HEAVY = ("torch", "PIL", "rich", "safetensors", "tokenizers", "transformers", "huggingface_hub", "fsspec")
NAMES = [name for group in STAGES.values() for name in group]

# The modules are written to a file: what the command prints is left as it is.
PROBE = """
import atexit, json, sys
atexit.register(lambda: open(sys.argv.pop(), "w").write(json.dumps(list(sys.modules))) and None)
out, sys.argv = sys.argv[1], ["dalle", *sys.argv[2:]]
from dalle_cli.cli import main
try:
    main()
finally:
    sys.argv.append(out)
"""


def imported(tmp_path, *arguments):
    """The modules that a command imports, and what it prints."""
    out = tmp_path / "modules.json"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(out), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DALLE_MODEL": ""},
    )
    print(f"dalle {' '.join(map(str, arguments))}: {1000 * (time.perf_counter() - began):.0f} ms")
    assert done.returncode == 0, done.stderr
    return set(json.loads(out.read_text())), done.stdout


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), *((name, "--help") for name in NAMES)], ids=" ".join
)
def test_help_imports_nothing_heavy(tmp_path, arguments):
    names, text = imported(tmp_path, *arguments)
    assert names.isdisjoint((*HEAVY, "numpy"))
    assert text
    if len(arguments) == 1:  # of no stage
        assert not [name for name in names if name.startswith("dalle_cli.commands.")]


def test_info_on_a_gigabyte(tmp_path):
    path = sparse(tmp_path / "large.safetensors")
    names, text = imported(tmp_path, "info", path)
    assert names.isdisjoint({*HEAVY} - {"safetensors"})  # its reader alone takes a millisecond to load
    assert "1,073,741,824 parameters" in text
