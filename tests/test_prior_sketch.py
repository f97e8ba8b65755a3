"""A prior that sketches: what the words alone stand for, and that the codes' places see it, fast and slow alike."""

import json

import numpy as np
import pytest
import torch
from conftest import run_bad, run_ok

from dalle_cli import load
from dalle_cli.artifacts import open_artifact
from dalle_cli.data.pairs import Pairs
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Prompt
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.training.prior import PriorTask, PriorTrain, code_colors, small_pictures

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": 20, "n_text": 6, "n_image_vocab": 12, "grid": 4}
TOKENS = torch.tensor([[3, 7, 11, 0, 0, 0], [5, 2, 9, 13, 0, 0], [3, 7, 11, 19, 4, 0]])
LENGTHS = torch.tensor([3, 4, 0])


def made(block="modern", attention="full", sketch=2, seed=0):
    """A prior whose places do see the sketch: the hint's first weights are zeros."""
    prior = Prior(PriorConfig(**SIZES, block=block, attention=attention, sketch=sketch, sketch_width=12))
    generator = torch.Generator().manual_seed(seed)
    prior.initialize(generator)
    if prior.hint is not None:
        torch.nn.init.normal_(prior.hint.weight, generator=generator)
    return prior.eval().requires_grad_(False)


def codes(n, seed=1):
    return torch.randint(12, (n, 4, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("block", "attention"), [("modern", "full"), ("paper", "full"), ("paper", "sparse")])
def test_step_by_step_is_what_forward_says(block, attention):
    """With several captions, candidates of each, and the null caption beside them."""
    prior = made(block, attention)
    given = codes(6)
    prompt = Prompt.join([prior.prefill(TOKENS[:2], LENGTHS[:2]), prior.prefill(TOKENS[:1], 0 * LENGTHS[:1])])
    cache = prior.cache(prompt, candidates=2)
    steps = [cache.logits, *(prior.step(code, cache) for code in given.flatten(1)[:, :-1].unbind(1))]
    tokens = TOKENS[[0, 0, 1, 1, 0, 0]]
    _, expected = prior(tokens, torch.tensor([3, 3, 4, 4, 0, 0]), given)
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=2e-5, rtol=1e-4)


def test_repeated_prompts_keep_their_hints():
    prior = made()
    prompt = prior.prefill(TOKENS, LENGTHS)
    assert torch.equal(prompt.repeat(2).hints, prompt.hints[[0, 0, 1, 1, 2, 2]])


def test_a_hint_is_of_the_cell_that_the_next_code_lies_in():
    """One cell of the sketch changed moves the codes predicted there and in the cells around, and of others none."""
    prior = made(sketch=4)
    prior.hint.weight.zero_()
    prior.hint.weight.view(16, 3, 3, 3)[:, :, 1, 1] = 1  # its own cell alone
    sketches = torch.zeros(2, 3, 4, 4)
    sketches[1, :, 2, 1] = 5
    told = prior.hint.of(sketches, 4)
    moved = (told[0] - told[1]).abs().sum(-1) > 0
    assert moved.nonzero().flatten().tolist() == [2 * 4 + 1]
    coarse = prior.hint.of(torch.eye(2).expand(1, 3, 2, 2), 4)[0].sum(-1).view(4, 4)
    assert torch.equal(coarse > 0, torch.kron(torch.eye(2), torch.ones(2, 2)) > 0)
    plain, hinted = (Prior.forward(prior, TOKENS[:1], LENGTHS[:1], codes(1))[1] for _ in range(2))
    assert torch.equal(plain, hinted)
    prior.sketched = lambda tokens, lengths: sketches[1:]
    hinted = prior(TOKENS[:1], LENGTHS[:1], codes(1))[1]
    prior.sketched = lambda tokens, lengths: sketches[:1]
    plain = prior(TOKENS[:1], LENGTHS[:1], codes(1))[1]
    changed = (plain - hinted).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().min() == 2 * 4 + 1  # its own code, and through attention what follows; nothing before it
    assert changed[2 * 4 + 1 :].all()


def test_sketch_and_hint_are_those_of_plain_loops():
    """Against numpy in float64, which shares no code."""
    prior = made().double()
    weights = {name: tensor.numpy() for name, tensor in prior.sketch.state_dict().items()}
    sketches = prior.sketched(TOKENS, LENGTHS).numpy()
    told = prior.hint.of(torch.from_numpy(sketches), 4).numpy()
    for row, length in enumerate(LENGTHS.tolist()):
        x = np.zeros(4)
        for token in TOKENS[row, :length].tolist():
            x = x + weights["word.weight"][token] / np.sqrt(length)
        for layer in ("layer_1", "layer_2"):
            x = weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"]
            x = x / (1 + np.exp(-x))
        expected = (weights["picture.weight"] @ x + weights["picture.bias"]).reshape(3, 2, 2)
        np.testing.assert_allclose(sketches[row], expected, rtol=1e-10, atol=1e-12)
        table = prior.hint.weight.numpy().reshape(16, 3, 3, 3)
        for place in range(16):
            r, c = place // 4 // 2, place % 4 // 2
            hint = np.zeros(16)
            for channel in range(3):
                for dr in (-1, 0, 1):
                    for dc in (-1, 0, 1):
                        if 0 <= r + dr < 2 and 0 <= c + dc < 2:
                            hint += table[:, channel, dr + 1, dc + 1] * expected[channel, r + dr, c + dc]
            np.testing.assert_allclose(told[row, place], hint, rtol=1e-10, atol=1e-12)


def test_without_a_hint_it_is_the_prior_without_a_sketch():
    prior, plain = made(), made(sketch=0)
    prior.hint.weight.zero_()
    plain.load_state_dict({k: v for k, v in prior.state_dict().items() if not k.startswith(("sketch.", "hint."))})
    for one, other in zip(prior(TOKENS, LENGTHS, codes(3)), plain(TOKENS, LENGTHS, codes(3)), strict=True):
        assert torch.equal(one, other)


def test_the_words_are_a_bag_and_pads_are_none():
    prior = made()
    turned = torch.tensor([[11, 3, 7, 9, 9, 9]])
    torch.testing.assert_close(prior.sketched(turned, LENGTHS[:1]), prior.sketched(TOKENS[:1], LENGTHS[:1]))
    null = prior.sketched(TOKENS, 0 * LENGTHS)
    assert torch.equal(null[0], null[1])
    assert not torch.allclose(null[:1], prior.sketched(TOKENS[:1], LENGTHS[:1]))


def test_each_loss_teaches_its_own():
    prior = made().requires_grad_(True)
    loss, _ = prior.loss(TOKENS, LENGTHS, codes(3))
    loss.backward()
    assert all(p.grad is None for p in prior.sketch.parameters())
    assert prior.hint.weight.grad.abs().max() > 0
    prior.zero_grad()
    pictures = torch.rand(3, 3, 2, 2)
    both, parts = prior.loss(TOKENS, LENGTHS, codes(3), seen=(TOKENS, LENGTHS, pictures))
    torch.testing.assert_close(both, loss + parts["sketch"])
    expected = (prior.sketched(TOKENS, LENGTHS) - pictures).square().mean()
    torch.testing.assert_close(parts["sketch"], expected.detach())
    both.backward()
    assert all(p.grad.abs().max() > 0 for p in prior.sketch.parameters())


def test_guidance_sees_the_null_sketch():
    prior = made()
    options = {"guidance_scale": 3.0, "temperature": 0.0}
    drawn = sample_codes(prior, TOKENS[:1], LENGTHS[:1], [0], 0, **options)
    prior.hint.weight.zero_()
    assert not torch.equal(drawn, sample_codes(prior, TOKENS[:1], LENGTHS[:1], [0], 0, **options))


def test_settings_that_do_not_fit():
    with pytest.raises(DalleError, match=r"expected prior\.sketch to divide the grid of 4, found 3"):
        PriorConfig(**SIZES, sketch=3)
    with pytest.raises(DalleError, match="sketch_width"):
        PriorConfig(**SIZES, sketch=2, sketch_width=2)
    with pytest.raises(DalleError, match="found one with sketch 0"):
        made(sketch=0).sketched(TOKENS, LENGTHS)


# ---- Training


STEPS = ("--set", "prior.sketch=4", "--set", "prior.sketch_width=48", "--set", "prior.train.sketch_batch=32")


def train(chain, out, *more):
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    return run_ok(*command, *STEPS, "--dtype", "float32", "-o", out, *more)


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketch")
    for path in (chain.dvae, chain.tokenizer, chain.clip):
        (folder / path.name).write_bytes(path.read_bytes())
    train(chain, folder / "prior.safetensors", "--set", "prior.train.steps=150", "--set", "prior.train.lr=5e-3")
    return folder


def test_small_pictures_are_the_decoded_ones_made_small(chain):
    dvae = load.dvae(open_artifact(chain.dvae), torch.device("cpu"))
    found = torch.from_numpy(np.array(open_artifact(chain.codes).array("codes")).astype(np.int64))
    side = found.shape[-1] // 2
    small = small_pictures(found.numpy(), code_colors(dvae), side)
    exact = torch.nn.functional.adaptive_avg_pool2d(dvae.decode(found) * 2 - 1, side)
    assert small.shape == exact.shape
    assert torch.corrcoef(torch.stack([small.flatten(), exact.flatten()]))[0, 1] > 0.9


def test_the_sketch_learns_what_captions_look_like(chain, trained):
    """Better than the mean of all pictures, and of another caption's sketch it is not."""
    prior = load.prior(open_artifact(trained / "prior.safetensors"), torch.device("cpu"))
    captions, found = open_artifact(chain.captions), open_artifact(chain.codes)
    rows = {name: row for row, name in enumerate(captions.strings("ids"))}
    order = [rows[name] for name in found.strings("ids")]
    columns = (np.array(captions.array(name)).astype(np.int64)[order] for name in ("tokens", "lengths"))
    tokens, lengths = map(torch.from_numpy, columns)
    dvae = load.dvae(open_artifact(chain.dvae), torch.device("cpu"))
    grids = np.array(found.array("codes")).astype(np.int64)
    pictures = small_pictures(grids, code_colors(dvae), prior.config.sketch)
    sketches = prior.sketched(tokens, lengths)
    mean = (pictures - pictures.mean(0)).square().mean()
    assert (sketches - pictures).square().mean() < 0.7 * mean
    assert (sketches.roll(1, 0) - pictures).square().mean() > (sketches - pictures).square().mean()


def test_the_whole_chain_draws_by_it(trained, tmp_path):
    path = run_ok("generate", "a red circle", "-n", 2, "--keep", 2, "-m", trained, "-o", tmp_path / "a.png")
    assert path
    run_ok("sample", "a red circle", "-n", 2, "-m", trained, "--int8", "-o", tmp_path / "b.safetensors")


def test_figures_tell_of_it(trained):
    lines = (trained / "prior.run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any("sketch" in row for row in rows)


def test_it_goes_on_where_it_was_stopped(chain, trained, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    steps = [f"prior.train.{setting}" for setting in ("checkpoint_every=4", "steps=8", "log_every=1")]
    steps = [word for setting in steps for word in ("--set", setting)]
    whole = train(chain, tmp_path / "a.safetensors", *steps)
    again = tmp_path / "b.safetensors"
    run = tmp_path / "a.run"
    (tmp_path / "b.run").mkdir()
    for path in run.glob("checkpoint-00000004*"):
        (tmp_path / "b.run" / path.name).write_bytes(path.read_bytes())
    train(chain, again, *steps)
    assert again.read_bytes() == open_artifact(whole).path.read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "b.run/metrics.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in rows) == 5  # it did not begin anew
    odd = ("--set", "prior.train.accumulate=2", "--set", "prior.train.sketch_batch=7", "-o", tmp_path / "d.safetensors")
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe, *STEPS)
    assert "expected sketch_batch a multiple of 2" in run_bad(*command, *odd)


def test_a_prior_may_be_given_a_sketch_later_and_keeps_what_it_has(chain, trained, tmp_path):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    begun = train(chain, tmp_path / "a.safetensors", "--init", chain.prior, "--set", "prior.train.steps=1")
    one, plain = (load.prior(open_artifact(path), torch.device("cpu")) for path in (begun, chain.prior))
    assert (one.config.sketch, plain.config.sketch) == (4, 0)
    for name, tensor in plain.state_dict().items():
        assert (one.state_dict()[name] - tensor).abs().max() < 0.1  # one update away
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe, "--init")
    line = run_bad(*command, trained, "--set", "prior.sketch=2", "-o", tmp_path / "b.safetensors")
    assert "expected prior.sketch = 4" in line


def test_parts_of_a_batch_teach_what_the_whole_does(chain, tmp_path):
    """In float64 and without dropout: the sketch's own pairs are cut with the rest."""
    pairs = Pairs(open_artifact(chain.captions), open_artifact(chain.codes))
    sizes = {**open_artifact(chain.prior).fact("model", dict), "sketch": 4, "sketch_width": 12}
    task = PriorTask(
        PriorConfig(**sizes), PriorTrain(bpe_dropout=0.0, batch_size=4, sketch_batch=6), pairs, None, 0,
        open_artifact(chain.dvae),
    )  # fmt: skip
    task.model.double().eval()
    batch = [x.double() if x.is_floating_point() else x for x in task.batch(0)]

    def gradients(parts):
        task.model.zero_grad()
        for part in parts:
            loss, _ = task.loss(part, 0, torch.Generator().manual_seed(0))
            (loss / len(parts)).backward()
        return {name: p.grad.clone() for name, p in task.model.sketch.named_parameters()}

    whole = gradients([batch])
    parts = gradients(task.split(batch, 2, 0, torch.Generator().manual_seed(0)))
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-12)


def test_without_the_dvae_it_is_told(chain, tmp_path):
    alone = tmp_path / "codes.safetensors"
    run_ok("encode-images", chain.data, "-m", chain.dvae, "-o", alone)
    command = ("train-prior", chain.captions, alone, "-t", chain.tokenizer, "--config", chain.recipe, *STEPS)
    line = run_bad(*command, "-o", tmp_path / "prior.safetensors")
    assert "expected the dVAE beside -o or the codes for prior.sketch, found none" in line
