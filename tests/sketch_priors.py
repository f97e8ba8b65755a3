"""Small priors that sketch, captions, codes and pictures for them."""

import torch

from dalle_cli.models.prior import Prior, PriorConfig

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": 20, "n_text": 6, "n_image_vocab": 12, "grid": 4}
TOKENS = torch.tensor([[3, 7, 11, 0, 0, 0], [5, 2, 9, 13, 0, 0], [3, 7, 11, 19, 4, 0]])
LENGTHS = torch.tensor([3, 4, 0])


def made(block="modern", attention="full", sketch=2, seed=0):
    """A prior of which everything has an effect: much of a sketch's and a hint's first weights are zeros."""
    prior = Prior(PriorConfig(**SIZES, block=block, attention=attention, sketch=sketch, sketch_width=15))
    generator = torch.Generator().manual_seed(seed)
    prior.initialize(generator)
    for part in (prior.hint, prior.sketch):
        for parameter in () if part is None else part.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)
    if prior.sketch is not None:
        prior.sketch.colors.uniform_(-1, 1, generator=generator)
    return prior.eval().requires_grad_(False)


def codes(n, seed=1):
    return torch.randint(12, (n, 4, 4), generator=torch.Generator().manual_seed(seed))


def pictures(n, side=2, seed=2):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
