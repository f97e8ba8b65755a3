"""Training: one loop, a task per model, and a function per stage. The functions are imported when they are used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_cli.training.clip import train_clip as train_clip
    from dalle_cli.training.decoder import train_decoder as train_decoder
    from dalle_cli.training.dvae import train_dvae as train_dvae
    from dalle_cli.training.prior import train_prior as train_prior
    from dalle_cli.training.tokenizer import train_tokenizer as train_tokenizer
    from dalle_cli.training.upsampler import train_upsampler as train_upsampler

STAGES = {
    "train_tokenizer": "tokenizer", "train_dvae": "dvae", "train_clip": "clip",
    "train_prior": "prior", "train_decoder": "decoder", "train_upsampler": "upsampler",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return getattr(import_module(f"dalle_cli.training.{STAGES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
