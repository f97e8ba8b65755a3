"""The optimiser and the running average of the weights."""

import copy

import torch
from torch import Tensor, nn

from dalle_cli.training.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only: none on gains, biases and embeddings (2021, app. B)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and id(p) not in tables else plain).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps, fused=True)


class EMA:
    """An exponential moving average of a model's weights, kept as a model of its own in `self.model`.

    The decay of the t-th average is min(decay, (1 + t) / (10 + t)), so that short runs forget their first weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        """Take the model's weights into the average for the `count`-th time, counted from 0; buffers are copied."""
        decay = min(self.decay, (1 + count) / (10 + count))
        ours: list[Tensor] = list(self.model.parameters())
        theirs: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors named after the parameters: `NAME.exp_avg` and so on."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = optimizer.state
    return {f"{names[id(p)]}:{key}": value for p in state for key, value in state[p].items()}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`."""
    parameters = dict(model.named_parameters())
    for full, value in state.items():
        name, _, key = full.rpartition(":")
        parameter = parameters[name]
        value = value if key == "step" else value.to(parameter.device)
        optimizer.state[parameter][key] = value
