"""Scores of a prior against its loss, a slow twin, and priors whose nats are known beforehand."""

import dataclasses
import math

import pytest
import torch

from dalle_cli.errors import DalleError
from dalle_cli.evaluation.likelihood import Mean, PriorMetrics, Unigram, derangement, mean, smoothed_nats
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.pipelines import scoring as module
from dalle_cli.pipelines.scoring import nats
from reference import likelihood as reference

SMALL = PriorConfig(n_layer=2, n_head=2, n_embd=8, n_text_vocab=7, n_text=4, n_image_vocab=5, grid=3, conv_kernel=3)
LENGTHS = [4, 0, 3, 1, 4]


def build(config=SMALL, dtype=torch.double, std=0.5):
    """A prior whose every parameter is random, and large enough for captions and neighbors to matter."""
    model = Prior(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, std, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


def batch(config=SMALL, lengths=LENGTHS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    tokens = torch.randint(config.n_text_vocab, (n, config.n_text), generator=generator)
    codes = torch.randint(config.n_image_vocab, (n, config.grid, config.grid), generator=generator)
    return tokens, torch.tensor(lengths), codes


def rolled(tokens, lengths, codes):
    """Each pair with the next one's caption."""
    return tokens, lengths, codes, tokens.roll(-1, 0), lengths.roll(-1, 0)


def judged(model, trial, counts=None, at_once=2, shuffle=True):
    found = PriorMetrics(model, counts or Unigram.empty(model))
    for tokens, lengths, codes, *other in zip(*(x.split(at_once) for x in trial), strict=True):
        found.add((tokens, lengths), codes, tuple(other) if shuffle else None)
    return found.metrics()


# Of one pair


@pytest.mark.parametrize("changes", [{}, {"attention": "full", "block": "modern"}])
def test_nats_add_up_to_the_priors_loss(changes):
    model = build(dataclasses.replace(SMALL, **changes))
    tokens, lengths, codes = batch()
    text, image = nats(model, tokens, lengths, codes)
    _, parts = model.loss(tokens, lengths, codes)
    assert text.sum().item() / sum(LENGTHS) == pytest.approx(parts["text_nats"].item(), abs=1e-12)
    assert image.mean().item() == pytest.approx(parts["image_nats"].item(), abs=1e-12)


def test_nats_agree_with_the_loss_in_half_precision():
    model = build(dtype=torch.float32)
    tokens, lengths, codes = batch()
    with torch.autocast("cpu", torch.bfloat16):
        text, image = nats(model, tokens, lengths, codes)
        _, parts = model.loss(tokens, lengths, codes)
    assert text.dtype == image.dtype == torch.double
    assert image.mean().item() == pytest.approx(parts["image_nats"].item(), rel=1e-2)  # see test_head
    assert text.sum().item() / sum(LENGTHS) == pytest.approx(parts["text_nats"].item(), rel=1e-2)


def test_pads_cost_nothing_and_what_stands_there_is_not_read():
    model = build()
    tokens, lengths, codes = batch()
    text, image = nats(model, tokens, lengths, codes)
    pads = torch.arange(4) >= lengths[:, None]
    assert not text[pads].any()
    assert (text[~pads] > 0).all()
    again = nats(model, torch.where(pads, (tokens + 1) % 7, tokens), lengths, codes)
    assert torch.equal(again[0], text)
    assert torch.equal(again[1], image)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_few_logits_at_a_time(pairs, monkeypatch):
    model = build()
    expected = nats(model, *batch())
    monkeypatch.setattr(module, "MAX_LOGITS", pairs * (4 * 7 + 9 * 5) + 1)
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for got, wanted in zip(nats(model, *batch()), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert max(seen) == pairs
    assert sum(seen) == len(LENGTHS)


def test_codes_of_another_grid_are_refused():
    tokens, lengths, codes = batch()
    with pytest.raises(DalleError, match="expected codes of 3 x 3, found 2 x 3"):
        nats(build(), tokens, lengths, codes[:, :2])


# Of many


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_all_figures_equal_the_slow_twin(at_once):
    model = build()
    trial = rolled(*batch())
    seen = batch(lengths=[2, 4, 1], seed=3)
    counts = Unigram.empty(model)
    counts.add(*seen)
    told = judged(model, trial, counts, at_once)
    pairs = list(zip(trial[0].tolist(), LENGTHS, trial[2].tolist(), strict=True))
    others = list(zip(trial[3].tolist(), trial[4].tolist(), strict=True))
    counted = seen[2].flatten().tolist()
    expected = reference.judged(pairs, others, counted, model.state_dict(), dataclasses.asdict(SMALL))
    for name in ("image_nats", "text_nats", "image_nats_unigram", "gain_over_null", "gain_over_shuffled"):
        assert (told[name], told[f"{name}_error"]) == pytest.approx(expected[name], abs=1e-10), name
    for name in ("by_position", "gain_over_null_by_position"):
        for got, wanted in zip(told[name], expected[name], strict=True):
            assert got == pytest.approx(wanted, abs=1e-10), name
    words = [token for row, n in zip(seen[0].tolist(), [2, 4, 1], strict=True) for token in row[:n]]
    mine = [token for row, n, _ in pairs for token in row[:n]]
    guessed = reference.smoothed(words, mine, 7)
    assert told["text_nats_unigram"] == pytest.approx(sum(guessed) / len(mine), abs=1e-12)
    assert (told["pairs"], told["codes"], told["tokens"]) == (5, 45, 12)


def test_the_grid_tells_where():
    """A prior that finds one code of the grid harder than all others is seen to at its row and column."""

    class Lopsided(Planted):
        def forward(self, tokens, lengths, codes):
            text, image = super().forward(tokens, lengths, codes)
            image = torch.zeros_like(image)
            image[:, 1 * 3 + 2] = torch.nn.functional.one_hot((codes[:, 1, 2] + 1) % 5, 5) * 6.0  # surely wrong
            return text, image

    tokens, lengths, codes = batch()
    told = judged(Lopsided(SMALL), rolled(tokens, lengths, codes))
    grid = torch.tensor(told["by_position"], dtype=torch.double)
    wrong = math.log(4 + math.exp(6))
    assert grid[1, 2].item() == pytest.approx(wrong)
    grid[1, 2] = math.log(5)
    torch.testing.assert_close(grid, torch.full((3, 3), math.log(5), dtype=torch.double))
    assert told["image_nats"] == pytest.approx((8 * math.log(5) + wrong) / 9)


class Planted(Prior):
    """A prior of known logits: in each place a code is the caption's first token with 3/4, another with 1/16 each;
    without a caption it is fair. Of tokens, each is as likely as any."""

    def forward(self, tokens, lengths, codes):
        known = torch.where(lengths > 0, tokens[:, 0], -1)[:, None, None]
        of_code = torch.where(torch.arange(5) == known, 0.75, 1 / 16).double()
        image = torch.where(known >= 0, of_code.log(), torch.full((5,), 1 / 5).double().log())
        return torch.zeros(*tokens.shape, 7).double(), image.expand(len(tokens), 9, 5)


def planted():
    """Five captions that tell their pictures' only code, and the picture."""
    tokens = torch.arange(5)[:, None].expand(5, 4).contiguous()
    return tokens, torch.full((5,), 4), tokens[:, :1, None].expand(5, 3, 3).contiguous()


def test_a_planted_prior_has_its_known_nats():
    told = judged(Planted(SMALL), rolled(*planted()))
    right, wrong, none = -math.log(0.75), math.log(16), math.log(5)
    assert told["image_nats"] == pytest.approx(right, abs=1e-12)
    assert told["image_nats_error"] == pytest.approx(0, abs=1e-12)
    assert told["gain_over_null"] == pytest.approx(none - right, abs=1e-12)
    assert told["gain_over_shuffled"] == pytest.approx(wrong - right, abs=1e-12)
    assert told["text_nats"] == pytest.approx(math.log(7), abs=1e-12)


def test_a_prior_that_knows_nothing_costs_ln_v():
    """Heads of zeros: all logits are alike, whatever stands before them."""
    model = build()
    for head in (model.image_head, model.text_head):
        head.weight.zero_()
        head.bias.fill_(0.3)
    told = judged(model, rolled(*batch()))
    assert told["image_nats"] == pytest.approx(math.log(5), abs=1e-14)
    assert told["text_nats"] == pytest.approx(math.log(7), abs=1e-14)
    assert told["image_nats_uniform"] == math.log(5)
    assert told["text_nats_uniform"] == math.log(7)
    assert told["gain_over_null"] == told["gain_over_shuffled"] == 0


def test_a_prior_deaf_to_captions_gains_nothing_and_one_that_reads_does():
    """Deaf: the codes' places see the same text whatever it is. The same prior with its embeddings gains or loses."""
    reads = judged(build(), rolled(*batch()))
    assert abs(reads["gain_over_null"]) > 1e-3
    assert abs(reads["gain_over_shuffled"]) > 1e-3
    deaf = build()
    deaf.token.weight.zero_()
    deaf.pad.weight.zero_()
    told = judged(deaf, rolled(*batch()))
    assert told["gain_over_null"] == pytest.approx(0, abs=1e-14)
    assert told["gain_over_shuffled"] == pytest.approx(0, abs=1e-14)
    assert told["gain_over_null_by_position"] == [pytest.approx([0] * 3, abs=1e-14)] * 3
    assert told["image_nats"] != pytest.approx(math.log(5), abs=1e-3)


def test_a_prior_that_is_the_unigram_costs_what_the_unigram_does():
    model = build()
    model.image_head.weight.zero_()
    counts = Unigram(torch.tensor([3, 0, 9, 1, 4]), torch.zeros(7, dtype=torch.int64))
    model.image_head.bias.copy_(((counts.image.double() + 1) / 22).log())
    told = judged(model, rolled(*batch()), counts)
    assert told["image_nats"] == pytest.approx(told["image_nats_unigram"], abs=1e-12)
    assert told["text_nats_unigram"] == pytest.approx(math.log(7), abs=1e-12)  # nothing was counted


def test_without_other_captions_there_is_no_gain_over_them():
    told = judged(build(), rolled(*batch()), shuffle=False)
    assert told["gain_over_shuffled"] is None
    assert told["gain_over_shuffled_error"] is None
    assert told["gain_over_null"] is not None


# Means, guesses, other captions


def test_means():
    assert mean(torch.tensor([1.0, 3.0])) == Mean(2, 1)
    assert mean(torch.tensor([4.0])) == Mean(4, None)
    assert mean(torch.tensor([])) == Mean(None, None)
    assert mean(torch.tensor([1.0, 2.0]), torch.tensor([0, 0])) == Mean(None, None)
    values, counts = [3.0, 5.0, 1.0, 0.0], [2, 3, 1, 0]
    found = mean(torch.tensor(values), torch.tensor(counts))
    assert found == pytest.approx(reference.ratio_and_error(values, counts))


def test_smoothed_shares_add_up_to_one():
    counts = torch.tensor([5, 0, 2])
    targets = torch.arange(3)[None]
    cost = smoothed_nats(targets, torch.ones(1, 3, dtype=torch.bool), counts, own=False)
    torch.testing.assert_close((-cost).exp(), torch.tensor([[6, 1, 3]]).double() / 10)


def test_a_rows_own_codes_are_left_out():
    """Row by row what the others' counts alone give; a code that this row alone holds is as good as never seen."""
    targets = torch.tensor([[0, 0, 1], [0, 2, 2], [1, 1, 0]])
    counted = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    everything = torch.bincount(targets[counted], minlength=4)
    found = smoothed_nats(targets, counted, everything, own=True)
    for i in range(3):
        rest = [j for j in range(3) if j != i]
        expected = reference.smoothed(targets[rest][counted[rest]].tolist(), targets[i].tolist(), 4)
        assert found[i].tolist() == pytest.approx([n * c for n, c in zip(expected, counted[i].tolist(), strict=True)])


def test_a_derangement_gives_other_captions_and_the_same_each_time():
    captions = ["a", "b", "a", "a", "c", "b", "a"]
    found = derangement(captions, 0)
    assert all(captions[i] != captions[j] for i, j in enumerate(found))
    assert found == derangement(captions, 0)
    assert any(found != derangement(captions, seed) for seed in range(1, 4))
    assert derangement(["a", "a"], 0) is None
    assert derangement([], 0) is None
    assert derangement(["a", "b"], 0) == [1, 0]


def test_a_derangement_of_different_captions_is_a_permutation():
    """Each caption is used once, none by its own pair."""
    found = derangement(list(range(50)), 3)
    assert sorted(found) == list(range(50))
    assert all(i != j for i, j in enumerate(found))
