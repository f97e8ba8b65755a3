"""Whether a model of some sizes, from fresh weights, can learn eight rows by heart: if not, its wiring is at fault."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_cli.doctor.checks import BAD, OK, Finding

ROWS = 8
UPDATES, SHARE = 200, 0.1  # within so many updates the error must fall to this share of its start
WARM_UP, CLIP = 10, 1.0
RATE, RATE_WIDTH, MOST_RATE = 1e-3, 512, 6e-3  # of learning, at this width; smaller models want larger steps

Step = Callable[[int], tuple[Tensor, Tensor]]  # update -> what is minimized, and the error that should fall


def learning_rate(width: int) -> float:
    """What learns by heart at some width of the model's stream."""
    return min(RATE * math.sqrt(RATE_WIDTH / width), MOST_RATE)


def overfit(model: nn.Module, step: Step, width: int, advance: Callable[[], None], updates: int = UPDATES) -> Finding:
    """Train on the same rows until their error has fallen far enough, or for `updates`; without dropout."""
    model.eval().requires_grad_(True)
    rate = learning_rate(width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=0.0)
    start = now = math.nan
    number = 0
    for number in range(updates + 1):
        loss, error = step(number)
        now = float(error.detach())
        start = now if number == 0 else start
        if number == updates or now <= SHARE * start or not math.isfinite(float(loss.detach())) or start <= 0:
            break
        model.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (number + 1) / WARM_UP)
        optimizer.step()
        advance()
    return verdict(now, start, number, updates)


def verdict(now: float, start: float, taken: int, updates: int) -> Finding:
    """What error is left of that at the start, after as many updates as were taken of those that there are."""
    left = now / start if start > 0 else math.nan
    expected = f"at most {SHARE:g} within {updates} updates"
    question = f"error left of {ROWS} rows, by heart after {taken} updates"
    advice = "fresh weights of these sizes do not learn: look for what is cut between inputs and loss"
    return Finding(question, OK if left <= SHARE else BAD, left, expected, advice)
