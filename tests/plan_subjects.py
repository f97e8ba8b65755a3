"""What is planned for in tests: subjects of small recipes and of the paper's, and a machine without a data sheet."""

from pathlib import Path

import torch

from dalle_cli import config
from dalle_cli.planning import hardware as machines
from dalle_cli.planning.subjects import subjects

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper" / "recipe.toml"
UNCLIP = ROOT / "recipes" / "paper" / "unclip.toml"
HERE = machines.Machine("here", 10**9, None, "float32", False, torch.float32)
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


def subject_of(text, name, tmp_path, *sets):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return next(s for s in subjects(config.read(path, sets)) if s.name == name)
