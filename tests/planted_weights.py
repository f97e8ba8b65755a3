"""Weights at which every path of a network counts: zeros that training starts from are drawn too."""

import torch


def randomized(model, seed=0, scale=0.3):
    """The same model with all its parameters drawn anew, gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, scale, generator=generator)
            if p.ndim >= 2:
                p.mul_(3 * (p[0].numel() ** -0.5))
            if name.endswith("weight") and p.ndim == 1:
                p.add_(1)
    return model
