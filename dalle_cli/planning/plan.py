"""Will a recipe's models fit on a device, and how long will their training take?

Rows are those of a batch. Bytes are of one device, times of all devices together.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dalle_cli import config as recipes
from dalle_cli.models.decoder import DecoderConfig
from dalle_cli.models.dvae import DVAEConfig
from dalle_cli.planning.estimate import Estimate, estimate
from dalle_cli.planning.hardware import Hardware, Rate
from dalle_cli.planning.workload import Workload, caption_sizes, condition_sizes, prior_config
from dalle_cli.training.dvae import DVAETrain

MOST_DEVICES = 1 << 20
SLACK_CPU = {2: 0.42, 4: 0.27}  # by bytes of a number, share of the activations that a heap takes beyond them: measured
HEAP_KEEPS = 0.6  # of what recomputing blocks saves, the share that is lost to a heap's holes on a CPU: measured
SLACK_GPU = 0.1  # the same for torch's allocator: assumed


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `peak` is less than the sum of the others where not all are alive at one time."""

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


def slack(device: Hardware) -> float:
    """Share of the activations that an allocator takes beyond them."""
    return SLACK_GPU if device.accelerator else SLACK_CPU[device.dtype.itemsize]


class Needs:
    """What an update of a model needs on a device, by rows and settings; each combination is estimated once."""

    def __init__(self, workload: Workload, device: Hardware):
        self.workload, self.device, self.train = workload, device, workload.train
        self.known: dict[tuple[int, bool, int], Estimate] = {}
        self.slack = 1 + slack(device)

    def update(self, rows: int, recompute: bool | None = None, parts: int = 1) -> Estimate:
        """An update of `rows` in so many parts; `recompute` None is as in the recipe."""
        recompute = self.train.checkpoint_activations if recompute is None else recompute
        key = rows, recompute, parts
        if key not in self.known:
            train = replace(self.train, batch_size=rows, checkpoint_activations=recompute, accumulate=parts)
            found = estimate(self.workload, train, self.device.dtype, self.device.accelerator)
            if recompute and not self.device.accelerator:
                plain = self.update(rows, False, parts)
                activations, peak = (
                    round(a + HEAP_KEEPS * (b - a))
                    for a, b in ((found.activations, plain.activations), (found.peak, plain.peak))
                )
                found = replace(found, activations=activations, peak=peak)
            self.known[key] = found
        return self.known[key]

    def whole(self, rows: int, parts: int = 1) -> Memory:
        """Everything on one device."""
        e = self.update(rows, parts=parts)
        peak = e.weights + e.average + e.moments + e.peak + int((self.slack - 1) * e.activations)
        return Memory(e.weights, e.gradients, e.moments, e.average, e.copies, e.activations, peak)

    def sharded(self, rows: int, devices: int, parts: int = 1) -> Memory:
        """Weights and all that goes with them in shards; those of two blocks are gathered at a time, in 16 bits."""
        e = self.update(rows, parts=parts)
        weights, gradients, moments, average = (
            math.ceil(n / devices) for n in (e.weights, e.gradients, e.moments, e.average)
        )
        gathered = self.gathered(e)
        peak = weights + gradients + moments + average + gathered + int(self.slack * e.activations)
        return Memory(weights, gradients, moments, average, gathered, e.activations, peak)

    def gathered(self, e: Estimate) -> int:
        """Bytes of the block at work and of the next one."""
        return 2 * e.block * self.device.dtype.itemsize

    def bound(self, rows: int, devices: int, recompute: bool) -> int:
        """Bytes for so many rows by a line between one row and the whole batch: at most a little too many."""
        batch = self.train.batch_size
        one, all_ = self.update(1, recompute), self.update(batch, recompute)
        activations = one.activations + max(all_.activations - one.activations, 0) / max(batch - 1, 1) * (rows - 1)
        standing = one.weights + one.gradients + one.moments + one.average
        held = standing / devices + self.gathered(one) if devices > 1 else standing + one.copies
        return int(held + self.slack * activations)


def plan(workload: Workload, device: Hardware, devices: int, rate: Callable[[int, bool], Rate | None]) -> ModelPlan:
    """Plan one model for so many devices; `rate` gets an update's operations and whether it fits on one device."""
    needs, train = Needs(workload, device), workload.train
    rows = math.ceil(train.batch_size / devices)
    parts = math.gcd(train.accumulate, rows)
    alone = needs.whole(train.batch_size, train.accumulate)
    replicated = needs.whole(rows, parts) if devices > 1 else None
    sharded = needs.sharded(rows, devices, parts) if devices > 1 else None
    whole = needs.update(train.batch_size, parts=train.accumulate)
    speed = rate(whole.flops, alone.peak <= device.memory)
    at_work = min(devices, train.batch_size)  # a row is not divided
    seconds = whole.flops * train.steps / (speed.flops * at_work) if speed else None
    fits, verdict = _verdict(needs, devices, alone, replicated, sharded)
    return ModelPlan(
        workload.name, whole.parameters, train.batch_size, train.steps, alone, replicated, sharded, whole.flops, speed,
        seconds, fits, verdict,
    )  # fmt: skip


def _verdict(
    needs: Needs, devices: int, alone: Memory, replicated: Memory | None, sharded: Memory | None
) -> tuple[bool, str]:
    """Whether it fits, and in a line how, or what would have to change."""
    memory = needs.device.memory
    available = f"{size(memory)} of {needs.device.name}"
    if replicated is None or sharded is None:
        if alone.peak <= memory:
            return True, f"fits: {size(alone.peak)} of the {available}"
        return False, f"does not fit: {size(alone.peak)}, more than the {available}; {_advice(needs, 1)}"
    if replicated.peak <= memory:
        return True, f"fits, replicated on each of {devices}: {size(replicated.peak)} of the {available}"
    if sharded.peak <= memory:
        other = f"replicated it would take {size(replicated.peak)}"
        return True, f"fits, sharded over {devices}: {size(sharded.peak)} of the {available}; {other}"
    return False, f"does not fit: {size(sharded.peak)} on each, more than the {available}; {_advice(needs, devices)}"


def _advice(needs: Needs, devices: int) -> str:
    """What would make it fit: a smaller batch at a time, blocks computed again, more devices."""
    splits, own = needs.update(1).splits, needs.train.checkpoint_activations
    ways = [way for recompute in sorted({own, True}) if (way := _smaller(needs, devices, recompute))]
    if len(ways) == 2 and ways[1].startswith(f"{ways[0]} and "):
        ways.pop()  # no gain over the first
    if enough := _enough(needs, own, split=False):
        ways.append(f"sharding over {enough:,} such devices")
    least = _enough(needs, True, split=splits)
    if least and devices < least < (enough or MOST_DEVICES):
        also = "accumulate and checkpoint_activations" if splits else "checkpoint_activations"
        ways.append(f"sharding over {least:,} with {also}")
    one = size(needs.bound(1, 1, True))
    return f"{', or '.join(ways)} would do" if ways else f"one row alone takes {one}, so it needs a smaller model"


def _smaller(needs: Needs, devices: int, recompute: bool) -> str:
    """Settings with which it would fit on so many devices; empty where none would do."""
    rows, splits = math.ceil(needs.train.batch_size / devices), needs.update(1).splits
    for few in range(rows, 0, -1):
        if not (splits and rows % few) and needs.bound(few, devices, recompute) <= needs.device.memory:
            smaller = f"accumulate = {rows // few}" if splits else f"batch_size = {few * devices}"
            settings = [smaller] if few < rows else []
            settings += ["checkpoint_activations = true"] if recompute > needs.train.checkpoint_activations else []
            return " and ".join(settings)
    return ""


def _enough(needs: Needs, recompute: bool, split: bool) -> int | None:
    """The fewest devices that hold it, sharded: the batch at once, or row by row; None where no number does."""

    def fits(devices: int) -> bool:
        rows = 1 if split else math.ceil(needs.train.batch_size / devices)
        return needs.bound(rows, devices, recompute) <= needs.device.memory

    found = 2 + bisect.bisect_left(range(2, MOST_DEVICES + 1), True, key=fits)
    return found if found <= MOST_DEVICES else None


def stored_bytes(table: Mapping[str, Any], pairs: int) -> dict[str, int]:
    """Bytes of so many pairs as the stages store them: captions, codes and embeddings, without ids and text."""
    found = {}
    if "tokenizer" in table or "prior" in table:
        sizes = caption_sizes(table) or vars(prior_config(table))
        found["captions"] = pairs * (sizes["n_text"] * _width(sizes["n_text_vocab"]) + 2)
    if "dvae" in table:
        dvae, _ = recipes.section(table, "dvae", DVAEConfig, train=DVAETrain)
        found["codes"] = pairs * dvae.grid**2 * _width(dvae.n_vocab)
    elif "prior" in table:
        prior = prior_config(table)
        found["codes"] = pairs * prior.grid**2 * _width(prior.n_image_vocab)
    if both := [name for name in ("embedding_prior", "decoder") if name in table]:  # z_t is the prior's
        width = condition_sizes(table).get("n_embedding", DecoderConfig.n_embedding)
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
