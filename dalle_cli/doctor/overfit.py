"""Overfit a fresh model of the same sizes on eight rows: if it cannot, its wiring is at fault."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_cli.doctor.checks import BAD, OK, Finding
from dalle_cli.doctor.examination import Examination
from dalle_cli.training.loop import mix

ROWS = 8
UPDATES, SHARE = 200, 0.1  # within so many updates the error must fall to this share of its start
WARMUP, CLIP_NORM = 10, 1.0


def learning_rate(width: int) -> float:
    """1e-3 at a width of 512; smaller models take larger steps."""
    return min(1e-3 * math.sqrt(512 / width), 6e-3)


def overfit_rows(examination: Examination, advance: Callable[[], None]) -> Finding:
    """Train the examination's fresh model on its first eight rows."""
    task, seed, machine = examination.task, examination.request.seed, examination.request.machine
    batch = tuple(column[:ROWS].to(machine.device) for column in examination.batch)

    def step(update: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(mix(seed, update))
        with machine.autocast():
            loss, metrics = task.loss(batch, update, torch.Generator(machine.device).manual_seed(mix(seed, update)))
            return loss, examination.error(loss, metrics)

    return overfit(task.model.to(machine.device), step, examination.width, advance)


def overfit(
    model: nn.Module, step: Callable[[int], tuple[Tensor, Tensor]], width: int, advance: Callable[[], None],
    updates: int = UPDATES,
) -> Finding:  # fmt: skip
    """Train without dropout until the error has fallen far enough, or for `updates`; `step` gives loss and error."""
    model.eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate(width), (0.9, 0.99), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1, (update + 1) / WARMUP))
    start, left, update = math.nan, 1.0, 0
    for update in range(updates + 1):
        loss, error = step(update)
        start = float(error.detach()) if update == 0 else start
        left = float(error.detach()) / start if start > 0 else math.nan
        if update == updates or not left > SHARE or not math.isfinite(float(loss.detach())):
            break
        model.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        warmup.step()
        advance()
    advice = "fresh weights of these sizes do not learn: look for what is cut between inputs and loss"
    expected = f"at most {SHARE:g} within {updates} updates"
    question = f"error left of {ROWS} rows, overfitted for {update} updates"
    return Finding(question, OK if left <= SHARE else BAD, left, expected, advice)
