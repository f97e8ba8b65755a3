"""Sample embeddings: noise per candidate, guidance, the best of two, and the dot product."""

import pytest
import torch
from by_keyword import sample_autoregressive
from test_diffusion_prior import inputs as diffusion_inputs
from test_diffusion_prior import prior as diffusion_prior
from test_embedding_prior import prior as autoregressive_prior

from dalle_cli.diffusion.noise import noise_for
from dalle_cli.errors import DalleError
from dalle_cli.sampling.categorical import sample_categorical, uniforms
from dalle_cli.sampling.embeddings import PromptBatch, sample_diffusion, upper_half_dots

CAPTIONS = [1, 1, 1, 2, 3, 3, 0, 1]
INDICES = [5 << 32 | 3, 1, 2, 9, 4, 2**160, 6, 7]


def read():
    _, _, tokens, lengths, z_t = diffusion_inputs()
    return PromptBatch(tokens, lengths, z_t)


def by_diffusion(model=None, captions=CAPTIONS, indices=INDICES, seed=0, **more):
    model = model or diffusion_prior(n_timestep=50)
    return torch.cat(list(sample_diffusion(model, read(), indices, seed, captions=captions, **{"steps": 6, **more})))


def by_buckets(model=None, captions=CAPTIONS, indices=INDICES, seed=0, **more):
    if model is None:
        model = autoregressive_prior(n_bucket=64)
        for part in (model.captions.token, model.captions.z_in, model.head):
            part.weight *= 4  # so that captions move many a bucket
    return torch.cat(list(sample_autoregressive(model, read(), indices, seed, captions=captions, **more)))


both = pytest.mark.parametrize("sampled", [by_diffusion, by_buckets])


@both
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_batches_of_any_size(sampled, scale):
    """Also of one candidate alone, and of several of a caption side by side."""
    one = sampled(guidance_scale=scale, batch_size=64)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(8, dtype=torch.double))
    for size in (1, 3):
        torch.testing.assert_close(sampled(guidance_scale=scale, batch_size=size), one, rtol=0, atol=1e-12)
    alone = sampled(guidance_scale=scale, captions=[3], indices=INDICES[4:5])
    torch.testing.assert_close(alone, one[4:5], rtol=0, atol=1e-12)


@both
def test_seed_candidate_and_caption_matter(sampled):
    one = sampled()
    assert ((one - sampled(seed=1)).norm(dim=-1) > 1e-3).sum() >= 7  # few buckets may fall alike
    assert ((one - sampled(indices=[i + 1 for i in INDICES])).norm(dim=-1) > 1e-3).sum() >= 7
    assert (one[0] - one[1]).norm() > 1e-3  # of one caption
    same = sampled(captions=[1, 2, 3], indices=[4, 4, 4])
    assert sum(float((same[i] - same[j]).norm()) > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2))) >= 2


@both
def test_guidance(sampled):
    """At scale 1 nothing; else something, but for a caption that is null itself; and a span is a part of it."""
    plain, guided = sampled(), sampled(guidance_scale=4.0)
    torch.testing.assert_close(sampled(guidance_scale=1.0), plain, rtol=0, atol=0)
    moved = (plain - guided).norm(dim=-1)
    null = CAPTIONS.index(0)
    if sampled is by_diffusion:
        assert moved[null] < 1e-12
        assert torch.cat([moved[:null], moved[null + 1 :]]).min() > 1e-4
    else:  # sampled codes change where a boundary passes the noise
        assert moved.count_nonzero() >= 4
        assert moved[null] == 0
    whole = sampled(guidance_scale=4.0, guidance_span=(0.0, 1.0))
    torch.testing.assert_close(whole, guided, rtol=0, atol=0)
    none = sampled(guidance_scale=4.0, guidance_span=(0.5, 0.5))
    torch.testing.assert_close(none, plain, rtol=0, atol=1e-12)
    part = sampled(guidance_scale=4.0, guidance_span=(0.5, 1.0))
    assert (part - plain).norm() > 1e-3
    assert (part - guided).norm() > 1e-3


def test_guided_towards_what_null_has_not():
    """One step from pure noise is the network itself: null + scale * (conditional - null)."""
    model, given = diffusion_prior(n_timestep=50), read()
    x = torch.stack([noise_for(0, [index], 0, (6,), "prior 0")[0] for index in INDICES]).double()
    t = torch.full((8,), 49)
    rows = given.rows(CAPTIONS)
    conditional = model(x, t, *rows)
    null = model(x, t, rows.tokens, torch.zeros_like(rows.lengths), rows.z_t)
    expected = model.principal.restore(null + 4 * (conditional - null))
    got = by_diffusion(model, steps=1, guidance_scale=4.0, best_of=1, sampler="ddim")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "heun"])
def test_every_sampler(sampler):
    found = by_diffusion(sampler=sampler, batch_size=3)
    assert found.shape == (8, 6)
    torch.testing.assert_close(found, by_diffusion(sampler=sampler), rtol=0, atol=1e-10)


def test_the_better_of_two():
    """The one that is nearer to its caption; the first of two is what one alone would be."""
    z_t = read().z_t[CAPTIONS]
    first, two, four = (by_diffusion(best_of=n) for n in (1, 2, 4))
    near = [(z * z_t).sum(-1) for z in (first, two, four)]
    assert bool((near[1] >= near[0] - 1e-12).all())
    assert bool((near[2] >= near[1] - 1e-12).all())
    same = (two - first).norm(dim=-1) < 1e-9
    assert 0 < same.sum() < 8
    assert bool((near[1][~same] > near[0][~same]).all())


def test_dot_products_of_the_upper_half():
    noise = torch.linspace(0, 1 - 2**-24, 1000)
    assert sorted(set(upper_half_dots(noise, 8).tolist())) == [4, 5, 6, 7]
    assert torch.bincount(upper_half_dots(noise, 8))[4:].tolist() == [250] * 4
    assert set(upper_half_dots(noise, 5).tolist()) == {2, 3, 4}
    assert set(upper_half_dots(noise, 2).tolist()) == {1}


def test_sampled_bucket_by_bucket():
    """As by hand from the logits of whole streams, without a cache."""
    model, given = autoregressive_prior(), read()
    rows, index = given.rows([2]), 77
    noise = uniforms(3, index, 6)
    dot = 2 + int(noise[0, 0] * 2)
    buckets = torch.zeros(1, 5, dtype=torch.int64)
    for component in range(5):
        logits = model(*rows, torch.tensor([dot]), buckets)[:, component]
        buckets[0, component] = sample_categorical(logits / 0.7, noise[None, 1 + component])
    got = torch.cat(list(sample_autoregressive(model, rows, [index], 3, temperature=0.7)))
    torch.testing.assert_close(got, model.dequantize(buckets))


def test_truncation_and_temperature():
    plain, likeliest = by_buckets(), by_buckets(temperature=0.0)
    torch.testing.assert_close(by_buckets(top_k=1), likeliest, rtol=0, atol=0)
    torch.testing.assert_close(by_buckets(top_p=1e-9), likeliest, rtol=0, atol=0)
    torch.testing.assert_close(by_buckets(top_k=0, top_p=0.0), plain, rtol=0, atol=0)
    assert (plain - likeliest).norm() > 0.1


def test_training_mode_is_left_as_it_was():
    model = diffusion_prior(dropout=0.5).train()
    torch.testing.assert_close(by_diffusion(model), by_diffusion(diffusion_prior(dropout=0.5)))
    assert model.training


def test_settings_out_of_range():
    cases = {
        "best_of": (by_diffusion, 0, "1 sample or more"),
        "sampler": (by_diffusion, "euler", "found 'euler'"),
        "steps": (by_diffusion, 51, "1 to 50 steps"),
        "guidance_span": (by_diffusion, (0.7, 0.2), "0.7 to 0.2"),
        "batch_size": (by_diffusion, 0, "batch size of 1"),
        "temperature": (by_buckets, -1.0, "temperature of 0"),
        "top_k": (by_buckets, -1, "top-k of 0"),
        "top_p": (by_buckets, 1.5, r"top-p in \[0, 1\]"),
        "captions": (by_buckets, [0, 1], "expected 1 caption or 8, found 2"),
    }
    for name, (sampled, value, said) in cases.items():
        with pytest.raises(DalleError, match=said):
            sampled(**{name: value})
