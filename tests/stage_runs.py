"""Stages that read a data set: their arguments, and what the runs of those that train leave on the disk."""

import json

TRAINERS = ("dvae", "clip", "prior")
TIMES = ("seconds", "rate", "peak_memory")  # what a row of the log says of the machine, not of the model


def training(chain, name, out, *more):
    """The arguments that train one of the chain's models anew, to `out`."""
    inputs = {
        "dvae": (chain.data,),
        "clip": (chain.data, "-t", chain.tokenizer),
        "prior": (chain.captions, chain.codes, "-t", chain.tokenizer),
    }
    return (f"train-{name}", *inputs[name], "--config", chain.recipe, "--dtype", "float32", "-o", out, *more)


def reading(chain, stage, data, folder):
    """The arguments of a stage that reads the data set `data`, to `folder`/out.safetensors."""
    more = {
        "train-tokenizer": (),
        "tokenize": ("-t", chain.tokenizer),
        "train-dvae": (),
        "train-clip": ("-t", chain.tokenizer),
        "encode-images": ("-m", chain.dvae),
    }
    return (stage, data, *more[stage], "--config", chain.recipe, "-o", folder / "out.safetensors")


def rows(out):
    """What the run beside `out` wrote down."""
    text = (out.parent / f"{out.stem}.run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def lasting_rows(out):
    """The same, without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(out)]


def checkpoints(out):
    """The names of the checkpoints of the run beside `out`."""
    return sorted(p.name for p in (out.parent / f"{out.stem}.run").glob("checkpoint-*"))
