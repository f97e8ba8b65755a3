"""The command line: which cases run, how often, each in a process of its own; `make bench` installs the peers first."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import cases, machine, report, timing

HERE = Path(__file__).resolve().parent


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def check_idle(quiet: bool = False) -> float:
    """Cores that are busy with other work; more than a little is said, unless it was said before."""
    found = machine.busy()
    if found > machine.BUSY and not quiet:
        say(f"bench: warning: expected an idle machine, found {found:.1f} cores busy; the figures mean little")
    return found


def run(job: Mapping[str, Any], threads: int, cores: set[int] | None = None) -> dict[str, Any]:
    """Do a job in a fresh process, on some cores or on all; what `timing.work` returns, or `error`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE), "--job", json.dumps({**job, "threads": threads})]
    bind = partial(os.sched_setaffinity, 0, cores) if cores else None
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=bind)
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def job_of(case: cases.Case, options: argparse.Namespace) -> dict[str, Any]:
    """How a case is asked for."""
    updates, seconds = (1, 0.0) if options.quick else (options.updates, options.seconds)
    job = {"module": case.module, "function": case.function, "settings": case.settings}
    return {**job, "updates": updates, "seconds": seconds}


def measure(chosen: list[cases.Case], options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Every case once a round, round after round; the runs by case, and the cases that failed."""
    runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in chosen}
    failed: list[str] = []
    for i, (number, case) in enumerate((n, c) for n in range(options.rounds) for c in chosen):
        if case.name in failed:
            continue
        label = f"[{i + 1}/{options.rounds * len(chosen)}] round {number + 1}: {case.name}"
        say(f"{label} ...")
        other, began = check_idle(quiet=True), time.monotonic()
        found = run(job_of(case, options), options.threads)
        took = f"{time.monotonic() - began:.0f} s in all"
        if "error" in found:
            failed.append(case.name)
            say(f"{label}: failed, {found['error']}, {took}")
            continue
        runs[case.name].append({**found, "busy": other})
        rate, memory = found["units"] / found["seconds"], found["memory"] / 2**20
        say(f"{label}: {found['seconds']:.4g} s an update, {rate:,.4g} {case.unit}/s, {memory:,.0f} MiB, {took}")
    return runs, failed


def settings_of(options: argparse.Namespace, runs: Mapping[str, list[dict[str, Any]]], idle: float) -> dict[str, Any]:
    """What the report says of the machine and of how it was measured."""
    every = [run for each in runs.values() for run in each]
    busy = [run["busy"] for run in every]
    settings = {
        "machine": f"{machine.name()}, {options.threads} of {os.cpu_count()} cores",
        "software": f"torch {every[0]['torch'] if every else '?'}, Python {sys.version.split()[0]}",
        "rounds": options.rounds,
        "other work": f"{max([idle, *busy]):.1f} cores at most, looked for before every case",
    }
    if options.quick:
        settings["quick"] = "tiny sizes, one update: these figures mean nothing"
    return settings


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write the report, and say whether all cases ran."""
    every = cases.measured(options.quick, options.dvae_batch)
    chosen = [case for case in every if not options.only or any(name in case.name for name in options.only)]
    if not chosen:
        say(f"bench: error: expected --only to name some of {', '.join(c.name for c in every)}")
        return 2
    if any(case.name.endswith("/ours") for case in chosen) and "machine" not in {case.name for case in chosen}:
        chosen.insert(0, every[0])
    idle = check_idle()
    runs, failed = measure(chosen, options)
    rows = report.rows(cases.ratios(), runs)
    settings = settings_of(options, runs, idle)
    text = report.markdown(settings, chosen, rows, runs)
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
        ratios = [{"name": row.ratio.name, "value": row.value, "limit": row.ratio.limit} for row in rows]
        data = json.dumps({"settings": settings, "ratios": ratios, "runs": runs}, indent=1)
        options.out.with_suffix(".json").write_text(data + "\n", encoding="utf-8")
        print(options.out)
    for name in failed:
        say(f"bench: error: {name} failed; it is missing in the report")
    return 1 if failed else 0


def doses(options: argparse.Namespace) -> int:
    """What harm does to scores, as a table: to stdout, or to -o."""
    from bench.doses import report
    from dalle_cli.errors import DalleError

    try:
        text = report(options.doses, options.features, options.limit)
    except DalleError as error:
        say(f"bench: error: {error}")
        return 1
    if options.out is None:
        print(text)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(options.out)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Speed and memory beside other implementations.")
    add = parser.add_argument
    add("-o", "--out", type=Path, metavar="FILE", help="Markdown; JSON (and a plot) beside it. Without: stdout")
    add("--only", action="append", metavar="NAME", help="cases whose name holds this; may be repeated")
    add("--quick", action="store_true", help="tiny sizes, one round, one update: to see that it works")
    add("--threads", type=int, default=machine.cores(), metavar="N", help="default: all cores, %(default)s")
    add("--rounds", type=int, default=3, metavar="N", help="%(default)s")
    add("--updates", type=int, default=3, metavar="N", help="timed in each round, at least; %(default)s")
    add("--seconds", type=float, default=10.0, metavar="S", help="of updates in each round, at least; %(default)s")
    add("--dvae-batch", type=int, metavar="N", help=f"{cases.DVAE_SIZES['batch']}")
    equal = parser.add_argument_group("two trainings of equal time, instead of the benchmark").add_argument
    equal("--equal-time", type=float, metavar="MINUTES", help="train ours, then DALLE-pytorch, for so long each")
    equal("--side-by-side", action="store_true", help="both at a time, each on half of the cores")
    equal("--captions", type=Path, metavar="FILE", help="what `dalle tokenize` wrote")
    equal("--codes", type=Path, metavar="FILE", help="what `dalle encode-images` wrote, of the same pictures")
    equal("--config", type=Path, metavar="FILE", help="recipe with a section prior; else 8 layers x 512, batch 8")
    equal("--set", action="append", default=[], metavar="KEY=VALUE", help="as `dalle train-prior` has it")
    equal("--peer-lr", type=float, default=3e-4, metavar="RATE", help="DALLE-pytorch's; %(default)s")
    equal("--points", type=int, default=12, metavar="N", help="validations on the way; %(default)s")
    equal("--held-out", type=int, default=256, metavar="N", help="pictures in a validation, at most; %(default)s")
    few = parser.add_argument_group("what fewer bits cost, instead of the benchmark").add_argument
    few("--precision", type=Path, metavar="BUILD", help="a recipe's build folder: captions, codes and model/")
    dose = parser.add_argument_group("what harm to pictures does to scores, instead of the benchmark").add_argument
    dose("--doses", metavar="DATASET", help="real pictures, with captions, as `dalle evaluate` takes them")
    dose("--features", metavar="FILE", help="what they are compared by, as `dalle evaluate` has it")
    dose("--limit", type=int, metavar="N", help="look at N pictures at most, spread over all")
    add("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.doses is not None and options.features is None:
        parser.error("expected --features with --doses; name a CLIP, or what else dalle evaluate takes")
    if options.equal_time is not None and not (options.captions and options.codes):
        parser.error(
            "expected --captions and --codes with --equal-time; make them with dalle tokenize and encode-images"
        )
    if options.quick:
        options.rounds = 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if a case failed."""
    options = parse(arguments)
    if options.job:
        print(json.dumps(timing.work(json.loads(options.job))))
        return 0
    if options.equal_time is not None:
        from bench import equal_time

        return equal_time.compare(options, run, say, check_idle)
    if options.precision is not None:
        from bench import precision

        print(precision.report(options.precision))
        return 0
    if options.doses is not None:
        return doses(options)
    return benchmark(options)
