"""dalle2-pytorch 1.15.6: its diffusion prior and its decoder's U-Net, on the inputs that ours are given.

It imports packages that no longer install beside a current torch, or that fetch weights, and of which neither model
needs any. Empty ones stand in their places while it is imported.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import count, step
from bench.timing import Subject
from bench.unclip import painted, prior_task

ABSENT = (
    *("accelerate", "coca_pytorch", "ema_pytorch", "ftfy", "kornia", "kornia.augmentation", "kornia.filters"),
    *("pytorch_warmup", "resize_right", "torchvision", "torchvision.transforms", "torchvision.utils"),
    *("vector_quantize_pytorch", "x_clip"),
)
BEST_OF = 2  # its default, and the paper's
CLIP = 0.5  # max_grad_norm of its train configs
MLP = 3.25  # times the width: gated, and its attention has one head of keys, so that a block is as large as ours
N_TIMESTEP = 1000
PRIOR_TRAIN = {"lr": 1.1e-4, "wd": 6.02e-2, "eps": 1e-6}  # of its train configs
DECODER_TRAIN = {"lr": 1e-4, "wd": 1e-2, "eps": 1e-8}


class Empty(ModuleType):
    """A package any name of which is a class without anything."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _package() -> Any:
    put = {name: Empty(name) for name in ABSENT if name not in sys.modules}
    sys.modules.update(put)
    try:
        import_module("dalle2_pytorch.optimizer")  # and the package before it
        inner = import_module("dalle2_pytorch.dalle2_pytorch")
    finally:
        for name in put:
            del sys.modules[name]
    vars(inner)["tqdm"] = lambda steps, **_: steps
    return inner


PACKAGE = _package()


def trainer(
    model: nn.Module, dtype: str, train: dict[str, float], loss: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """An update by its own optimizer: what `loss` takes -> the loss."""
    optimizer = sys.modules["dalle2_pytorch.optimizer"].get_optimizer(model.parameters(), **train)
    return lambda *given: step(model, optimizer, lambda: loss(*given), dtype, CLIP)


class Prior(nn.Module):
    """Its diffusion prior, and a table of tokens in the place of the CLIP that would tell it of captions."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        width, heads = sizes["n_embd"], sizes["n_head"]
        self.tokens = nn.Embedding(sizes["n_text_vocab"], width)
        net = PACKAGE.DiffusionPriorNetwork(
            dim=width,
            num_timesteps=N_TIMESTEP,
            max_text_len=sizes["n_text"],
            depth=sizes["n_layer"],
            heads=heads,
            dim_head=width // heads,
            ff_mult=MLP,
        )
        self.prior = PACKAGE.DiffusionPrior(
            net,
            image_embed_dim=sizes["n_embedding"],
            timesteps=N_TIMESTEP,
            text_cond_drop_prob=0.1,
            image_cond_drop_prob=0.0,
        )

    def forward(self, tokens: Tensor, z_t: Tensor, z_i: Tensor) -> Tensor:
        """The loss: (B, T) int64, (B, D), (B, D) -> ()."""
        image = z_i.clone()  # it scales what it is given in place
        loss: Tensor = self.prior(text_embed=z_t, text_encodings=self.tokens(tokens), image_embed=image)
        return loss


class Told:
    """In the place of a CLIP: what captions, known by their numbers, are encoded to."""

    def __init__(self, model: Prior, tokens: Tensor, z_t: Tensor) -> None:
        self.model, self.tokens, self.z_t = model, tokens, z_t

    def embed_text(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) int64 -> (B, D), (B, T, C)."""
        return self.z_t[rows], self.model.tokens(self.tokens[rows])


def prior(sizes: dict[str, int], batch: int, dtype: str) -> Subject:
    """An update of its diffusion prior."""
    model = Prior(sizes)
    update = trainer(model, dtype, PRIOR_TRAIN, model)
    given = cycle([(tokens, z_t, z_i) for tokens, _, z_t, z_i, *_ in prior_task(sizes, batch)[1]])
    return Subject(lambda: update(*next(given)), batch, parameters=count(model))


def embeddings(sizes: dict[str, int], batch: int, steps: int, dtype: str) -> Subject:
    """Its own drawing of as many captions' embeddings, the better of two each, which calls the network `steps` times.

    In fewer steps than it was trained with it takes DDIM with the noise of DDPM, and one step less than it is told.
    """
    model = Prior(sizes).eval().requires_grad_(False)
    tokens, _, z_t, *_ = prior_task(sizes, batch)[1][0]
    model.prior.clip = Told(model, tokens, z_t)
    rows = torch.arange(batch)

    def draw(n: int = steps) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            drawn: Tensor = model.prior.sample(rows, num_samples_per_batch=BEST_OF, timesteps=n + 1)
            return drawn

    draw(2)  # all steps to warm up would take minutes
    return Subject(draw, batch, parameters=sum(p.numel() for p in model.parameters()), warmup=0)


def decoder(sizes: dict[str, Any], width: int) -> Any:
    """Its decoder with one U-Net of `width`, that attends where ours does; whatever else is as its defaults have it."""
    sides = [sizes["image_size"] >> level for level in range(len(sizes["multipliers"]))]
    net = PACKAGE.Unet(
        dim=width,
        image_embed_dim=sizes["n_embedding"],
        cond_dim=sizes["context_width"],
        dim_mults=tuple(sizes["multipliers"]),
        num_resnet_blocks=sizes["depth"],
        self_attn=tuple(side in sizes["attention"] for side in sides),
        cond_on_image_embeds=True,
    )
    return PACKAGE.Decoder(net, image_size=sizes["image_size"], timesteps=N_TIMESTEP, image_cond_drop_prob=0.1)


def painting(model: Any, images: Tensor, z_i: Tensor) -> Tensor:
    """The loss of its decoder: (B, 3, S, S) uint8, (B, D) -> ()."""
    loss: Tensor = model(images.float() / 255, image_embed=z_i)
    return loss


def unet(sizes: dict[str, Any], batch: int, width: int, dtype: str) -> Subject:
    """An update of its decoder."""
    model = decoder(sizes, width)
    update = trainer(model, dtype, DECODER_TRAIN, partial(painting, model))
    given = cycle(painted(sizes, batch))
    return Subject(lambda: update(*next(given)), batch, parameters=count(model))
