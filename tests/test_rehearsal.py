"""Rehearsed updates against closed forms and against real ones: arithmetic, memory, and no trace left behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RECIPE
from plan_subjects import SMALL, subject_of
from torch import nn

from dalle_cli.devices import Arithmetic
from dalle_cli.planning.memory import rehearse
from dalle_cli.planning.standin import stand_in
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run


def products(model, pictures):
    """Multiply-adds of a dVAE's convolutions, forward, by hooks on a real pass; and those of the first one."""
    found = []

    def count(module, args, out):
        found.append(out.shape.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model.loss(pictures, temperature=1.0, beta=1.0, generator=torch.Generator())
    return sum(found), found[0]


def test_a_priors_arithmetic_is_that_of_its_products(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path)
    rows, width, layers, text, image = 8, 64, 3, 16, 64
    length = text + image
    blocks = layers * rows * length * 12 * width**2
    heads = rows * (text * 500 + image * 300) * width
    pairs = layers * rows * length**2 * 2 * width
    told = rehearse(subject, subject.train, torch.float32)
    assert told.flops == 6 * (blocks + heads + pairs)
    # CUDA's kernel multiplies queries and keys once more in its backward pass, rather than to keep the weights
    fused = rehearse(subject, subject.train, torch.float32, accelerator=True)
    assert fused.flops == 6 * (blocks + heads) + 7 * pairs
    assert fused.activations < told.activations


@pytest.mark.parametrize(
    ("quantizer", "block"), [("gumbel", "bottleneck"), ("vq", "residual"), ("fsq", "residual")], ids=str
)
def test_a_dvaes_arithmetic_is_that_of_its_convolutions(tmp_path, quantizer, block):
    sets = (f"dvae.quantizer={quantizer}", f"dvae.block={block}", "dvae.fsq_levels=[5,4]", "dvae.n_embd=6")
    subject = subject_of(RECIPE, "dvae", tmp_path, *sets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        forward, first = products(subject.build(), torch.rand(8, 3, 16, 16))
    expected = 2 * (3 * forward - first)  # no gradient for pixels
    if quantizer == "vq":
        expected += 2 * 8 * 4 * 4 * 20 * 6  # distances, which have no gradient
    assert rehearse(subject, subject.train, torch.float32).flops == expected


@pytest.mark.parametrize(
    ("name", "dtype"), [("dvae", torch.bfloat16), ("clip", torch.float32), ("prior", torch.bfloat16)], ids=str
)
def test_bytes_are_those_that_torchs_allocator_counts(tmp_path, name, dtype):
    """An oracle that shares nothing with the ledger: the profiler's own records of what was taken and given back."""
    subject = subject_of(RECIPE, name, tmp_path, f"{name}.train.batch_size=64", "prior.n_embd=64", "clip.text_width=64")
    told = rehearse(subject, subject.train, dtype)
    trainer = Trainer(
        stand_in(subject, subject.build()),
        subject.train,
        Run(Path(), "", {}, []),
        Arithmetic(torch.device("cpu"), dtype),
        0,
    )
    batch = subject.batch(64)
    trainer.update(batch)
    trainer.model.zero_grad()
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: None  # of the moments there are none in a rehearsal either
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.update(batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    assert told.peak == pytest.approx(peak, rel=0.12)  # kernels take some for themselves, unseen by the ledger


def test_rehearsing_leaves_no_trace(tmp_path):
    """Models keep masks between calls: those of tensors without memory must not reach the next real update."""
    subject = subject_of(RECIPE, "prior", tmp_path)
    model, batch = subject.build(), subject.batch(4)
    before = model.loss(*batch)[0]
    rehearse(subject, subject.train, torch.float32)
    rehearse(subject, subject.train, torch.float32, accelerator=True)
    after = model.loss(*batch)[0]
    assert after.item() == before.item()
    assert type(after) is torch.Tensor


def test_what_saves_memory_does(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path, "prior.n_layer=6")
    plain = rehearse(subject, subject.train, torch.bfloat16)
    again = rehearse(subject, replace(subject.train, checkpoint_activations=True), torch.bfloat16)
    parts = rehearse(subject, replace(subject.train, accumulate=4), torch.bfloat16)
    assert again.activations < 0.5 * plain.activations
    assert again.flops == pytest.approx(plain.flops * 4 / 3, rel=0.15)
    assert parts.activations == pytest.approx(plain.activations / 4, rel=0.25)
    assert parts.flops == plain.flops
    wide = rehearse(subject, replace(subject.train, batch_size=16), torch.bfloat16)
    assert wide.flops == 2 * plain.flops
    assert rehearse(subject, subject.train, torch.float32).copies == 0 < plain.copies


def test_only_a_cpu_has_holes_and_only_products_in_16_bits_have_kernels(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path, "prior.train.checkpoint_activations=true")
    half, full = (rehearse(subject, subject.train, dtype) for dtype in (torch.bfloat16, torch.float32))
    fused = rehearse(subject, subject.train, torch.bfloat16, accelerator=True)
    assert (fused.holes, fused.kernels, full.kernels) == (0, 0, 0)
    assert min(half.holes, full.holes, half.kernels) > 0
    deeper = subject_of(SMALL, "prior", tmp_path, "prior.n_layer=6")
    again = rehearse(deeper, subject.train, torch.bfloat16)
    assert again.kernels == half.kernels  # the same products in every layer


def test_the_optimisers_arithmetic_is_counted_once(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path)
    muon = replace(subject.train, optimizer="muon")
    plain, whole, parts = (
        rehearse(subject, train, torch.float32).flops for train in (subject.train, muon, replace(muon, accumulate=4))
    )
    assert plain < whole == parts
