"""A prior with a sketch: a small image is sampled first, and the codes are conditioned on it; fast and slow alike."""

import numpy as np
import pytest
import torch
from by_keyword import sample_codes
from sketch_priors import LENGTHS, SIZES, TOKENS, codes, made, pictures

from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling.sketches import resample_sketches, sample_sketches
from dalle_cli.training.prior import PriorTrain


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("block", "attention"), [("modern", "full"), ("paper", "full"), ("paper", "sparse")])
def test_step_by_step_is_what_forward_says(block, attention, static):
    """Candidates with sketches of their own, and null ones that see none; shown others, a cache forgets the first."""
    prior = made(block, attention)
    given, told = codes(6), pictures(4)
    prompt = Prompt.join([prior.prefill(TOKENS[:2], LENGTHS[:2]), prior.prefill(TOKENS[:1], 0 * LENGTHS[:1])])
    with torch.inference_mode():
        cache = prior.cache(prompt, candidates=2, static=static)
        for sketches in (pictures(4, seed=9), told):
            cache.restart()
            prior.show(sketches, cache)
            steps = [cache.logits, *(prior.step(code, cache) for code in given.flatten(1)[:, :-1].unbind(1))]
    tokens, sees = TOKENS[[0, 0, 1, 1, 0, 0]], torch.tensor([True] * 4 + [False] * 2)
    shown = torch.cat([told, pictures(2, seed=5)])
    _, expected = prior(tokens, torch.tensor([3, 3, 4, 4, 0, 0]), given, (shown, sees))
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=2e-5, rtol=1e-4)
    _, unseen = prior(tokens, torch.tensor([3, 3, 4, 4, 0, 0]), given)
    assert (expected[:4, 1:] - unseen[:4, 1:]).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(expected[:, 0], unseen[:, 0])  # the first code is sampled without
    torch.testing.assert_close(expected[4:], unseen[4:])


def test_a_place_sees_the_cell_that_the_next_code_lies_in_and_those_around():
    prior = made(sketch=4)
    plain = torch.zeros(1, 3, 4, 4)
    spot = plain.clone()
    spot[0, :, 2, 1] = 1
    near = {r * 4 + c for r in (1, 2, 3) for c in (0, 1, 2)}
    for before, after in zip(prior.hint.of(plain), prior.hint.of(spot), strict=True):
        moved = (before - after).abs().amax(-1)[0] > 0
        assert {int(i) + 1 for i in moved.nonzero()} == near  # what stands at place i is of the code behind it
    ratio = made(sketch=2).hint
    seen = ratio.of(pictures(1))[1][0]
    assert torch.equal(ratio.of(pictures(1))[0][0, 4], ratio.of(pictures(1))[0][0, 3])  # row 1: of one cell
    assert not torch.allclose(seen[4], seen[3])  # but in another corner of it


def test_sketch_and_hint_are_those_of_plain_loops():
    """Against numpy in float64, which shares no code."""
    prior = made().double()
    weights = {name: tensor.numpy() for name, tensor in prior.sketch.state_dict().items()}

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    t, noised = torch.tensor([0, 500, 999]), pictures(3).double()
    found = prior.sketch(noised, t, prior.sketch.read(TOKENS, prior.written(LENGTHS))).numpy()
    for row, length in enumerate(LENGTHS.tolist()):
        words = np.zeros(3)
        for token in TOKENS[row, :length].tolist():
            words = words + weights["word.weight"][token] / np.sqrt(length)
        words = linear("words_out", silu(linear("words_in", words)))
        angles = [t[row].item() * 1000.0 ** (-k / 32) * np.pi / 2 for k in range(32)]
        y = linear("picture_in", noised[row].numpy().ravel()) + words
        y = y + linear("time", np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles]))
        for layer in range(4):
            normed = (y - y.mean()) / np.sqrt(y.var() + 1e-5)
            normed = normed * weights[f"layers.{layer}.norm.weight"] + weights[f"layers.{layer}.norm.bias"]
            y = y + linear(f"layers.{layer}.outer", silu(linear(f"layers.{layer}.inner", normed)))
        expected = linear("picture_out", silu(y)).reshape(3, 2, 2)
        np.testing.assert_allclose(found[row], expected, rtol=1e-9, atol=1e-11)
    shown = pictures(1).double()
    ahead, seen = (x[0].numpy() for x in prior.hint.of(shown))
    weights = {name: tensor.numpy() for name, tensor in prior.hint.state_dict().items()}
    state = np.linspace(-1, 1, 16)
    for place in range(1, 16):
        r, c = place // 4, place % 4
        cells = np.zeros((3, 3, 3))
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                if 0 <= r // 2 + dr < 2 and 0 <= c // 2 + dc < 2:
                    cells[:, dr + 1, dc + 1] = shown[0, :, r // 2 + dr, c // 2 + dc].numpy()
        np.testing.assert_allclose(ahead[place - 1], weights["ahead.weight"] @ cells.ravel(), rtol=1e-10, atol=1e-12)
        expected = weights["seen.weight"] @ cells.ravel() + weights["corner"][r % 2, c % 2]
        np.testing.assert_allclose(seen[place - 1], expected, rtol=1e-10, atol=1e-12)
        expected = state + linear("outer", silu(linear("state", state) + seen[place - 1]))
        joined = prior.hint(torch.from_numpy(state), torch.from_numpy(seen[place - 1]))
        np.testing.assert_allclose(joined.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_untold_it_is_the_prior_without_a_sketch_and_a_new_hint_hardly_matters():
    prior, plain = made(), made(sketch=0)
    plain.load_state_dict({k: v for k, v in prior.state_dict().items() if not k.startswith(("sketch.", "hint."))})
    for one, other in zip(prior(TOKENS, LENGTHS, codes(3)), plain(TOKENS, LENGTHS, codes(3)), strict=True):
        assert torch.equal(one, other)
    prior.hint.initialize()
    assert torch.equal(prior.hint(torch.ones(2, 16), torch.ones(2, 256)), torch.ones(2, 16))


def test_the_words_are_a_bag_and_pads_are_none():
    prior = made()
    turned = torch.tensor([[11, 3, 7, 9, 9, 9]])

    def read(tokens, lengths):
        return prior.sketch.read(tokens, prior.written(lengths))

    torch.testing.assert_close(read(turned, LENGTHS[:1]), read(TOKENS[:1], LENGTHS[:1]))
    null = read(TOKENS, 0 * LENGTHS)
    torch.testing.assert_close(null[0], null[1])
    assert not torch.allclose(null[:1], read(TOKENS[:1], LENGTHS[:1]))


def test_a_true_sketch_is_the_mean_color_of_each_cells_codes():
    prior, given = made(), codes(2)
    expected = np.zeros((2, 3, 2, 2))
    for b, r, c in np.ndindex(2, 4, 4):
        expected[b, :, r // 2, c // 2] += prior.sketch.colors[given[b, r, c]].numpy() / 4
    np.testing.assert_allclose(prior.sketch.of(given).numpy(), expected, rtol=1e-5, atol=1e-6)


# ---- Drawing


def test_a_sketch_of_one_image_is_that_image():
    """A denoiser that knows the answer: whatever the noise, the guidance and the steps, it is what is sampled."""
    prior, true = made(), pictures(1)

    class Knows(torch.nn.Module):
        side = 2

        def read(self, tokens, written):
            return torch.zeros(len(tokens), 1)

        def forward(self, x, t, words):
            return true.expand_as(x)

    prior.sketch = Knows()
    for scale, steps in ((1.0, 30), (4.0, 30), (1.0, 5)):
        sampled = sample_sketches(prior, TOKENS[:2], LENGTHS[:2], [0, 1], 0, guidance_scale=scale, steps=steps)
        torch.testing.assert_close(sampled, true.expand(2, -1, -1, -1), atol=1e-3, rtol=1e-3)


def test_a_sketch_belongs_to_its_candidate():
    prior = made()
    together = sample_sketches(prior, TOKENS[[0, 1]], LENGTHS[[0, 1]], [5, 6], 3, guidance_scale=2.0)
    alone = sample_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 3, guidance_scale=2.0)
    torch.testing.assert_close(together[1:], alone)
    for other in (
        sample_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 4, guidance_scale=2.0),
        sample_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [7], 3, guidance_scale=2.0),
        sample_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 3, guidance_scale=1.0),
        sample_sketches(prior, TOKENS[[0]], LENGTHS[[0]], [6], 3, guidance_scale=2.0),
    ):
        assert (other - alone).abs().max() > 1e-3


def test_codes_follow_their_sketch_in_batches_of_any_size():
    prior = made()
    options = {"guidance_scale": 2.0, "sketch_guidance": 3.0, "captions": [0, 0, 0, 1, 1]}
    whole = sample_codes(prior, TOKENS, LENGTHS, [0, 1, 2, 3, 4], 0, batch_size=5, **options)
    parts = sample_codes(prior, TOKENS, LENGTHS, [0, 1, 2, 3, 4], 0, batch_size=2, **options)
    assert torch.equal(whole, parts)
    assert not torch.equal(
        whole, sample_codes(prior, TOKENS, LENGTHS, [0, 1, 2, 3, 4], 0, **{**options, "sketch_guidance": 1.0})
    )
    for parameter in prior.hint.parameters():
        parameter.zero_()
    assert not torch.equal(whole, sample_codes(prior, TOKENS, LENGTHS, [0, 1, 2, 3, 4], 0, **options))


def test_null_rows_see_the_sketch_and_no_caption(monkeypatch):
    """The first guided step against forward, of both halves by hand."""
    prior, seen = made(), []
    step = Prior.step
    monkeypatch.setattr(Prior, "step", lambda self, codes, cache: seen.append(step(self, codes, cache)) or seen[-1])
    sampled = sample_codes(prior, TOKENS[:1], LENGTHS[:1], [4, 5], 0, guidance_scale=3.0, sketch_guidance=2.0)
    numbers = [4, 5]
    told = sample_sketches(prior, TOKENS[[0, 0]], LENGTHS[[0, 0]], numbers, 0, guidance_scale=2.0)
    sees = torch.ones(4, dtype=torch.bool)
    lengths = torch.tensor([3, 3, 0, 0])
    _, expected = prior(TOKENS[[0, 0, 0, 0]], lengths, sampled.repeat(2, 1, 1), (told.repeat(2, 1, 1, 1), sees))
    torch.testing.assert_close(torch.stack(seen, 1), expected[:, 1:], atol=2e-5, rtol=1e-4)


def test_what_is_kept_of_an_image_is_in_its_sketch():
    """Only cells all of whose codes are kept are known; the rest is sampled beside them, and so otherwise."""
    prior, given = made(), codes(2)
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[:2] = True
    kept[2, :2] = True  # half a cell
    captions = (TOKENS[:2], LENGTHS[:2], [0, 1], 0)
    free = sample_sketches(prior, *captions)
    sampled = sample_sketches(prior, *captions, known=(given, kept))
    torch.testing.assert_close(sampled[:, :, 0], prior.sketch.of(given)[:, :, 0])
    assert (sampled[:, :, 1] - prior.sketch.of(given)[:, :, 1]).abs().amin((1, 2)).max() > 1e-3
    assert (sampled[:, :, 1] - free[:, :, 1]).abs().max() > 1e-3
    found = sample_codes(prior, TOKENS, LENGTHS, [0, 1], 0, captions=[0, 1], known=given, keep=kept)
    assert torch.equal(found[:, kept], given[:, kept])


def test_resampled_from_all_noise_it_is_sampled_and_from_none_the_image():
    """Between, some stay, each from a timestep of its own."""
    prior, true = made(), pictures(3)
    noise = row_noise(3, [5, 6, 7], "sketch")(0, true.shape[1:])
    captions = prior, TOKENS, LENGTHS

    def redrawn(*since, scale=2.0):
        return resample_sketches(*captions, true, torch.tensor(since), noise, guidance_scale=scale)

    sampled = sample_sketches(*captions, [5, 6, 7], 3, guidance_scale=2.0)
    torch.testing.assert_close(redrawn(1000.0, 1000.0, 1000.0), sampled)
    assert torch.equal(redrawn(30.0, 0.0, 31.0), true)  # the last of 30 steps is from timestep 33
    mixed = redrawn(0.0, 400.0, 1000.0)
    assert torch.equal(mixed[0], true[0])
    torch.testing.assert_close(mixed[2], sampled[2])
    for other in (true, sampled, redrawn(0.0, 700.0, 1000.0), redrawn(0.0, 400.0, 1000.0, scale=1.0)):
        assert (mixed[1] - other[1]).abs().max() > 1e-3
    assert torch.equal(noise, row_noise(3, [5, 6, 7], "sketch")(0, true.shape[1:]))


def test_resampling_is_ddim_by_plain_loops():
    """One picture at a time, in float64, by equation 12 of DDIM and the cosine of its own."""
    prior, true = made().double(), pictures(2).double()
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    captions, since = (TOKENS[:2], LENGTHS[:2]), torch.tensor([650.0, 270.0])
    found = resample_sketches(prior, *captions, true, since, noise, guidance_scale=3.0, steps=10)

    def kept(t):  # Nichol & Dhariwal 2021, eq. 17, without the limit on beta, which only the last timesteps reach
        def wave(u):
            return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2

        return wave((t + 1) / 1000) / wave(0)

    for row in range(2):
        times = range(999, 0, -100)
        x = None
        for t, after in zip(times, [*times[1:], -1], strict=True):
            if t > since[row]:
                continue
            if x is None:
                x = np.sqrt(kept(t)) * true[row].numpy() + np.sqrt(1 - kept(t)) * noise[row].numpy()
            guesses = []
            for length in (LENGTHS[row].item(), 0):
                words = prior.sketch.read(TOKENS[row : row + 1], prior.written(torch.tensor([length])))
                guesses.append(prior.sketch(torch.from_numpy(x)[None], torch.tensor([t]), words)[0].numpy())
            start = np.clip(guesses[1] + 3 * (guesses[0] - guesses[1]), -1, 1)
            epsilon = (x - np.sqrt(kept(t)) * start) / np.sqrt(1 - kept(t))
            x = np.sqrt(kept(after)) * start + np.sqrt(1 - kept(after)) * epsilon
        np.testing.assert_allclose(found[row].numpy(), x, atol=1e-5)


def test_settings_that_do_not_fit():
    with pytest.raises(DalleError, match=r"expected prior\.sketch to divide the grid of 4, found 3"):
        PriorConfig(**SIZES, sketch=3)
    with pytest.raises(DalleError, match="sketch_width"):
        PriorConfig(**SIZES, sketch=2, sketch_width=2)
    with pytest.raises(DalleError, match="sketch_batch"):
        PriorTrain(sketch_batch=0)
    with pytest.raises(DalleError, match=r"expected sketch_resampled in \[0, 1\], found 600"):
        PriorTrain(sketch_resampled=600)
    with pytest.raises(DalleError, match="expected sketch_only or sketch_resampled, found both"):
        PriorTrain(sketch_resampled=0.6, sketch_only=True)
    plain = made(sketch=0)
    with pytest.raises(DalleError, match="found one with sketch 0"):
        sample_sketches(plain, TOKENS, LENGTHS, [0, 1, 2], 0)
    with pytest.raises(DalleError, match="found one with sketch 0"):
        plain(TOKENS, LENGTHS, codes(3), (pictures(3), LENGTHS > 0))
