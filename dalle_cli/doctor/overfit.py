"""Overfit a fresh model of the same sizes on eight rows: if it cannot, its wiring is at fault."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_cli.doctor.checks import BAD, OK, Finding
from dalle_cli.doctor.subject import Subject
from dalle_cli.training.loop import mix

ROWS = 8
UPDATES, SHARE = 200, 0.1  # within so many updates the error must fall to this share of its start
WARMUP, CLIP_NORM = 10, 1.0
RATE, RATE_WIDTH, MAX_RATE = 1e-3, 512, 6e-3  # the learning rate at this width; smaller models take larger steps

Step = Callable[[int], tuple[Tensor, Tensor]]  # update -> what is minimized, and the error that should fall


def learning_rate(width: int) -> float:
    """The learning rate for a model's width."""
    return min(RATE * math.sqrt(RATE_WIDTH / width), MAX_RATE)


def overfit_subject(subject: Subject, advance: Callable[[], None]) -> Finding:
    """Train the subject's fresh model on its first eight rows."""
    task, seed, machine = subject.task, subject.request.seed, subject.request.machine
    batch = tuple(column[:ROWS].to(machine.device) for column in subject.batch)

    def step(update: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(mix(seed, update))
        with machine.autocast():
            loss, metrics = task.loss(batch, update, torch.Generator(machine.device).manual_seed(mix(seed, update)))
            return loss, subject.error(loss, metrics)

    return overfit(task.model.to(machine.device), step, subject.width, advance)


def overfit(model: nn.Module, step: Step, width: int, advance: Callable[[], None], updates: int = UPDATES) -> Finding:
    """Train without dropout until the error has fallen far enough, or for `updates`."""
    model.eval().requires_grad_(True)
    rate = learning_rate(width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.99), weight_decay=0.0)
    start = now = math.nan
    update = 0
    for update in range(updates + 1):
        loss, error = step(update)
        now = float(error.detach())
        start = now if update == 0 else start
        if update == updates or now <= SHARE * start or not math.isfinite(float(loss.detach())) or start <= 0:
            break
        model.zero_grad()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (update + 1) / WARMUP)
        optimizer.step()
        advance()
    left = now / start if start > 0 else math.nan
    question = f"error left of {ROWS} rows, overfitted for {update} updates"
    advice = "fresh weights of these sizes do not learn: look for what is cut between inputs and loss"
    expected = f"at most {SHARE:g} within {updates} updates"
    return Finding(question, OK if left <= SHARE else BAD, left, expected, advice)
