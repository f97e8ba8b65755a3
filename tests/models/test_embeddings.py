"""Principal components of embeddings, and attention behind a prefix."""

import math

import numpy as np
import pytest
import torch
from planted_embeddings import WIDTH, embeddings, unit

from dalle_cli.errors import DalleError
from dalle_cli.models.embeddings import MeanStd, Principal, covariance_of, off_scale
from dalle_cli.models.kernels import causal_attention, causal_attention_after_prefix


def fitted(z, scale=0.0, chunk=37):
    principal = Principal(z.shape[1]).double()
    principal.fit(torch.from_numpy(z).split(chunk), scale)
    return principal


@pytest.mark.parametrize("chunk", [1, 37, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_covariance_in_chunks(chunk, offset):
    """Against numpy; far from 0 plain sums of squares would have lost every digit of it."""
    z = np.random.default_rng(0).normal(size=(200, 5)) @ np.diag([3, 1, 0.5, 0.1, 0.01]) + offset
    mean, covariance = covariance_of(torch.from_numpy(z).split(chunk))
    np.testing.assert_allclose(mean, z.mean(0), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(covariance, np.cov(z.T, bias=True), rtol=1e-7, atol=1e-10)


def test_components_against_numpy():
    z = embeddings(500)[3].astype(np.float64)
    principal = fitted(z)
    values, vectors = np.linalg.eigh(np.cov(z.T, bias=True))
    np.testing.assert_allclose(principal.spectrum, values[::-1], rtol=1e-9, atol=1e-15)
    assert bool((principal.spectrum.diff() <= 0).all())
    cosines = (principal.components.numpy() * vectors.T[::-1]).sum(-1)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-9)
    np.testing.assert_allclose(principal.components @ principal.components.mT, np.eye(WIDTH), atol=1e-12)
    largest = principal.components.gather(1, principal.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())  # eigenvectors have no sign of their own


def test_projections_against_numpy():
    z = embeddings(300)[3].astype(np.float64)
    principal = fitted(z)
    _, _, rows = np.linalg.svd(z - z.mean(0))
    for n in (1, 3, WIDTH):
        near = (z - z.mean(0)) @ rows[:n].T @ rows[:n] + z.mean(0)
        ours = principal.rebuild(principal.project(torch.from_numpy(z), n))
        np.testing.assert_allclose(ours, near / np.linalg.norm(near, axis=1, keepdims=True), atol=1e-10)
    np.testing.assert_allclose(ours, unit(z), atol=1e-7)  # all of them lose nothing


def test_unit_variance_and_back():
    z = torch.from_numpy(embeddings(300)[3].astype(np.float64))
    principal = fitted(z.numpy())
    x = principal.standardize(z)
    assert float(x.mean()) == pytest.approx(0, abs=1e-12)
    assert principal.spread(z) == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(principal.restore(x), z, rtol=0, atol=1e-7)
    torch.testing.assert_close(principal.restore(3 * x).norm(dim=-1), torch.ones(300).double())
    unscaled = fitted(z.numpy(), scale=1.0)
    assert off_scale(unscaled.spread(z))
    assert not off_scale(principal.spread(z))
    assert [off_scale(s) for s in (0.5, 0.79, 0.81, 1.24, 1.26)] == [True, True, False, False, True]


def test_how_few_hold_a_share():
    principal = Principal(4)
    principal.spectrum.copy_(torch.tensor([8.0, 1.0, 0.9, 0.1]))
    assert [principal.n_holding(share) for share in (0.5, 0.79, 0.85, 0.95, 0.985, 1.0)] == [1, 1, 2, 3, 3, 4]


def test_nothing_to_learn_from():
    with pytest.raises(DalleError, match="expected embeddings, found none"):
        Principal(3).fit(iter([torch.zeros(0, 3)]))
    with pytest.raises(DalleError, match="found all alike"):
        Principal(3).fit([torch.ones(5, 3)])


@pytest.mark.parametrize("shared", [1, 3])
def test_attention_behind_a_prefix(shared):
    """As the same positions of one stream; a prefix serves several rows."""
    torch.manual_seed(0)
    prefixes, heads, before, own, width = 2, 3, 4, 3, 5
    rows = prefixes * shared
    k0, v0 = torch.randn(2, prefixes, heads, before, width, dtype=torch.double)
    q, k, v = torch.randn(3, rows, heads, own, width, dtype=torch.double)
    got = causal_attention_after_prefix(q, k, v, k0, v0)
    for row in range(rows):
        for head in range(heads):
            keys = torch.cat([k0[row // shared, head], k[row, head]])
            values = torch.cat([v0[row // shared, head], v[row, head]])
            for place in range(own):
                seen = before + place + 1
                scores = (keys[:seen] @ q[row, head, place] / math.sqrt(width)).exp()
                expected = (scores[:, None] * values[:seen]).sum(0) / scores.sum()
                torch.testing.assert_close(got[row, head, place], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [7, 600])
@pytest.mark.parametrize("last", [1, 3, 550])
def test_attention_of_the_last_positions_alone(length, last):
    """Answers and gradients are those of all positions, and so behind a prefix; in training and in drawing."""
    last = min(last, length)
    torch.manual_seed(0)
    given = [x.requires_grad_() for x in torch.randn(3, 1, 2, length, 4, dtype=torch.double)]
    q, k, v = given
    weights = torch.randn(1, 2, last, 4, dtype=torch.double)
    found = []
    for y in (causal_attention(q, k, v)[:, :, -last:], causal_attention(q[:, :, -last:], k, v)):
        found.append([y, *torch.autograd.grad((y * weights).sum(), given)])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(q[:, :, -last:], k, v), y, rtol=0, atol=1e-12)
        before = (x[:, :, :2] for x in (k, v))
        behind = causal_attention_after_prefix(q[:, :, -min(last, length - 2) :], k[:, :, 2:], v[:, :, 2:], *before)
    torch.testing.assert_close(behind, y[:, :, -min(last, length - 2) :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [7, 600])
def test_causal_attention_in_training_and_drawing(length):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, length, 4, dtype=torch.double)
    trained = causal_attention(*(x.requires_grad_() for x in (q, k, v)))
    with torch.no_grad():
        drawn = causal_attention(q, k, v)
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-12)
    later = v.detach().clone()
    later[:, :, -1] += 1
    changed = causal_attention(q, k, later) - trained
    assert changed[:, :, :-1].abs().max() == 0
    assert changed[:, :, -1].abs().min() > 0


def test_mean_and_deviation_of_each_dimension():
    """Against numpy; embeddings come back as long as they were."""
    z = np.random.default_rng(0).normal(size=(200, 3)) * [3, 1, 0.1] + [5, 0, -2]
    statistics = MeanStd(3).double()
    statistics.fit(torch.from_numpy(z).split(37))
    np.testing.assert_allclose(statistics.mean, z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, z.std(0), rtol=1e-12)
    x = statistics.standardize(torch.from_numpy(z))
    np.testing.assert_allclose(x.std(0, unbiased=False), 1, rtol=1e-12)
    assert statistics.spread(torch.from_numpy(z)) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(statistics.restore(x), z, atol=1e-12)
    with pytest.raises(DalleError, match="expected embeddings that differ in each dimension"):
        statistics.fit([torch.ones(4, 3)])
