"""Training weights that are stored in bfloat16: AdamW in float32 whose results are rounded at random.

An update is often smaller than half the distance between two bfloat16 numbers, and rounding to the nearest would lose
it. Random rounding takes the larger neighbor with a probability equal to the share of the distance, so that the mean
is right (Gupta et al. 2015, arXiv 1502.02551, sec. 3.1).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

DROPPED = 16  # bits of a float32 that a bfloat16 lacks


def store_rounded(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 numbers into a bfloat16 tensor of the same shape, rounded at random."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(1 << DROPPED, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    target.copy_(bits.add(noise).bitwise_and_(-(1 << DROPPED)).view(torch.float32))


def seeded(device: torch.device, number: int) -> torch.Generator:
    """The generator of one update: the same in every process, and in a run that resumes."""
    return torch.Generator(device).manual_seed(number)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for bfloat16 weights, with moments in bfloat16, too."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient, one matrix at a time."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        assert parameter.grad is not None
        state["step"] += 1
        step = max(1, int(state["step"]))  # `plan` has tensors without values
        (beta_1, beta_2), gradient = group["betas"], parameter.grad.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta_1)
        square = state["exp_avg_sq"].float().mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        deviation = (square / (1 - beta_2**step)).sqrt_().add_(group["eps"])
        value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta_1**step))
        generator = seeded(parameter.device, step << 20 | number)
        for target, result in ((parameter, value), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            store_rounded(target, result, generator)


def sampling_autocast(model: nn.Module, device: torch.device) -> AbstractContextManager[None]:
    """The arithmetic of samples during training: exact, but bfloat16 for weights that are stored in it."""
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(device.type, torch.bfloat16, enabled=rounded)
