"""DALL-E 2 on shapes and emoji: the graph that recipes share, the recipes' numbers, and how spread is measured."""

import importlib
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dalle_cli import config
from dalle_cli.models.clip import CLIPConfig
from dalle_cli.models.decoder import DecoderConfig
from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
from dalle_cli.models.embedding_prior import AutoregressivePriorConfig
from dalle_cli.models.upsampler import UpsamplerConfig
from dalle_cli.sampling.decoder import upsampler_order
from dalle_cli.training.decoder import DecoderTrain
from dalle_cli.training.embedding_prior import KINDS, EmbeddingPriorTrain, chosen
from dalle_cli.training.upsampler import UpsamplerTrain

FOLDER = Path(__file__).parents[2] / "recipes" / "shapes"
sys.path.insert(0, str(FOLDER))
scenes = importlib.import_module("scenes")
score = importlib.import_module("score")

# In place of `dalle` and of Python: what is named and should be there is there; the output is written, and the command
# noted down. So the graph runs as it is, in a second.
STAND_IN = """
import sys
from pathlib import Path

log, build, *args = sys.argv[1:]
if args[0] == "scenes.py":
    Path(args[1]).mkdir(parents=True)
    for name in ("train.tar", "truth.tar", "prompts-seen.txt", "prompts-unseen.txt"):
        Path(args[1], name).write_text(name)
out = Path(args[args.index("-o") + 1]) if "-o" in args else None
for word in args[1:] if args[0] != "scenes.py" else []:
    path = Path(word.partition("=")[2] or word)
    there = path.exists() or Path(f"{path}.images.safetensors").exists()
    if word.startswith(build) or f"={build}" in word:
        assert path == out or there, f"{path} is not there for {args}"
with open(log, "a") as file:
    file.write(" ".join(args).replace(build + "/", "") + "\\n")
if out:
    assert out.parent.is_dir() or args[0].startswith("train"), f"no folder for {out}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(" ".join(args))
"""


class Graph:
    """The shapes recipe with stand-ins for all stages, in a folder of its own."""

    def __init__(self, root):
        self.build, self.log, self.stand_in = root / "build", root / "log.txt", root / "stand_in.py"
        self.stand_in.write_text(STAND_IN)

    def make(self, *goals):
        """Run make; the commands that it ran, in order."""
        self.log.write_text("")
        stage = f"{sys.executable} -S -E {self.stand_in} {self.log} {self.build}"
        command = ["make", "-C", FOLDER, f"OUT={self.build}", f"DALLE={stage}", f"PY={stage}", *goals]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The graph, and what `make unclip` ran."""
    graph = Graph(tmp_path_factory.mktemp("graph"))
    return graph, graph.make("unclip")


def named(commands, stage):
    return [line for line in commands if line.split()[0] == stage]


def test_each_thing_is_made_once_and_clip_and_tokenizer_are_shared(built):
    _, commands = built
    outputs = [words[words.index("-o") + 1] for words in map(str.split, commands) if "-o" in words]
    assert len(outputs) == len(set(outputs))
    for stage, times in {"train-tokenizer": 1, "train-clip": 1, "train-dvae": 1, "train-decoder": 2}.items():
        assert len(named(commands, stage)) == times, stage
    embeddings, codes = sorted(named(commands, "encode-images"), key=lambda line: "dvae" in line)
    assert "-m model/clip.safetensors" in embeddings
    assert "-m model/dvae.safetensors" in codes
    assert [" -m model/clip.safetensors" in line for line in sorted(named(commands, "tokenize"))].count(True) == 1


def test_each_prior_has_a_whole_bundle_and_draws_both_lists(built):
    graph, commands = built
    trained = [line for line in named(commands, "train-prior") if "embeddings.safetensors" in line]
    assert [line.split("embedding_prior.kind=")[1].split()[0] for line in sorted(trained)] == sorted(KINDS)
    for kind in KINDS:
        bundle = graph.build / "unclip" / kind
        held = {path.name for path in bundle.iterdir()}
        assert held == {f"{n}.safetensors" for n in ("prior", "decoder", "upsampler-1", "clip")} | {"tokenizer.json"}
        for name, origin in {"decoder": "unclip", "upsampler-1": "unclip", "clip": "model"}.items():
            original = graph.build / origin / f"{name}.safetensors"
            assert (bundle / f"{name}.safetensors").read_text() == original.read_text()
            assert (bundle / f"{name}.safetensors").stat().st_mtime_ns == original.stat().st_mtime_ns
        for prompts in ("seen", "unseen"):
            stem = f"unclip/{kind}-{prompts}"
            sampled, decoded, ranked = (
                next(line for line in named(commands, stage) if f"-o {stem}." in line)
                for stage in ("sample", "decode", "rerank")
            )
            assert f"--prompts {prompts}.txt" in sampled
            assert f"-m unclip/{kind}" in sampled
            assert f"decode {stem}.embeddings.safetensors -m unclip/{kind}" in decoded
            assert f"rerank {stem}.images.safetensors -m model --keep 1" in ranked
    assert all("-n 8 " in line for line in named(commands, "sample") if "unclip/" in line)
    table = next(line for line in commands if "--table DALL-E" in line)
    assert table.count("unclip/") == 4


def test_again_there_is_nothing_to_do(built):
    graph, _ = built
    assert graph.make("unclip") == []


def test_other_numbers_call_what_reads_them(tmp_path):
    """The stages themselves see whether their own section is another."""
    graph = Graph(tmp_path)
    graph.make("unclip", "PRIORS=diffusion")
    old = graph.build / "unclip" / "decoder.safetensors"

    for path in graph.build.rglob("*"):
        os.utime(path, ns=(10**9, 10**9))  # all of them older than the numbers
    os.utime(old, ns=(10**9, 10**9))
    numbers = tmp_path / "numbers.toml"
    numbers.write_text("")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    os.utime(recipe, ns=(10**8, 10**8))
    commands = graph.make(
        "unclip", "PRIORS=diffusion", f"UNCLIP_CONFIG={numbers}", f"CONFIG={recipe}", "-o", "scenes.py"
    )
    assert {line.split()[0] for line in commands if not line.startswith("score")} == {
        "train-decoder", "train-prior", "sample", "decode", "rerank", "show",
    }  # fmt: skip
    assert len(named(commands, "train-prior")) == 1


def test_fresh_reaches_every_training_stage(tmp_path):
    commands = Graph(tmp_path).make("unclip", "FRESH=--fresh")
    fresh = [line.split()[0] for line in commands if "--fresh" in line.split()]
    assert fresh == [line.split()[0] for line in commands if line.startswith("train-") and "tokenizer" not in line[:15]]
    assert set(fresh) == {"train-dvae", "train-clip", "train-prior", "train-decoder"}


def test_small_is_dalle_and_a_smaller_dalle_2(tmp_path):
    graph = Graph(tmp_path)
    commands = graph.make("small", "-j2")
    assert len(named(commands, "train-clip")) == 1
    assert (graph.build / "accuracy.txt").exists()
    assert (graph.build / "unclip-small" / "accuracy.txt").exists()
    assert not (graph.build / "unclip").exists()
    assert all("--set decoder.train.steps=" in line for line in named(commands, "train-decoder"))
    assert [line.split("-n ")[1][:2] for line in named(commands, "sample") if "unclip" in line] == ["4 ", "4 "]


def test_sweep_and_truth(built):
    """Each guidance of each system; DALL-E 2's embeddings are sampled once."""
    graph, _ = built
    commands = graph.make("sweep", "truth")
    guided = [line.split("--guidance ")[1].split()[0] for line in named(commands, "sample") if "sweep/" in line]
    assert len(guided) == len(set(guided)) >= 4
    both = [line for line in named(commands, "sample") if "both.embeddings" in line]
    assert len(both) == len(KINDS)
    decoded = [line for line in named(commands, "decode") if "sweep/" in line and "embeddings" in line]
    assert len(decoded) == len(KINDS) * len(guided)
    assert all(line.count("--decoder-guidance") == 1 for line in decoded)
    assert any(line.startswith("score.py unclip/truth.images.safetensors --captions") for line in commands)
    assert graph.make("sweep", "truth") == []


def test_truth_alone_has_all_that_decode_reads(tmp_path):
    graph = Graph(tmp_path)
    assert len(named(graph.make("truth"), "train-prior")) == 0
    held = {path.name for path in (graph.build / "unclip" / "diffusion").iterdir()}
    assert held == {"decoder.safetensors", "upsampler-1.safetensors", "tokenizer.json"}


# Numbers


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_numbers_are_of_models_that_exist(name):
    """Every key is known, the sizes fit together, and the images that come out are those that CLIP reads."""
    folder = FOLDER.parent / name
    table, recipe = (config.read(folder / file) for file in ("unclip.toml", "recipe.toml"))
    clip, _ = config.section(recipe, "clip", CLIPConfig, train=_anything(recipe["clip"]["train"]))
    known = {"n_text_vocab": 512, "n_text": 16, "n_embedding": clip.n_proj}
    for kind, cls in (("diffusion", DiffusionPriorConfig), ("autoregressive", AutoregressivePriorConfig)):
        found, body = chosen({"embedding_prior": {**table["embedding_prior"], "kind": kind}})
        sizes = {"n_component": 16, **body} if kind == "autoregressive" else body
        config.section({"x": sizes}, "x", cls, {**known, "kind": found}, train=EmbeddingPriorTrain)
    decoder, _ = config.section(table, "decoder", DecoderConfig, known, train=DecoderTrain)
    upsampler, _ = config.section(table, "upsampler_1", UpsamplerConfig, train=UpsamplerTrain)
    assert upsampler_order([upsampler], decoder.image_size) == [0]
    assert upsampler.image_size == clip.image_size


def _anything(values):
    """A dataclass of these fields."""
    from dataclasses import make_dataclass

    cls = make_dataclass("Anything", [(name, type(value), value) for name, value in values.items()])
    assert fields(cls)
    return cls


# Spread

RIGHT = "a small red circle left of a large blue square"


def shifted(cells, ground=0):
    """RIGHT with its circle so many cells lower than at the top."""
    image = np.empty((16, 16, 3), np.uint8)
    image[:] = scenes.BACKGROUNDS[ground]
    image[4 + cells : 9 + cells, 1:6][scenes.bitmap("circle", "small")] = scenes.COLORS["red"]
    image[4:11, 8:15][scenes.bitmap("square", "large")] = scenes.COLORS["blue"]
    return image.repeat(2, 0).repeat(2, 1)


def test_spread_is_the_mean_distance_of_objects_and_the_share_of_other_grounds():
    assert all(score.matches(shifted(k), RIGHT) for k in range(3))
    same = score.spread([shifted(1)] * 3, [RIGHT] * 3)
    assert same == {"pairs": 3, "places": 0, "grounds": 0}
    moved = score.spread([shifted(0), shifted(2)], [RIGHT] * 2)
    assert moved == pytest.approx({"pairs": 1, "places": 1.0, "grounds": 0})  # 2 cells of one object, 0 of the other
    grounds = score.spread([shifted(0), shifted(0, 1), shifted(0, 2), shifted(0)], [RIGHT] * 4)
    assert grounds["grounds"] == pytest.approx(5 / 6)


def test_spread_is_of_right_pictures_and_within_a_caption():
    other = "a large blue square"
    wrong = scenes.render(score.parse_caption(other), np.random.default_rng(0))
    found = score.spread([shifted(0), wrong, shifted(2), wrong], [RIGHT, RIGHT, RIGHT, other])
    assert found == pytest.approx({"pairs": 1, "places": 1.0, "grounds": 0})
    assert score.spread([wrong], [RIGHT])["pairs"] == 0


def test_truth_is_spread_as_the_generator_spreads_it():
    scene = score.parse_caption("a small red circle")
    images = [scenes.render(scene, np.random.default_rng(seed)) for seed in range(80)]
    found = score.spread(images, ["a small red circle"] * 80)
    corners = np.random.default_rng(0).integers(0, 12, (2, 200_000, 2))
    assert found["places"] == pytest.approx(np.linalg.norm(corners[0] - corners[1], axis=1).mean(), rel=0.1)
    assert found["grounds"] == pytest.approx(2 / 3, abs=0.05)


def test_pictures_without_captions_take_those_of_a_tar(tmp_path):
    artifacts = importlib.import_module("dalle_cli.artifacts")
    sampled = [scenes.sample(3, 1, i, False) for i in range(4)]
    scenes.write_tar(tmp_path / "truth.tar", [(image, text) for _, image, text in sampled])
    order = [2, 0, 3]
    images = np.stack([sampled[i][1] for i in order]).transpose(0, 3, 1, 2).copy()
    path = tmp_path / "images.safetensors"
    artifacts.write_artifact(path, "images", {"images": images, "ids": [f"{i:06d}" for i in order]}, {}, [])
    images, captions = score._read(path, tmp_path / "truth.tar")
    assert captions == [sampled[i][2] for i in order]
    assert score.score(images, captions)["accuracy"] == 1


def test_the_table_of_spread_ends_with_the_truth(tmp_path):
    artifacts = importlib.import_module("dalle_cli.artifacts")
    texts = [RIGHT] * 4
    path = tmp_path / "images.safetensors"
    images = np.stack([shifted(k % 2) for k in range(4)]).transpose(0, 3, 1, 2).copy()
    columns = {"images": images, "text": texts, "ids": [str(k) for k in range(4)]}
    artifacts.write_artifact(path, "images", columns, {}, [])
    rows = score.spread_table([f"some guidance={path}"]).splitlines()
    assert [row.split("  ")[0] for row in rows[1:]] == ["some guidance", "truth"]
    assert "100.0%" in rows[1]
    assert "0.33 cells" in rows[1]  # 4 of 6 pairs differ by a cell of one object of two
    assert len({len(row) for row in rows}) == 1


def test_the_emoji_run_it_too(tmp_path):
    """Each thing made once, the stages before those that read them, and 20 steps beside 100 of the same embeddings."""
    given = [f"OUT={tmp_path}", "DATA=small.tar", "READY=small.tar", "EXCLUDE=", f"PY={sys.executable}", "DALLE=dalle"]
    Path(tmp_path, "data").mkdir()
    Path(tmp_path, "data", "test.tar").touch()
    done = subprocess.run(
        ["make", "-n", "unclip", *given], cwd=FOLDER.parent / "emoji", capture_output=True, text=True, check=True
    )
    ran = [line.replace(f"{tmp_path}/", "") for line in done.stdout.replace("\\\n", "").splitlines()]
    outs = [line.split(" -o ")[1] for line in ran if " -o " in line]
    assert len(outs) == len(set(outs))
    order = ("model/clip", "unclip/decoder", "unclip/diffusion-prompts.images", "unclip/diffusion-prompts.best")
    assert [name for name in outs if name.startswith(order)] == [f"{name}.safetensors" for name in order]
    decoded = [
        line.split(" -o ")[0].split("--decoder-sampler ")[1].split() for line in ran if "--decoder-sampler" in line
    ]
    assert decoded == [
        ["dpm++", "--decoder-steps", "20"],
        ["ddim", "--decoder-steps", "20"],
        ["ddim", "--decoder-steps", "100"],
    ]
    explored = {"vary-fluent-1f622", "vary-noto-1f427", "interpolate", "diff", "reconstruct"}
    assert {name for name in outs if name.endswith(".png")} == {
        f"unclip/{name}.png" for name in {"grid-diffusion", "grid-autoregressive", *explored}
    }
