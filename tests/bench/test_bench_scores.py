"""The benchmark of scores: both sides do the same work, what a pass holds, and what harm does to scores."""

import sys
from dataclasses import asdict
from pathlib import Path

import fidelity
import numpy as np
import pytest
import torch

from bench import cli, doses, scores
from bench.doses import Cell, verdict
from dalle_cli.artifacts.weights import save_tensors
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.data.datasets import open_dataset
from dalle_cli.evaluation.image_sets import open_image_set
from dalle_cli.models.clip import CLIP, CLIPConfig

SMALL = Path(__file__).parents[2] / "recipes" / "emoji" / "small.tar"


@pytest.fixture(scope="module")
def peer():
    fidelity.importable()
    pytest.importorskip("torchmetrics")
    from bench.peers import torchmetrics

    return torchmetrics


def test_ours_and_torchmetrics_take_in_the_same_features(peer):
    sizes = {"pictures": 5, "batch": 2, "size": 16, "width": 64}
    moments, metric = scores.ours(**sizes).update(), peer.pictures(**sizes).update()
    assert moments.count == metric.real_features_num_samples == 5
    mean = metric.real_features_sum.numpy() / 5
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-5)
    covariance = (metric.real_features_cov_sum.numpy() - 5 * np.outer(mean, mean)) / 4
    np.testing.assert_allclose(moments.covariance, covariance, atol=1e-5 * np.diag(covariance).max())
    assert np.diag(moments.covariance).min() > 0  # pictures differ, and so do their features


@pytest.mark.parametrize("block", [7, 64])
def test_ours_and_torchmetrics_find_the_same_distance(peer, block):
    found = scores.statistics(300, 16).update()
    assert found == pytest.approx(float(peer.statistics(300, 16, block).update()), rel=1e-4)
    assert found > 0.1


def test_the_pass_whose_memory_is_measured_makes_the_scores_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    subject = scores.memory(70)
    assert (subject.once, subject.warmup, subject.units) == (True, 0, 140)
    (told,) = subject.update()
    assert {"frechet", "kernel", "precision", "recall", "retrieval"} <= told.keys()
    assert told["frechet"]["value"] > 0
    assert not [*tmp_path.glob("*/clip.safetensors"), *tmp_path.glob("*/drawn"), *tmp_path.glob("*/*.features")]


def test_pictures_are_other_ones_by_number_and_seed():
    made = scores.Made(3, 16, seed=1)
    assert made.pixels(0).shape == (16, 16, 3)
    assert len({made.pixels(i).tobytes() for i in range(3)} | {scores.Made(1, 16, seed=2).pixels(0).tobytes()}) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_no_picture_that_was_read_stays_mapped(tmp_path):
    made = scores.Made(scores.BLOCK + 3, 8, seed=0)
    side = open_image_set("generated", str(scores.store(made, tmp_path / "drawn")))
    for i in (0, 5, scores.BLOCK - 1, scores.BLOCK, scores.BLOCK + 2):
        np.testing.assert_array_equal(np.asarray(side.images.read(i)), made.pixels(i))
    mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    sizes = [int(stop, 16) - int(start, 16) for start, stop in (span.split("-") for span in mapped)]
    assert 0 < sum(sizes) < made.pixels(0).nbytes * len(made) / 2  # ids


# Doses


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("frechet", (1.0, 1.3, 2.0, 3.0), "from 2"),
        ("frechet", (1.0, 2.0, 3.0, 4.0), "from 1"),
        ("frechet", (1.0, 2.0, 4.0, 3.0), "from 1, not with every dose"),
        ("frechet", (1.0, 1.1, 0.9, 1.3), "blind"),
        ("frechet", (1.0, 2.0, 1.1, 1.0), "unsteady"),
        ("frechet", (1.0, 1.1, 0.1, 3.0), "misled"),
        ("recall", (1.0, 0.9, 0.5, 0.2), "from 2"),
        ("recall", (1.0, 1.1, 1.2, 2.0), "misled"),
    ],
)
def test_what_is_said_of_a_score(name, values, said):
    harmless, *cells = (Cell(value, value - 0.2, value + 0.2) for value in values)
    assert verdict(name, harmless, (1, 2, 4), cells) == said


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A CLIP of random weights with its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    data = open_dataset(str(SMALL), need_captions=True)
    bpe = tokenizers.train([texts[0] for texts in data.captions], 300)
    (folder / "tokenizer.json").write_bytes(bpe.data)
    torch.manual_seed(0)
    sizes = {**scores.CLIP_SIZES, "n_proj": 16, "image_size": 16, "patch_size": 4, "vision_width": 32, "n_text": 16}
    model = CLIP(CLIPConfig(**{**sizes, "n_text_vocab": bpe.vocab_size}))
    config = {"model": asdict(model.config), "train": {}, "tokenizer": bpe.digest}
    return save_tensors(folder / "clip.safetensors", "weights.clip", model.state_dict(), config, [])


def test_harm_is_of_the_dose_asked_for(features, tmp_path):
    trial = doses.Trial(str(SMALL), str(features), tmp_path, limit=80)
    row = int(trial.half.rows[0])
    pixels = {}
    for kind, dose in (("none", 0.0), ("blur", 2.0), ("noise", 0.1)):
        pixels[kind] = np.asarray(trial.harmed(kind, dose).images.read(row)).astype(float)
    np.testing.assert_array_equal(pixels["none"], np.asarray(trial.whole.images.read(row)))
    gray = (pixels["none"] > 76) & (pixels["none"] < 179)  # where nothing is cut off
    assert np.std((pixels["noise"] - pixels["none"])[gray]) == pytest.approx(25.5, rel=0.15)
    assert np.abs(np.diff(pixels["blur"], axis=0)).max() < np.abs(np.diff(pixels["none"], axis=0)).max() / 2
    texts = trial.texts()
    changed = [{own for own, text in trial.exchanged(share).items() if text != texts[own]} for share in (0, 0.25, 1)]
    assert [len(names) for names in changed] == [0, 10, 40]
    assert changed[1] < changed[2]
    assert sorted(trial.exchanged(1).values()) == sorted(texts.values())


def test_the_halves_share_no_picture_and_originals_are_those_that_are_harmed(features, tmp_path):
    trial = doses.Trial(str(SMALL), str(features), tmp_path, limit=80)
    rows = {name: set(side.rows.tolist()) for name, side in trial.references.items()}
    assert rows[doses.OWN] == set(trial.half.rows.tolist())
    assert not rows[doses.OWN] & rows[doses.FAR]


def test_the_table_says_what_each_score_sees(features, capsys, monkeypatch):
    monkeypatch.setattr(doses, "DOSES", {"blur": (0.1, 8), doses.CAPTIONS: (0.5, 1)})
    assert cli.main(["--doses", str(SMALL), "--features", str(features), "--limit", "200"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("100 pictures against 100 others, 64 pixels, features clip-")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    names, rows = cells[0], {(row[0], row[1]): dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    distance = next(name for name in names if name.startswith("Frechet distance"))
    assert [row[1] for row in cells[2:]] == ["", "0.1", "8", "worse", "0.5", "1", "worse"]
    captions, blur = rows[f"**{doses.CAPTIONS}**", "worse"], rows["**blur**", "worse"]
    assert blur["kernel distance"] == blur["recall"] == blur["retrieval R@1"] == "**from 8**"
    assert captions[distance] == captions["kernel distance"] == captions["recall"] == "**blind**"
    assert captions["retrieval R@1"] == "**from 0.5**"
    assert rows["none", ""]["retrieval R@1"] == "1.000 ± 0.000"


def test_doses_need_features(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["--doses", "x.tar"])
    assert cli.main(["--doses", "nothing.tar", "--features", "none"]) == 1
    assert "bench: error: expected" in capsys.readouterr().err
