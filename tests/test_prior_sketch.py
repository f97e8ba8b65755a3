"""A prior that sketches: a small picture is drawn of the words first, and the codes follow it, fast and slow alike."""

import json

import numpy as np
import pytest
import torch
from conftest import run_bad, run_ok

from dalle_cli import load
from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.data.pairs import Pairs
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.sketches import PROCESS, draw_sketches, sketch_losses
from dalle_cli.training.prior import PriorTask, PriorTrain, code_colors

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": 20, "n_text": 6, "n_image_vocab": 12, "grid": 4}
TOKENS = torch.tensor([[3, 7, 11, 0, 0, 0], [5, 2, 9, 13, 0, 0], [3, 7, 11, 19, 4, 0]])
LENGTHS = torch.tensor([3, 4, 0])


def made(block="modern", attention="full", sketch=2, seed=0):
    """A prior of which everything has an effect: much of a sketch's and a hint's first weights are zeros."""
    prior = Prior(PriorConfig(**SIZES, block=block, attention=attention, sketch=sketch, sketch_width=15))
    generator = torch.Generator().manual_seed(seed)
    prior.initialize(generator)
    for part in (prior.hint, prior.sketch):
        for parameter in () if part is None else part.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)
    if prior.sketch is not None:
        prior.sketch.colors.uniform_(-1, 1, generator=generator)
    return prior.eval().requires_grad_(False)


def codes(n, seed=1):
    return torch.randint(12, (n, 4, 4), generator=torch.Generator().manual_seed(seed))


def pictures(n, side=2, seed=2):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


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
    assert torch.equal(expected[:, 0], unseen[:, 0])  # the first code is drawn without
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


def test_a_sketch_of_one_picture_is_that_picture():
    """A denoiser that knows the answer: whatever the noise, the guidance and the steps, it is what is drawn."""
    prior, true = made(), pictures(1)

    class Knows(torch.nn.Module):
        side = 2

        def read(self, tokens, written):
            return torch.zeros(len(tokens), 1)

        def forward(self, x, t, words):
            return true.expand_as(x)

    prior.sketch = Knows()
    for scale, steps in ((1.0, 30), (4.0, 30), (1.0, 5)):
        drawn = draw_sketches(prior, TOKENS[:2], LENGTHS[:2], [0, 1], 0, guidance_scale=scale, steps=steps)
        torch.testing.assert_close(drawn, true.expand(2, -1, -1, -1), atol=1e-3, rtol=1e-3)


def test_a_sketch_belongs_to_its_candidate():
    prior = made()
    together = draw_sketches(prior, TOKENS[[0, 1]], LENGTHS[[0, 1]], [5, 6], 3, guidance_scale=2.0)
    alone = draw_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 3, guidance_scale=2.0)
    torch.testing.assert_close(together[1:], alone)
    for other in (
        draw_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 4, guidance_scale=2.0),
        draw_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [7], 3, guidance_scale=2.0),
        draw_sketches(prior, TOKENS[[1]], LENGTHS[[1]], [6], 3, guidance_scale=1.0),
        draw_sketches(prior, TOKENS[[0]], LENGTHS[[0]], [6], 3, guidance_scale=2.0),
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
    drawn = sample_codes(prior, TOKENS[:1], LENGTHS[:1], [4, 5], 0, guidance_scale=3.0, sketch_guidance=2.0)
    numbers = [4, 5]
    told = draw_sketches(prior, TOKENS[[0, 0]], LENGTHS[[0, 0]], numbers, 0, guidance_scale=2.0)
    sees = torch.ones(4, dtype=torch.bool)
    lengths = torch.tensor([3, 3, 0, 0])
    _, expected = prior(TOKENS[[0, 0, 0, 0]], lengths, drawn.repeat(2, 1, 1), (told.repeat(2, 1, 1, 1), sees))
    torch.testing.assert_close(torch.stack(seen, 1), expected[:, 1:], atol=2e-5, rtol=1e-4)


def test_what_is_kept_of_a_picture_is_in_its_sketch():
    """Only cells all of whose codes are kept are known; the rest is drawn beside them, and so otherwise."""
    prior, given = made(), codes(2)
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[:2] = True
    kept[2, :2] = True  # half a cell
    captions = (TOKENS[:2], LENGTHS[:2], [0, 1], 0)
    free = draw_sketches(prior, *captions)
    drawn = draw_sketches(prior, *captions, kept=(given, kept))
    torch.testing.assert_close(drawn[:, :, 0], prior.sketch.of(given)[:, :, 0])
    assert (drawn[:, :, 1] - prior.sketch.of(given)[:, :, 1]).abs().amin((1, 2)).max() > 1e-3
    assert (drawn[:, :, 1] - free[:, :, 1]).abs().max() > 1e-3
    found = sample_codes(prior, TOKENS, LENGTHS, [0, 1], 0, captions=[0, 1], given=given, kept=kept)
    assert torch.equal(found[:, kept], given[:, kept])


def test_settings_that_do_not_fit():
    with pytest.raises(DalleError, match=r"expected prior\.sketch to divide the grid of 4, found 3"):
        PriorConfig(**SIZES, sketch=3)
    with pytest.raises(DalleError, match="sketch_width"):
        PriorConfig(**SIZES, sketch=2, sketch_width=2)
    with pytest.raises(DalleError, match="sketch_batch"):
        PriorTrain(sketch_batch=0)
    plain = made(sketch=0)
    with pytest.raises(DalleError, match="found one with sketch 0"):
        draw_sketches(plain, TOKENS, LENGTHS, [0, 1, 2], 0)
    with pytest.raises(DalleError, match="found one with sketch 0"):
        plain(TOKENS, LENGTHS, codes(3), (pictures(3), LENGTHS > 0))


# ---- Training


def settings(*told):
    return tuple(word for setting in told for word in ("--set", f"prior.{setting}"))


STEPS = settings("sketch=4", "sketch_width=60", "train.sketch_batch=64", "train.caption_dropout=0.1")


def train(chain, out, *more):
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    return run_ok(*command, *STEPS, "--dtype", "float32", "-o", out, *more)


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketch")
    for path in (chain.dvae, chain.tokenizer, chain.clip):
        (folder / path.name).write_bytes(path.read_bytes())
    train(chain, folder / "prior.safetensors", *settings("train.steps=300", "train.lr=5e-3", "train.sketch_guidance=2"))
    return folder


def seen(chain):
    """Captions and codes of the same pictures: tokens, lengths, codes."""
    captions, found = open_artifact(chain.captions), open_artifact(chain.codes)
    rows = {name: row for row, name in enumerate(captions.strings("ids"))}
    order = [rows[name] for name in found.strings("ids")]
    columns = [np.array(captions.array(name)).astype(np.int64)[order] for name in ("tokens", "lengths")]
    return tuple(map(torch.from_numpy, (*columns, np.array(found.array("codes")).astype(np.int64))))


def test_colors_of_codes_make_small_what_is_decoded(chain):
    dvae = load.dvae(open_artifact(chain.dvae), torch.device("cpu"))
    grids = seen(chain)[2]
    side = grids.shape[-1] // 2
    small = torch.nn.functional.avg_pool2d(code_colors(dvae)[grids].movedim(-1, 1), 2)
    exact = torch.nn.functional.adaptive_avg_pool2d(dvae.decode(grids) * 2 - 1, side)
    assert small.shape == exact.shape
    assert torch.corrcoef(torch.stack([small.flatten(), exact.flatten()]))[0, 1] > 0.9


def test_sketches_are_of_their_captions_and_codes_of_their_sketches(chain, trained):
    """What is drawn is nearer to a caption's own pictures than to others'; true sketches make the codes likelier."""
    prior = load.prior(open_artifact(trained / "prior.safetensors"), torch.device("cpu"))
    tokens, lengths, grids = seen(chain)
    true = prior.sketch.of(grids)
    drawn = draw_sketches(prior, tokens, lengths, range(len(tokens)), 0, guidance_scale=2.0)

    def far(other):
        return (drawn - other).square().mean().item()

    assert far(true) < 0.8 * far(true.roll(7, 0))
    sees = torch.ones(len(tokens), dtype=torch.bool)
    own, other, none = (
        prior.loss(tokens, lengths, grids, told=told)[1]["image_nats"].item()
        for told in ((true, sees), (true.roll(7, 0), sees), None)
    )
    assert own < none < other


def test_the_whole_chain_draws_by_it(chain, trained, tmp_path):
    run_ok("generate", "a red circle", "-n", 2, "--keep", 2, "-m", trained, "-o", tmp_path / "a.png")
    options = []
    for name, said in (("b", ()), ("c", ("--sketch-guidance", 1)), ("d", ("--int8",))):
        out = tmp_path / f"{name}.safetensors"
        run_ok("sample", "a red circle", "-n", 2, "-m", trained, *said, "-o", out)
        options.append(open_artifact(out).history[-1]["options"])
    assert [told["sketch_guidance"] for told in options] == [2.0, 1.0, 2.0]  # as the weights say, but for what is said
    again = tmp_path / "again.safetensors"
    run_ok("sample", "--from", tmp_path / "c.safetensors", "-m", trained, "-o", again)
    first, second = (np.array(open_artifact(path).array("codes")) for path in (tmp_path / "c.safetensors", again))
    assert np.array_equal(first, second)
    line = run_bad("sample", "a", "-m", chain.prior, "--sketch-guidance", 2, "-o", tmp_path / "e.safetensors")
    assert "expected a prior that sketches for --sketch-guidance, found none" in line


def test_figures_tell_of_it(trained):
    rows = [json.loads(line) for line in (trained / "prior.run/metrics.jsonl").read_text().splitlines()]
    steps = [row["sketch"] for row in rows if "sketch" in row]
    assert steps[-1] < 0.8 * steps[0]
    last = [row["validation"] for row in rows if "validation" in row][-1]
    assert last["sketched_nats"] < last["image_nats"]
    assert 0 < last["sketch"] < 1  # the error of one that gives nothing is that of noise and pictures


def test_it_goes_on_where_it_was_stopped(chain, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    steps = settings("train.checkpoint_every=4", "train.steps=8", "train.log_every=1")
    whole = train(chain, tmp_path / "a.safetensors", *steps)
    again = tmp_path / "b.safetensors"
    (tmp_path / "b.run").mkdir()
    for path in (tmp_path / "a.run").glob("checkpoint-00000004*"):
        (tmp_path / "b.run" / path.name).write_bytes(path.read_bytes())
    train(chain, again, *steps)
    assert again.read_bytes() == open_artifact(whole).path.read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "b.run/metrics.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in rows) == 5  # it did not begin anew
    odd = settings("train.accumulate=2", "train.sketch_batch=7")
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe, *STEPS)
    assert "expected sketch_batch a multiple of 2" in run_bad(*command, *odd, "-o", tmp_path / "d.safetensors")


def test_a_prior_may_be_given_a_sketch_later_and_keeps_what_it_has(chain, trained, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    begun = train(chain, tmp_path / "a.safetensors", "--init", chain.prior, *settings("train.steps=1"))
    one, plain = (load.prior(open_artifact(path), torch.device("cpu")) for path in (begun, chain.prior))
    assert (one.config.sketch, plain.config.sketch) == (4, 0)
    for name, tensor in plain.state_dict().items():
        assert (one.state_dict()[name] - tensor).abs().max() < 0.1  # one update away
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe, "--init")
    line = run_bad(*command, trained, *settings("sketch=2"), "-o", tmp_path / "b.safetensors")
    assert "expected prior.sketch = 4" in line


def test_the_sketch_alone_may_be_trained_and_of_another_width_begins_anew(chain, trained, tmp_path):
    """The prior proper and its hint keep their bytes."""
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    for name, width in (("a", 60), ("b", 80)):
        alone = settings("train.sketch_only=true", "train.steps=3", f"sketch_width={width}")
        out = train(chain, tmp_path / f"{name}.safetensors", "--init", trained, *alone)
        before, after = (load_tensors(open_artifact(path)) for path in (trained / "prior.safetensors", out))
        rest = [key for key in before if not key.startswith("sketch.")]
        assert any(key.startswith("hint.") for key in rest)
        assert all(torch.equal(before[key], after[key]) for key in rest)
        shapes = {tuple(t[f"sketch.layers.{i}.inner.weight"].shape) for t in (after,) for i in range(4)}
        assert shapes == {(width, width)}
        near = before["sketch.word.weight"]
        if width == 60:  # it goes on
            assert 0 < (after["sketch.word.weight"] - near).abs().max() < 0.05
        rows = [json.loads(line) for line in (tmp_path / f"{name}.run/metrics.jsonl").read_text().splitlines()]
        assert all("image_nats" not in row for row in rows if "sketch" in row)
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    line = run_bad(*command, *settings("train.sketch_only=true"), "-o", tmp_path / "c.safetensors")
    assert "expected prior.sketch beside prior.train.sketch_only, found none" in line


def test_doctor_looks_at_one_whose_sketch_alone_was_trained(chain, trained, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    out = train(chain, tmp_path / "prior.safetensors", "--init", trained, *settings("train.sketch_only=true"))
    rows = json.loads(run_ok("doctor", out, chain.captions, chain.codes, "--device", "cpu", "--json"))["findings"]
    assert all(np.isfinite(row["value"]) for row in rows)
    (by_heart,) = (row for row in rows if "by heart" in row["question"])
    assert by_heart["verdict"] == "ok"


def test_parts_of_a_batch_teach_what_the_whole_does(chain):
    """In float64 and without dropout: the sketch's own pairs, its noise and who sees what are cut with the rest."""
    pairs = Pairs(open_artifact(chain.captions), open_artifact(chain.codes))
    sizes = {**open_artifact(chain.prior).fact("model", dict), "sketch": 4, "sketch_width": 15}
    task = PriorTask(
        PriorConfig(**sizes), PriorTrain(bpe_dropout=0.0, batch_size=4, sketch_batch=6), pairs, None, 0,
        open_artifact(chain.dvae),
    )  # fmt: skip
    task.model.double().eval()
    for parameter in (*task.model.hint.parameters(), *task.model.sketch.parameters()):
        parameter.data.normal_(0, 0.2)
    batch = task.batch(0)

    def gradients(parts):
        task.model.zero_grad()
        for part in parts:
            loss, _ = task.loss(part, 0, torch.Generator().manual_seed(0))
            (loss / len(parts)).backward()
        named = [*task.model.sketch.named_parameters(), *task.model.hint.named_parameters()]
        return {name: p.grad.clone() for name, p in named}

    whole = gradients([batch])
    parts = gradients(task.split(batch, 2, 0, torch.Generator().manual_seed(0)))
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_sketch_is_the_error_of_the_picture():
    prior, true = made(), pictures(3)
    t, noise = torch.tensor([0, 400, 999]), torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    level = PROCESS.schedule.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    words = prior.sketch.read(TOKENS, prior.written(LENGTHS))
    x = level.sqrt() * true + (1 - level).sqrt() * noise
    expected = (prior.sketch(x, t, words) - true).square().mean((1, 2, 3))
    torch.testing.assert_close(sketch_losses(prior, TOKENS, LENGTHS, true, t, noise), expected, rtol=1e-4, atol=1e-5)


def test_without_the_dvae_it_is_told(chain, tmp_path):
    alone = tmp_path / "codes.safetensors"
    run_ok("encode-images", chain.data, "-m", chain.dvae, "-o", alone)
    command = ("train-prior", chain.captions, alone, "-t", chain.tokenizer, "--config", chain.recipe, *STEPS)
    line = run_bad(*command, "-o", tmp_path / "prior.safetensors")
    assert "expected the dVAE beside -o or the codes for prior.sketch, found none" in line


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plan_knows_of_the_sketch(tmp_path, accumulate):
    """It runs updates on tensors without memory; a larger sketch takes more."""
    sizes = {**SIZES, "sketch": 2}
    memory = []
    for width in (15, 960):
        recipe = tmp_path / "recipe.toml"
        table = "".join(f"{name} = {value}\n" for name, value in {**sizes, "sketch_width": width}.items())
        train = f"[prior.train]\nbatch_size = 4\nsketch_batch = 8\naccumulate = {accumulate}\n"
        recipe.write_text(f"[prior]\n{table}{train}")
        memory.append(run_ok("plan", recipe, "--json"))
    assert memory[0] != memory[1]
