"""Ours and DALLE-pytorch trained for the same wall-clock time on the same captions and codes.

Only updates count as time (making their batches included), not validation. Both see the same batches in the same order
and are judged on the same held-out pictures, in float32: mean cross-entropy over image positions and the image
vocabulary alone, nats per code. Ours is judged by its averaged weights, which are what `train-prior` writes.

B batch, T caption positions, W side of the grid.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.cases import ARITHMETICS

# Where no recipe says otherwise: the benchmark's sizes, and numbers for hours instead of weeks.
DEFAULTS = (
    *("prior.n_layer=8", "prior.n_head=8", "prior.n_embd=512"),
    *("prior.train.batch_size=8", "prior.train.warmup=100", "prior.train.ema_every=1"),
)
CALIBRATION = 3  # updates
VALIDATION_BATCH = 4
Curve = list[dict[str, float]]


def compare(
    options: argparse.Namespace,
    run: Callable[[dict[str, Any], int, set[int] | None], dict[str, Any]],
    say: Callable[[str], None],
    check_idle: Callable[[], float],
) -> int:
    """Train both, each in its own process and one after the other or each on half of the cores; JSON and a plot."""
    settings = {
        "captions": str(options.captions),
        "codes": str(options.codes),
        "sets": [*([] if options.config else DEFAULTS), *options.set],
        "config": options.config and str(options.config),
        "seconds": 60 * options.equal_time,
        "points": options.points,
        "held_out": options.held_out,
    }
    cores = sorted(os.sched_getaffinity(0)) if options.side_by_side else []
    half = len(cores) // 2
    shares = [set(cores[:half]), set(cores[half : 2 * half])] if half else [None, None]
    threads = half or options.threads

    def train(name: str, function: str, share: set[int] | None) -> dict[str, Any]:
        say(f"{name}: {options.equal_time:g} minutes of updates ...")
        other = check_idle()
        more = {"learning_rate": options.peer_lr} if function == "dalle_pytorch" else {}
        job = {"module": "bench.equal_time", "function": function, "settings": {**settings, **more}}
        found = run(job, threads, share)
        if "error" in found:
            say(f"{name}: failed, {found['error']}")
            return found
        last = found["curve"][-1]
        say(f"{name}: {last['updates']:,.0f} updates, {last['nats']:.4f} nats per code")
        return {**found, "busy": other}

    names = ("ours", "DALLE-pytorch")
    with ThreadPoolExecutor(2 if half else 1) as pool:
        curves = dict(zip(names, pool.map(train, names, ("ours", "dalle_pytorch"), shares), strict=True))
    if any("error" in curve for curve in curves.values()):
        return 1
    out: Path = (options.out or Path("out/equal-time.json")).with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {"minutes": options.equal_time, "threads": threads, **settings, "curves": curves}
    out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(out)
    if (picture := plot(curves, out.with_suffix(".png"))) is not None:
        print(picture)
    return 0


def plot(curves: dict[str, Any], path: Path) -> Path | None:
    """Nats per code over minutes; None where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, found in curves.items():
        points = found["curve"]
        axes.plot([p["seconds"] / 60 for p in points], [p["nats"] for p in points], marker=".", label=name)
    axes.set_xlabel("minutes of updates")
    axes.set_ylabel("held-out nats per code")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return path


def follow(
    update: Callable[[int], object], nats: Callable[[], float], seconds: float, points: int, clock: Callable[[], float]
) -> Curve:
    """Update until so many seconds have passed, validating at so many equal parts of them, and before the first."""
    spent, done = 0.0, 0
    curve: Curve = [{"seconds": 0.0, "updates": 0, "nats": nats()}]
    for point in range(1, points + 1):
        while spent < seconds * point / points:
            began = clock()
            update(done)
            spent += clock() - began
            done += 1
        curve.append({"seconds": round(spent, 3), "updates": done, "nats": nats()})
        print(f"  {spent:,.0f} s: {done} updates, {curve[-1]['nats']:.4f} nats per code", file=sys.stderr, flush=True)
    return curve


def seconds_of(update: Callable[[int], object]) -> float:
    """Time of an update, after one that does not count."""
    update(0)
    began = time.perf_counter()
    for number in range(CALIBRATION):
        update(1 + number)
    return (time.perf_counter() - began) / CALIBRATION


def load(captions: str, codes: str, config: str | None, sets: list[str]) -> Any:
    """The task of `train-prior` for these artifacts and this recipe, less what would make the two see other data."""
    from dalle_cli import config as recipes
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.models.prior import PriorConfig
    from dalle_cli.training.prior import PriorTask, PriorTrain

    texts, latents = open_artifact(Path(captions), "captions"), open_artifact(Path(codes), "codes")
    known = {
        "n_text_vocab": texts.require("n_vocab", int),
        "n_text": texts.require("n_text", int),
        "n_image_vocab": latents.require("n_vocab", int),
        "grid": latents.require("grid", int),
    }
    table = recipes.read(Path(config) if config else None, sets)
    model, options = recipes.section(table, "prior", PriorConfig, known, train=PriorTrain)
    options = replace(options, bpe_dropout=0.0, caption_dropout=0.0)
    return PriorTask(model, options, Pairs(texts, latents), None, 0)


def validation(task: Any, most: int) -> list[tuple[Any, Any, Any]]:
    """The first held-out pictures, with the first of their captions: tokens (B, T), lengths (B,), codes (B, W, W)."""
    import numpy as np
    import torch

    places = task.held_out[:most]
    if not len(places):
        raise SystemExit("bench: error: expected held-out pictures, found none; set prior.train.validation higher")
    batches = []
    for chunk in np.array_split(places, -(-len(places) // VALIDATION_BATCH)):
        captions, latents = task.pairs.draw(chunk, np.zeros((len(chunk), 2)))
        tokens, lengths = map(torch.from_numpy, task.pairs.tokens(captions))
        batches.append((tokens, lengths, torch.from_numpy(task.pairs.codes(latents))))
    return batches


def mean_nats(nats: Callable[[Any, Any, Any], Any], batches: list[tuple[Any, Any, Any]]) -> float:
    """Mean over pictures of what `nats` says of each batch."""
    total = sum(float(nats(*batch)) * len(batch[2]) for batch in batches)
    return total / sum(len(batch[2]) for batch in batches)


def ours(
    captions: str, codes: str, config: str | None, sets: list[str], seconds: float, points: int, held_out: int
) -> dict[str, Any]:
    """As `train-prior` does it, its schedule stretched over the updates that there is time for."""
    import torch

    from bench.prior import trainer_of

    task = load(captions, codes, config, sets)
    throwaway = copy.copy(task)
    throwaway.model = copy.deepcopy(task.model)
    trial = trainer_of(throwaway, task.options, "auto")
    steps = max(1, int(seconds / seconds_of(lambda number: trial.update(task.batch(number)))))
    options = replace(task.options, steps=steps, warmup=min(task.options.warmup, steps // 10))
    trainer, batches = trainer_of(task, options, "auto"), validation(task, held_out)
    averaged: Any = trainer.ema.model

    def nats() -> float:
        with torch.no_grad():
            return mean_nats(lambda *batch: averaged.loss(*batch)[1]["image_nats"], batches)

    curve = follow(lambda number: trainer.update(task.batch(number)), nats, seconds, points, time.perf_counter)
    return {"curve": curve, "model": asdict(task.config), "train": asdict(options), "dtype": trainer.machine.name}


def dalle_pytorch(
    captions: str,
    codes: str,
    config: str | None,
    sets: list[str],
    seconds: float,
    points: int,
    held_out: int,
    learning_rate: float,
) -> dict[str, Any]:
    """As its training script does it: Adam, one rate throughout; in float32 or bfloat16, whichever is faster."""
    import torch

    from bench.peers import dalle_pytorch as peer

    task = load(captions, codes, config, sets)
    # its token 0 is a pad, ours may be a token
    sizes = {**asdict(task.config), "n_text_vocab": task.config.n_text_vocab + 1}

    def as_read(tokens: Any, lengths: Any, codes: Any) -> tuple[Any, Any]:
        written = (lengths[:, None] > torch.arange(tokens.shape[1])).long()
        return (tokens + 1) * written, codes.flatten(1)

    trials = {dtype: peer.trainer(peer.build(sizes), dtype, learning_rate) for dtype in ARITHMETICS}
    took = {
        dtype: seconds_of(partial(lambda update, number: update(*as_read(*task.batch(number))), update))
        for dtype, update in trials.items()
    }
    trials.clear()
    dtype = min(took, key=lambda name: took[name])
    torch.manual_seed(0)
    model = peer.build(sizes)
    update, batches = peer.trainer(model, dtype, learning_rate), validation(task, held_out)

    def nats() -> float:
        return mean_nats(lambda *batch: peer.image_nats(model, *as_read(*batch)), batches)

    curve = follow(lambda number: update(*as_read(*task.batch(number))), nats, seconds, points, time.perf_counter)
    return {"curve": curve, "lr": learning_rate, "clip_norm": peer.CLIP, "dtype": dtype}
