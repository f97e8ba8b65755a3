"""Plans: what an update takes and a run keeps, against real trainers and the papers; and what is said of it."""

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
from plan_subjects import HERE, PAPER, ROOT, SECTIONS_UNCLIP, SMALL, SMALL_UNCLIP, UNCLIP, subject_of

from dalle_cli import config
from dalle_cli.artifacts import open_artifact
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.models import clip, embeddings, unet
from dalle_cli.models.unet import Attention
from dalle_cli.planning import hardware as machines
from dalle_cli.planning import plan
from dalle_cli.planning.memory import rehearse
from dalle_cli.planning.standin import stand_in
from dalle_cli.planning.subjects import subjects
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run


def test_a_large_batch_follows_from_smaller_ones(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path)
    told = plan.Needs(subject, HERE).update(96)
    real = rehearse(subject, replace(subject.train, batch_size=96), torch.float32)
    assert told.flops == real.flops
    assert told.activations == pytest.approx(real.activations, rel=0.02)
    assert told.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_standing_memory_is_that_of_a_real_trainer(tmp_path, optimizer):
    subject = subject_of(RECIPE, "clip", tmp_path, f"clip.train.optimizer={optimizer}")
    needs = plan.Needs(subject, HERE)
    machine = Arithmetic(torch.device("cpu"), torch.float32)
    trainer = Trainer(stand_in(subject, subject.build()), subject.train, Run(Path(), "", {}, []), machine, 0)
    trainer.update(subject.batch(4))
    states = [s for o in trainer.optimizers for state in o.state.values() for k, s in state.items() if k != "step"]
    assert needs.moments == sum(t.nbytes for t in states)
    assert needs.weights == sum(p.nbytes for p in trainer.model.parameters())
    assert needs.average == sum(t.nbytes for t in (*trainer.ema.model.parameters(), *trainer.ema.model.buffers()))


def test_sizes_are_those_that_the_stages_build(chain, tmp_path):
    table = config.read(chain.recipe)
    for subject in subjects(table)[:1]:  # the others' vocabularies are as large as the captions allow
        tensors = open_artifact(chain.dvae).headers[0].tensors
        with torch.device("meta"):
            model = subject.build()
        assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
            k: t.shape for k, t in tensors.items()
        }
    stored = plan.data(table, 100)
    captions, codes = open_artifact(chain.captions), open_artifact(chain.codes)
    row = captions.array("tokens")[:1].nbytes + captions.array("lengths")[:1].nbytes
    assert stored == {"captions": 100 * row, "codes": 100 * codes.array("codes")[:1].nbytes}


def test_parts_are_all_of_a_model_and_go_by_their_names(tmp_path):
    for subject in subjects(config.read(PAPER)):
        with torch.device("meta"):
            model = subject.build()
        parts = plan.count_parts(model)
        assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
        if subject.name == "prior":
            width = 3968
            assert parts["attention"] == 64 * (4 * width**2 + 4 * width)
            assert parts["MLP"] == 64 * (8 * width**2 + 5 * width)
            assert parts["heads"] == (width + 1) * (16384 + 8192)
            assert parts["norms"] == (2 * 64 + 1) * 2 * width
            assert parts["embeddings"] == width * (16384 + 256 + 1 + 257 + 8192 + 32 + 32)


# What the papers say of the 12-billion-parameter prior (2021, sec. 2.4 and app. B to E).


@pytest.fixture(scope="module")
def paper():
    """The paper's prior on the paper's devices, each of which has one of the batch's 1024 rows."""
    subject = next(s for s in subjects(config.read(PAPER)) if s.name == "prior")
    return plan.Needs(subject, machines.machine("v100-16gb"))


def test_the_papers_prior_has_its_size(paper):
    whole = paper.whole(1)
    assert sum(paper.parts.values()) == pytest.approx(12e9, rel=0.05)
    assert whole.copies == pytest.approx(24e9, rel=0.02)  # "about 24 GB" of parameters in 16 bits
    assert whole.copies / 8 < 0.2 * paper.machine.memory  # over a machine's eight devices: 3 GB of each one's 16
    assert whole.weights + whole.gradients + whole.moments + whole.average == pytest.approx(240e9, rel=0.03)


def test_the_papers_prior_fits_its_1024_devices_sharded_and_no_other_way(paper):
    memory, train = paper.machine.memory, paper.subject.train
    assert (memory, train.batch_size) == (16e9, 1024)
    whole, shared = paper.whole(1), paper.shared(1, 1024)
    assert shared.peak < memory < whole.weights < whole.peak
    fits, verdict = plan._verdict(paper, 1024, whole, whole, shared)
    assert fits
    assert verdict.startswith("fits, sharded over 1024: 11")
    eight = paper.shared(1, 8)  # a machine's: weights, moments and average in 32 bits would be too much for it
    assert eight.weights + eight.gradients + eight.moments + eight.average > memory


def test_the_papers_prior_takes_its_arithmetic(paper):
    width, matrices = 3968, paper.parts["attention"] + paper.parts["MLP"]
    attention, heads = 14 * 64 * 1280**2 * width, 6 * width * (256 * 16384 + 1024 * 8192)
    row = paper.update(1).flops
    assert row == pytest.approx(6 * 1280 * matrices + attention + heads, rel=0.001)
    rate = machines.assumed(paper.machine).flops * 1024
    assert 10 < row * 1024 * paper.subject.train.steps / rate / 86400 < 16  # days


def test_the_papers_data():
    assert plan.data(config.read(PAPER), 250_000_000) == {
        "captions": 250_000_000 * (256 * 2 + 2),
        "codes": 250_000_000 * 1024 * 2,
    }


def machine_of(memory):
    return replace(HERE, memory=int(memory))


def judged(subject, memory, devices=1):
    return plan.plan(subject, machine_of(memory), devices, lambda flops, fits: None)


def test_a_model_fits_where_its_fullest_moment_does(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path)
    peak = plan.Needs(subject, HERE).whole(8).peak
    assert judged(subject, peak).fits
    assert not judged(subject, peak - 1).fits


@pytest.mark.parametrize(("devices", "share"), [(1, 0.7), (2, 0.4)])
def test_advice_is_true(tmp_path, devices, share):
    """Whatever it says would do, does."""
    subject = subject_of(SMALL, "prior", tmp_path, "prior.train.batch_size=32")
    needs = plan.Needs(subject, HERE)
    standing = 2 * needs.weights + needs.moments + needs.average
    full = needs.whole(32 // devices).peak if devices == 1 else needs.shared(32 // devices, devices).peak
    memory = standing / devices + share * (full - standing / devices)
    made = judged(subject, memory, devices)
    assert not made.fits
    ways = made.verdict.rsplit("; ", 1)[1].removesuffix(" would do").split(", or ")
    assert len(ways) >= 2
    for way in ways:
        settings = {"checkpoint_activations": "checkpoint_activations" in way}
        if found := re.search(r"accumulate = (\d+)", way):
            settings["accumulate"] = int(found[1]) * devices // math.gcd(devices, int(found[1]))
        if found := re.search(r"sharding over ([\d,]+)", way):
            count = int(found[1].replace(",", ""))
            if "with" in way:
                settings["accumulate"] = 32
            changed = replace(subject, train=replace(subject.train, **settings))
            assert (
                plan.Needs(changed, HERE).shared(math.ceil(32 / count) if "with" not in way else 1, count).peak
                <= memory
            )
        else:
            changed = replace(subject, train=replace(subject.train, **settings))
            assert judged(changed, memory, devices).fits, way


def test_a_clip_is_told_a_smaller_batch(tmp_path):
    subject = subject_of(RECIPE, "clip", tmp_path, "clip.train.batch_size=64")
    needs = plan.Needs(subject, HERE)
    made = judged(subject, (needs.whole(64).peak + needs.whole(8).peak) / 2)
    few = int(re.search(r"batch_size = (\d+)", made.verdict)[1])
    assert 8 < few < 64
    assert "accumulate" not in made.verdict


def test_nothing_helps_where_one_row_is_too_large(tmp_path):
    subject = subject_of(SMALL, "prior", tmp_path)
    made = judged(subject, 1000)
    assert not made.fits
    assert made.verdict.endswith("so it wants a smaller model")


def test_the_page(recipe):
    told = run_ok("plan", recipe, "--device", "A100-80GB", "--devices", 2, "--pairs", 1000)
    lines = told.splitlines()
    assert lines[0].split() == ["dvae", "clip", "prior"]
    assert "\x1b" not in told
    assert max(map(len, lines)) < 160
    for word in (
        "parameters",
        "  attention",
        "  optimizer",
        "sharded, on each of 2",
        "arithmetic of an update",
        "epochs",
    ):
        assert any(line.startswith(word) for line in lines), word
    assert "prior fits, a whole copy on each of 2" in told
    assert "1,000 pairs: captions" in told
    assert "30% of the data sheet's 312 TFLOP/s in bfloat16, assumed" in told


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
    subject = subject_of(RECIPE, "prior", tmp_path)
    flops = rehearse(subject, subject.train, torch.float32).flops
    rate = machines.measured(subject, "cpu", flops, True)
    assert rate.flops > 0
    assert "updates of 8" in rate.source
    large = machines.measured(subject, "cpu", flops, False)
    assert large.flops > 0
    assert "product" in large.source
    assert "assumed" in large.source


def test_without_a_rate_no_time_is_told(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    result = run_cli("plan", tmp_path / "small.toml", "--device", "cpu")
    assert result.status == 0
    assert "--measure" in result.stdout
    assert not re.search(r"^time ", result.stdout, re.MULTILINE)


def test_faults_are_told_in_a_line(recipe, tmp_path):
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
    for name in machines.SHEETS:
        made = machines.machine(name)
        assert 10e9 < made.memory < 200e9
        assert 50e12 < made.peak < 3000e12
        assert machines.assumed(made).flops == pytest.approx(0.3 * made.peak)
    with pytest.raises(DalleError, match="h100"):
        machines.machine("h1000")


# The models of DALL-E 2.

NAMES = ("diffusion_prior", "autoregressive_prior", "decoder", "upsampler_1")
ROWS, WIDTH, TEXT, EMBEDDING = 8, 64, 24, 16


def test_a_recipe_of_both_systems_names_all_its_models(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + SECTIONS_UNCLIP)
    assert [s.name for s in subjects(config.read(path))] == ["dvae", "clip", "prior", *NAMES]
    path.write_text('[embedding_prior]\nkind = "autoregressive"\n')
    (only,) = subjects(config.read(path))
    assert only.name == "autoregressive_prior"


def test_captions_and_clip_decide_what_they_decide_in_training(tmp_path):
    more = ("embedding_prior.autoregressive.n_component=0",)
    for name in NAMES[:3]:
        with torch.device("meta"):
            made = subject_of(SMALL_UNCLIP, name, tmp_path, *more).build().config
        assert (made.n_text, made.n_text_vocab, made.n_embedding) == (TEXT, 300, EMBEDDING)
    assert subjects(config.read(tmp_path / "recipe.toml", more))[2].build().config.n_component == EMBEDDING
    plain = subject_of(SMALL_UNCLIP, "decoder", tmp_path, "decoder.n_text=0")
    assert plain.build().text is None
    with pytest.raises(DalleError, match="n_embedding"):
        subject_of(SMALL_UNCLIP, "decoder", tmp_path, "decoder.n_embedding=17")


def test_the_arithmetic_of_the_diffusion_prior_is_that_of_its_products(tmp_path):
    subject = subject_of(SMALL_UNCLIP, "diffusion_prior", tmp_path)
    length = TEXT + 4
    blocks = ROWS * WIDTH**2 * (length * (12 + 12 + 3) + 9)  # of the last block only the query is made
    pairs = ROWS * (2 * length + 1) * length * 2 * WIDTH
    inner = ROWS * (WIDTH * WIDTH + WIDTH * EMBEDDING)  # of the timestep's second layer, and the answer
    first = ROWS * (WIDTH * WIDTH + 2 * WIDTH * EMBEDDING)  # whose inputs want no gradient
    assert rehearse(subject, subject.train, torch.float32).flops == 6 * (blocks + pairs + inner) + 4 * first


def test_the_arithmetic_of_the_autoregressive_prior_is_that_of_its_products(tmp_path):
    subject = subject_of(SMALL_UNCLIP, "autoregressive_prior", tmp_path)
    length, components, buckets = TEXT + 1 + 12, 12, 40
    blocks, pairs = 3 * ROWS * length * 12 * WIDTH**2, 3 * ROWS * length**2 * 2 * WIDTH
    head, first, projected = (
        ROWS * n for n in (components * buckets * WIDTH, WIDTH * EMBEDDING, EMBEDDING * components)
    )
    told = rehearse(subject, subject.train, torch.float32).flops
    assert told == 6 * (blocks + pairs + head) + 4 * first + 2 * projected


def multiplied(model, call):
    """Multiply-adds of a forward pass by hooks: of layers, of attention, and of the layers that begin a path."""
    sums = {"layers": 0, "attention": 0, "first": 0}
    begins = ("conv_in", "time_embedding.linear_1", "low_level.linear_1")

    def hook(name):
        def count(module, args, out):
            if isinstance(module, Attention):
                places, context = out.shape[2] * out.shape[3], 0 if args[1] is None else args[1].shape[1]
                sums["attention"] += 2 * len(out) * places * (places + context) * out.shape[1]
            elif isinstance(module, clip.Layer):
                sums["attention"] += 2 * len(out) * out.shape[1] ** 2 * out.shape[2]
            else:
                n = out.numel() * module.weight[0].numel()
                sums["first" if name.endswith(begins) else "layers"] += n

        return count

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, Attention, clip.Layer)):
            module.register_forward_hook(hook(name))
    call(model)
    return sums


@pytest.mark.parametrize("name", ["decoder", "upsampler_1"])
def test_the_arithmetic_of_a_unet_is_that_of_its_layers(tmp_path, name):
    subject = subject_of(SMALL_UNCLIP, name, tmp_path)
    sums = multiplied(subject.build(), lambda model: subject.loss(model, subject.batch(ROWS), torch.Generator()))
    assert (sums["attention"] > 0) == (name == "decoder")
    told = rehearse(subject, subject.train, torch.float32)
    assert told.flops == 6 * (sums["layers"] + sums["attention"]) + 4 * sums["first"]


def test_attention_over_many_places_is_counted_on_a_cpu_too(tmp_path):
    """Beyond 512 places torch's own kernel takes over, of which torch counts nothing."""
    sets = ("decoder.image_size=64", "decoder.attention=[32]", "decoder.train.batch_size=1")
    subject = subject_of(SMALL_UNCLIP, "decoder", tmp_path, *sets)
    sums = multiplied(subject.build(), lambda model: subject.loss(model, subject.batch(1), torch.Generator()))
    told = rehearse(subject, subject.train, torch.float32).flops
    assert told >= 6 * (sums["layers"] + sums["attention"]) + 4 * sums["first"]
    assert told <= 7 * sums["attention"] + 6 * sums["layers"] + 4 * sums["first"]  # scores made again


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
def test_a_gpu_keeps_no_weights_of_attention(tmp_path, name):
    subject = subject_of(SMALL_UNCLIP, name, tmp_path)
    before = unet.batched_attention, embeddings.batched_attention, unet.trains_on_cpu, embeddings.trains_on_cpu
    gpu = plan.Needs(subject, replace(HERE, accelerator=True)).update(ROWS)
    cpu = plan.Needs(subject, HERE).update(ROWS)
    assert gpu.activations < cpu.activations
    assert cpu.flops < gpu.flops < 1.2 * cpu.flops
    after = unet.batched_attention, embeddings.batched_attention, unet.trains_on_cpu, embeddings.trains_on_cpu
    assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_that_torchs_allocator_counts(tmp_path, name):
    """As for the other models in test_rehearsal.py: the profiler's own records are the oracle."""
    subject = subject_of(SMALL_UNCLIP, name, tmp_path)
    train = replace(subject.train, batch_size=32)
    told = rehearse(subject, train, torch.float32)
    machine = Arithmetic(torch.device("cpu"), torch.float32)
    trainer = Trainer(stand_in(subject, subject.build()), train, Run(Path(), "", {}, []), machine, 0)
    trainer.update(subject.batch(32))
    trainer.model.zero_grad()
    for optimizer in trainer.optimizers:
        optimizer.step = lambda: None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.update(subject.batch(32))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert told.peak == pytest.approx(peak, rel=0.12)


def test_standing_memory_of_a_decoder_is_that_of_a_real_trainer(tmp_path):
    subject = subject_of(SMALL_UNCLIP, "decoder", tmp_path)
    needs = plan.Needs(subject, HERE)
    machine = Arithmetic(torch.device("cpu"), torch.float32)
    trainer = Trainer(stand_in(subject, subject.build()), subject.train, Run(Path(), "", {}, []), machine, 0)
    trainer.update(subject.batch(2))
    states = [s for o in trainer.optimizers for state in o.state.values() for k, s in state.items() if k != "step"]
    assert needs.moments == sum(t.nbytes for t in states)
    assert needs.weights == sum(p.nbytes for p in trainer.model.parameters())


def test_parts_of_the_papers_decoder():
    """Its text transformer, attention and convolutions, by the sizes of the table (2022, app. C)."""
    subject = next(s for s in subjects(config.read(UNCLIP)) if s.name == "decoder")
    with torch.device("meta"):
        model = subject.build()
    parts = plan.count_parts(model)
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
import gc, json, sys
from pathlib import Path
import torch
from dalle_cli import config
from dalle_cli.devices import Arithmetic
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run
from dalle_cli.training.subjects import subjects
from dalle_cli.training.standin import stand_in

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def updates(path, sets, name, count):
    subject = next(s for s in subjects(config.read(Path(path), sets)) if s.name == name)
    machine = Arithmetic(torch.device("cpu"), torch.bfloat16)
    trainer = Trainer(stand_in(subject, subject.build()), subject.train, Run(Path(), "", {}, []), machine, 0)
    batch = subject.batch(subject.train.batch_size)
    for _ in range(count):
        trainer.update(batch)

tiny, path, name, section, *sets = sys.argv[1:]
for optimizer in ("adamw", "muon"):  # what libraries take when they are first used
    updates(tiny, [f"{section}.train.optimizer={optimizer}"], name, 1)
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forgets the highest so far
updates(path, sets, name, 2)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's record of memory")
@pytest.mark.parametrize(
    ("name", "recipe", "sets"),
    [
        ("prior", "recipes/shapes/recipe.toml", ()),
        ("prior", "recipes/emoji/small.toml", ()),
        ("dvae", "recipes/emoji/small.toml", ()),
        ("clip", "recipes/shapes/recipe.toml", ()),
        (
            "prior",
            None,
            (
                "prior.n_layer=8", "prior.n_head=8", "prior.n_embd=512", "prior.n_text=256", "prior.grid=32",
                "prior.train.batch_size=2",
            ),
        ),
        (
            "prior",
            None,
            (
                "prior.n_layer=8", "prior.n_head=4", "prior.n_embd=256", "prior.n_text=64", "prior.grid=16",
                "prior.train.batch_size=16", "prior.train.accumulate=2", "prior.train.checkpoint_activations=true",
            ),
        ),
        (
            "prior",
            None,
            (
                "prior.n_layer=8", "prior.n_head=4", "prior.n_embd=256", "prior.n_text=64", "prior.grid=16",
                "prior.train.batch_size=16", "prior.train.accumulate=2",
            ),
        ),
        (
            "decoder",
            None,
            (
                "decoder.image_size=32", "decoder.width=64", "decoder.attention=[16,8]", "decoder.multipliers=[1,2,3]",
                "decoder.depth=2", "decoder.context_width=256", "decoder.text_layers=2", "decoder.text_heads=4",
                "decoder.n_text=32", "decoder.n_text_vocab=512", "decoder.n_embedding=256",
                "decoder.train.batch_size=16",
            ),
        ),
        (
            "diffusion_prior",
            None,
            (
                "embedding_prior.diffusion.n_layer=6", "embedding_prior.diffusion.n_head=8",
                "embedding_prior.diffusion.n_embd=512", "embedding_prior.diffusion.n_text=32",
                "embedding_prior.diffusion.n_text_vocab=4096",
                "embedding_prior.diffusion.n_embedding=256", "embedding_prior.diffusion.train.batch_size=64",
            ),
        ),
    ],
    ids=[
        "shapes-prior", "emoji-prior", "emoji-dvae", "shapes-clip", "8x512", "checkpointed", "accumulated", "decoder",
        "diffusion",
    ],
)  # fmt: skip
def test_memory_is_what_an_update_takes_of_this_machine(tmp_path, name, recipe, sets):
    """`python -m pytest tests/test_plan.py -m slow -rP`: the plan's fullest moment against the process's."""
    tiny, path = tmp_path / "tiny.toml", ROOT / recipe if recipe else tmp_path / "empty.toml"
    tiny.write_text(RECIPE + SECTIONS_UNCLIP)
    if not recipe:
        path.write_text("[prior]\n")
    subject = next(s for s in subjects(config.read(path, sets)) if s.name == name)
    machine = machines.Machine("cpu", 10**12, None, "bfloat16", False, torch.bfloat16)
    planned = plan.plan(subject, machine, 1, lambda flops, fits: None).alone.peak
    section = name.replace("diffusion_prior", "embedding_prior.diffusion")
    run = [sys.executable, "-c", CHECK, str(tiny), str(path), name, section, *sets]
    taken = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    print(f"planned {planned / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB, ratio {planned / taken:.3f}")
    assert planned == pytest.approx(taken, rel=0.15)
