"""What training is made of: schedules, settings, optimisers, the average, the order of samples and who is held out."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from toy_task import LinearBlock

from dalle_cli.data.order import Order, split
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.training.blocks import blocks
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.loop import mix
from dalle_cli.training.optim import EMA, optimizers
from dalle_cli.training.schedules import cosine, learning_rate, same_until


def test_cosine():
    assert [cosine(s, 1.0, 0.0, 4) for s in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert cosine(0, 1.0, 0.2, 0) == 0.2


def test_learning_rates():
    def rates(kind, steps=10, warmup=2):
        return [learning_rate(s, kind, 1.0, 0.1, warmup, steps) for s in range(steps + 1)]

    assert rates("constant") == pytest.approx([0.5, 1] + [1] * 9)
    assert rates("trapezoid") == pytest.approx([0.5] + [1] * 8 + [0.55, 0.1])
    falling = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert rates("cosine") == pytest.approx([0.5, 1, *falling])
    with pytest.raises(DalleError, match="schedule"):
        learning_rate(0, "linear", 1.0, 0.0, 0, 1)


def test_two_lengths_of_a_run_agree_until_either_comes_down():
    told = {"schedule": "trapezoid", "lr": 1.0, "final_lr": 0.0, "warmup": 2, "steps": 10, "batch_size": 2}
    longer = {**told, "steps": 20}
    assert [same_until(step, told, longer) for step in (0, 8, 9, 10)] == [True, True, True, False]
    assert [same_until(step, longer, told) for step in (9, 10)] == [True, False]
    assert not same_until(1, told, {**longer, "batch_size": 3})
    constant, cosines = ({**told, "schedule": kind} for kind in ("constant", "cosine"))
    assert same_until(10, constant, {**constant, "steps": 20})
    assert not same_until(11, {**constant, "steps": 20}, constant)
    assert [same_until(step, cosines, {**cosines, "steps": 20}) for step in (3, 4)] == [True, False]
    assert same_until(9, {**cosines, "lr_steps": 5, "warmup": 0}, {**cosines, "lr_steps": 5, "warmup": 0, "steps": 20})


def test_the_dvae_learning_rate_comes_down_by_lr_steps():
    assert TrainConfig(steps=7).schedule_steps == 7
    assert DVAETrain().schedule_steps == 1_200_000
    assert DVAETrain(steps=300).schedule_steps == 300


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"steps": 0},
            {"batch_size": 0},
            {"keep": 0},
            {"schedule": "linear"},
            {"ema": 1.0},
            {"validation": 1.0},
            {"save_dtype": "int4"},
        ),
        *({"lr": -1.0}, {"weight_decay": -0.1}, {"warmup": -1}, {"eps": -1.0}, {"clip_norm": -1.0}, {"beta1": 1.0}),
        {"optimizer": "lion"},
    ],
    ids=str,
)
def test_settings_out_of_range(values):
    with pytest.raises(DalleError, match=next(iter(values))):
        TrainConfig(**values)


def decays(optimizer):
    return {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}


def test_weight_decay_is_for_matrices():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    (adamw,) = optimizers(model, TrainConfig(weight_decay=0.5))
    assert decays(adamw)[0.5] == {id(model[1].weight), id(model[3].weight)}
    assert len(decays(adamw)[0.0]) == 5


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest():
    """Digits in a name make no block: a head may be a sequence of layers."""
    model = nn.ModuleDict({
        "blocks": nn.ModuleList([LinearBlock(4, 4)]),
        "head": nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 9)),
        "token": nn.Embedding(3, 4),
    })  # fmt: skip
    adamw, muon = optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.5))
    assert decays(muon) == {0.5: {id(model["blocks"][0].weight)}}
    assert decays(adamw)[0.5] == {id(layer.weight) for layer in model["head"]}
    assert sum(map(len, (*decays(adamw).values(), *decays(muon).values()))) == len(list(model.parameters()))


def test_the_decoders_low_resolution_head_is_no_block():
    sizes = {"image_size": 8, "width": 8, "multipliers": (1,), "depth": 1, "groups": 4, "attention": ()}
    text = {"n_embedding": 4, "context_width": 8, "n_text": 3, "n_text_vocab": 9, "text_layers": 1, "text_heads": 2}
    model = Decoder(DecoderConfig(**sizes, **text, sketch=2))
    _, muon = optimizers(model, TrainConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)].split(".")[0] for group in muon.param_groups for p in group["params"]}
    assert taken == {name.split(".")[0] for name in blocks(model)} == {"unet", "text"}


@pytest.mark.parametrize("block", ["bottleneck", "residual"])
def test_muon_is_refused_where_it_would_take_nothing(block):
    model = DVAE(DVAEConfig(n_hid=16, n_init=16, n_vocab=9, block=block))
    with pytest.raises(DalleError, match=r"^expected .* linear layers .*found none in DVAE; set optimizer = 'adamw'$"):
        optimizers(model, TrainConfig(optimizer="muon"))


def test_ema_against_its_formula():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, 0.5)
    value = model.weight.item()
    for count, new in enumerate((1.0, 5.0, -3.0)):
        with torch.no_grad():
            model.weight.fill_(new)
        ema.update(model, count)
        decay = min(0.5, (1 + count) / (10 + count))
        value = decay * value + (1 - decay) * new
        assert ema.model.weight.item() == pytest.approx(value, rel=1e-6)


def test_mix_is_a_function_of_all_its_parts():
    seeds = {mix(a, b) for a in range(-3, 30) for b in range(-3, 30)}
    assert len(seeds) == 33**2
    seeds |= {mix(a, b, name) for a in range(30) for b in range(30) for name in ("global", "task")}
    assert len(seeds) == 33**2 + 2 * 30**2
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 8), (1, 1), (7, 7)])
def test_order(n, batch):
    steps = 3 * n
    order = Order(n, batch, 5)
    epochs, places = map(np.concatenate, zip(*(order.batch(s) for s in range(steps)), strict=True))
    for epoch in range(steps * batch // n):
        assert sorted(places[epochs == epoch]) == list(range(n))
    assert (np.diff(epochs) >= 0).all()
    for step in reversed(range(steps)):  # a batch is a function of its number, whatever was asked for before
        np.testing.assert_array_equal(Order(n, batch, 5).batch(step)[1], order.batch(step)[1])
    if n > 3:
        assert not np.array_equal(order.permutation(0), order.permutation(1))
        assert not np.array_equal(order.permutation(0), Order(n, batch, 6).permutation(0))


def test_an_order_of_nothing():
    with pytest.raises(DalleError, match="none"):
        Order(0, 1, 0)


def test_split_is_by_the_id_alone():
    ids = [f"picture {i}" for i in range(4000)]
    train, held = split(ids, 0.1)
    assert sorted([*train, *held]) == list(range(4000))
    assert 320 < len(held) < 480
    again = split(ids[::-1], 0.1)[1]
    assert {ids[::-1][i] for i in again} == {ids[i] for i in held}
    assert {ids[i] for i in held} <= {ids[i] for i in split(ids, 0.2)[1]}
    assert len(split(ids, 0)[1]) == 0
