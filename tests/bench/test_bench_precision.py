"""The benchmark of what fewer bits cost: its figures are those of `evaluate`, and it sees differences."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_ok

from bench import precision

N = 6


@pytest.fixture(scope="module")
def told(chain, tmp_path_factory):
    """A line of each arithmetic, by name, and the sentence about the dVAE."""
    root = tmp_path_factory.mktemp("precision")
    shutil.copytree(chain.model, root / "model", ignore=shutil.ignore_patterns("*.run"))
    shutil.copy(chain.captions, root)
    run_ok("encode-images", chain.data, "-m", chain.dvae, "-o", root / "codes.safetensors")
    lines = precision.report(root, N).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines[2:5]]
    return root, {name: (float(nats), float(other.rstrip("%"))) for name, nats, other in cells}, lines[-1]


def test_float32_is_what_evaluate_says(told):
    root, figures, _ = told
    parts = (root / "model/prior.safetensors", root / "captions.safetensors", root / "codes.safetensors")
    said = json.loads(Path(run_ok("evaluate", *parts, "-o", root / "scores.json")).read_text())
    assert list(figures) == list(precision.FORMS)
    assert figures["float32"][1] == 0
    assert figures["float32"][0] == pytest.approx(said["scores"]["image_nats"], rel=0.05)


def test_fewer_bits_move_the_likelihood_a_little(told):
    _, figures, sentence = told
    exact = figures["float32"][0]
    assert figures["int8, bfloat16"][0] != exact
    for name in ("bfloat16", "int8, bfloat16"):
        assert figures[name][0] == pytest.approx(exact, rel=0.02)
    assert "of a picture's codes stay the same" in sentence
