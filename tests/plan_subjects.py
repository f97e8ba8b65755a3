"""What is planned for in tests: subjects of small recipes and of the paper's, and a machine without a data sheet."""

from pathlib import Path

import torch

from dalle_cli import config
from dalle_cli.training import machines
from dalle_cli.training.standin import subjects

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper" / "recipe.toml"
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


def subject_of(text, name, tmp_path, *sets):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return next(s for s in subjects(config.read(path, sets)) if s.name == name)
