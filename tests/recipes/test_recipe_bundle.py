"""The step that puts weights into one folder, on the tiny chain; and the folder that comes with the package."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run_ok
from PIL import Image

from dalle_cli.artifacts import open_artifact
from dalle_cli.hub import bundles, card

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = bundles.SHIPPED
EMOJI = str(RECIPES / "emoji")
sys.path.insert(0, str(RECIPES))
bundle = importlib.import_module("bundle")


@pytest.fixture
def model(chain, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    for name in bundle.PARTS:
        shutil.copy(chain.model / name, out / name)
    return out


def test_a_bundle_draws_by_itself_and_says_what_it_is(model, tmp_path):
    out = tmp_path / "bundle"
    (model / "prior.run").mkdir()
    assert bundle.main([str(model), EMOJI, str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {*bundle.PARTS, "NOTICE", "README.md"}
    run_ok("generate", "a red circle", "-n", 2, "--keep", 1, "-m", out, "-o", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 8
    text = card.read(out)
    assert card.license_of(text) == "mit"
    for owner in ("Noto", "Twemoji", "Fluent", "CC-BY 4.0"):
        assert owner in text
    assert bundles.weights(str(out), "weights.dvae").digest[:12] in text


def test_what_does_not_fit_is_not_shipped(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bundle"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert bundle.main([str(model), EMOJI, str(out)]) == 1
    assert "tokenizer" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert bundle.main([str(model), EMOJI, str(out)]) == 1
    assert "found no tokenizer.json; train it first" in capsys.readouterr().err
    monkeypatch.setattr(bundle, "MOST", 100)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert bundle.main([str(model), EMOJI, str(out)]) == 1
    assert "bfloat16" in capsys.readouterr().err
    assert not out.exists()


# What comes with the package


def test_the_shipped_shapes_are_as_they_are_told(tmp_path, monkeypatch):
    sys.path.insert(0, str(RECIPES / "shapes"))
    score = importlib.import_module("score")
    monkeypatch.setattr(bundles, "SHIPPED", SHIPPED)
    prompt = "a small red circle above a large blue square"
    run_ok("generate", prompt, "-m", "shapes", "-o", tmp_path / "x.png", "--images", tmp_path / "x.safetensors")
    found = open_artifact(tmp_path / "x.safetensors", "images").array("images")
    right = [score.matches(image.transpose(1, 2, 0), prompt) for image in found]
    assert sum(right) >= 3  # of the best four of eight
    assert not any(score.matches(p.transpose(1, 2, 0), "a large green star") for p in found)


def test_the_model_without_m_draws_emoji_as_they_are_told(tmp_path, monkeypatch):
    """The middle of what is sampled has the color that was asked for, in either language, and white around it."""
    monkeypatch.setattr(bundles, "SHIPPED", SHIPPED)
    prompts = ("a blue heart", "a twemoji style emoji of a red apple", "트위모지 스타일의 빨간 사과 이모지")
    out = tmp_path / "x.safetensors"
    run_ok("generate", *prompts, "-n", 6, "--keep", 3, "-o", tmp_path / "x.png", "--images", out)
    found = open_artifact(out, "images").array("images").astype(float)
    middle = found[:, :, 24:40, 24:40].mean(axis=(2, 3)).reshape(3, 3, 3)  # of the best three of each prompt
    red, green, blue = middle.mean(axis=1).T
    assert blue[0] > red[0] + 40
    assert (red[1:] > blue[1:] + 60).all()
    assert (red[1:] > green[1:] + 60).all()
    corner = found[:, :, :3, :3].mean(axis=(1, 2, 3))
    assert (corner > 200).mean() > 0.6


def test_what_is_shipped_is_small_and_says_what_it_is():
    folders = sorted(path for path in SHIPPED.iterdir() if path.is_dir())
    assert [path.name for path in folders if path.name in bundles.DEFAULTS]
    for folder in folders:
        files = sorted(folder.iterdir())
        assert sum(path.stat().st_size for path in files) < bundle.MOST
        weights = bundles.whole([path for path in files if path.name in bundle.PARTS])
        for artifact in weights:
            assert artifact.digest[:12] in card.read(folder)
        assert card.license_of(card.read(folder)) == "mit"
