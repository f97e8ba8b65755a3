"""The autoregressive prior: against its slow twin, its buckets, and whether it looks at all that it is given."""

import numpy as np
import pytest
import torch
from planted_embeddings import WIDTH, embeddings
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.embedding_prior import AutoregressivePrior, AutoregressivePriorConfig
from reference import embedding_priors as reference

SIZES = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": 11, "n_text": 4, "n_embedding": 6, "n_component": 5,
    "n_bucket": 7, "n_dot": 4,
}  # fmt: skip


def prior(seed=0, **more):
    """A double prior with large weights, so that everything in it matters."""
    torch.manual_seed(seed)
    model = AutoregressivePrior(AutoregressivePriorConfig(**{**SIZES, **more})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    return model.requires_grad_(False)


def inputs(rows=4, seed=1):
    """Tokens, lengths (one of them null, one whole), z_t, dots, buckets."""
    torch.manual_seed(seed)
    tokens = torch.randint(0, SIZES["n_text_vocab"], (rows, SIZES["n_text"]))
    z_t = F.normalize(torch.randn(rows, SIZES["n_embedding"], dtype=torch.double), dim=-1)
    dots = torch.randint(0, SIZES["n_dot"], (rows,))
    buckets = torch.randint(0, SIZES["n_bucket"], (rows, SIZES["n_component"]))
    return tokens, torch.tensor([0, 2, SIZES["n_text"], 3])[:rows], z_t, dots, buckets


def fitted(z, **more):
    """A prior that has seen the embeddings z: (N, D) float64."""
    width = z.shape[1]
    model = prior(**{"n_embedding": width, "n_component": width, **more})
    model.principal.fit([z])
    model.forget()
    for part in z.split(50):
        model.measure(part)
    return model


def test_twin():
    model, (tokens, lengths, z_t, dots, buckets) = prior(), inputs()
    logits = model(tokens, lengths, z_t, dots, buckets)
    total = 0.0
    for row in range(len(tokens)):
        args = (tokens[row].tolist(), int(lengths[row]), z_t[row], int(dots[row]), buckets[row].tolist())
        expected = reference.autoregressive_prior(*args, model.state_dict(), SIZES)
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-11)
        total += sum(-line.log_softmax(0)[b] for line, b in zip(expected, buckets[row], strict=True))
    loss, _ = model.loss(tokens, lengths, z_t, dots, buckets)
    torch.testing.assert_close(loss, total / buckets.numel())


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize("n_component", [1, 3, 5])
def test_drawing_is_training(block, n_component):
    """Step by step over a cache the logits are those of the whole stream, for several candidates of each caption."""
    model = prior(block=block, n_component=n_component)
    tokens, lengths, z_t, _, _ = inputs()
    each = [x.repeat_interleave(3, 0) for x in (tokens, lengths, z_t)]
    dots = torch.randint(0, SIZES["n_dot"], (12,))
    buckets = torch.randint(0, SIZES["n_bucket"], (12, n_component))
    cache = model.cache(model.prefill(tokens, lengths, z_t), 3)
    for _ in range(2):  # the same buffers serve again
        cache.restart()
        got = [model.start(dots, each[1], cache)]
        got += [model.step(buckets[:, i], cache) for i in range(n_component - 1)]
        torch.testing.assert_close(torch.stack(got, 1), model(*each, dots, buckets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize("name", ["tokens", "lengths", "z_t", "dots", "buckets"])
def test_looks_at_everything(name, block):
    model, given = prior(block=block), inputs()
    at = ["tokens", "lengths", "z_t", "dots", "buckets"].index(name)
    changed = list(given)
    changed[at] = {
        "tokens": (given[0] + 1) % SIZES["n_text_vocab"],
        "lengths": torch.tensor([1, 3, 3, 2]),
        "z_t": -given[2],
        "dots": (given[3] + 1) % SIZES["n_dot"],
        "buckets": (given[4] + 1) % SIZES["n_bucket"],
    }[name]
    differs = (model(*given) - model(*changed)).abs().amax(-1) > 1e-4
    if name == "buckets":  # each sees those before it
        assert not differs[:, 0].any()
        assert differs[:, 1:].all()
    else:  # the first caption is null
        assert differs[1:].all()
        assert differs[0].all() == differs[0].any() == (name == "lengths")


def test_null_knows_nothing_of_a_caption():
    model, (tokens, lengths, z_t, dots, buckets) = prior(), inputs()
    null = torch.zeros_like(lengths)
    one = model(tokens, null, z_t, dots, buckets)
    other = model(tokens.flip(0), null, z_t.flip(0), dots.flip(0), buckets)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("n_bucket", [2, 7, 1024])
def test_error_of_buckets(n_bucket):
    """Within the training range at most half a bucket in each component, and near that somewhere."""
    z = torch.from_numpy(embeddings(400)[3].astype(np.float64))
    model = fitted(z, n_bucket=n_bucket)
    buckets = model.quantize(z)
    assert (int(buckets.min()), int(buckets.max())) == (0, n_bucket - 1)
    true = model.principal.project(z, WIDTH)
    width = (model.high - model.low) / n_bucket
    middle = model.low + (buckets + 0.5) * width
    share = ((true - middle).abs() / width).amax(0)
    assert share.max() <= 0.5 + 1e-9
    assert share.min() > 0.45
    torch.testing.assert_close(model.dequantize(buckets), model.principal.rebuild(middle))
    # the way back cannot lose more than the buckets do
    lost = (model.dequantize(buckets) - z).norm(dim=-1)
    assert lost.max() <= 2 * (0.5 * width).norm() + 1e-6
    torch.testing.assert_close(model.quantize(model.principal.mean + middle @ model.principal.components), buckets)


def test_buckets_against_a_twin():
    z = torch.from_numpy(embeddings(300)[3].astype(np.float64))
    model = fitted(z[:200], n_component=4)
    assert model.low.shape == (4,)
    buckets = model.quantize(z)
    coordinates = (z - model.principal.mean) @ model.principal.components[:4].mT
    torch.testing.assert_close(model.low, coordinates[:200].amin(0))
    torch.testing.assert_close(model.high, coordinates[:200].amax(0))
    for row in range(0, 300, 7):  # the last hundred may lie beyond the range
        for k in range(4):
            args = (float(coordinates[row, k]), float(model.low[k]), float(model.high[k]), SIZES["n_bucket"])
            assert int(buckets[row, k]) == reference.bucket(*args)
    beyond = model.principal.mean + 100 * model.principal.components[0] - 100 * model.principal.components[1]
    assert model.quantize(beyond[None])[0, :2].tolist() == [SIZES["n_bucket"] - 1, 0]


def test_dot_products_in_equal_shares():
    model, rng = prior(), np.random.default_rng(0)
    dots = torch.from_numpy(rng.normal(0.3, 0.1, 400))
    model.measure_dots(dots)
    np.testing.assert_allclose(model.edges, np.quantile(dots, [0.25, 0.5, 0.75]), rtol=1e-9)
    found = model.quantize_dot(dots)
    assert torch.bincount(found).tolist() == [100] * 4
    order = dots.argsort()
    assert bool((found[order].diff() >= 0).all())
    assert model.quantize_dot(torch.tensor([-1.0, 1.0]).double()).tolist() == [0, 3]


def test_size_of_the_papers():
    config = AutoregressivePriorConfig()
    assert (config.n_component, config.n_bucket, config.n_embedding) == (319, 1024, 1024)
    with torch.device("meta"):
        model = AutoregressivePrior(config)
    assert 1.2e9 < sum(p.numel() for p in model.parameters()) < 1.4e9


def test_sizes_that_do_not_fit():
    cases = {
        "kind": ("diffusion", 'expected kind "autoregressive"'),
        "n_component": (7, "found 7 of 6"),
        "n_bucket": (1, "n_bucket of at least 2"),
        "n_dot": (1, "n_dot of at least 2"),
        "n_text_vocab": (0, "n_text_vocab of at least 1"),
        "n_head": (5, "multiple of prior.n_head"),
    }
    for name, (value, said) in cases.items():
        with pytest.raises(DalleError, match=said):
            AutoregressivePriorConfig(**{**SIZES, name: value})
