"""Processes of one job that are stopped, stuck or killed: the others end with a line each, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_runs import rows, training

from dalle_cli.training import distributed


def launch(chain, out, *sets):
    settings = ("steps=400", "checkpoint_every=20", "validate_every=400", "log_every=5", *sets)
    more = [part for setting in settings for part in ("--set", f"prior.train.{setting}")]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.Popen(
        [*launcher, "-m", "dalle_cli", *map(str, training(chain, "prior", out, *more))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_checkpoint(child, folder, seen=()):
    while not (found := set(folder.glob("checkpoint-*.safetensors")) - set(seen)):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    return found


def workers(child):
    """The launcher's processes by rank."""
    ids = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    ranks = {}
    for number in map(int, ids):
        try:
            environ = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        ranks |= {int(pair[5:]): number for pair in environ if pair.startswith(b"RANK=")}
    return ranks


def last_words(child):
    """The one line that a failing job says beside the launcher's own, and all that it wrote."""
    _, stderr = child.communicate(timeout=60)
    assert child.returncode != 0
    lines = [line for line in stderr.splitlines() if line.startswith("dalle:") or "stopped after" in line]
    assert len(lines) == 1, stderr
    return lines[0], stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_stuck_process_is_waited_for_no_longer_than_told(chain, tmp_path):
    """Nobody sees that a process stands still but those that wait for it."""
    child = launch(chain, tmp_path / "prior.safetensors", "timeout=5")
    wait_for_checkpoint(child, tmp_path / "prior.run")
    stuck = workers(child)[1]
    os.kill(stuck, signal.SIGSTOP)
    while 0 in workers(child):  # the launcher waits for the stuck one, which does not hear its signal
        time.sleep(0.1)
        assert child.poll() is None
    os.kill(stuck, signal.SIGKILL)
    assert "found one gone or stuck" in last_words(child)[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_process_ends_the_run_and_a_signal_stops_all(chain, tmp_path):
    out, folder = tmp_path / "prior.safetensors", tmp_path / "prior.run"
    child = launch(chain, out)
    wait_for_checkpoint(child, folder)
    os.kill(workers(child)[0], signal.SIGKILL)
    began = time.monotonic()
    line, stderr = last_words(child)
    assert time.monotonic() - began < 30
    assert "expected all 2 processes to go on, found one gone or stuck" in line
    assert 'File "' + str(Path(distributed.__file__).parent) not in stderr  # no traceback of ours
    seen = set(folder.glob("checkpoint-*.safetensors"))

    child = launch(chain, out)
    wait_for_checkpoint(child, folder, seen)
    child.send_signal(signal.SIGTERM)
    line, stderr = last_words(child)
    assert "resuming from update" in stderr
    stopped = int(line.split()[3].rstrip(";"))
    assert sorted(folder.glob("checkpoint-*.safetensors"))[-1].name == f"checkpoint-{stopped:08d}.safetensors"
    logged = [row["step"] for row in rows(out)]
    assert logged == sorted(set(logged)) == list(range(5, 5 * (stopped // 5) + 1, 5))
    assert not out.exists()
