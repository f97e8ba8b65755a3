"""A process that is killed again and again, at any moment, leaves a run that ends in the very same bytes."""

import itertools
import random
import signal
import time

import pytest
from conftest import run_ok, start
from stage_runs import lasting_rows

SETTINGS = (
    *("checkpoint_every=2", "log_every=1", "validate_every=20", "ema_every=3", "clip_norm=1.0"),
    *("schedule=plateau", "plateau_patience=1", "plateau_metric=-image_nats"),
)


def command(chain, out, steps):
    """A prior that writes a checkpoint every few milliseconds, so that many a kill comes in the middle of one."""
    inputs = (chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe, "--dtype", "float32")
    more = itertools.chain.from_iterable(
        ("--set", f"prior.train.{setting}") for setting in (*SETTINGS, f"steps={steps}")
    )
    return ("train-prior", *inputs, *more, "-o", out)


def end(child, sign):
    child.send_signal(sign)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL), stderr


def stop(chain, out, steps, sign, seconds):
    """Start or go on, and end the process so long after it has written a checkpoint."""
    folder = out.parent / f"{out.stem}.run"
    seen = set(folder.glob("checkpoint-*"))
    child = start(*command(chain, out, steps))
    while not set(folder.glob("checkpoint-*")) - seen:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.005)
    time.sleep(seconds)
    end(child, sign)
    assert not out.exists()


def check(chain, out, steps):
    """Go on to the end: all is as in a run that nothing came between."""
    whole = out.with_name("whole.safetensors")
    run_ok(*command(chain, whole, steps))
    folder = out.parent / f"{out.stem}.run"
    (folder / ".checkpoint-00000500.safetensors.0123abcd.part").write_bytes(b"cut off")
    (folder / ".tmpbPtPdJ").write_bytes(b"cut off by safetensors")
    run_ok(*command(chain, out, steps))
    assert out.read_bytes() == whole.read_bytes()
    assert not list(folder.glob(".*"))
    rows = lasting_rows(out)
    assert rows == lasting_rows(whole)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert len({row["lr"] for row in rows if "lr" in row}) > 1  # the plateau cut, somewhere between the kills


def test_killed_twice(chain, tmp_path):
    chance = random.Random(0)
    for _ in range(2):
        stop(chain, tmp_path / "out.safetensors", 120, signal.SIGKILL, 0.2 * chance.random())
    check(chain, tmp_path / "out.safetensors", 120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_again_and_again(chain, tmp_path, seed):
    """Five times while it trains, once while it starts, and at last interrupted."""
    chance, out = random.Random(seed), tmp_path / "out.safetensors"
    for kill in range(7):
        if kill == 3:
            child = start(*command(chain, out, 280))
            time.sleep(2 * chance.random())
            end(child, signal.SIGKILL)
        else:
            stop(chain, out, 280, signal.SIGKILL if kill < 6 else signal.SIGINT, 0.3 * chance.random())
    check(chain, out, 280)
