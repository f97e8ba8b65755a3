"""The token prior against its float64 twin, and each of its paths against doing nothing."""

import dataclasses
import math

import pytest
import torch

from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.prior import Prior, PriorConfig, drop_captions
from reference import prior as reference

SMALL = PriorConfig(n_layer=3, n_head=2, n_embd=16, n_text_vocab=11, n_text=6, n_image_vocab=13, grid=4, conv_kernel=3)
LENGTHS = [4, 0, 6]
MALEVICH = {"attention": "window", "activation": "gelu_tanh", "sandwich_norm": True, "final_norms": 2}
MINDALLE = {"attention": "full", "start": False, "flat_position": True}


def build(dtype=torch.double, **changes):
    """A prior whose every parameter is random, and large enough for each path to matter."""
    model = Prior(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return model.to(dtype).eval()


def batch(config=SMALL, lengths=LENGTHS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    tokens = torch.randint(config.n_text_vocab, (n, config.n_text), generator=generator)
    codes = torch.randint(config.n_image_vocab, (n, config.grid, config.grid), generator=generator)
    return tokens, torch.tensor(lengths), codes


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"attention": "full"}, {"conv_kernel": 5, "n_layer": 2}, {"block": "modern"}, MALEVICH, MINDALLE,
        {"block": "modern", "start": False},
    ],
)  # fmt: skip
def test_forward_matches_reference(changes):
    model = build(**changes)
    tokens, lengths, codes = batch()
    text, image = model(tokens, lengths, codes)
    weights, sizes = model.state_dict(), dataclasses.asdict(model.config)
    for i in range(len(tokens)):
        expected = reference.prior(tokens[i].tolist(), int(lengths[i]), codes[i].tolist(), weights, sizes)
        torch.testing.assert_close(text[i], expected[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(image[i], expected[1], rtol=0, atol=1e-10)


def test_loss_counts_tokens_and_codes():
    model = build(text_weight=0.2)
    tokens, lengths, codes = batch()
    loss, parts = model.loss(tokens, lengths, codes)
    text, image = model(tokens, lengths, codes)
    rows = range(len(tokens))
    text_nats = [reference.nats(text[i, t], tokens[i, t]) for i in rows for t in range(int(lengths[i]))]
    image_nats = [reference.nats(image[i, j], codes[i].flatten()[j]) for i in rows for j in range(16)]
    assert parts["text_nats"].item() == pytest.approx(sum(text_nats) / 10)
    assert parts["image_nats"].item() == pytest.approx(sum(image_nats) / 48)
    assert loss.item() == pytest.approx(0.2 * parts["text_nats"].item() + 0.8 * parts["image_nats"].item())
    assert PriorConfig().text_weight == 1 / 8


def test_loss_of_null_captions_alone_is_finite():
    model = build()
    tokens, _, codes = batch()
    loss, parts = model.loss(tokens, torch.zeros(3, dtype=torch.int64), codes)
    assert parts["text_nats"] == 0
    assert torch.isfinite(loss)


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_codes_see_only_the_past(attention):
    # one layer more than the window needs, so that the whole past is in reach of the last code
    model = build(attention=attention, n_layer=5)
    tokens, lengths, codes = batch()
    before = model(tokens, lengths, codes)[1]
    for j in (0, 5, 14, 15):
        changed = codes.clone()
        changed.view(3, -1)[:, j] = (changed.view(3, -1)[:, j] + 1) % 13
        text, image = model(tokens, lengths, changed)
        assert torch.equal(image[:, : j + 1], before[:, : j + 1])
        assert torch.equal(text, model(tokens, lengths, codes)[0])
        assert ((image[:, j + 1 :] - before[:, j + 1 :]).abs().amax(-1) > 1e-6).all()


def test_one_layer_sees_its_pattern_only():
    model = build(n_layer=1, conv_kernel=3)
    tokens, lengths, codes = batch()
    changed = codes.clone()
    changed[:, 0, 3] = (changed[:, 0, 3] + 1) % 13
    difference = (model(tokens, lengths, changed)[1] - model(tokens, lengths, codes)[1]).abs().amax((0, 2))
    # code 3 is seen from 3, 4 (wrapped), 6, 7, 8 (wrapped); position j predicts code j + 1
    assert [j for j in range(16) if difference[j] > 1e-9] == [4, 5, 7, 8, 9]


def test_text_sees_only_the_past():
    model = build()
    tokens, lengths, codes = batch(lengths=[6, 6, 6])
    before = model(tokens, lengths, codes)
    tokens[:, 3] = (tokens[:, 3] + 1) % 11
    text, image = model(tokens, lengths, codes)
    assert torch.equal(text[:, :4], before[0][:, :4])
    assert ((text[:, 4:] - before[0][:, 4:]).abs().amax(-1) > 1e-6).all()
    assert ((image - before[1]).abs().amax(-1) > 1e-6).all(), "every code sees the caption"


def test_tokens_beyond_the_length_are_not_read():
    model = build()
    tokens, lengths, codes = batch()
    text, image = model(tokens, lengths, codes)
    loss = model.loss(tokens, lengths, codes)[0]
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % 11
    changed[1] = (changed[1] + 1) % 11
    for a, b in zip(model(changed, lengths, codes), (text, image), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.loss(changed, lengths, codes)[0], loss)
    other = model(tokens, lengths - torch.tensor([1, 0, 1]), codes)[1]
    assert ((other - image)[[0, 2]].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize(
    "option", [{"attention": "window"}, {"activation": "gelu_tanh"}, {"sandwich_norm": True}, {"final_norms": 2}]
)
def test_each_option_of_malevich_changes_the_logits(option):
    """The same weights, with the norms that the option adds at their initial values, where they are not neutral."""
    model, plain = build(**option), build()
    weights = {name: t for name, t in plain.state_dict().items() if not name.startswith("norm.")}
    model.load_state_dict(weights, strict=False)
    difference = model(*batch())[1] - plain(*batch())[1]
    assert difference.abs().max() > 1e-4


def test_without_a_start_the_first_token_is_not_predicted():
    model = build(**MINDALLE)
    tokens, _, codes = batch(lengths=[4, 1, 6])
    lengths = torch.tensor([4, 1, 6])
    assert model.predicted(lengths).sum(1).tolist() == [3, 0, 5]
    text = model(tokens, lengths, codes)[0]
    expected = [reference.nats(text[i, t - 1], tokens[i, t]) for i in (0, 2) for t in range(1, int(lengths[i]))]
    parts = model.loss(tokens, lengths, codes)[1]
    assert parts["text_nats"].item() == pytest.approx(sum(expected) / 8)
    assert model.n_positions == 6 + 16 - 1


def test_each_pad_is_its_own():
    model = build()
    tokens, _, codes = batch(lengths=[4])
    gradient = torch.autograd.grad(model(tokens, torch.tensor([4]), codes)[1].sum(), model.pad.weight)[0]
    assert [bool(row.any()) for row in gradient] == [False] * 4 + [True] * 2


def test_first_code_comes_from_the_image_head():
    model = build()
    tokens, lengths, codes = batch()
    torch.nn.init.zeros_(model.text_head.weight)
    first = model(tokens, lengths, codes)[1][:, 0]
    assert first.std() > 0.1
    torch.testing.assert_close(model.prefill(tokens, lengths).logits, first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"attention": "full"}, {"n_layer": 6, "conv_kernel": 7}, {"grid": 1}, {"block": "modern"}, MALEVICH,
        MINDALLE, {"attention": "window", "grid": 6}, {"block": "modern", "start": False},
    ],
)  # fmt: skip
def test_cached_logits_equal_uncached(changes, static):
    model = build(**changes)
    tokens, lengths, codes = batch(model.config)
    expected = model(tokens, lengths, codes)[1]
    cache = model.cache(model.prefill(tokens, lengths), static=static)
    for _ in range(2):
        logits = [cache.logits]
        logits += [model.step(code, cache) for code in codes.flatten(1)[:, :-1].unbind(1)]
        torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=1e-11)
        cache.restart()


@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_candidates_share_their_caption(attention):
    model = build(attention=attention)
    tokens, lengths, _ = batch()
    codes = batch(lengths=[0] * 6, seed=3)[2]
    expected = model(tokens.repeat_interleave(2, 0), lengths.repeat_interleave(2), codes)[1]
    cache = model.cache(Prompt.join([model.prefill(tokens[i : i + 1], lengths[i : i + 1]) for i in range(3)]), 2)
    logits = [cache.logits] + [model.step(code, cache) for code in codes.flatten(1)[:, :-1].unbind(1)]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=1e-11)


def test_repeated_prompt_equals_repeated_captions():
    model = build()
    tokens, lengths, _ = batch()
    repeated = model.prefill(tokens, lengths).repeat(2)
    expected = model.prefill(tokens.repeat_interleave(2, 0), lengths.repeat_interleave(2))
    torch.testing.assert_close(repeated.logits, expected.logits)
    torch.testing.assert_close(repeated.keys, expected.keys)
    torch.testing.assert_close(repeated.values, expected.values)


@pytest.mark.parametrize("changes", [{}, {"attention": "full"}, MALEVICH, MINDALLE])
def test_gradients_reach_every_parameter(changes):
    model = build(**changes).train()
    tokens, lengths, codes = batch()
    model.loss(tokens, lengths, codes)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_is_close_to_float32():
    model = build(torch.float)
    tokens, lengths, codes = batch()
    exact, parts = model.loss(tokens, lengths, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text, image = model(tokens, lengths, codes)
        loss, rounded = model.loss(tokens, lengths, codes)
        cache = model.cache(model.prefill(tokens, lengths))
        logits = model.step(codes[:, 0, 0], cache)
    assert text.dtype == image.dtype == logits.dtype == loss.dtype == torch.float
    assert not torch.equal(image, model(tokens, lengths, codes)[1]), "the matrices should have been rounded"
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    torch.testing.assert_close(rounded["image_nats"], parts["image_nats"], rtol=0.02, atol=0)
    torch.testing.assert_close(logits, image[:, 1], rtol=0, atol=0.1)


def test_dropout_works_in_training_only():
    model = build(dropout=0.5)
    tokens, lengths, codes = batch()
    assert torch.equal(model(tokens, lengths, codes)[1], model(tokens, lengths, codes)[1])
    model.train()
    assert not torch.equal(model(tokens, lengths, codes)[1], model(tokens, lengths, codes)[1])


def test_dropped_captions_are_null():
    lengths = torch.full((10_000,), 5)
    dropped = drop_captions(lengths, 0.1, torch.Generator().manual_seed(0))
    assert set(dropped.tolist()) == {0, 5}
    assert 900 < (dropped == 0).sum() < 1100
    assert torch.equal(dropped, drop_captions(lengths, 0.1, torch.Generator().manual_seed(0)))
    assert (drop_captions(lengths, 0.0, torch.Generator()) == 5).all()
    assert (drop_captions(lengths, 1.0, torch.Generator()) == 0).all()


def test_initialization():
    config = dataclasses.replace(SMALL, n_layer=8, n_embd=128)
    model = Prior(config)
    model.initialize(torch.Generator().manual_seed(0))
    again = Prior(config)
    again.initialize(torch.Generator().manual_seed(0))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp_out.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.token.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.norm.weight == 1).all()
    assert not model.image_head.bias.any()


def test_fresh_model_starts_at_the_uniform_distribution():
    torch.manual_seed(0)
    parts = Prior(SMALL).loss(*batch())[1]
    assert parts["image_nats"].item() == pytest.approx(math.log(13), abs=0.05)


def test_paper_scale_has_12_billion_parameters():
    with torch.device("meta"):
        model = Prior(PriorConfig())
    assert 12.0e9 < sum(p.numel() for p in model.parameters()) < 12.5e9
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "multiple"),
        ({"conv_kernel": 4}, "odd"),
        ({"attention": "axial"}, "axial"),
        ({"n_layer": 0}, "n_layer"),
        ({"text_weight": 1.5}, "text_weight"),
        ({"activation": "relu"}, '"gelu" or "gelu_tanh", found "relu"'),
        ({"final_norms": 0}, "1 or 2, found 0"),
        ({"block": "modern", "sandwich_norm": True}, 'block "paper"'),
    ],
)
def test_config_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(DalleError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_shapes_of_another_model_are_refused():
    model = build()
    tokens, lengths, codes = batch()
    with pytest.raises(DalleError, match="6 positions, found 5"):
        model(tokens[:, :5], lengths, codes)
    with pytest.raises(DalleError, match="4 x 4, found 2 x 4"):
        model(tokens, lengths, codes[:, :2])


def test_flops_count_matrices_and_pairs():
    """The closed form: 6 for each weight used at a position, and 12 C for each pair of positions that attends."""
    config = dataclasses.replace(SMALL, n_layer=1, attention="full")
    model = Prior(config)
    inner = sum(m.weight.numel() for m in model.blocks[0].children() if isinstance(m, torch.nn.Linear))
    n, heads = 6 + 16, 16 * (6 * 11 + 16 * 13)
    assert model.n_positions == n
    assert model.flops() == 6 * (inner * n + heads) + 12 * 16 * n * (n + 1) / 2


def test_parts_of_a_batch_make_the_whole():
    model = build()
    tokens, lengths, codes = batch(lengths=[4, 0, 6, 1])
    whole, figures = model.loss(tokens, lengths, codes)
    halves = [model.loss(tokens[i], lengths[i], codes[i], lengths.sum() / 2) for i in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(loss for loss, _ in halves) / 2, whole)
    for name, value in figures.items():
        torch.testing.assert_close(sum(parts[name] for _, parts in halves) / 2, value)
