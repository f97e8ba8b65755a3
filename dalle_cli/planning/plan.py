"""Will it fit, and how long will it take: parameters, memory, operations and time of a recipe's models.

Rows are those of a batch. Bytes are of one device, times of all devices together.
"""

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from dalle_cli import config as recipes
from dalle_cli.models import embeddings, unet
from dalle_cli.models.decoder import DecoderConfig
from dalle_cli.models.dvae import DVAEConfig
from dalle_cli.planning.hardware import Machine, Rate
from dalle_cli.planning.memory import Rehearsal, rehearse
from dalle_cli.planning.standin import Subject, caption_sizes, prior_config
from dalle_cli.planning.subjects import conditions
from dalle_cli.training.blocks import blocks
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.optim import optimizers

REHEARSED = 64  # rows of a batch; what a larger one takes follows from that
MOST_DEVICES = 1 << 20
SLACK_GPU = 0.1  # of the activations, what its allocator takes beyond them: assumed; a CPU's is followed (heap.py)
PARTS = (  # of a parameter's name, the first that occurs in it; a dVAE's are the halves of the network
    ("encoder", ("encoder.",)),
    ("decoder", ("decoder.",)),
    ("text transformer", ("text.",)),
    ("norms", ("norm", "layrnorm")),
    ("attention", ("attn", "attention", "qkv")),
    ("MLP", ("mlp",)),
    ("heads", ("head", "projection", "logit_")),
    ("convolutions", ("conv", "shortcut")),
    ("timestep", ("time", "low_level")),
)
for way in ("", "_backward"):  # whose operations torch does not count
    fused = flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{way}")]
    flop_registry.setdefault(getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{way}"), fused)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `peak` is the fullest moment, which is less than the sum where not all come at once."""

    weights: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    peak: int


@dataclass(frozen=True)
class ModelPlan:
    """One model: its size, its memory on one device and on each of several, its operations, its time."""

    name: str
    parameters: dict[str, int]
    batch: int
    updates: int
    alone: Memory
    replicated: Memory | None
    sharded: Memory | None
    flops: int
    rate: Rate | None
    seconds: float | None
    fits: bool
    verdict: str


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters by part, embeddings first."""
    counts: dict[str, int] = {"embeddings": 0}
    halves = any(name.startswith("decoder.") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        rules = PARTS[:2] if halves else PARTS[2:]
        part = next((part for part, signs in rules if any(sign in name for sign in signs)), "embeddings")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {part: n for part, n in counts.items() if n}


@contextmanager
def _attention(accelerator: bool) -> Iterator[None]:
    """On a GPU, attention in the models of DALL-E 2 is one fused kernel, as in those that rehearsals know by name."""
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    ways: dict[str, Any] = {"batched_attention": lambda q, k, v, _: fused(q, k, v, None, True)[0]}
    ways |= {"trains_on_cpu": lambda q: True}
    with ExitStack() as stack:
        for module, name in product((embeddings, unet) if accelerator else (), ways):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, ways[name])
        yield


class Needs:
    """What a model's update needs on a machine, by rows and settings; each combination is rehearsed once."""

    def __init__(self, subject: Subject, machine: Machine):
        self.subject, self.machine = subject, machine
        self.rehearsed: dict[tuple[int, bool, int], Rehearsal] = {}
        with torch.device("meta"):
            model = subject.build()
        self.parts = count_parts(model)
        self.weights = sum(t.nbytes for t in model.parameters())
        self.average = self.weights + sum(t.nbytes for t in model.buffers())
        self.moments = 0
        for optimizer in optimizers(model, subject.train):
            each = 2 if isinstance(optimizer, torch.optim.AdamW) else 1  # Muon has one number for each parameter
            self.moments += each * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks(model).values())
        self.gathered = 2 * largest * machine.dtype.itemsize  # the block at work, and the next one

    def update(self, rows: int, recompute: bool | None = None, parts: int = 1) -> Rehearsal:
        """An update of `rows` in so many parts; `recompute` None is as the recipe has it."""
        if recompute is None:
            recompute = self.subject.train.checkpoint_activations
        if self.subject.splits and rows > parts * REHEARSED:  # rows are independent: what each one takes is known
            few, many = (self.update(parts * n, recompute, parts) for n in (REHEARSED // 2, REHEARSED))
            share = (rows - parts * REHEARSED) / (parts * REHEARSED // 2)
            pairs = zip(astuple(few), astuple(many), strict=True)
            all_ = Rehearsal(*(round(b + share * (b - a)) for a, b in pairs))
            holes = many.holes * all_.activations // many.activations  # which are by chance: no line through two
            return replace(all_, holes=holes)
        key = rows, recompute, parts
        if key not in self.rehearsed:
            train = replace(self.subject.train, batch_size=rows, checkpoint_activations=recompute, accumulate=parts)
            with _attention(self.machine.accelerator):
                self.rehearsed[key] = rehearse(self.subject, train, self.machine.dtype, self.machine.accelerator)
        return self.rehearsed[key]

    def slack(self, r: Rehearsal) -> int:
        """What an allocator takes beyond the tensors."""
        return int(SLACK_GPU * r.activations) if self.machine.accelerator else r.holes + r.kernels

    def whole(self, rows: int, parts: int = 1) -> Memory:
        """Everything on one device."""
        r = self.update(rows, parts=parts)
        peak = self.weights + self.average + self.moments + r.peak + self.slack(r)
        return Memory(self.weights, self.weights, self.moments, self.average, r.copies, r.activations, peak)

    def shared(self, rows: int, devices: int, parts: int = 1) -> Memory:
        """Weights and all that goes with them cut into shares, of which a block's are brought together in 16 bits."""
        r = self.update(rows, parts=parts)
        own, moments, average = (math.ceil(n / devices) for n in (self.weights, self.moments, self.average))
        peak = 2 * own + moments + average + self.gathered + r.activations + self.slack(r)
        return Memory(own, own, moments, average, self.gathered, r.activations, peak)

    def estimate(self, rows: int, devices: int, recompute: bool, sharded: bool) -> int:
        """Bytes by a straight line between a batch of one row and the recipe's, all at once: at most a little more."""
        batch = self.subject.train.batch_size
        one, all_ = self.update(1, recompute), self.update(batch, recompute)
        least, most = (r.activations + self.slack(r) for r in (one, all_))
        activations = least + max(most - least, 0) / max(batch - 1, 1) * (rows - 1)
        standing = 2 * self.weights + self.moments + self.average
        held = standing / devices + self.gathered if sharded else standing + one.copies
        return int(held + activations)


def plan(subject: Subject, machine: Machine, devices: int, rate: Callable[[int, bool], Rate | None]) -> ModelPlan:
    """One model on so many devices; `rate` is told an update's operations and whether one device holds it."""
    needs, train = Needs(subject, machine), subject.train
    rows = math.ceil(train.batch_size / devices)
    parts = math.gcd(train.accumulate, rows)
    alone = needs.whole(train.batch_size, train.accumulate)
    replicated = needs.whole(rows, parts) if devices > 1 else None
    sharded = needs.shared(rows, devices, parts) if devices > 1 else None
    flops = needs.update(train.batch_size, parts=train.accumulate).flops
    speed = rate(flops, alone.peak <= machine.memory)
    at_work = min(devices, train.batch_size)  # a row is not divided
    seconds = flops * train.steps / (speed.flops * at_work) if speed else None
    fits, verdict = _verdict(needs, devices, alone, replicated, sharded)
    return ModelPlan(
        subject.name, needs.parts, train.batch_size, train.steps, alone, replicated, sharded, flops, speed, seconds,
        fits, verdict,
    )  # fmt: skip


def _verdict(
    needs: Needs, devices: int, alone: Memory, replicated: Memory | None, sharded: Memory | None
) -> tuple[bool, str]:
    """Whether it fits, and in a line how, or what would have to change."""
    memory = needs.machine.memory
    there = f"{size(memory)} of {needs.machine.name}"
    if replicated is None or sharded is None:
        if alone.peak <= memory:
            return True, f"fits: {size(alone.peak)} of the {there}"
        return False, f"does not fit: {size(alone.peak)}, more than the {there}; {_advice(needs, 1)}"
    if replicated.peak <= memory:
        return True, f"fits, a whole copy on each of {devices}: {size(replicated.peak)} of the {there}"
    if sharded.peak <= memory:
        whole = f"a whole copy on each would take {size(replicated.peak)}"
        return True, f"fits, sharded over {devices}: {size(sharded.peak)} of the {there}; {whole}"
    return False, f"does not fit: {size(sharded.peak)} on each, more than the {there}; {_advice(needs, devices)}"


def _advice(needs: Needs, devices: int) -> str:
    """What would make it fit: a smaller batch at a time, less kept of each block, more devices."""
    train, splits = needs.subject.train, needs.subject.splits
    settings = sorted({train.checkpoint_activations, True})
    ways = [way for recompute in settings if (way := _way(needs, devices, recompute))]
    if len(ways) == 2 and ways[1].startswith(f"{ways[0]} and "):
        ways.pop()  # no gain over the first
    if enough := _enough(needs, settings[0], split=False):
        ways.append(f"sharding over {enough:,} such devices")
    least = _enough(needs, True, split=splits)
    if least and devices < least < (enough or MOST_DEVICES):
        also = "accumulate and checkpoint_activations" if splits else "checkpoint_activations"
        ways.append(f"sharding over {least:,} with {also}")
    one = size(needs.estimate(1, 1, True, False))
    return f"{', or '.join(ways)} would do" if ways else f"one row alone takes {one}, so it wants a smaller model"


def _way(needs: Needs, devices: int, recompute: bool) -> str:
    """Settings with which it would fit on so many devices; empty where none would do."""
    train = needs.subject.train
    rows, splits = math.ceil(train.batch_size / devices), needs.subject.splits
    for few in range(rows, 0, -1):
        if splits and rows % few:
            continue
        if needs.estimate(few, devices, recompute, devices > 1) <= needs.machine.memory:
            smaller = f"accumulate = {rows // few}" if splits else f"batch_size = {few * devices}"
            settings = [smaller] if few < rows else []
            settings += ["checkpoint_activations = true"] if recompute > train.checkpoint_activations else []
            return " and ".join(settings)
    return ""


def _enough(needs: Needs, recompute: bool, split: bool) -> int | None:
    """The fewest devices that hold it, sharded: the batch at once, or row by row; None where no number does."""
    batch, memory = needs.subject.train.batch_size, needs.machine.memory

    def fits(devices: int) -> bool:
        return needs.estimate(1 if split else math.ceil(batch / devices), devices, recompute, True) <= memory

    many = 1
    while not fits(many):
        many *= 2
        if many > MOST_DEVICES:
            return None
    return bisect.bisect_left(range(many + 1), True, lo=many // 2 + 1, key=fits) if many > 1 else 1


def data(table: Mapping[str, Any], pairs: int) -> dict[str, int]:
    """Bytes of so many pairs as the stages store them: captions, codes, z_i and z_t; ids and text come on top."""
    found = {}
    if "tokenizer" in table or "prior" in table:
        sizes = caption_sizes(table) if "tokenizer" in table else vars(prior_config(table))
        found["captions"] = pairs * (sizes["n_text"] * _width(sizes["n_text_vocab"]) + 2)
    if "dvae" in table or "prior" in table:
        if "dvae" in table:
            dvae, _ = recipes.section(table, "dvae", DVAEConfig, train=DVAETrain)
            n_vocab, grid = dvae.n_vocab, dvae.grid
        else:
            n_vocab, grid = prior_config(table).n_image_vocab, prior_config(table).grid
        found["codes"] = pairs * grid**2 * _width(n_vocab)
    if both := [name for name in ("embedding_prior", "decoder") if name in table]:  # z_t is the prior's
        width = conditions(table).get("n_embedding", DecoderConfig.n_embedding)
        found["embeddings"] = pairs * 4 * width * (1 + ("embedding_prior" in both))
    return found


def _width(n_vocab: int) -> int:
    return 2 if n_vocab <= 1 << 16 else 4


def size(n_bytes: float) -> str:
    """12_345_678 -> 12.3 MB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if n_bytes >= 10**power:
            return f"{n_bytes / 10**power:.3g} {unit}"
    return f"{n_bytes:.0f} B"
