"""The papers' recipes: they load, their models have the published sizes, and their numbers are the papers'."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dalle_cli import config
from dalle_cli.data.filters import Filters
from dalle_cli.data.tokenizer import TokenizerConfig
from dalle_cli.models.attention import layer_kinds
from dalle_cli.models.clip import CLIP, CLIPConfig
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.planning.estimate import models_on_meta
from dalle_cli.planning.workload import workloads
from dalle_cli.training.clip import CLIPTrain
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.prior import PriorTrain

RECIPE = Path(__file__).parents[2] / "recipes" / "paper" / "recipe.toml"
PUBLISHED_CLIP_VOCAB = 49408

# What the papers give, written down once more by hand.
DATA = {"drop_boilerplate": True, "max_aspect": 2.0}
TOKENIZER = {"vocab_size": 16384, "length": 256}
DVAE_MODEL = {
    "image_size": 256, "n_groups": 4, "n_blk_per_group": 2, "n_hid": 256, "n_init": 128, "n_vocab": 8192,
    "quantizer": "gumbel", "block": "bottleneck", "likelihood": "logit_laplace", "grid": 32, "reduction": 8,
}  # fmt: skip
DVAE_TRAIN = {
    "steps": 3_000_000, "batch_size": 512, "lr": 1e-4, "final_lr": 1.25e-6, "lr_steps": 1_200_000,
    "temperature": 1.0, "final_temperature": 1 / 16, "temperature_steps": 150_000, "beta": 6.6, "beta_steps": 5000,
    "schedule": "cosine", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-4, "ema": 0.999,
    "ema_every": 1, "augment": "dvae", "flip": True,
}  # fmt: skip
PRIOR_MODEL = {
    "n_layer": 64, "n_head": 62, "n_embd": 62 * 64, "n_text_vocab": 16384, "n_text": 256, "n_image_vocab": 8192,
    "grid": 32, "attention": "sparse", "conv_kernel": 11, "text_weight": 1 / 8,
}  # fmt: skip
PRIOR_TRAIN = {
    "steps": 430_000, "batch_size": 1024, "lr": 4.5e-4, "schedule": "plateau", "plateau_factor": 0.5,
    "plateau_least": 1 / 2**5, "parallel": "shard", "warmup": 5000, "beta1": 0.9,
    "beta2": 0.96, "eps": 1e-8, "weight_decay": 4.5e-2, "clip_norm": 4.0, "ema": 0.99, "ema_every": 25,
    "bpe_dropout": 0.1, "caption_dropout": 0.0,
}  # fmt: skip
CLIP_MODEL = {
    "image_size": 224, "patch_size": 32, "n_proj": 512, "vision_width": 768, "vision_layers": 12, "vision_heads": 12,
    "n_text": 77, "text_width": 512, "text_layers": 12, "text_heads": 8, "activation": "quick_gelu", "loss": "softmax",
}  # fmt: skip
CLIP_TRAIN = {
    "steps": 32 * 400_000_000 // 32_768, "batch_size": 32_768, "lr": 5e-4, "warmup": 2000, "beta1": 0.9,
    "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2, "flip": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return config.read(RECIPE)


def differing(made, expected):
    """The values that are not the paper's: name -> (recipe's, paper's)."""
    found = {name: getattr(made, name) for name in expected}
    return {n: (found[n], value) for n, value in expected.items() if found[n] != value}


def sections(table, clip_vocab=PUBLISHED_CLIP_VOCAB):
    """Every dataclass of the recipe, built as the stages build them."""
    (data,) = config.section(table, "data", Filters)
    (tokenizer,) = config.section(table, "tokenizer", TokenizerConfig)
    dvae, dvae_train = config.section(table, "dvae", DVAEConfig, train=DVAETrain)
    clip, clip_train = config.section(table, "clip", CLIPConfig, {"n_text_vocab": clip_vocab}, train=CLIPTrain)
    known = {
        "n_text_vocab": tokenizer.vocab_size,
        "n_text": tokenizer.length,
        "n_image_vocab": dvae.n_vocab,
        "grid": dvae.grid,
    }
    prior, prior_train = config.section(table, "prior", PriorConfig, known, train=PriorTrain)
    return data, tokenizer, dvae, dvae_train, clip, clip_train, prior, prior_train


def test_every_value_is_the_papers(table):
    expected = (DATA, TOKENIZER, DVAE_MODEL, DVAE_TRAIN, CLIP_MODEL, CLIP_TRAIN, PRIOR_MODEL, PRIOR_TRAIN)
    for made, values in zip(sections(table), expected, strict=True):
        assert not differing(made, values)


def test_a_changed_value_is_noticed(table):
    changed = {**table, "prior": {**table["prior"], "n_layer": 63}}
    assert differing(sections(changed)[6], PRIOR_MODEL) == {"n_layer": (63, 64)}


def test_the_recipe_says_what_the_paper_gives_instead_of_leaning_on_defaults(table):
    """Defaults may move; a recipe that is read on its own should not."""
    inputs = {"n_text_vocab", "n_text", "n_image_vocab", "grid"}  # of the prior: known from its captions and codes
    for section, expected, settings, absent in (
        (table["dvae"], DVAE_MODEL, DVAEConfig, set()),
        (table["dvae"]["train"], DVAE_TRAIN, DVAETrain, set()),
        (table["prior"], PRIOR_MODEL, PriorConfig, inputs),
        (table["prior"]["train"], PRIOR_TRAIN, PriorTrain, set()),
        (table["clip"], CLIP_MODEL, CLIPConfig, set()),
    ):
        wanted = expected.keys() & {f.name for f in fields(settings)}
        assert not wanted - absent - section.keys()


def count(module):
    return sum(math.prod(p.shape) for p in module.parameters())


def test_parameter_counts_are_the_published_ones(table):
    _, _, dvae, _, clip, _, prior, _ = sections(table)
    with torch.device("meta"):
        vae, transformer, judge = DVAE(dvae), Prior(prior), CLIP(clip)
    # exactly 53,786,240 and 43,829,766, of which test_dvae loads the published layout
    assert count(vae.encoder) == pytest.approx(53.8e6, rel=1e-3)
    assert count(vae.decoder) == pytest.approx(43.8e6, rel=1e-3)
    assert count(transformer) == pytest.approx(12e9, rel=0.05)
    assert count(judge) == 151_277_313
    assert all(p.is_meta for module in (vae, transformer, judge) for p in module.parameters())


def test_clip_on_the_recipes_own_tokenizer_is_smaller_by_its_embeddings(table):
    with torch.device("meta"):
        small = CLIP(sections(table, clip_vocab=TOKENIZER["vocab_size"])[4])
    assert count(small) == 151_277_313 - (PUBLISHED_CLIP_VOCAB - TOKENIZER["vocab_size"]) * 512


def test_layers_are_those_of_the_figure(table):
    prior = sections(table)[6]
    kinds = layer_kinds(prior.n_layer, prior.attention)
    assert kinds[:5] == ["row", "column", "row", "row", "row"]
    assert kinds[-1] == "conv"
    assert kinds.count("column") == 16


# DALL-E 2: the numbers of table 3 (2022, app. C) and of sec. 2, written down once more by hand.

UNCLIP = RECIPE.parent / "unclip.toml"
COUNTS = {  # what the paper says
    "diffusion_prior": 1e9, "autoregressive_prior": 1e9, "decoder": 3.5e9, "upsampler_1": 700e6, "upsampler_2": 300e6,
}  # fmt: skip
PARTS = {
    "decoder": {
        "image_size": 64, "width": 512, "multipliers": (1, 2, 3, 4), "depth": 3, "attention": (32, 16, 8),
        "head_width": 64, "dropout": 0.1, "schedule": "cosine", "n_timestep": 1000, "prediction": "epsilon",
        "learned_variance": True, "n_extra": 4, "context_width": 2048, "text_layers": 24, "text_heads": 32,
        "n_embedding": 1024, "n_text": 256,
    },
    "upsampler_1": {
        "image_size": 256, "low_size": 64, "width": 320, "multipliers": (1, 2, 3, 4), "depth": 3, "attention": (),
        "schedule": "cosine", "n_timestep": 1000,
    },
    "upsampler_2": {
        "image_size": 1024, "low_size": 256, "width": 192, "multipliers": (1, 1, 2, 2, 4, 4), "depth": 2,
        "attention": (), "schedule": "linear", "n_timestep": 1000,
    },
    "diffusion_prior": {
        "n_head": 32, "n_embd": 2048, "n_text": 256, "n_embedding": 1024, "schedule": "cosine", "n_timestep": 1000,
    },
    "autoregressive_prior": {
        "n_head": 32, "n_embd": 2048, "n_text": 256, "n_component": 319, "n_bucket": 1024, "n_embedding": 1024,
    },
}  # fmt: skip
TRAINS = {
    "decoder": {
        "steps": 800_000, "batch_size": 2048, "lr": 1.2e-4, "beta2": 0.999, "eps": 1e-8, "ema": 0.9999,
        "embedding_dropout": 0.1, "caption_dropout": 0.5,
    },
    "upsampler_1": {
        "steps": 1_000_000, "batch_size": 1024, "lr": 1.2e-4, "beta2": 0.999, "eps": 1e-8, "ema": 0.9999, "crop": 4,
        "corruption": "blur", "blur_sigma": 0.6,
    },
    "upsampler_2": {
        "steps": 1_000_000, "batch_size": 512, "lr": 1e-4, "beta2": 0.999, "eps": 1e-8, "ema": 0.9999, "crop": 4,
        "corruption": "bsr",
    },
    "diffusion_prior": {
        "steps": 600_000, "batch_size": 4096, "lr": 1.1e-4, "beta2": 0.96, "eps": 1e-6, "weight_decay": 6e-2,
        "ema": 0.9999, "caption_dropout": 0.1,
    },
    "autoregressive_prior": {
        "steps": 1_000_000, "batch_size": 4096, "lr": 1.6e-4, "beta2": 0.91, "eps": 1e-10, "weight_decay": 4e-2,
        "ema": 0.999, "caption_dropout": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def unclip():
    """The models of the second recipe on the meta device, and how they are trained."""
    with models_on_meta():
        return {w.name: (w.task(w.train).model, w.train) for w in workloads(config.read(UNCLIP))}


@pytest.mark.parametrize("name", COUNTS)
def test_dalle_2_has_its_published_sizes_and_numbers(unclip, name):
    model, train = unclip[name]
    assert count(model) == pytest.approx(COUNTS[name], rel=0.1)
    assert not differing(model.config, PARTS[name])
    assert not differing(train, TRAINS[name])
    assert all(p.is_meta for p in model.parameters())


def test_the_layers_of_table_3_are_not_1_billion(unclip):
    """Why the priors have 20 and not 24."""
    model, _ = unclip["diffusion_prior"]
    assert model.config.n_layer == 20
    of_a_layer = count(model.blocks[0])
    assert of_a_layer == 12 * 2048**2 + 13 * 2048
    assert count(model) + 4 * of_a_layer > 1.1e9
    assert 24 * of_a_layer > 1.2e9


def test_the_clip_is_a_vit_h(unclip):
    """632 million parameters in its encoder of images, as the ViT-H of the paper that named it."""
    model, _ = unclip["clip"]
    assert (model.config.n_proj, model.config.patch_size, model.config.image_size) == (1024, 16, 256)
    vision = sum(p.numel() for name, p in model.named_parameters() if name.startswith("vis"))
    assert vision == pytest.approx(632e6, rel=0.02)


def test_what_dalle_2s_recipe_says_of_the_table_is_written_out(unclip):
    """Defaults may move; a recipe that is read on its own should not."""
    table = config.read(UNCLIP)
    inputs = {"n_embedding", "n_text"}
    bodies = {"diffusion_prior": table["embedding_prior"]["diffusion"]}
    bodies["autoregressive_prior"] = table["embedding_prior"]["autoregressive"]
    for name in COUNTS:
        body = bodies.get(name) or table[name]
        assert not PARTS[name].keys() - inputs - body.keys(), name
        assert not TRAINS[name].keys() - body["train"].keys(), name
