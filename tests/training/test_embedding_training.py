"""Training the priors over embeddings: planted answers, exact resumption, parts, and a scale that does not fit."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from interruptions import Crash, after_update
from planted_embeddings import CLIP, LENGTH, WIDTH, WORDS, embeddings, opened, pairs
from process_pair import group
from stage_runs import lasting_rows

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.devices import arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
from dalle_cli.models.embedding_prior import AutoregressivePriorConfig
from dalle_cli.pipelines.loading import embedding_prior
from dalle_cli.sampling.embeddings import PromptBatch, sample_diffusion
from dalle_cli.training.distributed import ProcessGroup
from dalle_cli.training.embedding_prior import (
    AutoregressivePriorTask,
    DiffusionPriorTask,
    EmbeddingPriorTrain,
    cosines,
    measured,
)
from dalle_cli.training.loop import Splits, Trainer
from dalle_cli.training.run import Run

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": WORDS, "n_text": LENGTH, "n_embedding": WIDTH}
KINDS = ("diffusion", "autoregressive")
QUICK = {"steps": 12, "batch_size": 8, "lr": 3e-3, "warmup": 2, "ema": 0.9, "log_every": 3, "validate_every": 6}


def settings(**more):
    return EmbeddingPriorTrain(**{**QUICK, "validation": 0.2, "checkpoint_every": 4, **more})


def task(kind, joined, seed=0, **more):
    if kind == "diffusion":
        return DiffusionPriorTask(DiffusionPriorConfig(**SIZES, n_timestep=50), settings(**more), joined, seed)
    config = AutoregressivePriorConfig(**SIZES, n_component=WIDTH, n_bucket=16, n_dot=8)
    return AutoregressivePriorTask(config, settings(**more), joined, seed)


def run_of(folder, model):
    from dataclasses import asdict

    facts = {"tokenizer": "f" * 64, "encoder": CLIP}
    return Run(folder / "prior.safetensors", "weights.prior.embeddings", {"model": asdict(model), **facts}, [])


def trainer(kind, joined, folder, seed=0, members=None, **more):
    made = task(kind, joined, seed, **more)
    run = run_of(folder, made.model.config)
    return Trainer(made, settings(**more), run, arithmetic("cpu", "float32"), seed, members)


@pytest.mark.parametrize(("kind", "by"), [("diffusion", "z_t"), ("diffusion", "word"), ("autoregressive", "z_t")])
def test_planted(tmp_path, kind, by):
    """z_i follows z_t, or the first word: what is drawn for held-out captions is near their own z_i, not others'."""
    joined = pairs(tmp_path, by=by)
    more = {"steps": 150, "batch_size": 32, "lr": 5e-3, "warmup": 10, "validate_every": 1000, "checkpoint_every": 1000}
    if kind == "autoregressive":
        more = {**more, "batch_size": 64, "lr": 1e-2}
    made = trainer(kind, joined, tmp_path, **more)
    before = made.task.validate(made.model.eval(), torch.device("cpu"))
    assert before["cosine"] - before["cosine_others"] < 0.05
    after = made.train()
    assert after["cosine"] - after["cosine_others"] > (0.2 if kind == "diffusion" else 0.12)
    assert after["loss_held_out"] < 0.9 * before["loss_held_out"]


@pytest.mark.parametrize("kind", KINDS)
def test_caption_and_embedding_are_joined_by_id(tmp_path, kind):
    """In a batch each caption stands with the embeddings of its own picture; a dropped one has length 0."""
    joined = pairs(tmp_path, n=60)
    tokens, lengths, z_t, z_i = embeddings(60)
    made = task(kind, joined, caption_dropout=0.3)
    dropped = 0
    for step in range(20):
        batch = made.batch(step)
        for row in range(8):
            place = int((torch.from_numpy(z_i) - batch[3][row]).norm(dim=-1).argmin())
            np.testing.assert_allclose(batch[3][row], z_i[place], atol=1e-6)
            np.testing.assert_allclose(batch[2][row], z_t[place], atol=1e-6)
            assert batch[0][row].tolist() == tokens[place].tolist()
            assert int(batch[1][row]) in (0, lengths[place])
            dropped += int(batch[1][row]) == 0
        for ours, again in zip(batch, made.batch(step), strict=True):
            assert torch.equal(ours, again)
    assert 0.2 < dropped / 160 < 0.4
    with_all = task(kind, joined, caption_dropout=0.0)
    assert min(int(with_all.batch(step)[1].min()) for step in range(20)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_carry_the_statistics(tmp_path, kind):
    """Of the training embeddings alone, unchanged by averages; a model made from the file draws with them."""
    joined = pairs(tmp_path)
    made = trainer(kind, joined, tmp_path)
    made.train()
    weights = open_artifact(tmp_path / "prior.safetensors")
    model = embedding_prior(weights, torch.device("cpu"))
    z = joined.embeddings(np.arange(len(joined)))[made.task.places].astype(np.float64)
    np.testing.assert_allclose(model.principal.mean, z.mean(0), atol=1e-7)
    np.testing.assert_allclose(model.principal.spectrum, np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1], atol=1e-8)
    assert float(model.principal.scale) == pytest.approx(z.var(0).mean() ** -0.5, rel=1e-5)
    if kind == "autoregressive":
        coordinates = (z - z.mean(0)) @ model.principal.components.double().numpy().T
        np.testing.assert_allclose(model.low, coordinates.min(0), atol=1e-6)
        np.testing.assert_allclose(model.high, coordinates.max(0), atol=1e-6)
        dots = (z * joined.text_embeddings(np.arange(len(joined)))[made.task.places]).sum(-1)
        np.testing.assert_allclose(model.edges, np.quantile(dots, np.arange(1, 8) / 8), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [3, 9])
def test_resumed(tmp_path, kind, step):
    """Broken off after an update and gone on with: the same bytes and the same log."""
    joined = pairs(tmp_path, n=60)
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    trainer(kind, joined, folders[0]).train()
    with after_update(step), pytest.raises(Crash):
        trainer(kind, joined, folders[1]).train()
    again = trainer(kind, joined, folders[1])
    again.resume()
    assert again.step == step // 4 * 4
    again.train()
    outs = [folder / "prior.safetensors" for folder in folders]
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert lasting_rows(outs[0]) == lasting_rows(outs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch(tmp_path, kind):
    made = task(kind, pairs(tmp_path, n=60), caption_dropout=0.5)
    assert isinstance(made, Splits)
    made.model.double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in made.batch(0))

    def gradients(batches):
        made.model.zero_grad()
        for part in batches:
            (made.loss(part, 0, torch.Generator())[0] / len(batches)).backward()
        return {name: p.grad.clone() for name, p in made.model.named_parameters()}

    whole, parts = gradients([batch]), gradients(made.split(batch, 4, 0, torch.Generator()))
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-9, atol=1e-14)
        assert grad.abs().sum() > 0, name


def two_processes(kind, folder):
    joined = opened(folder / "data")  # not written again: the other process reads
    trainer(kind, joined, folder, members=group()).train()


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(pair, tmp_path, kind):
    for name in ("one", "two", "two/data"):
        (tmp_path / name).mkdir()
    pairs(tmp_path / "two" / "data", n=60)
    joined = pairs(tmp_path, n=60)
    trainer(kind, joined, tmp_path / "one", members=ProcessGroup()).train()
    pair(two_processes, kind, tmp_path / "two")
    ours, theirs = (load_tensors(open_artifact(tmp_path / n / "prior.safetensors")) for n in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3 if "bias" in name else 1e-4)


def test_scale_that_does_not_fit(tmp_path):
    """What is asked for is taken, and a warning says what would fit."""
    joined = pairs(tmp_path, n=60)
    with mock.patch("dalle_cli.console.warn") as warn:
        fitting = task("diffusion", joined)
        assert not warn.called
        made = task("diffusion", joined, scale=1.0)
    (said,) = warn.call_args[0]
    assert "with scale 1 the entries of z_i have a standard deviation of 0." in said
    told = float(said.partition("; ")[2].split()[0])
    assert told == pytest.approx(float(fitting.model.principal.scale), rel=1e-3)
    assert float(made.model.principal.scale) == 1
    z = torch.from_numpy(joined.embeddings(np.arange(60)))
    torch.testing.assert_close(made.model.principal.restore(made.model.principal.standardize(z)), z)


def test_noise_is_for_unit_variance(tmp_path):
    """What the network is given at half of the way has as much of z_i as of noise."""
    made = task("diffusion", pairs(tmp_path))
    seen = []
    loss = made.model.loss
    made.model.loss = lambda x, *rest: (seen.append((x, rest[0], rest[-1])), loss(x, *rest))[1]
    for step in range(30):
        made.loss(made.batch(step), step, torch.Generator())
    x, t, x_start = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert float(x_start.square().mean()) == pytest.approx(1, abs=0.15)
    assert float(x.square().mean()) == pytest.approx(1, abs=0.15)
    level = made.process.schedule.at(t, x).float()
    noise = (x - level.sqrt() * x_start) / (1 - level).sqrt()
    assert (float(noise.mean()), float(noise.std())) == (pytest.approx(0, abs=0.1), pytest.approx(1, abs=0.1))
    assert (int(t.min()), int(t.max())) == (0, 49)
    assert len(set(t.tolist())) > 40


def test_cosines_with_own_and_others():
    rng = np.random.default_rng(0)
    drawn, true = torch.from_numpy(rng.normal(size=(2, 5, 3)))
    table = drawn @ true.mT
    others = [float(table[i, j]) for i, j in itertools.permutations(range(5), 2)]
    found = cosines(drawn, true)
    assert found["cosine"] == pytest.approx(float(table.diag().mean()))
    assert found["cosine_others"] == pytest.approx(np.mean(others))
    assert cosines(drawn[:1], true[:1]).keys() == {"cosine"}


def test_few_components_hold_most(tmp_path):
    principal = measured(joined := pairs(tmp_path), joined.split(0.2)[0])
    n = principal.n_holding(0.9)
    assert 1 < n < WIDTH
    z = torch.from_numpy(joined.embeddings(joined.split(0.2)[0])) - principal.mean
    kept = principal.project(z + principal.mean, n).square().sum() / z.square().sum()
    fewer = principal.project(z + principal.mean, n - 1).square().sum() / z.square().sum()
    assert fewer < 0.9 <= kept


def test_inputs_that_do_not_fit(tmp_path):
    with pytest.raises(DalleError, match="embedded by one CLIP"):
        pairs(tmp_path, n=5, encoder="d" * 64)
    for name, value in {"caption_dropout": 1.5, "scale": -1.0, "drawn_captions": -1, "drawn_steps": 0}.items():
        with pytest.raises(DalleError, match=f"expected {name} "):
            settings(**{name: value})
    with pytest.raises(DalleError, match='found "shard"'):
        settings(parallel="shard")


def test_guidance_draws_nearer_to_the_caption(tmp_path):
    """A trained prior, whose captions were dropped now and then, follows them more closely when guided."""
    joined = pairs(tmp_path, noise=1.0)
    more = {"steps": 150, "batch_size": 32, "lr": 5e-3, "warmup": 10, "validate_every": 1000, "checkpoint_every": 1000}
    made = trainer("diffusion", joined, tmp_path, caption_dropout=0.2, **more)
    made.train()
    held = made.task.held_out
    tokens, lengths = joined.tokens(held)
    given = PromptBatch(*map(torch.from_numpy, (tokens, lengths, joined.text_embeddings(held))))
    clean = torch.from_numpy(embeddings(noise=0.0)[3][held])

    def nearness(scale):
        model = made.ema.model
        how = {"steps": 10, "guidance_scale": scale, "best_of": 1}
        drawn = torch.cat(list(sample_diffusion(model, given, range(len(held)), 0, **how)))
        return cosines(drawn, clean)["cosine"] - cosines(drawn, clean)["cosine_others"]

    assert nearness(2.0) > nearness(1.0) + 0.02
