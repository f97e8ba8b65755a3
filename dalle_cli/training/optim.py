"""The optimiser and the running average of the weights."""

import copy

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.shards import local


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay acts on matrices and kernels only: none on gains, biases and embeddings (2021, app. B). Muon (Jordan et
    al. 2024) is torch's own, its step scaled to AdamW's size, so that one learning rate serves both.

    Raises:
        DalleError: Muon with a torch that has none.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inner = {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and _inside(name)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    muon = [p for p in parameters if id(p) in inner] if config.optimizer == "muon" else []
    taken = {id(p) for p in muon}
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in tables | taken]
    plain = [p for p in parameters if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)
    return [adamw, _muon(muon, config)] if muon else [adamw]


def _inside(name: str) -> bool:
    """Whether a layer belongs to a block of a stack, as `blocks.3.qkv` does, rather than to an input or a head."""
    return any(part.isdecimal() for part in name.split("."))


def _muon(matrices: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise DalleError(f"expected torch 2.9 or newer for Muon, found {torch.__version__}; set optimizer = 'adamw'")
    decay = config.weight_decay
    return torch.optim.Muon(matrices, config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


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
        ours: list[Tensor] = [local(p) for p in self.model.parameters()]
        theirs: list[Tensor] = [local(p) for p in model.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' state as flat tensors named after the parameters: `NAME:exp_avg` and so on."""
    names = {id(p): name for name, p in model.named_parameters()}
    states = [item for optimizer in optimizers for item in optimizer.state.items()]
    return {f"{names[id(p)]}:{key}": value for p, state in states for key, value in state.items()}


def load_optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`."""
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full, value in state.items():
        name, _, key = full.rpartition(":")
        parameter = parameters[name]
        if key != "step":  # the fused update goes by memory: a state must lie as its parameter does (channels_last)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        owner[id(parameter)].state[parameter][key] = value
