"""A task small enough to check by hand: residual blocks on rows of unequal length, any dtype, no files."""

from dataclasses import asdict

import torch
from stage_runs import lasting_rows
from torch import nn

from dalle_cli.devices import Arithmetic
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.loop import Trainer, mix, train
from dalle_cli.training.run import Run

WIDTH, LENGTH = 8, 5


class Block(StackedBlock):
    """x + branch(x), as every model's blocks are; `gain` makes a branch's activations larger or smaller."""

    def __init__(self, dropout=0.0, gain=1.0):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 2 * WIDTH)
        self.outer = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.gain = gain
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.gain * self.dropout(self.outer(torch.tanh(self.inner(self.norm(x)))))


class LinearBlock(StackedBlock, nn.Linear):
    """The smallest block: a linear layer."""


class Toy(nn.Module):
    """Blocks between two linear layers; the loss is a mean over the places that are written."""

    def __init__(self, n_blocks=2, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(n_blocks))
        self.last = nn.Linear(WIDTH, 1)

    def loss(self, x, lengths):
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        written = torch.arange(LENGTH, device=x.device) < lengths[:, None]
        error = (self.last(h)[..., 0] - x.sum(-1)).square() * written
        return error.sum() / lengths.sum()


class ToyTask:
    """Rows of numbers, of which each has its own length."""

    def __init__(self, config, dtype=torch.float32, dropout=0.0, held_out=None):
        torch.manual_seed(0)
        self.config, self.dtype = config, dtype
        self.model = Toy(dropout=dropout).to(dtype)
        self.held_out = held_out or {}  # the figure of the validation after so many updates
        self.done = 0
        self.parts = []

    def batch(self, step):
        generator = torch.Generator().manual_seed(mix(1, step))
        x = torch.randn(self.config.batch_size, LENGTH, WIDTH, generator=generator, dtype=self.dtype)
        return x, torch.randint(1, LENGTH + 1, (len(x),), generator=generator)

    def batches(self, start):
        while True:
            yield self.batch(start)
            start += 1

    def loss(self, batch, step, generator):
        self.done = step + 1
        self.parts.append(len(batch[0]))
        loss = self.model.loss(*batch[:2])
        if len(batch) == 3:
            loss = loss * batch[2]
        return loss, {"figure": loss.detach()}

    def validate(self, model, device):
        return {"nats": self.held_out.get(self.done, 0.0)}

    def samples(self, model, device):
        return None


class SplitToy(ToyTask):
    """One whose batches can be computed in parts, each with the weight that its lengths give it."""

    def split(self, batch, parts, step, generator):
        x, lengths = batch
        weights = [(part.sum().to(x.dtype) * parts / lengths.sum()) for part in lengths.chunk(parts)]
        return list(zip(x.chunk(parts), lengths.chunk(parts), weights, strict=True))

    def units(self, batch):
        return "places", int(batch[1].sum())

    def flops(self):
        return 1e6


def config(**more):
    """Twelve updates, and everything in sight of each other."""
    short = {"steps": 12, "batch_size": 6, "lr": 0.02, "log_every": 3, "validate_every": 4, "checkpoint_every": 4}
    return TrainConfig(**{**short, "schedule": "constant", **more})


def run_of(folder, config):
    return Run(folder / "toy.safetensors", "weights.prior.codes", {"train": asdict(config)}, [])


def log_of(folder):
    """The log of the toy's run in a folder, without what differs from run to run."""
    return lasting_rows(folder / "toy.safetensors")


def machine(dtype=torch.float32):
    return Arithmetic(torch.device("cpu"), dtype)


def trainer(folder, config, task=SplitToy, dtype=torch.float32, arithmetic=torch.float32, **more):
    return Trainer(task(config, dtype, **more), config, run_of(folder, config), machine(arithmetic), 0)


def train_toy(folder, config, task=SplitToy, arithmetic=torch.float32, **more):
    """The weights' bytes after a whole run from its last checkpoint."""
    run = run_of(folder, config)
    train(lambda: task(config, **more), config, run, machine(arithmetic), 0)
    return run.out.read_bytes()
