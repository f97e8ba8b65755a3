"""What tests of `dalle plan` share: small recipes of both systems, and a trainer on a workload's random batches."""

from pathlib import Path

import torch

from dalle_cli import config
from dalle_cli.devices import Arithmetic
from dalle_cli.planning.estimate import estimate
from dalle_cli.planning.hardware import Hardware
from dalle_cli.planning.workload import workloads
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper" / "recipe.toml"
UNCLIP = ROOT / "recipes" / "paper" / "unclip.toml"
HERE = Hardware("here", 10**9, None, "float32", False, torch.float32)
SMALL = """
[prior]
n_layer = 3
n_head = 4
n_embd = 64
n_text_vocab = 500
n_text = 16
n_image_vocab = 300
grid = 8
attention = "full"

[prior.train]
batch_size = 8
"""
HEAD_UNCLIP = """
[tokenizer]
vocab_size = 300
length = 24

[clip]
image_size = 16
patch_size = 8
n_proj = 16
vision_width = 16
vision_layers = 1
vision_heads = 2
n_text = 24
text_width = 16
text_layers = 1
text_heads = 2
"""
SECTIONS_UNCLIP = """
[embedding_prior.diffusion]
n_layer = 3
n_head = 4
n_embd = 64

[embedding_prior.diffusion.train]
batch_size = 8

[embedding_prior.autoregressive]
n_layer = 3
n_head = 4
n_embd = 64
n_component = 12
n_bucket = 40

[embedding_prior.autoregressive.train]
batch_size = 8

[decoder]
image_size = 16
width = 16
multipliers = [1, 2]
depth = 1
attention = [8]
head_width = 8
groups = 4
context_width = 24
text_layers = 2
text_heads = 2

[decoder.train]
batch_size = 8

[upsampler_1]
image_size = 64
low_size = 16
width = 16
multipliers = [1, 2]
depth = 1
groups = 4

[upsampler_1.train]
batch_size = 8
"""
SMALL_UNCLIP = HEAD_UNCLIP + SECTIONS_UNCLIP


def workload_of(text, name, tmp_path, *sets):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return next(w for w in workloads(config.read(path, sets)) if w.name == name)


def estimated(workload, train=None, dtype=torch.float32, accelerator=False):
    """An update by the workload's settings, or by others."""
    return estimate(workload, train or workload.train, dtype, accelerator)


def trainer_of(workload, dtype=torch.float32):
    machine = Arithmetic(torch.device("cpu"), dtype)
    trainer = Trainer(workload.task(workload.train), workload.train, Run(Path(), "", {}, []), machine, 0)
    trainer.step = 1
    return trainer
