"""Training a prior to sketch, to follow what is sketched, or one of both alone."""

import json

import numpy as np
import pytest
import torch
from conftest import run_bad, run_ok
from sketch_priors import LENGTHS, SIZES, TOKENS, made, pictures

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.data.pairs import Pairs
from dalle_cli.models.prior import PriorConfig
from dalle_cli.pipelines import loading
from dalle_cli.sampling.sketches import PROCESS, sample_sketches, sketch_losses
from dalle_cli.training.prior import PriorTask, PriorTrain, code_colors


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
    dvae = loading.dvae(open_artifact(chain.dvae), torch.device("cpu"))
    grids = seen(chain)[2]
    side = grids.shape[-1] // 2
    small = torch.nn.functional.avg_pool2d(code_colors(dvae)[grids].movedim(-1, 1), 2)
    exact = torch.nn.functional.adaptive_avg_pool2d(dvae.decode(grids) * 2 - 1, side)
    assert small.shape == exact.shape
    assert torch.corrcoef(torch.stack([small.flatten(), exact.flatten()]))[0, 1] > 0.9


def test_sketches_are_of_their_captions_and_codes_of_their_sketches(chain, trained):
    """What is drawn is nearer to a caption's own pictures than to others'; true sketches make the codes likelier."""
    prior = loading.prior(open_artifact(trained / "prior.safetensors"), torch.device("cpu"))
    tokens, lengths, grids = seen(chain)
    true = prior.sketch.of(grids)
    drawn = sample_sketches(prior, tokens, lengths, range(len(tokens)), 0, guidance_scale=2.0)

    def far(other):
        return (drawn - other).square().mean().item()

    assert far(true) < 0.8 * far(true.roll(7, 0))
    sees = torch.ones(len(tokens), dtype=torch.bool)
    own, other, none = (
        prior.loss(tokens, lengths, grids, sketches=told)[1]["image_nats"].item()
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
    assert "expected a prior with a sketch for --sketch-guidance, found none" in line


def test_figures_tell_of_it(trained):
    rows = [json.loads(line) for line in (trained / "prior.run/metrics.jsonl").read_text().splitlines()]
    steps = [row["sketch"] for row in rows if "sketch" in row]
    assert steps[-1] < 0.8 * steps[0]
    last = [row["validation"] for row in rows if "validation" in row][-1]
    assert last["sketched_nats"] < last["image_nats"]
    assert 0 < last["sketch"] < 1  # the error of one that gives nothing is that of noise and pictures


@pytest.mark.parametrize("redrawn", [False, True])
def test_it_goes_on_where_it_was_stopped(chain, trained, tmp_path, redrawn):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    steps = settings("train.checkpoint_every=4", "train.steps=8", "train.log_every=1")
    if redrawn:
        steps += ("--init", trained, *settings("train.sketch_resampled=0.6"))
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
    one, plain = (loading.prior(open_artifact(path), torch.device("cpu")) for path in (begun, chain.prior))
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


def test_codes_may_follow_what_a_sketch_that_stays_draws(chain, trained, tmp_path):
    """Its own bytes stay; followed is what it makes of true ones."""
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    again = settings("train.sketch_resampled=0.6", "train.steps=3", "train.log_every=1")
    out = train(chain, tmp_path / "a.safetensors", "--init", trained, *again)
    before, after = (load_tensors(open_artifact(path)) for path in (trained / "prior.safetensors", out))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("sketch."), name
    rows = [json.loads(line) for line in (tmp_path / "a.run/metrics.jsonl").read_text().splitlines()]
    assert all("image_nats" in row and "sketch" not in row for row in rows if "loss" in row)
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    line = run_bad(*command, *settings("train.sketch_resampled=0.6"), "-o", tmp_path / "b.safetensors")
    assert "expected prior.sketch beside prior.train.sketch_resampled, found none" in line
    for init in ((), ("--init", chain.prior), ("--init", trained, *settings("sketch_width=80"))):
        line = run_bad(*command, *STEPS, *again, *init, "-o", tmp_path / "c.safetensors")
        assert "expected --init with a sketch of width" in line


def task_of(chain, **options):
    """In float64 and without dropout; everything has an effect."""
    pairs = Pairs(open_artifact(chain.captions), open_artifact(chain.codes))
    sizes = {**open_artifact(chain.prior).require("model", dict), "sketch": 4, "sketch_width": 15}
    train = PriorTrain(bpe_dropout=0.0, batch_size=4, sketch_batch=6, **options)
    task = PriorTask(PriorConfig(**sizes), train, pairs, None, 0, open_artifact(chain.dvae))
    task.model.double().eval()
    for parameter in (*task.model.hint.parameters(), *task.model.sketch.parameters()):
        parameter.data.normal_(0, 0.2)
    return task


@pytest.mark.parametrize("redrawn", [0.0, 0.6])
def test_only_what_is_redrawn_is_told_of_the_sketchs_weights(chain, redrawn):
    """That of a null caption as well, whose sketch is that of the caption when it is drawn for guidance."""
    task = task_of(chain, sketch_resampled=redrawn, caption_dropout=1.0)
    batch = task.batch(0)

    def nats():
        return task.loss(batch, 0, torch.Generator().manual_seed(0))[1]["image_nats"].item()

    first = nats()
    assert nats() == first
    task.model.sketch.word.weight.data.normal_(0, 0.5)
    assert (nats() != first) == bool(redrawn)


@pytest.mark.parametrize("way", ["sketch_only=true", "sketch_resampled=0.6"])
def test_doctor_looks_at_one_of_which_a_part_was_trained(chain, trained, tmp_path, way):
    (tmp_path / "dvae.safetensors").write_bytes(chain.dvae.read_bytes())
    out = train(chain, tmp_path / "prior.safetensors", "--init", trained, *settings(f"train.{way}"))
    rows = json.loads(run_ok("doctor", out, chain.captions, chain.codes, "--device", "cpu", "--json"))["findings"]
    assert all(np.isfinite(row["value"]) for row in rows)
    (by_heart,) = (row for row in rows if "overfitted" in row["question"])
    assert by_heart["verdict"] == "ok"


@pytest.mark.parametrize("redrawn", [0.0, 0.6])
def test_parts_of_a_batch_teach_what_the_whole_does(chain, redrawn):
    """The sketch's own pairs, its noise and who sees what are cut with the rest."""
    task = task_of(chain, sketch_resampled=redrawn)
    batch = task.batch(0)

    def gradients(parts):
        task.model.zero_grad()
        for part in parts:
            loss, _ = task.loss(part, 0, torch.Generator().manual_seed(0))
            (loss / len(parts)).backward()
        learn = (task.model.hint,) if redrawn else (task.model.sketch, task.model.hint)
        return {name: p.grad.clone() for part in learn for name, p in part.named_parameters()}

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


@pytest.mark.parametrize("told", ["accumulate = 1", "accumulate = 2", "sketch_only = true", "sketch_resampled = 0.6"])
def test_a_plan_knows_of_the_sketch(tmp_path, told):
    """It runs updates on tensors without memory; a larger sketch takes more."""
    sizes = {**SIZES, "sketch": 2}
    memory = []
    for width in (15, 960):
        recipe = tmp_path / "recipe.toml"
        table = "".join(f"{name} = {value}\n" for name, value in {**sizes, "sketch_width": width}.items())
        train = f"[prior.train]\nbatch_size = 4\nsketch_batch = 8\n{told}\n"
        recipe.write_text(f"[prior]\n{table}{train}")
        memory.append(run_ok("plan", recipe, "--json"))
    assert memory[0] != memory[1]
