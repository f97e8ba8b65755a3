"""The Python API: it gives what the commands give, raises DalleError, prints nothing, and its page's examples run."""

import logging
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from artifact_files import array
from conftest import run_ok
from PIL import Image
from test_generate_embeddings import plant

import dalle_cli as dalle

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle on white"


def test_import_is_light_and_names_are_lazy():
    code = "import sys, dalle_cli; assert 'torch' not in sys.modules; dalle_cli.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"load", "Pipeline", "open_artifact", "DalleError"} <= set(dir(dalle))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dalle.nothing


def test_generate_equals_the_command(chain, tmp_path):
    run_ok("generate", PROMPT, "-n", 5, "--keep", 2, "--seed", 3, "--temperature", 0.9, "-m", chain.model,
           "-o", tmp_path / "a.png", "--images", tmp_path / "a.safetensors")  # fmt: skip
    images = dalle.load(chain.model).generate(PROMPT, n=5, keep=2, seed=3, temperature=0.9)
    assert [np.asarray(image).transpose(2, 0, 1).tolist() for image in images] == array(
        tmp_path / "a.safetensors", "images"
    ).tolist()
    np.testing.assert_allclose([i.score for i in images], array(tmp_path / "a.safetensors", "score"))
    assert images[0].info["prompt"] == PROMPT


def test_steps_equal_the_commands(chain, tmp_path):
    model = dalle.load(str(chain.model))
    codes = model.sample(PROMPT, n=3, seed=2)
    run_ok("sample", PROMPT, "-n", 3, "--seed", 2, "-m", chain.model, "-o", tmp_path / "c.safetensors")
    run_ok("decode", tmp_path / "c.safetensors", "-m", chain.model, "-o", tmp_path / "i.safetensors")
    run_ok("rerank", tmp_path / "i.safetensors", "-m", chain.model, "-o", tmp_path / "b.safetensors")
    assert (codes == array(tmp_path / "c.safetensors", "codes")).all()
    pixels = model.decode(codes)
    assert (pixels == array(tmp_path / "i.safetensors", "images")).all()
    scores = model.score(pixels, [PROMPT] * 3)
    np.testing.assert_allclose(sorted(scores, reverse=True), array(tmp_path / "b.safetensors", "score"), rtol=1e-6)
    assert (model.sample(PROMPT, n=3, seed=2) == codes).all()  # a pipeline can be used again


def test_encode_equals_the_command(chain, tmp_path):
    run_ok("encode-images", chain.data, "-m", chain.dvae, "-o", tmp_path / "c.safetensors")
    image = Image.open(chain.data / "00.png")
    assert (dalle.load(chain.model).encode([image])[0] == array(tmp_path / "c.safetensors", "codes")[0]).all()


def test_errors_are_raised_and_nothing_is_printed(chain, capfd):
    model = dalle.load(chain.model)
    for settings, message in (
        ({"unheard_of": 1}, "found 'unheard_of'"),
        ({"decoder_steps": 3}, "no --decoder-steps for a prior over codes"),
        ({"n": 2, "keep": 3}, "at least 3 images"),
        ({"temperature": float("nan")}, "a finite --temperature"),
        ({"mask": "m.png"}, "--image beside --mask"),
    ):
        with pytest.raises(dalle.DalleError, match=message):
            model.generate(PROMPT, **settings)
    with pytest.raises(dalle.DalleError, match="no such file"):
        dalle.load("nowhere")
    with pytest.raises(dalle.DalleError, match="--latents among"):
        dalle.load(chain.model, latents="pixels")
    model.generate(PROMPT, n=1)
    assert capfd.readouterr() == ("", "")


def test_warnings_are_logged(chain, caplog, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dalle_cli"), "propagate", True)
    dalle.load(chain.model).sample("a red circle " * 40, n=1)
    assert "which were cut: 1" in caplog.text
    assert capfd.readouterr().out == ""


def examples():
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)


def test_the_pages_examples_run(chain, tmp_path, monkeypatch):
    """In one session, as they stand; `model/` is a tiny bundle of DALL-E 2."""
    monkeypatch.setattr("dalle_cli.hub.bundles.SHIPPED", ROOT / "dalle_cli/bundles")
    monkeypatch.chdir(tmp_path)
    plant(chain, tmp_path / "model", "diffusion")
    names = {}
    for block in examples():
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "circle.best.safetensors").exists()
    assert names["codes"].shape == (2, 16, 16)
    assert names["x"].shape == (2, 3, 8, 8)
    assert names["varied"].labels == ["original", "variation 1", "variation 2"]


def test_every_class_and_its_methods_are_on_the_page():
    from dalle_cli import pipelines

    page = (ROOT / "docs/python.md").read_text()
    for name in pipelines.__all__:
        assert re.search(rf"`{name}\b", page), name
        found = getattr(pipelines, name)
        members = [m for base in getattr(found, "__mro__", ()) for m, of in vars(base).items() if is_method(of)]
        for member in members:
            assert member.startswith("_") or re.search(rf"\b{member}\b", page), f"{name}.{member}"


def is_method(member):
    return callable(member) or isinstance(member, property | cached_property | classmethod)
