"""The optimizer and the moving average of the weights."""

import copy

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.shards import local


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the linear layers inside stacked blocks and AdamW for the rest.

    Weight decay applies to matrices and kernels, not to gains, biases and embeddings (2021, app. B). Muon (Jordan et
    al. 2024) is torch's; its step is scaled to the size of AdamW's, so one learning rate serves both.

    Raises:
        DalleError: Muon for a model without such layers, or with a torch that lacks it.
    """
    muon = _block_matrices(model) if config.optimizer == "muon" else []
    in_muon = {id(p) for p in muon}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_muon]
    decayed = [p for p in rest if p.ndim >= 2 and id(p) not in tables]
    plain = [p for p in rest if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)
    return [adamw, _muon(muon, config)] if muon else [adamw]


def _block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights of linear layers in stacked blocks, in the model's order."""
    blocks = [m for m in model.modules() if isinstance(m, StackedBlock)]
    inner = {id(m.weight) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    found = [p for p in model.parameters() if p.requires_grad and id(p) in inner]
    if not found:
        raise DalleError(
            f"expected residual blocks with linear layers for optimizer = 'muon', found none in "
            f"{type(model).__name__}; set optimizer = 'adamw'"
        )
    return found


def _muon(matrices: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise DalleError(f"expected torch 2.9 or newer for Muon, found {torch.__version__}; set optimizer = 'adamw'")
    decay = config.weight_decay
    return torch.optim.Muon(matrices, config.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


class EMA:
    """An exponential moving average of a model's weights, held in a copy of the model, `self.model`.

    The decay of the t-th update is min(decay, (1 + t) / (10 + t)), so that short runs forget their initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        """Average in the model's weights, for the `count`-th time, counted from 0; buffers are copied."""
        decay = min(self.decay, (1 + count) / (10 + count))
        ours: list[Tensor] = [local(p) for p in self.model.parameters()]
        theirs: list[Tensor] = [local(p) for p in model.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


def optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as flat tensors named after the parameters: `NAME:exp_avg` and so on."""
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
        if key != "step":  # the fused update needs a state with its parameter's memory layout (channels_last)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        owner[id(parameter)].state[parameter][key] = value
