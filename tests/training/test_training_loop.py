"""What the training loop can do for every model, on a task that is small enough to check by hand."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from comparisons import assert_equal
from conftest import run_bad, run_ok
from interruptions import Crash, after_update
from stage_runs import rows
from toy_task import SplitToy, ToyTask, config, log_of, run_of, train_toy, trainer

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.training import run as runs
from dalle_cli.training.blocks import blocks, recompute, wrap_forward
from dalle_cli.training.clip import CLIPTrain
from dalle_cli.training.config import TrainConfig, affecting, deterministic
from dalle_cli.training.decoder import DecoderTrain
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.embedding_prior import EmbeddingPriorTrain
from dalle_cli.training.loop import Trainer, mix
from dalle_cli.training.prior import PriorTrain
from dalle_cli.training.schedules import Plateau
from dalle_cli.training.upsampler import UpsamplerTrain

DOUBLE = torch.float64
FIRST = {  # the training settings that the oldest weights name
    "steps", "batch_size", "lr", "final_lr", "schedule", "warmup", "optimizer", "beta1", "beta2", "eps", "weight_decay",
    "clip_norm", "ema", "ema_every", "log_every", "validate_every", "checkpoint_every", "keep", "validation",
    "max_validation",
}  # fmt: skip


def gradients(loop, batch):
    loop._gradients(batch)
    return {name: p.grad.clone() for name, p in loop.model.named_parameters()}


# A stopped run goes on as the very same run, whatever is set

SETTINGS = (
    {},
    {"schedule": "plateau", "plateau_patience": 1, "plateau_metric": "nats"},
    {"schedule": "plateau", "plateau_patience": 1, "lr": 0.3},
    {"accumulate": 3},
    {"checkpoint_activations": True},
    {"ema_every": 5, "ema": 0.9, "clip_norm": 1.0},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("step", [3, 5, 10])
def test_a_stopped_run_goes_on_as_the_very_same(tmp_path, settings, step):
    """Weights and every row of the log: a mean over three updates, too, of which two came before the stop."""
    c = config(**settings)
    more = {"dropout": 0.1, "held_out": {4: 3.0, 8: 4.0, 12: 5.0}}
    whole = train_toy(tmp_path / "whole", c, **more)
    with after_update(step), pytest.raises(Crash):
        train_toy(tmp_path / "cut", c, **more)
    assert train_toy(tmp_path / "cut", c, **more) == whole
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert [row["step"] for row in log_of(tmp_path / "cut")] == [3, 4, 6, 8, 9, 12, 12]


def test_a_checkpoint_after_the_very_first_update(tmp_path):
    """The sums of the log's and of validation's figures are one and the same then."""
    often = config(checkpoint_every=1)
    with after_update(2), pytest.raises(Crash):
        train_toy(tmp_path / "cut", often)
    assert train_toy(tmp_path / "cut", often) == train_toy(tmp_path / "whole", often)


def test_a_checkpoint_of_before_the_loop_remembered_anything(tmp_path):
    c = config()
    whole = train_toy(tmp_path / "whole", c)
    with after_update(6), pytest.raises(Crash):
        train_toy(tmp_path / "cut", c)
    last = runs.Run.checkpoints(run_of(tmp_path / "cut", c))[-1]
    found = open_artifact(last)
    old = {k: v for k, v in load_tensors(found).items() if k.split("/")[0] in ("model", "ema", "optimizer")}
    assert len(old) < len(load_tensors(found))
    train = {k: v for k, v in found.config["train"].items() if k in FIRST}
    save_tensors(last, "checkpoint", old, {**found.config, "train": train}, found.history)
    assert train_toy(tmp_path / "cut", c) == whole


def test_a_setting_that_came_later_counts_as_its_default(tmp_path):
    """Weights of before there was a field are those of its default, and what changes nothing is not compared."""
    c = config()
    train_toy(tmp_path, c)
    out = run_of(tmp_path, c).out
    found = open_artifact(out)
    train = {name: value for name, value in found.config["train"].items() if name in FIRST}
    save_tensors(out, found.kind, load_tensors(found), {**found.config, "train": train}, found.history)
    assert run_of(tmp_path, c).finished()
    assert run_of(tmp_path, config(tensorboard=True, parallel="shard", timeout=9)).finished()
    for more in ({"accumulate": 2}, {"save_dtype": "bfloat16"}, {"lr": 0.03}):
        assert not run_of(tmp_path, config(**more)).finished()


def test_what_settings_affect():
    assert affecting(TrainConfig, "nothing") == {"tensorboard", "parallel", "timeout"}
    assert affecting(TrainConfig, "end") == {"save_dtype"}
    assert affecting(TrainConfig, "sampling") == set()
    assert affecting(PriorTrain, "sampling") == {"guidance", "temperature", "sketch_guidance"}
    assert affecting(EmbeddingPriorTrain, "sampling") == {"guidance"}
    assert affecting(UpsamplerTrain, "sampling") == {"low_noise"}
    assert affecting(DVAETrain, "end") == {"save_dtype"}  # its temperature is of training


@pytest.mark.parametrize(
    ("train", "quiet"),
    [
        (DVAETrain, {"augment": "center", "flip": False}),
        (CLIPTrain, {"augment": "center", "flip": False}),
        (PriorTrain, {"bpe_dropout": 0, "caption_dropout": 0, "sketch_batch": 8, "code_noise": 0}),
        (EmbeddingPriorTrain, {"caption_dropout": 0}),
        (DecoderTrain, {"augment": "center", "flip": False, "caption_dropout": 0, "embedding_dropout": 0}),
        (UpsamplerTrain, {"augment": "center", "flip": False, "corruption": "none"}),
    ],
)  # fmt: skip
def test_deterministic_settings(train, quiet):
    usual = train(batch_size=32, accumulate=4)
    sizes = {"batch_size": 8, "max_validation": 8, "accumulate": 1, "validation": 0.0}
    assert deterministic(usual, 8) == replace(usual, **sizes, **quiet)


# Plateau


def test_the_rate_is_halved_when_a_figure_stands_still():
    plateau = Plateau("nats", 2, 0.5, 0.2)
    seen = [5.0, 4.0, 4.0, 4.0, 3.9, 3.95, 3.95, 4.1, 4.0, 9.0, 9.0, 9.0]
    cuts = [plateau.update({"loss": -9.0, "nats": nats}) for nats in seen]
    assert [i for i, cut in enumerate(cuts) if cut] == [3, 6, 8]
    assert plateau.share == 0.2  # half of a quarter would be below the least
    again = Plateau("nats", 2, 0.5, 0.2)
    again.load(plateau.state())
    assert (again.share, again.best, again.waited) == (0.2, 3.9, plateau.waited)
    for nats in (math.nan, math.inf):
        better = plateau.best
        plateau.update({"nats": nats})
        assert plateau.best == better
    rising = Plateau("-psnr", 1, 0.5, 0.2)
    assert [rising.update({"psnr": x}) for x in (10.0, 11.0, 11.0, 12.0)] == [False, False, True, False]
    with pytest.raises(DalleError, match="plateau_metric among loss, nats, found 'image'"):
        Plateau("image", 1, 0.5, 0.2).update({"loss": 1.0, "nats": 1.0})


def test_plateau_in_a_run(tmp_path, capsys):
    """Validations after updates 4, 8, 12, ..., of which the one within the warm-up does not count."""
    c = config(steps=24, warmup=4, schedule="plateau", plateau_patience=1, plateau_metric="nats", log_every=1)
    train_toy(tmp_path, c, held_out={4: 0.0, 8: 3.0, 12: 4.0, 16: 3.0, 20: 3.5, 24: 0.5})
    rates = [row["lr"] / c.lr for row in log_of(tmp_path) if "lr" in row]
    expected = [0.25, 0.5, 0.75, 1.0] + [1.0] * 4 + [1.0] * 4 + [0.5] * 4 + [0.25] * 4 + [0.125] * 4
    assert rates == pytest.approx(expected, rel=1e-6)
    assert "nats has stopped falling: from here lr times 0.5" in capsys.readouterr().err


def test_a_plateau_of_the_training_loss(tmp_path):
    """The mean loss between two validations, not that of the last row."""
    loop = trainer(tmp_path, config(schedule="plateau", plateau_patience=1, log_every=1))
    means = []
    for chunk in ((4.0, 2.0), (3.0, 2.5), (2.0, 5.0)):
        for loss in chunk:
            loop.validated.add({"loss": torch.tensor(loss)})
        loop.step += 2
        means.append(sum(chunk) / 2)
        loop.validate()
    assert loop.plateau.best == min(means) == 2.75
    assert loop.plateau.share == 0.5


def test_a_figure_that_is_none_is_told_before_the_first_update(tmp_path):
    task = SplitToy(c := config(schedule="plateau", plateau_metric="image_nats"))
    with pytest.raises(DalleError, match="among loss, nats, found 'image_nats'"):
        Trainer(task, c, run_of(tmp_path, c), trainer(tmp_path, c).machine, 0).train()
    assert task.parts == []


# Batches in parts


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_have_the_gradients_of_the_whole(tmp_path, parts):
    whole = trainer(tmp_path, config(clip_norm=0.0), dtype=DOUBLE)
    batch = whole.task.batch(0)[0], torch.tensor([1, 5, 2, 4, 5, 5])
    split = trainer(tmp_path, config(accumulate=parts), dtype=DOUBLE)
    expected = gradients(whole, batch)
    assert_equal(gradients(split, batch), expected, rtol=1e-12, atol=1e-14)
    assert split.task.parts == [6 // parts] * parts
    told = [loop._gradients(batch) for loop in (whole, split)]
    assert_equal(told[1], told[0], rtol=1e-6, atol=0)  # and the figures that are logged

    class Naive(SplitToy):
        def split(self, batch, parts, step, generator):
            return list(zip(*(t.chunk(parts) for t in batch), strict=True))

    wrong = gradients(trainer(tmp_path, config(accumulate=parts), Naive, DOUBLE), batch)
    assert not torch.allclose(wrong["last.weight"], expected["last.weight"], rtol=1e-3)


def test_parts_draw_their_own_dropout(tmp_path):
    """Else k parts would be k times the same noise. The task's own noise is independent of the dropout's."""
    seen = []

    class Spy(SplitToy):
        def loss(self, batch, step, generator):
            seen.append((torch.rand(1).item(), torch.rand(1, generator=generator).item()))
            return super().loss(batch, step, generator)

    for parts in (3, 1):
        loop = trainer(tmp_path, config(accumulate=parts), Spy)
        loop._gradients(loop.task.batch(0))
    assert len({noise for both in seen for noise in both}) == 8
    seeds = mix(0, 0, "global"), mix(0, 0)
    assert seen[-1] == tuple(torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds)


def test_a_loss_of_the_whole_batch_is_not_taken_apart(tmp_path, chain):
    with pytest.raises(DalleError, match="accumulate = 1 for Toy, whose loss takes the whole batch, found 2"):
        trainer(tmp_path, config(accumulate=2), ToyTask)
    command = ("train-clip", chain.data, "-t", chain.tokenizer, "--config", chain.recipe, "-o", tmp_path / "a")
    assert "takes the whole batch" in run_bad(*command, "--set", "clip.train.accumulate=2")


@pytest.mark.parametrize(
    "values",
    [
        *({"accumulate": 0}, {"accumulate": 5}, {"plateau_patience": 0}, {"plateau_factor": 1.0}),
        *({"plateau_factor": 0.0}, {"plateau_least": 0.0}, {"schedule": "plateaux"}),
    ],
    ids=str,
)
def test_settings_out_of_range(values):
    with pytest.raises(DalleError, match=next(iter(values))):
        TrainConfig(**values)


# Blocks


def test_every_model_has_blocks():
    prior = Prior(PriorConfig(n_layer=3, n_head=2, n_embd=8, n_text_vocab=9, n_text=2, n_image_vocab=5, grid=2))
    assert list(blocks(prior)) == ["blocks.0", "blocks.1", "blocks.2"]
    clip = CLIP(CLIPConfig(vision_layers=1, text_layers=2))
    stem = "_model.encoder.layers."
    assert list(blocks(clip)) == [f"text{stem}0", f"text{stem}1", f"vision{stem}0"]
    for kind in ("bottleneck", "residual"):
        names = list(blocks(DVAE(DVAEConfig(n_hid=16, n_init=16, n_vocab=9, block=kind))))
        assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
        assert all(name.split(".")[-1] in ("block_1", "block_2") for name in names)
        assert len(names) == (16 if kind == "bottleneck" else 12)
    with pytest.raises(DalleError, match="residual blocks, found none in Linear"):
        blocks(torch.nn.Linear(1, 1))


def test_recomputed_blocks_have_the_same_gradients(tmp_path):
    """With dropout, whose noise must be drawn again; and they are computed twice, else nothing was saved."""
    plain = trainer(tmp_path, config(), dtype=DOUBLE, dropout=0.3)
    again = trainer(tmp_path, config(checkpoint_activations=True), dtype=DOUBLE, dropout=0.3)
    batch = plain.task.batch(0)
    assert_equal(gradients(again, batch), gradients(plain, batch), rtol=0, atol=0)
    assert [block.calls for block in plain.model.blocks] == [1, 1]
    assert [block.calls for block in again.model.blocks] == [2, 2]
    assert again.model.state_dict().keys() == plain.model.state_dict().keys()
    assert "forward" not in vars(again.ema.model.blocks[0])  # the average stays a plain model


@pytest.mark.parametrize("kind", ["paper", "modern"])
def test_recomputed_blocks_of_the_prior(kind):
    options = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_text_vocab": 9, "n_text": 3, "n_image_vocab": 5, "grid": 3}
    sizes = PriorConfig(**options, dropout=0.2, block=kind, conv_kernel=3)
    torch.manual_seed(0)
    prior = Prior(sizes).double()
    batch = torch.randint(0, 9, (2, 3)), torch.tensor([3, 1]), torch.randint(0, 5, (2, 3, 3))
    found = []
    for _ in range(2):
        prior.zero_grad()
        torch.manual_seed(1)
        prior.loss(*batch)[0].backward()
        found.append({name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None})
        for block in blocks(prior).values():
            wrap_forward(block, recompute)
    assert_equal(found[1], found[0], rtol=0, atol=0)


# torch.compile


def test_the_loss_is_what_is_compiled(tmp_path, monkeypatch):
    given = []

    def compile(function):
        given.append(function)
        return lambda *args, **named: given.append((args, named)) or function(*args, **named)

    monkeypatch.setattr(torch, "compile", compile)
    loop = trainer(tmp_path, config(compile=True))
    loop.update(loop.task.batch(0))
    assert given[0].__func__ is type(loop.model).loss
    assert len(given) == 2
    assert loop.ema.model.loss.__func__ is type(loop.model).loss
    loop.model.loss(*loop.task.batch(0))


def test_no_compiler(tmp_path, monkeypatch):
    class Broken(Exception):
        pass

    def fail(*_):
        raise Broken("InvalidCxxCompiler: No working C++ compiler found\nand many lines more")

    exc = types.SimpleNamespace(BackendCompilerFailed=Broken)
    monkeypatch.setattr(torch, "_dynamo", types.SimpleNamespace(exc=exc), raising=False)
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    loop = trainer(tmp_path, config(compile=True))
    with pytest.raises(DalleError, match=r"^expected a compiler .*, found InvalidCxx.* compiler found; install g\+\+"):
        loop.update(loop.task.batch(0))


@pytest.mark.slow
def test_the_compiled_loss_is_the_eager_one(tmp_path):
    losses = []
    for settings in ({}, {"compile": True, "checkpoint_activations": True}):
        loop = trainer(tmp_path, config(**settings))
        losses.append([loop.update(loop.task.batch(step))["loss"].item() for step in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_prior_from_the_command_line(chain, tmp_path):
    command = ("train-prior", chain.captions, chain.codes, "-t", chain.tokenizer, "--config", chain.recipe)
    command += ("--dtype", "float32", "--set", "prior.n_layer=1", "--set", "prior.train.steps=4", "-o")
    found = []
    for name, more in (("a", ()), ("b", ("--set", "prior.train.compile=true"))):
        out = run_ok(*command, tmp_path / f"{name}.safetensors", *more)
        found.append(load_tensors(open_artifact(tmp_path / out)))
    assert_equal(found[1], found[0], rtol=1e-3, atol=1e-4)


# What a run tells


def test_rate_and_memory_are_in_the_log(tmp_path):
    train_toy(tmp_path, config())
    trained = [row for row in rows(tmp_path / "toy.safetensors") if "loss" in row]
    assert all(row["rate"] > 0 for row in trained)
    assert all(10 < row["peak_memory"] < 1e6 for row in trained)  # MiB
    assert trained[-1]["seconds"] >= trained[0]["seconds"] > 0


def test_rates_are_of_the_tasks_units_over_the_last_updates(tmp_path):
    loop = trainer(tmp_path, config())
    for seconds, units in ((9.0, 1), (1.0, 10), (2.0, 10), (1.0, 20)):
        loop.meter.add(seconds, "places", units)
    pace = loop.meter.pace()
    assert (pace.rate, pace.unit, pace.share) == (10.0, "places", None)
    loop.meter.peak = 5e6
    assert loop.meter.pace().share == pytest.approx(3 * 1e6 / 4.0 / 5e6)
    assert loop.meter.seconds == 13.0
    loop.meter.measure_machine()
    assert 1e7 < loop.meter.peak < 1e17
    assert trainer(tmp_path, config(), ToyTask).meter.flops is None


def test_scalars_for_tensorboard(tmp_path, monkeypatch):
    written, opened = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train_toy(tmp_path, config(tensorboard=True), held_out={4: 1.0, 8: 2.0, 12: 3.0})
    assert opened == [(str(tmp_path / "toy.run/tensorboard"), 1), "closed"]
    assert [(v, s) for name, v, s in written if name == "validation/nats"] == [(1.0, 4), (2.0, 8), (3.0, 12)]
    logged = [row for row in log_of(tmp_path) if "loss" in row]
    assert [(v, s) for name, v, s in written if name == "loss"] == [(row["loss"], row["step"]) for row in logged]
    assert {"rate", "peak_memory", "lr", "figure"} <= {name for name, _, _ in written}
    assert "step" not in {name for name, _, _ in written}


def test_scalars_for_the_real_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train_toy(tmp_path, config(tensorboard=True))
    assert list((tmp_path / "toy.run/tensorboard").glob("events.*"))


def test_tensorboard_is_missing_or_switched(tmp_path, monkeypatch, capsys):
    whole = train_toy(tmp_path, config())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DalleError, match=r"found none; pip install 'dalle-cli\[tensorboard\]'"):
        train_toy(tmp_path / "b", config(tensorboard=True))
    assert train_toy(tmp_path, config(tensorboard=True)) == whole  # the same run: nothing is made again
    assert "left alone" in capsys.readouterr().err


def test_what_is_no_number_ends_the_run(tmp_path):
    for settings, said in (({}, "finite loss, found nan"), ({"clip_norm": 1.0}, "finite loss")):
        with pytest.raises(DalleError, match=f"expected a {said}.* by update .*lower lr"):
            train_toy(tmp_path / str(len(settings)), config(lr=1e30, **settings))

    class Steep(SplitToy):
        def loss(self, batch, step, generator):
            loss, figures = super().loss(batch, step, generator)
            return loss + (self.model.first.bias.sum() * 0).sqrt(), figures  # a slope that is none at a finite loss

    with pytest.raises(
        DalleError, match="expected a finite grad norm, found nan by update 1; lower lr, lengthen warmup"
    ):
        train_toy(tmp_path / "steep", config(clip_norm=1.0, log_every=1), Steep)
    assert list((tmp_path / "steep/toy.run").glob("checkpoint-*")) == []


def test_the_average_is_taken_every_few_updates(tmp_path):
    """After updates 3 and 6 of 8, against its formula."""
    loop = trainer(tmp_path, config(ema=0.5, ema_every=3), dtype=DOUBLE)
    expected = {name: p.clone() for name, p in loop.model.state_dict().items()}
    for step in range(8):
        loop.update(loop.task.batch(step))
        if loop.step in (3, 6):
            decay = min(0.5, (1 + loop.step // 3 - 1) / (10 + loop.step // 3 - 1))
            now = loop.model.state_dict()
            expected = {name: decay * old + (1 - decay) * now[name] for name, old in expected.items()}
    assert_equal(loop.ema.model.state_dict(), expected, rtol=1e-12, atol=0)
