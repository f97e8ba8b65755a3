"""Sample codes: guidance, truncation, frequencies, and samples that depend on seed and index only."""

import dataclasses
import itertools
import math

import pytest
import torch
from by_keyword import sample_codes
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from dalle_cli.errors import DalleError
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling import categorical
from dalle_cli.sampling.autoregressive import sample_batches
from dalle_cli.sampling.categorical import guide, guided_positions, sample_categorical, top_k, top_p, uniforms

SMALL = PriorConfig(n_layer=3, n_head=2, n_embd=32, n_text_vocab=11, n_text=6, n_image_vocab=40, grid=5, conv_kernel=3)
TOKENS = torch.tensor([[1, 2, 3, 4, 0, 0]])
LENGTHS = torch.tensor([4])


def build(dtype=torch.float, **changes):
    model = Prior(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    torch.nn.init.normal_(model.token.weight, 0, 3, generator=generator)  # so that the caption matters
    return model.to(dtype).eval()


def sample(model, indices, seed=7, **options):
    return sample_codes(model, TOKENS, LENGTHS, indices, seed, **options)


# ---- the loop


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0, "top_k": 20, "temperature": 0.8}, {"top_p": 0.9}])
@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_sample_equals_uncached_sampling(attention, options):
    """The whole grid again, one full pass for each code, with the same numbers."""
    model = build(torch.double, attention=attention)
    sampled = sample(model, [3, 8], batch_size=2, **options)
    scale = options.get("guidance_scale", 1.0)
    codes = torch.zeros(2, 25, dtype=torch.int64)
    noise = torch.stack([uniforms(7, i, 25) for i in (3, 8)])
    for j in range(25):
        grid = codes.view(2, 5, 5)
        conditional = model(TOKENS.expand(2, -1), LENGTHS.expand(2), grid)[1][:, j]
        null = model(TOKENS.expand(2, -1), torch.zeros(2, dtype=torch.int64), grid)[1][:, j]
        logits = (null + scale * (conditional - null)) / options.get("temperature", 1.0)
        logits = top_k(logits, options.get("top_k", 40))
        codes[:, j] = sample_categorical(top_p(logits, options.get("top_p", 1.0)), noise[:, j])
    assert torch.equal(sampled.flatten(1), codes)


def test_sample_depends_on_seed_and_index_only():
    model = build()
    grids = sample(model, range(20), batch_size=20)
    assert grids.shape == (20, 5, 5)
    assert grids.dtype == torch.int64
    assert set(grids.flatten().tolist()) <= set(range(40))
    for batch_size in (1, 3, 7):
        assert torch.equal(sample(model, range(20), batch_size=batch_size), grids)
    assert torch.equal(sample(model, [17, 2]), grids[[17, 2]])
    assert len(grids.flatten(1).unique(dim=0)) == 20
    assert not torch.equal(sample(model, [2], seed=8), grids[[2]])


def test_sample_does_not_depend_on_other_captions():
    model = build()
    tokens = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
    lengths = torch.tensor([4, 2, 1])
    for scale in (1.0, 2.0):
        together = sample_codes(model, tokens, lengths, [0, 1, 2], 7, guidance_scale=scale, batch_size=2)
        for i in range(3):
            own = slice(i, i + 1)
            alone = sample_codes(model, tokens[own], lengths[own], [i], 7, guidance_scale=scale)
            assert torch.equal(together[own], alone)
    assert not torch.equal(sample_codes(model, tokens[1:2], lengths[1:2], [0], 7), sample(model, [0]))


def test_candidates_of_several_captions_in_any_order():
    """A caption is read once for a batch of its own candidates; batches that mix captions read each row's."""
    model = build()
    tokens, lengths = torch.tensor([[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]]), torch.tensor([4, 2])
    captions = [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    for scale in (1.0, 2.0):
        sampled = sample_codes(
            model, tokens, lengths, range(12), 7, captions=captions, batch_size=2, guidance_scale=scale
        )
        for of in (0, 1):
            rows = [row for row, caption in enumerate(captions) if caption == of]
            own = slice(of, of + 1)
            assert torch.equal(
                sampled[rows], sample_codes(model, tokens[own], lengths[own], rows, 7, guidance_scale=scale)
            )


def test_a_caption_is_read_once_for_its_candidates(monkeypatch):
    model, read = build(), []
    prefill = Prior.prefill
    monkeypatch.setattr(
        Prior, "prefill", lambda self, tokens, lengths: read.append(len(tokens)) or prefill(self, tokens, lengths)
    )
    sample_codes(model, TOKENS.expand(2, -1), LENGTHS.expand(2), range(8), 7, captions=[0] * 4 + [1] * 4, batch_size=2)
    assert read == [1, 1]


def test_global_random_state_is_neither_read_nor_written():
    model = build()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample(model, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(sample(model, [0, 1]), first)


def test_batches_come_as_they_are_sampled_and_progress_is_reported():
    model, told = build(), []
    batches = sample_batches(model, TOKENS, LENGTHS, range(5), 7, batch_size=2, progress=told.append)
    first = next(batches)
    assert sum(told) == 2 * 25
    grids = torch.cat([first, *batches])
    assert sum(told) == 5 * 25
    assert torch.equal(grids, sample(model, range(5)))
    assert sample(model, []).shape == (0, 5, 5)


def test_model_in_training_is_sampled_without_dropout_and_trains_on():
    model = build(dropout=0.5)
    grids = sample(model, [0, 1])
    model.train()
    assert torch.equal(sample(model, [0, 1]), grids)
    assert model.training
    model.loss(TOKENS, LENGTHS, grids[:1])[0].backward()


def test_bfloat16_sampling_runs():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample(model, [0, 1], guidance_scale=2.0).shape == (2, 5, 5)
    assert sample(model.bfloat16(), [0, 1], guidance_scale=2.0).shape == (2, 5, 5)


# ---- guidance


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_guidance_changes_every_position(attention):
    model = build(torch.double, attention=attention)
    codes = sample(model, [0])
    conditional = model(TOKENS, LENGTHS, codes)[1]
    null = model(TOKENS, torch.tensor([0]), codes)[1]
    distance = (guide(torch.cat([conditional, null]), 3.0) - conditional)[0].norm(dim=-1)
    assert (distance[[0, 12, 24]] > 0.1).all()
    guided = sample(model, range(8), guidance_scale=3.0)
    differs = (guided != sample(model, range(8))).flatten(1)
    assert differs[:, [0, 12, 24]].any(0).all()


def test_guidance_of_scale_one_computes_no_null_rows(monkeypatch):
    model, rows = build(), []
    step = Prior.step
    monkeypatch.setattr(Prior, "step", lambda self, codes, cache: rows.append(len(codes)) or step(self, codes, cache))
    plain = sample(model, range(3))
    assert set(rows) == {3}
    rows.clear()
    nearly = sample(model, range(3), guidance_scale=1 + 1e-9)
    assert set(rows) == {6}
    assert torch.equal(nearly, plain)


def test_guidance_of_scale_zero_ignores_the_caption():
    model = build(torch.double)
    ignoring = sample(model, range(3), guidance_scale=0.0)
    assert torch.equal(ignoring, sample_codes(model, TOKENS, torch.tensor([0]), range(3), 7))


@pytest.mark.parametrize("span", [(0.0, 0.4), (0.4, 0.8), (0.52, 1.0), (0.3, 0.3)])
def test_guidance_by_part_of_the_grid(monkeypatch, span):
    """Within the span logits are guided, elsewhere they are the conditional ones of the codes sampled so far."""
    model, seen = build(torch.double), []
    monkeypatch.setattr(
        categorical, "sample_categorical", lambda logits, u: seen.append(logits) or sample_categorical(logits, u)
    )
    codes = sample(model, range(4), guidance_scale=3.0, guidance_span=span)
    logits = torch.stack(seen, dim=1)
    monkeypatch.undo()
    conditional = model(TOKENS.expand(4, -1), LENGTHS.expand(4), codes)[1].double()
    null = model(TOKENS.expand(4, -1), torch.zeros(4, dtype=torch.int64), codes)[1].double()
    within = [j for j in range(25) if span[0] * 25 - 1e-9 <= j < span[1] * 25 - 1e-9]
    outside = [j for j in range(25) if j not in within]
    whole = null + 3 * (conditional - null)
    torch.testing.assert_close(logits[:, outside], conditional[:, outside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, within], whole[:, within], rtol=1e-5, atol=1e-5)
    assert (whole - conditional).abs().amax(-1).min() > 0.1  # so that these differ everywhere
    assert not torch.equal(codes, sample(model, range(4), guidance_scale=3.0))
    assert torch.equal(codes, sample(model, range(4))) == (not within)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=5).map(sorted), st.integers(1, 1024))
def test_spans_that_meet_share_no_position(cuts, n):
    shares = [0.0, *(cut / 100 for cut in cuts), 1.0]
    parts = [guided_positions(pair, n) for pair in itertools.pairwise(shares)]
    assert [j for part in parts for j in part] == list(range(n))
    assert guided_positions((0.07, 0.29), 100) == range(7, 29)


def test_an_empty_span_computes_no_null_rows(monkeypatch):
    model, rows = build(), []
    step = Prior.step
    monkeypatch.setattr(Prior, "step", lambda self, codes, cache: rows.append(len(codes)) or step(self, codes, cache))
    sample(model, range(3), guidance_scale=3.0, guidance_span=(0.5, 0.5))
    assert set(rows) == {3}


# ---- frequencies

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1.5


def chi_square(sampled, probabilities):
    """The p-value of counts against exact probabilities; values expected under 5 times go into one bin."""
    assert not sampled[probabilities == 0].any()
    expected = probabilities * sampled.sum()
    rare = expected < 5
    observed = [*sampled[~rare].tolist(), sampled[rare].sum().item()]
    wanted = [*expected[~rare].tolist(), expected[rare].sum().item()]
    kept = [i for i, w in enumerate(wanted) if w > 0]
    return stats.chisquare([observed[i] for i in kept], [wanted[i] for i in kept], sum_check=False).pvalue


@pytest.mark.parametrize("cut", [lambda x: x, lambda x: top_k(x, 7), lambda x: top_p(x, 0.8)])
@pytest.mark.parametrize("n_vocab", [5, 50, 5000])
def test_frequencies_are_the_softmax(cut, n_vocab):
    n = 20_000
    logits = cut(LOGITS.repeat(100)[:n_vocab].double())
    noise = uniforms(11, n_vocab, n)
    sampled = torch.cat([sample_categorical(logits.expand(len(u), -1), u) for u in noise.split(2000)])
    assert chi_square(torch.bincount(sampled, minlength=n_vocab).double(), torch.softmax(logits, 0)) > 0.01


def test_frequencies_through_the_whole_sampler():
    model = build(torch.double, grid=1)
    logits = model(TOKENS, LENGTHS, torch.zeros(1, 1, 1, dtype=torch.int64))[1][0, 0] / 0.7
    sampled = sample(model, range(4000), batch_size=1000, temperature=0.7, top_k=12)
    expected = torch.softmax(top_k(logits, 12), 0)
    assert chi_square(torch.bincount(sampled.flatten(), minlength=40).double(), expected) > 0.01


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_p": 0.85}, {"top_k": 12, "top_p": 0.7, "temperature": 1.6}])
def test_frequencies_against_the_exact_distribution(options):
    """Guided, cooled and cut by hand, in float64 and plain Python, at one seed."""
    model, null = build(torch.double, grid=1), torch.tensor([0])
    codes = torch.zeros(1, 1, 1, dtype=torch.int64)
    conditional, free = (model(TOKENS, n, codes)[1][0, 0].double() for n in (LENGTHS, null))
    row = ((free + 4 * (conditional - free)) / options.get("temperature", 1.0)).tolist()
    exact = torch.tensor(cut_by_hand(row, options.get("top_k", 40), options.get("top_p", 1.0)), dtype=torch.double)
    sampled = sample(model, range(5000), seed=3, batch_size=1000, guidance_scale=4.0, **options)
    counts = torch.bincount(sampled.flatten(), minlength=40).double()
    assert chi_square(counts, exact) > 0.01
    other = torch.softmax(torch.tensor(row) / 2, 0).double() * (exact > 0)
    assert chi_square(counts, other / other.sum()) < 1e-3  # the test would notice another temperature


def test_temperature_zero_is_the_likeliest_code():
    model = build(torch.double)
    grids = sample(model, [0, 1], temperature=0.0)
    likeliest = model(TOKENS.expand(2, -1), LENGTHS.expand(2), grids)[1].argmax(-1)
    assert torch.equal(grids.flatten(1), likeliest)
    assert torch.equal(sample(model, [0], temperature=1.0, top_k=1), grids[:1])


def test_truncation_applies_to_codes():
    """Even one code kept of all leaves no choice (a cut of a joint vocabulary would leave it)."""
    model = build()
    assert len(sample(model, range(6), top_k=1).flatten(1).unique(dim=0)) == 1
    assert len(sample(model, range(6), top_p=1e-6).flatten(1).unique(dim=0)) == 1
    assert torch.equal(sample(model, [0], top_k=0, top_p=1.0), sample(model, [0]))


def test_noise_is_uniform_independent_and_a_function_of_its_names():
    noise = torch.stack([uniforms(0, index, 1000) for index in range(20)]).double()
    assert noise.min() >= 0
    assert noise.max() < 1
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 0.01
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(20)).abs().max() < 0.1
    assert torch.equal(uniforms(0, 3, 10), uniforms(0, 3, 1000)[:10])
    assert len({tuple(uniforms(*names, 1)[0].tolist()) for names in ((0, 12), (1, 2), (2, 1), (0, 1), (-1, 0))}) == 5
    # written down once: a sample must stay the same between versions
    assert (uniforms(0, 0, 1) * 2**24).tolist() == [[15773741, 5362364, 5230431]]


def test_sampling_never_gives_what_was_cut():
    logits = torch.full((4, 3000), float("-inf"))
    logits[:, [5, 1500, 2999]] = torch.tensor([-90.0, 0.0, -1e-3])
    edges = torch.tensor([0.0, 1 - 2**-24])
    noise = torch.cartesian_prod(edges, edges, edges)[:, :3]
    sampled = sample_categorical(logits[:1].expand(8, -1), noise)
    assert set(sampled.tolist()) <= {5, 1500, 2999}


def test_rounding_seldom_changes_a_sample():
    """Beside one inversion over the whole vocabulary, where rounding moves thousands of boundaries past the noise."""
    generator = torch.Generator().manual_seed(0)
    changed = flat = 0
    for block in range(5):
        logits = torch.randn(500, 8192, generator=generator)
        rounded = logits + 1e-3 * torch.randn(500, 8192, generator=generator)
        noise = uniforms(0, block, 500)
        changed += int((sample_categorical(logits, noise) != sample_categorical(rounded, noise)).sum())
        shares = [torch.softmax(x.double(), -1).cumsum(-1) for x in (logits, rounded)]
        flat += int(torch.ne(*(torch.searchsorted(x, noise[:, :1].double()) for x in shares)).sum())
    assert flat > 6 * changed > 0


# ---- truncation

reals = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


def cut_by_hand(row, k, p):
    """Probabilities of what is left, one value at a time from the likeliest down; ties with the last one stay."""
    order = sorted(row, reverse=True)
    weight = {x: math.exp(x - order[0]) for x in row if x >= order[min(k, len(row)) - 1]}
    total = sum(weight[x] for x in row if x in weight)
    held, least = 0.0, order[0]
    for x in order:
        if held >= p or x not in weight:
            break
        held, least = held + weight[x] / total, x
    kept = [weight[x] if x >= least else 0.0 for x in row]
    return [w / sum(kept) for w in kept]


@given(reals, st.integers(1, 32), st.floats(0.05, 1.0))
def test_truncation_matches_a_twin_in_plain_python(row, k, p):
    """Both cuts, one after the other, on any logits, unless the mass held is p but for rounding."""
    logits = torch.tensor([row, row[::-1]], dtype=torch.double)
    shares = sorted(cut_by_hand(row, k, 1.0), reverse=True)
    assume(all(abs(sum(shares[: i + 1]) - p) > 1e-9 for i in range(len(shares))))
    expected = cut_by_hand(row, k, p)
    made = torch.softmax(top_p(top_k(logits, k), p), -1)
    torch.testing.assert_close(made, torch.tensor([expected, expected[::-1]], dtype=torch.double))
    assert torch.equal(made > 0, torch.tensor([expected, expected[::-1]]) > 0)


values = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


@given(values, st.integers(1, 14))
def test_top_k_matches_brute_force(row, k):
    last = sorted(row, reverse=True)[min(k, len(row)) - 1]
    expected = [x if x >= last else float("-inf") for x in row]
    assert top_k(torch.tensor(row, dtype=torch.double), k).tolist() == expected


@given(values, st.floats(0.01, 1.0))
def test_top_p_matches_brute_force(row, p):
    mass = torch.softmax(torch.tensor(row, dtype=torch.double), 0).tolist()
    kept, held = set(), 0.0
    for value in sorted(set(row), reverse=True):
        if kept and held >= p - 1e-12:
            break
        kept.add(value)
        held += sum(m for m, x in zip(mass, row, strict=True) if x == value)
    result = top_p(torch.tensor(row, dtype=torch.double), p).tolist()
    assert result == [x if x in kept else float("-inf") for x in row]


def test_truncation_by_example():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    cut = float("-inf")
    assert torch.equal(top_k(logits, 2)[0], torch.tensor([logits[0, 0], logits[0, 1], cut, cut]))
    assert torch.equal(torch.isfinite(top_p(logits, 0.6)), torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool())
    assert torch.equal(torch.isfinite(top_p(logits, 0.49)), torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool())
    assert torch.isfinite(top_k(torch.zeros(5), 2)).all(), "ties stay"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 1.5}, "top-p"),
        ({"batch_size": 0}, "batch size"),
        ({"guidance_span": (0.5, 0.4)}, "guidance from"),
        ({"guidance_span": (0.0, 1.1)}, "guidance from"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(DalleError, match=message):
        sample(build(), [0], **options)


def test_as_many_captions_as_candidates():
    with pytest.raises(DalleError, match="1 caption or 3, found 2"):
        sample_codes(build(), TOKENS.expand(2, -1), LENGTHS.expand(2), [0, 1, 2], 7)
