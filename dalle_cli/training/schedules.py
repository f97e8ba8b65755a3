"""Schedules: every one a pure function of the update's number, so that nothing compounds and a resumed run agrees."""

import math

from dalle_cli.errors import DalleError

LEARNING_RATES = ("cosine", "trapezoid", "constant")


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at step `steps` along half a cosine, and `end` from there on."""
    done = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(
    step: int, kind: str, peak: float, final: float, warmup: int, steps: int, cooldown: float = 0.2
) -> float:
    """The learning rate of update `step`: linear warm-up to `peak`, then by `kind` to `final`.

    `trapezoid` stays at the peak and falls linearly over the last `cooldown` share of the steps.

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
