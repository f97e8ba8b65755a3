"""A checkpoint that does not fit the model: the one before it serves."""

import pytest
import torch
from toy_task import SplitToy, config, run_of, train_toy, trainer

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.training import resuming

CHANGES = {
    "a weight of another shape": ("model/first.weight", torch.zeros(3, 3)),
    "an average of another shape": ("ema/last.bias", torch.zeros(2)),
    "a weight too many": ("model/first.other", torch.zeros(1)),
    "a moment of another shape": ("optimizer/first.weight:exp_avg", torch.zeros(8)),
    "a moment of no weight": ("optimizer/none:exp_avg", torch.zeros(8)),
    "a count that is a list": ("optimizer/first.weight:step", torch.zeros(2)),
    "a plateau of another kind": ("loop/plateau/state", torch.zeros(5)),
    "a sum that is a matrix": ("loop/logged/sum/x", torch.zeros(2, 2)),
    "a weight gone": ("model/first.weight", None),
    "an unknown part": ("other/first.weight", torch.zeros(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_does_not_fit(tmp_path, name):
    whole, c = train_toy(tmp_path / "whole", config(keep=3)), config(keep=3)
    train_toy(tmp_path / "cut", c)
    run = run_of(tmp_path / "cut", c)
    run.out.unlink()
    *_, before, last = run.checkpoints()
    found, (key, value) = open_artifact(last), CHANGES[name]
    tensors = {**load_tensors(found), **({} if value is None else {key: value})}
    if value is None:
        del tensors[key]
    save_tensors(last, "checkpoint", tensors, found.config, found.history, force=True)
    fits = resuming.fits(trainer(tmp_path / "other", c).model, {})
    assert run.checkpoint(run.latest(fits)[0]) == before
    assert train_toy(tmp_path / "cut", c) == whole


def test_a_checkpoint_of_another_update(tmp_path):
    c = config(keep=3)
    train_toy(tmp_path, c)
    run = run_of(tmp_path, c)
    first, last = run.checkpoints()[0], run.checkpoints()[-1]
    last.write_bytes(first.read_bytes())
    assert run.latest()[0] == max(int(path.stem[-8:]) for path in run.checkpoints() if path != last)


def test_its_own_checkpoint_fits(tmp_path):
    c = config()
    loop = trainer(tmp_path, c, SplitToy)
    fits = resuming.fits(loop.model, {})
    train_toy(tmp_path, c)
    for path in run_of(tmp_path, c).checkpoints():
        shapes = {name: info.shape for name, info in open_artifact(path).headers[0].tensors.items()}
        assert fits(shapes, True)
        part = {name: shape for name, shape in shapes.items() if "first" in name}
        assert fits(part, False)
        assert not fits(part, True)
