"""Schedules: functions of the update's number alone, so a resumed run agrees with one that never stopped.

The plateau schedule depends on the validations so far; its state is in the checkpoints.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

LEARNING_RATES = ("cosine", "trapezoid", "constant", "plateau")


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps` along half a cosine, and `end` from there on."""
    done = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(
    step: int, kind: str, peak: float, final: float, warmup: int, steps: int, cooldown: float = 0.2
) -> float:
    """The learning rate of update `step`: linear warm-up to `peak`, then by `kind` to `final`.

    `trapezoid` stays at the peak and falls linearly over the last `cooldown` share of the steps; `constant` and
    `plateau` stay there (the caller multiplies by `Plateau.share`).

    Raises:
        DalleError: an unknown kind.
    """
    if kind not in LEARNING_RATES:
        raise DalleError(f"expected a schedule among {', '.join(LEARNING_RATES)}, found {kind!r}")
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "cosine":
        return cosine(step - warmup, peak, final, steps - warmup)
    if kind == "trapezoid":
        left = (steps - step) / max(cooldown * steps, 1.0)
        return final + (peak - final) * min(left, 1.0)
    return peak


def same_until(step: int, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two training configs that differ in their number of updates agree on the first `step` of them.

    The number enters an update only through the learning rate, so a run may be prolonged or shortened as long as its
    schedule has not begun to fall.
    """
    if {**one, "steps": other["steps"]} != dict(other) or step > min(one["steps"], other["steps"]):
        return False

    def rates(train: Mapping[str, Any]) -> list[float]:
        steps = min(train.get("lr_steps", train["steps"]), train["steps"])
        peak, final, warmup = (train[name] for name in ("lr", "final_lr", "warmup"))
        return [learning_rate(n, train["schedule"], peak, final, warmup, steps) for n in range(step)]

    return rates(one) == rates(other)


class Plateau:
    """Cuts the learning rate when a metric stops falling (Ramesh et al. 2021, app. B: halved five times).

    The rate is multiplied by `share`. A minus before the metric's name means that it should rise.
    """

    def __init__(self, metric: str, patience: int, factor: float, least: float):
        self.metric, self.patience, self.factor, self.least = metric, patience, factor, least
        self.share, self.best, self.waited = 1.0, math.inf, 0

    def value(self, metrics: Mapping[str, float]) -> float:
        """The value that should fall, from metrics whose `loss` is that of training.

        Raises:
            DalleError: there is no metric of that name.
        """
        name = self.metric.removeprefix("-")
        if name not in metrics:
            found = f"expected plateau_metric among {', '.join(metrics)}, found {self.metric!r}"
            raise DalleError(f"{found}; name one of them, with a minus before it if it should rise")
        return -metrics[name] if self.metric.startswith("-") else metrics[name]

    def update(self, metrics: Mapping[str, float]) -> bool:
        """Update with the metrics of a validation; whether the rate was cut."""
        value = self.value(metrics)
        if value < self.best:
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        if self.waited < self.patience or self.share <= self.least:
            return False
        self.share, self.waited = max(self.share * self.factor, self.least), 0
        return True

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: share, best value, validations waited; (3,) float64."""
        return {"state": torch.tensor([self.share, self.best, self.waited], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; older checkpoints have none."""
        if state:
            self.share, self.best, waited = state["state"].tolist()
            self.waited = int(waited)
