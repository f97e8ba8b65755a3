"""What several test files share: the command line in this process, a tiny data set, and a tiny chain made once."""

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many tiny products, which threads only slow down

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.register_assert_rewrite("artifact_files", "comparisons", "hub_worker", "process_pair")  # they assert, too


def declare_torchvision() -> None:
    """Let the oracles import a torchvision that was built for CUDA, beside a torch without it.

    Its operators cannot be loaded then, and its import fails at two of them unless they are declared. Tests call none.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_torchvision()

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLORS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}

RECIPE = """
[tokenizer]
vocab_size = 300
length = 24

[dvae]
image_size = 16
n_groups = 3
n_hid = 16
n_blk_per_group = 1
n_init = 16
quantizer = "fsq"
fsq_levels = [5, 4]
n_vocab = 20
block = "residual"
likelihood = "l1"

[dvae.train]
steps = 12
batch_size = 8
lr = 3e-3
warmup = 2
augment = "center"
flip = false
ema = 0.5
log_every = 3
validate_every = 6
checkpoint_every = 4
validation = 0.2

[clip]
image_size = 16
patch_size = 8
n_proj = 16
vision_width = 16
vision_layers = 1
vision_heads = 2
n_text = 24
text_width = 16
text_layers = 1
text_heads = 2

[clip.train]
steps = 12
batch_size = 8
lr = 3e-3
warmup = 0
augment = "center"
ema = 0.5
log_every = 3
validate_every = 6
checkpoint_every = 4
validation = 0.2

[prior]
n_layer = 2
n_head = 2
n_embd = 16
conv_kernel = 3

[prior.train]
steps = 12
batch_size = 8
lr = 3e-3
warmup = 0
ema = 0.5
ema_every = 1
log_every = 3
validate_every = 6
checkpoint_every = 4
bpe_dropout = 0.1
caption_dropout = 0.1
validation = 0.2
"""


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """No model comes with the package: a test that forgets -m must not draw by one."""
    monkeypatch.setattr("dalle_cli.hub.bundles.SHIPPED", Path(__file__).parent / "no bundles here")


class Result(NamedTuple):
    """How a command ended and what it said."""

    status: int
    stdout: str
    stderr: str


def run_cli(*args, stdin=None, env=None):
    """`dalle ARGS` in this process; `stdin` is what the pipe holds. A bug's exception comes through."""
    from dalle_cli.cli import main

    out, err = io.StringIO(), io.StringIO()
    pipe = io.StringIO(stdin or "")
    with (
        mock.patch.object(sys, "argv", ["dalle", *map(str, args)]),
        mock.patch.object(sys, "stdin", pipe),
        mock.patch.dict(os.environ, {"DALLE_MODEL": "", **(env or {})}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code
    return Result(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def run_ok(*args, **options):
    """`run_cli`, which must succeed; the path on stdout, or what else stands there."""
    result = run_cli(*args, **options)
    assert result.status == 0, result.stderr
    return result.stdout.removesuffix("\n")


def run_bad(*args, **options):
    """`run_cli`, which must end with status 1 and one line of error, nothing on stdout; the line."""
    result = run_cli(*args, **options)
    assert result.status == 1, result
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("dalle: error: "), result.stderr
    assert "expected " in line
    assert ", found " in line
    assert [text for text in result.stderr.splitlines() if "error" in text] == [line]
    assert "Traceback" not in result.stderr
    return line


def start(*args, **options):
    """`python -m dalle_cli ARGS` as a process of its own; Ctrl-C reaches it from tests in the background, too."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", "dalle_cli", *map(str, args)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits that it is ignored
    try:
        return subprocess.Popen(command, env=env, **{**streams, **options})
    finally:
        signal.signal(signal.SIGINT, before)


def write_pictures(folder, size=16):
    """24 plain pictures of a colored shape on a background, each with a .txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (shape, color, back) in enumerate(itertools.product(SHAPES, COLORS, BACKGROUNDS)):
        image = Image.new("RGB", (size, size), BACKGROUNDS[back])
        draw = ImageDraw.Draw(image)
        box = (2, 2, size - 3, size - 3)
        if shape == "circle":
            draw.ellipse(box, fill=COLORS[color])
        else:
            draw.rectangle(box if shape == "square" else (0, 5, size, 9), fill=COLORS[color])
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {color} {shape} on {back}\n")
    return folder


class Chain:
    """The paths of a whole chain under one folder; `stage` runs a stage as the recipe's graph would."""

    def __init__(self, root: Path, data: Path, recipe: Path):
        self.root, self.data, self.recipe = root, data, recipe
        self.model = root / "model"
        self.tokenizer = self.model / "tokenizer.json"
        self.dvae, self.clip, self.prior = (self.model / f"{name}.safetensors" for name in ("dvae", "clip", "prior"))
        self.captions, self.codes = root / "captions.safetensors", root / "codes"
        self.drawn, self.images, self.best = (root / f"red.{k}.safetensors" for k in ("codes", "images", "best"))

    def stage(self, name, *more):
        """Run one stage, with more options behind it."""
        config = ("--config", self.recipe)
        arguments = {
            "train-tokenizer": (self.data, *config, "-o", self.tokenizer),
            "tokenize": (self.data, "-t", self.tokenizer, *config, "-o", self.captions),
            "train-dvae": (self.data, *config, "--dtype", "float32", "-o", self.dvae),
            "encode-images": (self.data, "-m", self.dvae, "--shard-size", 10, *config, "-o", self.codes),
            "train-clip": (self.data, "-t", self.tokenizer, *config, "--dtype", "float32", "-o", self.clip),
            "train-prior": (
                self.captions,
                self.codes,
                "-t",
                self.tokenizer,
                *config,
                "--dtype",
                "float32",
                "-o",
                self.prior,
            ),
            "sample": ("a red circle on white", "-n", 4, "-m", self.model, "-o", self.drawn),
            "decode": (self.drawn, "-m", self.model, "-o", self.images),
            "rerank": (self.images, "-m", self.model, "-o", self.best),
        }
        return run_ok(name, *arguments[name], *more)

    def make(self):
        """Every stage in order."""
        for name in ("train-tokenizer", "tokenize", "train-dvae", "encode-images", "train-clip", "train-prior"):
            self.stage(name)
        for name in ("sample", "decode", "rerank"):
            self.stage(name)
        return self

    def artifacts(self):
        """Every file that the chain wrote, but the folders of runs."""
        files = [p for p in sorted(self.root.rglob("*")) if p.is_file()]
        return [p for p in files if not any(part.endswith(".run") for part in p.parts)]


@pytest.fixture(scope="module")
def browser():
    """The machine's own chromium, without a window, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 24 pictures with captions; read only."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """A recipe of tiny models; read only."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def chain(tmp_path_factory, data, recipe):
    """Every stage run once on the tiny data set; read only."""
    import torch

    torch.set_num_threads(1)
    return Chain(tmp_path_factory.mktemp("chain"), data, recipe).make()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes of one group, for all tests of what several make together."""
    from process_pair import Pair

    pair = Pair(tmp_path_factory.mktemp("pair") / "store")
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def _seeded():
    """A test that draws from a global generator draws the same each time."""
    np.random.seed(0)
