"""The optimizer and the moving average of the weights."""

import copy

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.rounding import RoundedAdamW, seeded, store_rounded
from dalle_cli.training.shards import local


def optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the linear layers inside stacked blocks and AdamW for the rest.

    Weight decay applies to matrices and kernels, not to gains, biases and embeddings (2021, app. B). Muon (Jordan et
    al. 2024) is torch's; its step is scaled to the size of AdamW's, so one learning rate serves both.

    Matrices that `to_bfloat16` has converted have an AdamW of their own.

    Raises:
        DalleError: Muon for a model without such layers, or with a torch that lacks it.
    """
    muon = _block_matrices(model) if config.optimizer == "muon" else []
    rounded = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    apart = {id(p) for p in (*muon, *rounded)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    decayed = [p for p in rest if p.ndim >= 2 and id(p) not in tables]
    plain = [p for p in rest if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], config.lr, betas, config.eps, fused=True)
    ]
    made += [RoundedAdamW(rounded, config.lr, betas, config.eps, config.weight_decay)] if rounded else []
    return [*made, _muon(muon, config)] if muon else made


def to_bfloat16(model: nn.Module) -> None:
    """Store the matrices of linear layers in stacked blocks in bfloat16; all else keeps its dtype.

    Raises:
        DalleError: a model without such layers.
    """
    for matrix in _block_matrices(model, "weights_dtype = 'bfloat16'", "weights_dtype = 'float32'"):
        matrix.data = matrix.data.to(torch.bfloat16)


def _block_matrices(
    model: nn.Module, wanted: str = "optimizer = 'muon'", instead: str = "optimizer = 'adamw'"
) -> list[nn.Parameter]:
    """The trained weights of linear layers in stacked blocks, in the model's order."""
    blocks = [m for m in model.modules() if isinstance(m, StackedBlock)]
    inner = {id(m.weight) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    found = [p for p in model.parameters() if p.requires_grad and id(p) in inner]
    if not found:
        raise DalleError(
            f"expected residual blocks with linear layers for {wanted}, found none in {type(model).__name__}; "
            f"set {instead}"
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
        pairs = [(local(a), local(b)) for a, b in zip(self.model.parameters(), model.parameters(), strict=True)]
        exact: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if pair[0].dtype != torch.bfloat16]
        torch._foreach_lerp_([mine for mine, _ in exact], [other for _, other in exact], 1 - decay)
        for number, (mine, other) in enumerate(pair for pair in pairs if pair[0].dtype == torch.bfloat16):
            store_rounded(
                mine, mine.float().lerp_(other.float(), 1 - decay), seeded(mine.device, -1 - (count << 20 | number))
            )
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
