"""Plans: what is said of a recipe's models and devices, against the stages, the papers and measured updates."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, run_bad, run_cli, run_ok
from plan_workloads import (
    HERE,
    PAPER,
    ROOT,
    SECTIONS_UNCLIP,
    SMALL,
    SMALL_UNCLIP,
    UNCLIP,
    estimated,
    workload_of,
)  # fmt: skip

from dalle_cli import config
from dalle_cli.artifacts import open_artifact
from dalle_cli.errors import DalleError
from dalle_cli.planning import hardware, plan
from dalle_cli.planning.estimate import count_parts, models_on_meta
from dalle_cli.planning.workload import workloads


def on_meta(workload):
    with models_on_meta():
        return workload.task(workload.train).model


def test_sizes_are_those_that_the_stages_build(chain, tmp_path):
    table = config.read(chain.recipe)
    dvae = on_meta(workloads(table)[0])  # the others' vocabularies are as large as the captions allow
    stored = open_artifact(chain.dvae).headers[0].tensors
    assert {name: tuple(t.shape) for name, t in dvae.state_dict().items()} == {k: t.shape for k, t in stored.items()}
    captions, codes = open_artifact(chain.captions), open_artifact(chain.codes)
    row = captions.array("tokens")[:1].nbytes + captions.array("lengths")[:1].nbytes
    expected = {"captions": 100 * row, "codes": 100 * codes.array("codes")[:1].nbytes}
    assert plan.stored_bytes(table, 100) == expected


def test_parts_are_all_of_a_model_and_go_by_their_names():
    for workload in workloads(config.read(PAPER)):
        model = on_meta(workload)
        parts = count_parts(model)
        assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    width = 3968  # of the last, the token prior
    assert parts["attention"] == 64 * (4 * width**2 + 4 * width)
    assert parts["MLP"] == 64 * (8 * width**2 + 5 * width)
    assert parts["heads"] == (width + 1) * (16384 + 8192)
    assert parts["norms"] == (2 * 64 + 1) * 2 * width
    assert parts["embeddings"] == width * (16384 + 256 + 1 + 257 + 8192 + 32 + 32)


# What the papers say of the 12-billion-parameter prior (2021, sec. 2.4 and app. B to E).


@pytest.fixture(scope="module")
def paper():
    """The paper's prior on the paper's devices, each of which has one of the batch's 1024 rows."""
    workload = next(w for w in workloads(config.read(PAPER)) if w.name == "prior")
    return plan.Needs(workload, hardware.find("v100-16gb"))


def test_the_papers_prior_has_its_size(paper):
    whole = paper.whole(1)
    assert sum(paper.update(1).parameters.values()) == pytest.approx(12e9, rel=0.05)
    assert whole.copies == pytest.approx(24e9, rel=0.02)  # "about 24 GB" of parameters in 16 bits
    assert whole.copies / 8 < 0.2 * paper.device.memory  # over a machine's eight devices: 3 GB of each one's 16
    assert whole.weights + whole.gradients + whole.moments + whole.average == pytest.approx(240e9, rel=0.03)


def test_the_papers_prior_fits_its_1024_devices_sharded_and_no_other_way(paper):
    memory, train = paper.device.memory, paper.train
    assert (memory, train.batch_size) == (16e9, 1024)
    whole, shared = paper.whole(1), paper.sharded(1, 1024)
    assert shared.peak < memory < whole.weights < whole.peak
    fits, verdict = plan._verdict(paper, 1024, whole, whole, shared)
    assert fits
    assert verdict.startswith("fits, sharded over 1024: 11")
    eight = paper.sharded(1, 8)  # a machine's: weights, moments and average in 32 bits would be too much for it
    assert eight.weights + eight.gradients + eight.moments + eight.average > memory


def test_the_papers_prior_takes_its_arithmetic(paper):
    width, matrices = 3968, sum(paper.update(1).parameters[name] for name in ("attention", "MLP"))
    attention, heads = 14 * 64 * 1280**2 * width, 6 * width * (256 * 16384 + 1024 * 8192)
    row = paper.update(1).flops
    assert row == pytest.approx(6 * 1280 * matrices + attention + heads, rel=0.001)
    rate = hardware.assumed_rate(paper.device).flops * 1024
    assert 10 < row * 1024 * paper.train.steps / rate / 86400 < 16  # days


def test_the_papers_data():
    assert plan.stored_bytes(config.read(PAPER), 250_000_000) == {
        "captions": 250_000_000 * (256 * 2 + 2),
        "codes": 250_000_000 * 1024 * 2,
    }


def planned(workload, memory, devices=1):
    return plan.plan(workload, replace(HERE, memory=int(memory)), devices, lambda flops, fits: None)


def test_a_model_fits_where_its_peak_does(tmp_path):
    workload = workload_of(SMALL, "prior", tmp_path)
    peak = plan.Needs(workload, HERE).whole(8).peak
    assert planned(workload, peak).fits
    assert not planned(workload, peak - 1).fits


@pytest.mark.parametrize(("devices", "share"), [(1, 0.7), (2, 0.4)])
def test_advice_is_true(tmp_path, devices, share):
    """With each setting that the verdict names, the model fits."""
    workload = workload_of(SMALL, "prior", tmp_path, "prior.train.batch_size=32")
    needs = plan.Needs(workload, HERE)
    whole = needs.whole(32)
    standing = (whole.weights + whole.gradients + whole.moments + whole.average) / devices
    full = whole.peak if devices == 1 else needs.sharded(32 // devices, devices).peak
    memory = standing + share * (full - standing)
    made = planned(workload, memory, devices)
    assert not made.fits
    ways = made.verdict.rsplit("; ", 1)[1].removesuffix(" would do").split(", or ")
    assert len(ways) >= 2
    for way in ways:
        settings = {"checkpoint_activations": "checkpoint_activations" in way}
        if found := re.search(r"accumulate = (\d+)", way):
            settings["accumulate"] = int(found[1]) * devices // math.gcd(devices, int(found[1]))
        changed = replace(workload, train=replace(workload.train, **settings))
        if found := re.search(r"sharding over ([\d,]+)", way):
            count = int(found[1].replace(",", ""))
            rows = 1 if "with" in way else math.ceil(32 / count)
            assert plan.Needs(changed, HERE).sharded(rows, count).peak <= memory
        else:
            assert planned(changed, memory, devices).fits, way


def test_a_clip_is_advised_a_smaller_batch(tmp_path):
    workload = workload_of(RECIPE, "clip", tmp_path, "clip.train.batch_size=64")
    needs = plan.Needs(workload, HERE)
    made = planned(workload, (needs.whole(64).peak + needs.whole(8).peak) / 2)
    few = int(re.search(r"batch_size = (\d+)", made.verdict)[1])
    assert 8 < few < 64
    assert "accumulate" not in made.verdict


def test_nothing_helps_where_one_row_is_too_large(tmp_path):
    made = planned(workload_of(SMALL, "prior", tmp_path), 1000)
    assert not made.fits
    assert made.verdict.endswith("so it needs a smaller model")


def test_the_page(recipe):
    lines = (page := run_ok("plan", recipe, "--device", "A100-80GB", "--devices", 2, "--pairs", 1000)).splitlines()
    assert lines[0].split() == ["dvae", "clip", "prior"]
    assert "\x1b" not in page
    assert max(map(len, lines)) < 160
    words = ("parameters", "  attention", "  optimizer", "sharded, on each of 2", "arithmetic of an update", "epochs")
    for word in words:
        assert any(line.startswith(word) for line in lines), word
    assert "prior fits, replicated on each of 2" in page
    assert "1,000 pairs: captions" in page
    assert "30% of the data sheet's 312 TFLOP/s in bfloat16, assumed" in page


def test_json_is_one_object_and_settings_can_be_overridden(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    plain = json.loads(run_ok("plan", path, "--json", "--rate", "1e12", "--pairs", 16))
    assert set(plain) == {"device", "models", "data", "epochs"}
    assert plain["data"] == {"captions": 16 * (16 * 2 + 2), "codes": 16 * 64 * 2}
    prior = plain["models"]["prior"]
    assert prior["seconds"] == pytest.approx(prior["flops"] * prior["updates"] / 1e12)
    assert plain["epochs"] == {"prior": 430_000 * 8 / 16}
    command = ("plan", path, "--json", "--rate", "1e12", "--set", "prior.n_layer=6", "--devices", 2)
    more = json.loads(run_ok(*command))["models"]["prior"]
    assert more["parameters"]["MLP"] == 2 * prior["parameters"]["MLP"]
    assert more["seconds"] == pytest.approx(more["flops"] * more["updates"] / 2e12)
    assert more["sharded"]["weights"] == math.ceil(more["alone"]["weights"] / 2)


def test_a_rate_is_measured_by_updates_or_by_a_product(tmp_path):
    workload = workload_of(RECIPE, "prior", tmp_path)
    flops = estimated(workload).flops
    rate = hardware.measured_rate(workload, "cpu", flops, True)
    assert rate.flops > 0
    assert "updates of 8" in rate.source
    large = hardware.measured_rate(workload, "cpu", flops, False)
    assert large.flops > 0
    assert "product" in large.source
    assert "assumed" in large.source


def test_without_a_rate_there_is_no_time(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    result = run_cli("plan", tmp_path / "small.toml", "--device", "cpu")
    assert result.status == 0
    assert "--measure" in result.stdout
    assert not re.search(r"^time ", result.stdout, re.MULTILINE)


def test_bad_input_is_one_line(recipe, tmp_path):
    assert "a100-80gb" in run_bad("plan", recipe, "--device", "a100")
    assert "--rate" in run_bad("plan", recipe, "--rate", "1e12", "--measure")
    assert "--measure" in run_bad("plan", recipe, "--device", "h100", "--measure")
    assert "n_layer" in run_bad("plan", recipe, "--set", "prior.n_layers=3")
    assert "missing.toml" in run_bad("plan", tmp_path / "missing.toml")
    (tmp_path / "data.toml").write_text("[data]\nmax_aspect = 2.0\n")
    assert "[prior]" in run_bad("plan", tmp_path / "data.toml")
    assert "--rate" in run_bad("plan", recipe, "--rate", "nan")
    assert "accumulate" in run_bad("plan", recipe, "--set", "clip.train.accumulate=2")


def test_the_data_sheets_are_in_order():
    for name in hardware.DATA_SHEETS:
        made = hardware.find(name)
        assert 10e9 < made.memory < 200e9
        assert 50e12 < made.peak < 3000e12
        assert hardware.assumed_rate(made).flops == pytest.approx(0.3 * made.peak)
    with pytest.raises(DalleError, match="h100"):
        hardware.find("h1000")


# The models of DALL-E 2.

NAMES = ("diffusion_prior", "autoregressive_prior", "decoder", "upsampler_1")
TEXT, EMBEDDING = 24, 16


def test_a_recipe_of_both_systems_names_all_its_models(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + SECTIONS_UNCLIP)
    assert [w.name for w in workloads(config.read(path))] == ["dvae", "clip", "prior", *NAMES]
    path.write_text('[embedding_prior]\nkind = "autoregressive"\n')
    (only,) = workloads(config.read(path))
    assert only.name == "autoregressive_prior"


def test_captions_and_clip_decide_what_they_decide_in_training(tmp_path):
    more = ("embedding_prior.autoregressive.n_component=0",)
    for name in NAMES[:3]:
        made = on_meta(workload_of(SMALL_UNCLIP, name, tmp_path, *more)).config
        assert (made.n_text, made.n_text_vocab, made.n_embedding) == (TEXT, 300, EMBEDDING)
        assert getattr(made, "n_component", EMBEDDING) == EMBEDDING
    assert on_meta(workload_of(SMALL_UNCLIP, "decoder", tmp_path, "decoder.n_text=0")).text is None
    with pytest.raises(DalleError, match="n_embedding"):
        workload_of(SMALL_UNCLIP, "decoder", tmp_path, "decoder.n_embedding=17")


def test_parts_of_the_papers_decoder():
    """Its text transformer, attention and convolutions, by the sizes of the table (2022, app. C)."""
    model = on_meta(next(w for w in workloads(config.read(UNCLIP)) if w.name == "decoder"))
    parts = count_parts(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    width, context = 2048, 2048
    tables = (16384 + 2 * 256) * width
    assert parts["text transformer"] == 24 * (12 * width**2 + 13 * width) + tables + 2 * width
    attends = [1024] * 7 + [1536] * 7 + [2048] * 8  # down and up at sides 32, 16, 8, and one in the middle
    assert parts["attention"] == sum(4 * c**2 + 4 * c + 2 * c * (context + 1) for c in attends)
    assert parts["embeddings"] == 1024 + (1024 + 1) * 4 * context
    assert parts["convolutions"] > 1e9


def test_the_page_of_dalle_2(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + SECTIONS_UNCLIP)
    lines = run_ok("plan", path, "--device", "a100-40gb", "--pairs", 1000).splitlines()
    heads = [line.split() for line in lines if "clip" in line.split() or "upsampler_1" in line.split()]
    assert heads[:2] == [["dvae", "clip", "prior"], list(NAMES)]
    assert max(map(len, lines)) < 160
    assert any(line.startswith("  convolutions") for line in lines)
    for name in NAMES:
        assert any(line.startswith(f"{name} fits") for line in lines), name
    assert "embeddings 128 kB" in "\n".join(lines)  # of 1000 pictures and as many captions, 16 numbers of 4 bytes
    assert "n_layer" in run_bad("plan", path, "--set", "embedding_prior.diffusion.n_layers=3")
    assert "kind" in run_bad("plan", path, "--set", "embedding_prior.kind=both")
    assert "[decoder]" in run_bad("plan", path, "--set", "decoder=3")


CHECK = """
import gc, json, sys, time
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from plan_workloads import trainer_of
from dalle_cli import config
from dalle_cli.planning.workload import workloads

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def updates(path, sets, name, count):
    workload = next(w for w in workloads(config.read(Path(path), sets)) if w.name == name)
    trainer, batch, times = trainer_of(workload, torch.bfloat16), workload.batch(workload.train.batch_size), []
    for _ in range(count):
        started = time.perf_counter()
        trainer.update(batch)
        times.append(time.perf_counter() - started)
    return min(times[1:], default=0)

tiny, path, name, section, *sets = sys.argv[1:]
for optimizer in ("adamw",) if name == "dvae" else ("adamw", "muon"):  # what libraries take when first used
    updates(tiny, [f"{section}.train.optimizer={optimizer}"], name, 1)
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the highest so far
seconds = updates(path, sets, name, 8)
print(json.dumps([status("VmHWM") - before, seconds]))
"""
EMPTY = "[prior]\n"
SHAPES, EMOJI, SHAPES_UNCLIP = (
    (ROOT / "recipes" / path).read_text() for path in ("shapes/recipe.toml", "emoji/small.toml", "shapes/unclip.toml")
)
LONG = ("n_layer=8", "n_head=8", "n_embd=512", "n_text=256", "grid=32", "train.batch_size=2")
WIDE = ("n_layer=8", "n_head=4", "n_embd=256", "n_text=64", "grid=16", "train.batch_size=16", "train.accumulate=2")
CASES = {
    "shapes-dvae": ("dvae", SHAPES, ()),
    "shapes-clip": ("clip", SHAPES, ()),
    "shapes-prior": ("prior", SHAPES, ()),
    "emoji-dvae": ("dvae", EMOJI, ()),
    "emoji-clip": ("clip", EMOJI, ()),
    "emoji-prior": ("prior", EMOJI, ()),
    "diffusion": ("diffusion_prior", SHAPES_UNCLIP, ()),
    "autoregressive": ("autoregressive_prior", SHAPES_UNCLIP, ()),
    "decoder": ("decoder", SHAPES_UNCLIP, ()),
    "upsampler": ("upsampler_1", SHAPES_UNCLIP, ()),
    "long": ("prior", EMPTY, LONG),
    "accumulated": ("prior", EMPTY, WIDE),
    "checkpointed": ("prior", EMPTY, (*WIDE, "train.checkpoint_activations=true")),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's record of memory")
@pytest.mark.parametrize("case", CASES)
def test_memory_and_time_are_what_updates_take_here(tmp_path, case):
    """`python -m pytest tests/planning/test_plan.py -m slow -rP`: the plan against a process that trains."""
    name, text, keys = CASES[case]
    tiny, path = tmp_path / "tiny.toml", tmp_path / "recipe.toml"
    tiny.write_text(RECIPE + SECTIONS_UNCLIP)
    sets = [f"{name}.{key}" for key in keys]
    workload = workload_of(text, name, tmp_path, *sets)
    device = hardware.Hardware("cpu", 10**12, None, "bfloat16", False, torch.bfloat16)
    section = {"diffusion_prior": "embedding_prior.diffusion", "autoregressive_prior": "embedding_prior.autoregressive"}
    run = [sys.executable, "-c", CHECK, str(tiny), str(path), name, section.get(name, name), *sets]
    run_here = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    memory, seconds = json.loads(run_here.stdout)
    made = plan.plan(workload, device, 1, lambda flops, fits: hardware.measured_rate(workload, "cpu", flops, fits))
    planned_memory, planned_seconds = made.alone.peak, made.seconds / made.updates
    print(f"memory: planned {planned_memory / 1e6:.0f} MB, taken {memory / 1e6:.0f} MB, {planned_memory / memory:.3f}")
    print(f"update: planned {planned_seconds:.3f} s, taken {seconds:.3f} s, {planned_seconds / seconds:.3f}")
    assert planned_memory == pytest.approx(memory, rel=0.25 if case == "checkpointed" else 0.15)
    assert planned_seconds == pytest.approx(seconds, rel=0.25)
