"""The tasks of the models: batches that are computed in parts."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import run_bad, run_ok
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig, disturb_codes
from dalle_cli.training.dvae import DVAETask, DVAETrain
from dalle_cli.training.loop import Splits
from dalle_cli.training.prior import PriorTask, PriorTrain


def gradients(task, batches, step=3):
    """The mean gradients of some batches, float64."""
    task.model.zero_grad()
    for batch in batches:
        loss, figures = task.loss(batch, step, torch.Generator().manual_seed(0))
        (loss / len(batches)).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}, figures


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prior_task(**more):
    task = object.__new__(PriorTask)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_text_vocab": 9, "n_text": 4, "n_image_vocab": 5, "grid": 3}
    task.config, task.options = PriorConfig(**sizes, conv_kernel=3), PriorTrain(**more)
    torch.manual_seed(0)
    task.model = Prior(task.config).double()
    return task


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize(("dropout", "noise"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5)])
def test_parts_of_a_priors_batch(double, parts, dropout, noise):
    """Captions of unequal length, some of them dropped: the text loss is by count over the whole batch."""
    task = prior_task(caption_dropout=dropout, code_noise=noise)
    assert isinstance(task, Splits)
    lengths = torch.tensor([1, 4, 2, 0, 1, 3])
    batch = torch.randint(0, 9, (6, 4)), lengths, torch.randint(0, 5, (6, 3, 3))
    whole, told = gradients(task, [batch])
    split = task.split(batch, parts, 3, torch.Generator().manual_seed(0))
    assert [len(part[0]) for part in split] == [6 // parts] * parts
    ours, _ = gradients(task, split)
    for name, grad in whole.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-10, atol=1e-14)
    figures = [gradients(task, [part])[1] for part in split]
    for name, value in told.items():
        assert np.mean([f[name].item() for f in figures]) == pytest.approx(value.item(), rel=1e-10)
    if not dropout:
        naive, _ = gradients(task, [part[:3] for part in split])
        assert not torch.allclose(naive["text_head.weight"], whole["text_head.weight"], rtol=1e-3)


def test_code_noise_is_in_what_the_prior_reads_alone(double):
    """Against logits of codes disturbed by hand: targets are the codes as they were, and other draws are untouched."""
    lengths, seen = torch.tensor([1, 4, 2, 3]), []
    batch = torch.randint(0, 9, (4, 4)), lengths, torch.randint(0, 5, (4, 3, 3))
    for noise in (0.0, 0.4):
        task = prior_task(caption_dropout=0.5, code_noise=noise)
        read = task.model._read
        task.model._read = lambda *given, read=read: (seen.append(given[1:]), read(*given))[1]
        found = task.loss(batch, 3, torch.Generator().manual_seed(0))[1]["image_nats"]
        with torch.no_grad():
            logits = task.model(batch[0], *seen[-1])[1]
        torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), batch[2].flatten()).double())
    (plain_lengths, plain, *_), (noisy_lengths, noisy, *_) = seen[0], seen[2]
    assert torch.equal(plain_lengths, noisy_lengths)
    assert torch.equal(plain, batch[2])
    assert not torch.equal(noisy, batch[2])


def test_disturbed_codes_are_as_many_as_asked_for_and_evenly_spread():
    codes = torch.full((50, 20, 20), 3)
    found = disturb_codes(codes, 0.3, 5, torch.Generator().manual_seed(0))
    counts = np.bincount(found.flatten().numpy(), minlength=5)
    expected = 20_000 * np.array([0.06, 0.06, 0.06, 0.76, 0.06])  # a fifth of the drawn ones is the code itself
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01
    assert torch.equal(disturb_codes(codes, 0.0, 5, torch.Generator()), codes)


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
def test_parts_of_a_dvaes_batch(double, quantizer):
    task = object.__new__(DVAETask)
    sizes = {"image_size": 8, "n_groups": 2, "n_hid": 16, "n_init": 16, "n_vocab": 20, "fsq_levels": (5, 4)}
    task.config = DVAEConfig(**sizes, quantizer=quantizer, block="residual", likelihood="mse")
    task.options, task.model = DVAETrain(), DVAE(task.config).double()
    loss = task.model.loss
    task.model.loss = lambda images, **more: loss(images.double(), **{**more, "generator": None})
    batch = (torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8),)
    whole, _ = gradients(task, [batch])
    ours, _ = gradients(task, task.split(batch, 3, 3, torch.Generator()))
    for name, grad in whole.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["dvae", "prior"])
def test_accumulation_from_the_command_line(chain, tmp_path, name):
    inputs = {"dvae": (chain.data,), "prior": (chain.captions, chain.codes, "-t", chain.tokenizer)}
    more = ("accumulate=2", "steps=6", "lr=1e-3")
    more = tuple(itertools.chain.from_iterable(("--set", f"{name}.train.{k}") for k in more))
    command = (f"train-{name}", *inputs[name], "--config", chain.recipe, "--dtype", "float32", *more)
    assert run_ok(*command, "-o", tmp_path / "a.safetensors")
    assert "divide batch_size 8" in run_bad(*command, "--set", f"{name}.train.accumulate=3", "-o", tmp_path / "b")


def test_codes_that_are_gone_end_the_run():
    task = object.__new__(DVAETask)
    task.config, task.options, task.held_out = DVAEConfig(), DVAETrain(beta_steps=10), np.arange(8)
    task.updates = 10
    task._check(1.0, 1000)  # before the KL weight has risen
    task.updates = 11
    task._check(2.0, 1000)
    with pytest.raises(DalleError, match=r"found a perplexity of 1.0 among 8192 codes; set dvae.quantizer = 'fsq'"):
        task._check(1.0, 1000)
    task.held_out = np.arange(7)  # so few may well look the same
    task._check(1.0, 1000)
