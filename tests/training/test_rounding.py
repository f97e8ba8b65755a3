"""Weights stored in bfloat16 while they are trained: rounded at random, the mean of many updates is the exact one."""

import pytest
import torch
from conftest import run_bad, run_cli, run_ok
from interruptions import Crash, after_update
from stage_runs import lasting_rows, rows, training
from torch import nn

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.training.optim import EMA, to_bfloat16
from dalle_cli.training.prior import PriorTrain
from dalle_cli.training.rounding import RoundedAdamW, seeded, store_rounded

ROUNDED = ("--set", "prior.train.weights_dtype=bfloat16", "--dtype", "bfloat16")


def test_the_mean_is_exact_and_each_value_a_neighbor():
    value = torch.tensor([1.001, -1.001, 0.3, -2e-30, 0.0, 1.5])
    stored = torch.empty(6, dtype=torch.bfloat16)
    total = torch.zeros(6, dtype=torch.double)
    for number in range(4000):
        store_rounded(stored, value, seeded(value.device, number))
        total += stored.double()
        assert ((stored.float() - value).abs() <= value.abs() * 2**-7).all()
    torch.testing.assert_close(total / 4000, value.double(), rtol=2e-4, atol=0)
    assert (stored[4:] == value[4:]).all(), "what bfloat16 can hold is not changed"
    torch.testing.assert_close(stored[:4].float(), value[:4].to(torch.bfloat16).float(), rtol=2**-7, atol=0)


def test_steps_too_small_for_bfloat16_add_up():
    """1,000 updates of 1e-6 each, at weights near 1, whose neighbors are 0.004 and more apart."""
    start = torch.linspace(0.5, 1.5, 4096).view(64, 64)
    exact, rounded = nn.Parameter(start.clone()), nn.Parameter(start.to(torch.bfloat16))
    settings = {"lr": 1e-6, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.1}
    theirs, ours = torch.optim.AdamW([exact], **settings), RoundedAdamW([rounded], **settings)
    generator = torch.Generator().manual_seed(0)
    before = rounded.detach().double().mean()
    for _ in range(1000):
        gradient = torch.randn(64, 64, generator=generator) * 0.1 + 0.5
        exact.grad, rounded.grad = gradient, gradient.to(torch.bfloat16)
        theirs.step()
        ours.step()
    moved, expected = rounded.detach().double().mean() - before, (exact.detach() - start).double().mean()
    assert expected < -8e-4
    assert moved.item() == pytest.approx(expected.item(), rel=0.15)
    assert ours.state[rounded]["exp_avg"].dtype == torch.bfloat16


def test_average_moves_by_steps_too_small_for_bfloat16():
    model = nn.Linear(64, 64)  # the bias stays in float32
    model.weight.data = torch.ones(64, 64, dtype=torch.bfloat16)
    average = EMA(model, 0.999)
    nn.init.constant_(model.weight, 1.0625)
    for count in range(10_000, 10_200):
        average.update(model, count)
    expected = 1.0625 - 0.0625 * 0.999**200
    assert average.model.weight.double().mean().item() == pytest.approx(expected, abs=5e-4)


def test_a_prior_learns_as_in_float32_and_resumes_exactly(chain, tmp_path):
    whole, cut, exact = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "exact"))
    run_ok(*training(chain, "prior", exact))
    run_ok(*training(chain, "prior", whole, *ROUNDED))
    with after_update(7), pytest.raises(Crash):
        run_cli(*training(chain, "prior", cut, *ROUNDED))
    run_ok(*training(chain, "prior", cut, *ROUNDED))
    assert cut.read_bytes() == whole.read_bytes()
    assert lasting_rows(cut) == lasting_rows(whole)
    ours, theirs = ([row["loss"] for row in rows(out) if "loss" in row][-1] for out in (whole, exact))
    assert ours == pytest.approx(theirs, rel=0.01)
    tensors = load_tensors(open_artifact(whole))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["blocks.0.qkv.weight"], tensors["blocks.0.qkv.weight"].to(torch.bfloat16).float())


def test_what_does_not_go_with_it_is_refused(chain, tmp_path):
    out = tmp_path / "prior.safetensors"
    assert "expected --dtype bfloat16" in run_bad(*training(chain, "prior", out, *ROUNDED[:2]))
    with pytest.raises(DalleError, match="expected 'adamw' and 'replicate'"):
        PriorTrain(weights_dtype="bfloat16", optimizer="muon")
    with pytest.raises(DalleError, match="found none in Conv2d; set weights_dtype = 'float32'"):
        to_bfloat16(nn.Conv2d(3, 3, 3))
