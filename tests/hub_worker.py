"""Commands in a process that has a hub on loopback for its hub, and a cache of its own: fixtures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Result, start
from hub_server import Hub

ROOT = Path(__file__).parents[1]

# huggingface-hub reads its environment once, when it is imported: commands run in one process that has the right one.
WORKER = """
import json, sys
from conftest import run_cli
from dalle_cli.hub import transfer
from dalle_cli.importing import known
from planted_publication import IMPORTER
real = known.importers
known.importers = lambda: iter([IMPORTER, *real()])
for line in sys.stdin:
    given = json.loads(line)
    transfer._resolve.cache_clear()
    transfer._kind.cache_clear()
    print(json.dumps(run_cli(*given["args"], env=given["env"])), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    running = Hub()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """The environment of commands that talk to the server, with a cache of their own."""
    home = tmp_path_factory.mktemp("home")
    names = (
        "HF_TOKEN",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HUGGING_FACE_HUB_TOKEN",
        "DALLE_MODEL",
        "TRANSFORMERS_OFFLINE",
    )
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    return {**kept, **ours, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def worker(environment):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def dalle(worker):
    """`dalle ARGS` where the server is the hub; of `token`, if any, and with more environment."""

    def run(*args, token="", **env):
        given = {"args": [str(a) for a in args], "env": {"HF_TOKEN": token, **env}}
        worker.stdin.write(json.dumps(given) + "\n")
        worker.stdin.flush()
        return Result(*json.loads(worker.stdout.readline()))

    return run


@pytest.fixture
def good(dalle):
    def run(*args, token=""):
        result = dalle(*args, token=token)
        assert result.status == 0, result.stderr
        return result.stdout.removesuffix("\n")

    return run


@pytest.fixture
def bad(dalle):
    """A command that must fail in one line: the line."""

    def run(*args, token=""):
        result = dalle(*args, token=token)
        assert result.status == 1, result
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("dalle: error: expected ")
        assert ", found " in line
        assert "; " in line
        return line

    return run


@pytest.fixture
def quiet(server):
    """The server, with an empty log and without faults."""
    server.log.clear()
    server.served.clear()
    server.leaked.clear()
    server.stalled.clear()
    yield server
    for faults in (server.changed, server.cut, server.stall):
        faults.clear()
    server.status, server.reset = 0, False


def alone(environment, *args, **more):
    """`dalle ARGS` in a process of its own."""
    process = start(*args, env={**environment, **more})
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # where nobody listens
