"""Stages in two processes write what they write in one."""

from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from comparisons import assert_equal
from conftest import run_cli, run_ok, write_pictures
from process_pair import group
from stage_runs import rows, training
from toy_task import machine, run_of

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.models.quantizers import VectorQuantizer
from dalle_cli.training.loop import Trainer


def stage(*args):
    with mock.patch("dalle_cli.cli.GRACE", 0.0):
        result = run_cli(*args)
    assert "Traceback" not in result.stderr
    return tuple(result)


def stages_agree(pair, chain, name, tmp_path, *sets, init=None, **tolerance):
    """A training stage in one process and in two: the same weights; the first process alone speaks."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    more = [part for setting in sets for part in ("--set", f"{name}.train.{setting}")]
    more += [] if init is None else ["--init", init]
    run_ok(*training(chain, name, one, *more))
    results = pair(stage, *map(str, training(chain, name, two, *more)))
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[0][1] == f"{two}\n"
    assert results[1][1:] == ("", "")
    # a bias of keys changes nothing but by rounding, of which AdamW makes whole steps
    found = [
        {n: t for n, t in load_tensors(open_artifact(out)).items() if "k_proj.bias" not in n} for out in (two, one)
    ]
    assert_equal(*found, **tolerance)
    trained = [[row for row in rows(out) if "loss" in row] for out in (one, two)]
    assert len(trained[1]) == len(trained[0]) > 3
    for ours, theirs in zip(*trained, strict=True):  # AdamW would hide gradients of another size
        for figure in ("loss", "grad_norm", "lr"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3)
    again = pair(stage, *map(str, training(chain, name, two, *more)))
    assert "left alone" in again[0][2]


@pytest.mark.parametrize("name", ["prior", "dvae", "clip"])
def test_stages(pair, chain, tmp_path, name):
    stages_agree(pair, chain, name, tmp_path, "clip_norm=10.0", rtol=1e-3, atol=1e-4)


def test_the_prior_in_shards(pair, chain, tmp_path):
    stages_agree(pair, chain, "prior", tmp_path, "parallel=shard", "clip_norm=10.0", rtol=1e-3, atol=1e-5)


def test_a_prior_that_follows_redrawn_sketches(pair, chain, tmp_path):
    """What is left out of a sketch that learns is another pick in each process; one that stays leaves nothing out."""
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    first = tmp_path / "first.safetensors"
    sets = ("--set", "prior.sketch=4", "--set", "prior.sketch_width=60", "--set", "prior.train.sketch_batch=8")
    run_ok(*training(chain, "prior", first, *sets))
    again = ("clip_norm=10.0", "sketch_resampled=0.9")
    stages_agree(pair, chain, "prior", tmp_path, *again, init=first, rtol=1e-3, atol=1e-4)


def test_no_shards_of_a_prior_that_sketches(pair, chain, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    sets = ("--set", "prior.sketch=4", "--set", "prior.train.parallel=shard")
    for status, out, err in pair(stage, *map(str, training(chain, "prior", tmp_path / "a.safetensors", *sets))):
        assert (status, out) == (1, "")
        assert err.startswith('dalle: error: expected parallel = "replicate" for a prior that sketches, found "shard"')


@pytest.mark.parametrize("name", ["dvae", "clip"])
def test_no_shards_of_it(pair, chain, tmp_path, name):
    arguments = training(chain, name, tmp_path / "a", "--set", f"{name}.train.parallel=shard")
    for status, out, err in pair(stage, *map(str, arguments)):
        assert (status, out) == (1, "")
        assert err.startswith(f'dalle: error: expected parallel = "replicate" for {name.upper()}, whose ')


def codebook(data, recipe):
    """The codebook and its usage after some updates, of which the first revives every code."""
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.models.dvae import DVAEConfig
    from dalle_cli.training.dvae import DVAETask, DVAETrain

    sizes = {"image_size": 16, "n_groups": 3, "n_hid": 16, "n_blk_per_group": 1, "n_init": 16}
    c = DVAETrain(steps=4, batch_size=8, lr=1e-3, augment="center", revive_every=2, beta=0.0)
    task = DVAETask(
        DVAEConfig(**sizes, quantizer="vq", n_vocab=12, block="residual"),
        c,
        open_dataset(data, need_captions=False),
        0,
        0,
    )
    loop = Trainer(task, c, run_of(Path(data), c), machine(), 0, group() if dist.is_initialized() else None)
    batches = task.batches(0)
    for _ in range(3):
        loop.update(next(batches))
    assert isinstance(task.model.quantizer, VectorQuantizer)
    return {name: t.clone() for name, t in task.model.quantizer.state_dict().items()}


def test_dead_codes_are_moved_alike(pair, data, recipe):
    one, two = pair(codebook, str(data), str(recipe))
    assert_equal(one, two, rtol=0, atol=0)
    alone = codebook(str(data), str(recipe))
    assert one.keys() == alone.keys()
    assert one["usage"].sum().item() == pytest.approx(alone["usage"].sum().item(), rel=0.2)


def test_pictures_are_encoded_by_shards(pair, chain, tmp_path):
    """The same bytes as one process writes, and the list of what was broken is one."""
    data = write_pictures(tmp_path / "data")
    for number in (2, 17, 21):
        (tmp_path / f"data/broken{number}.png").write_bytes(b"\x89PNG but no more")
    arguments = ("encode-images", data, "-m", chain.dvae, "--shard-size", 4, "--config", chain.recipe)
    run_ok(*arguments, "-o", tmp_path / "one")
    results = pair(stage, *map(str, arguments), "-o", str(tmp_path / "two"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[1][1:] == ("", "")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lists = [(tmp_path / f"{name}.skipped.jsonl").read_text() for name in ("one", "two")]
    assert lists[0] == lists[1] != ""
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    # one shard is missing, and a killed process has left its list
    (tmp_path / "two" / names[3]).unlink()
    (tmp_path / "two.skipped.jsonl").rename(tmp_path / "two.skipped.1.jsonl")
    results = pair(stage, *map(str, arguments), "-o", str(tmp_path / "two"))
    assert (tmp_path / "two" / names[3]).read_bytes() == (tmp_path / "one" / names[3]).read_bytes()
    assert (tmp_path / "two.skipped.jsonl").read_text() == lists[0]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
