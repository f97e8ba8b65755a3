import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.models.quantizers import (
    FiniteScalarQuantizer,
    GumbelQuantizer,
    VectorQuantizer,
    categorical_kl,
    gumbel_noise,
    gumbel_softmax,
)
from reference import dvae as reference

LEVELS = st.lists(st.integers(3, 9), min_size=1, max_size=4).map(tuple)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def test_kl_matches_reference_and_its_bounds() -> None:
    logits = 3 * randn(2, 11, 3, 4)
    torch.testing.assert_close(categorical_kl(logits), reference.kl(logits), rtol=0, atol=1e-12)
    assert categorical_kl(torch.zeros(1, 11, 2, 2)).item() == pytest.approx(0, abs=1e-6)
    certain = torch.nn.functional.one_hot(torch.zeros(1, 2, 2, dtype=torch.long), 11).permute(0, 3, 1, 2) * 100.0
    assert categorical_kl(certain).item() == pytest.approx(math.log(11), abs=1e-5)


def test_kl_does_not_grow_with_the_batch() -> None:
    logits = 3 * randn(2, 11, 3, 4)
    torch.testing.assert_close(categorical_kl(logits.repeat(4, 1, 1, 1)), categorical_kl(logits))


def test_kl_does_not_know_the_temperature() -> None:
    quantizer, logits = GumbelQuantizer(11), 3 * randn(2, 11, 3, 4)
    assert quantizer(logits, 1.0, seeded()).kl == quantizer(logits, 1 / 16, seeded()).kl


def test_gumbel_softmax_matches_reference() -> None:
    logits = randn(2, 7, 3, 4)
    noise = gumbel_noise(logits.permute(0, 2, 3, 1), seeded(5)).permute(0, 3, 1, 2)
    expected = reference.relax(logits, noise, 0.7)
    torch.testing.assert_close(gumbel_softmax(logits, 0.7, seeded(5)), expected, rtol=0, atol=1e-12)
    plain = gumbel_softmax(logits, 0.7, None)
    torch.testing.assert_close(plain, (logits / 0.7).softmax(1), rtol=0, atol=1e-12)


def test_gumbel_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.empty(200_000), seeded())
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all()


def test_gumbel_noise_samples_the_categorical() -> None:
    logits = torch.tensor([0.6, 0.3, 0.1]).log().view(1, 3, 1, 1).expand(1, 3, 200, 200)
    counts = torch.bincount(gumbel_softmax(logits, 1.0, seeded()).argmax(1).flatten(), minlength=3)
    torch.testing.assert_close(counts / 40_000, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.01)


def test_gumbel_is_soft_forward_and_follows_temperature() -> None:
    logits = randn(1, 7, 4, 4)
    warm, cold = gumbel_softmax(logits, 1.0, seeded()), gumbel_softmax(logits, 1 / 16, seeded())
    assert 0.2 < warm.amax(1).mean() < 0.9 < cold.amax(1).mean()
    assert torch.equal(warm.argmax(1), cold.argmax(1))


@settings(max_examples=40, deadline=None)
@given(LEVELS)
def test_fsq_codes_and_vectors_are_a_bijection(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    assert quantizer.n_vocab == math.prod(levels)
    every = torch.arange(quantizer.n_vocab).view(1, 1, -1)
    vectors = quantizer.vectors(every)
    assert len(vectors.flatten(2)[0].T.unique(dim=0)) == quantizer.n_vocab
    assert vectors.abs().max() <= 1
    integers = vectors * (quantizer.levels // 2).view(-1, 1, 1)
    assert torch.equal(quantizer._index(integers.round()), every)


@settings(max_examples=40, deadline=None)
@given(LEVELS)
def test_fsq_reaches_every_code_and_no_other(levels: tuple[int, ...]) -> None:
    quantizer = FiniteScalarQuantizer(levels)
    sweep = torch.linspace(-20, 20, 4001)
    for channel, n in enumerate(levels):
        features = torch.zeros(1, len(levels), 1, len(sweep))
        features[0, channel, 0] = sweep
        codes = quantizer.codes(features)
        digits = codes // quantizer.basis[channel] % n
        assert torch.equal(digits.unique(), torch.arange(n))
        assert codes.min() >= 0
        assert codes.max() < quantizer.n_vocab
        assert (digits.flatten().diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(LEVELS, st.data())
def test_fsq_matches_reference(levels: tuple[int, ...], data: st.DataObject) -> None:
    z = data.draw(st.lists(st.floats(-4, 4), min_size=len(levels), max_size=len(levels)))
    quantizer = FiniteScalarQuantizer(levels)
    features = torch.tensor(z, dtype=torch.double).view(1, -1, 1, 1)
    assert quantizer.codes(features).item() == reference.fsq_code(z, levels)


def test_fsq_forward_agrees_with_its_codes_and_passes_the_bounds_gradient() -> None:
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    features = (2 * randn(2, 4, 6, 6)).requires_grad_()
    quantized = quantizer(features, 1.0, None)
    torch.testing.assert_close(quantized.vectors, quantizer.vectors(quantized.codes).double(), rtol=0, atol=1e-6)
    assert torch.equal(quantized.codes, quantizer.codes(features))
    (straight,) = torch.autograd.grad(quantized.vectors.sum(), features)
    half = (quantizer.levels // 2).view(-1, 1, 1)
    (bounded,) = torch.autograd.grad((quantizer.bound(features) / half).sum(), features)
    torch.testing.assert_close(straight, bounded)
    torch.testing.assert_close(quantizer.bound(torch.zeros(1, 4, 1, 1)), torch.zeros(1, 4, 1, 1), rtol=0, atol=1e-6)


def test_vq_finds_the_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = VectorQuantizer(13, 5, 0.25).double()
    with torch.no_grad():
        quantizer.codebook.normal_(generator=seeded(1))
    features = randn(2, 5, 3, 4)
    expected = reference.nearest(features.permute(0, 2, 3, 1).reshape(-1, 5), quantizer.codebook.detach())
    assert torch.equal(quantizer.codes(features).flatten(), expected)
    monkeypatch.setattr("dalle_cli.models.quantizers.DISTANCE_ROWS", 5)
    assert torch.equal(quantizer.codes(features).flatten(), expected)


def test_vq_losses_and_gradients() -> None:
    quantizer = VectorQuantizer(13, 5, 0.25).double()
    with torch.no_grad():
        quantizer.codebook.normal_(generator=seeded(1))
    features = randn(2, 5, 3, 4).requires_grad_()
    quantized = quantizer(features, 1.0, None)
    gap = quantizer.vectors(quantized.codes) - features
    torch.testing.assert_close(quantized.vectors, quantizer.vectors(quantized.codes))
    torch.testing.assert_close(quantized.codebook, 1.25 * gap.square().mean())
    grads = torch.autograd.grad(quantized.vectors.sum(), [features, quantizer.codebook], allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(features))
    assert grads[1] is None
    codebook_loss = quantizer(features, 1.0, None).codebook
    pull, push = torch.autograd.grad(codebook_loss, [features, quantizer.codebook])
    torch.testing.assert_close(pull, -0.25 * 2 * gap.detach() / gap.numel())
    torch.testing.assert_close(push.sum(0), (2 * gap / gap.numel()).sum((0, 2, 3)).detach())


def test_vq_counts_usage_in_training_alone_and_keeps_it() -> None:
    quantizer = VectorQuantizer(13, 5, 0.25)
    features = randn(2, 5, 3, 4).float()
    quantizer.eval()(features, 1.0, None)
    assert quantizer.usage.sum() == 0
    quantizer.train()(features, 1.0, None)
    assert quantizer.usage.sum().item() == pytest.approx(0.01)
    assert "usage" in quantizer.state_dict()


def test_vq_revives_dead_codes_deterministically() -> None:
    features = randn(4, 5, 6, 6).float()
    first, second = VectorQuantizer(32, 5, 0.25), VectorQuantizer(32, 5, 0.25)
    with torch.no_grad():
        first.codebook.fill_(50).select(0, 3).zero_()  # every feature falls to code 3
        second.codebook.copy_(first.codebook)
    for quantizer in (first, second):
        quantizer(features, 1.0, None)
        assert quantizer.codes(features).unique().tolist() == [3]
        assert quantizer.revive(features, seeded(9)) == 31
        assert quantizer.revive(features, seeded(9)) == 0  # time to be found
        assert quantizer.codebook[3].abs().max() == 0
    assert len(first.codes(features).unique()) > 28
    assert torch.equal(first.codebook, second.codebook)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 5)
    assert all((rows == code).all(1).any() for i, code in enumerate(first.codebook.detach()) if i != 3)


def test_vq_revives_a_code_that_falls_out_of_use() -> None:
    quantizer = VectorQuantizer(4, 2, 0.25)
    corners = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    with torch.no_grad():
        quantizer.codebook.copy_(corners)
        quantizer.usage.fill_(0.25)
    features = corners[:3].T.reshape(1, 2, 1, 3)
    for _ in range(500):
        quantizer(features, 1.0, None)
    assert quantizer.revive(features, seeded()) == 1
    assert not torch.equal(quantizer.codebook[3].detach(), corners[3])


def test_vq_revives_more_codes_than_there_are_features() -> None:
    quantizer = VectorQuantizer(50, 2, 0.25)
    assert quantizer.revive(torch.randn(1, 2, 3, 3, generator=seeded()), seeded()) == 50
    assert len(quantizer.codebook.detach().unique(dim=0)) == 9
