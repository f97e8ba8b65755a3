"""Kernel distance, precision and recall, Inception score, matches and blur against slow twins; bootstrap intervals."""

import importlib

import fidelity
import numpy as np
import pytest
import torch

from dalle_cli.artifacts import ShardWriter, open_artifact
from dalle_cli.evaluation import bootstrap, classes, kernel, manifold
from dalle_cli.evaluation import retrieval as matches
from dalle_cli.evaluation.blur import gaussian_blur
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.store import FeatureRows
from reference import evaluation as reference


def rng(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def stored(tmp_path):
    """Rows as `FeatureRows` reads them, from shards of 16."""
    made = []

    def write(rows, kept=None):
        writer = ShardWriter(tmp_path / str(len(made)), "embeddings", len(rows), 16, {}, [])
        for i in writer.missing():
            low, high = writer.bounds(i)
            part = np.asarray(rows[low:high], np.float32)
            writer.write(i, {"embeddings": part, "ids": [str(k) for k in range(low, high)]})
        made.append(writer)
        return FeatureRows(open_artifact(writer.out), kept=kept)

    return write


def test_stored_rows_are_those_kept_whatever_the_shards(stored):
    rows = rng(0).standard_normal((50, 3)).astype(np.float32)
    kept = np.array([0, 3, 15, 16, 40, 49])
    found = stored(rows, kept)
    assert [len(block) for block in found.blocks()] == [3, 1, 1, 1]
    np.testing.assert_array_equal(np.concatenate(list(found.blocks())), rows[kept])
    np.testing.assert_array_equal(found.take([5, 0]), rows[[49, 0]])
    assert len(found.sample(4, 0)) == 4
    assert np.isin(found.sample(4, 0), rows[kept]).all()
    assert not np.array_equal(found.sample(3, 0), found.sample(3, 1))


def test_squared_mmd_matches_the_definition():
    x, y = rng(1).standard_normal((7, 4)), rng(2).standard_normal((5, 4)) + 1
    assert kernel.squared_mmd(x, y) == pytest.approx(reference.squared_mmd(x, y), rel=1e-12)


def test_squared_mmd_agrees_with_torchmetrics():
    fidelity.importable()
    pytest.importorskip("torchmetrics")
    kid = importlib.import_module("torchmetrics.image.kid")
    x, y = rng(1).standard_normal((20, 6)), rng(2).standard_normal((20, 6)) + 0.5
    assert kernel.squared_mmd(x, y) == pytest.approx(float(kid.poly_mmd(*map(torch.from_numpy, (x, y)))), rel=1e-4)


def test_kernel_distance_is_near_the_whole_sides_and_its_error_is_what_it_varies_by(stored):
    def sides(seed):
        return rng(seed).standard_normal((60, 4)), rng(seed + 1000).standard_normal((60, 4)) + 0.5

    x, y = sides(0)
    whole = kernel.squared_mmd(x, y)
    found = kernel.kernel_distance(stored(x), stored(y), seed=0)
    assert found["subset"] == 30
    assert found["low"] < whole < found["high"]
    assert kernel.kernel_distance(stored(x), stored(y), seed=0) == found
    assert kernel.kernel_distance(stored(x), stored(y), seed=1)["value"] != found["value"]
    spread = np.std([kernel.squared_mmd(*sides(seed)) for seed in range(200)])
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize("block", [1, 7, 512])
def test_precision_and_recall_match_the_definition(monkeypatch, block):
    monkeypatch.setattr(manifold, "BLOCK", block)
    a, b = rng(3).standard_normal((23, 3)), 1.5 * rng(4).standard_normal((19, 3)) + 1.2
    precision, recall = manifold.precision_recall(a, b, 3)
    assert precision.tolist() == reference.covered(a, b, 3)
    assert recall.tolist() == reference.covered(b, a, 3)
    assert 0 < precision.sum() < len(a)
    assert 0 < recall.sum() < len(b)


def test_no_more_distances_are_held_than_said(monkeypatch):
    held, real = [], manifold.squared_distances
    monkeypatch.setattr(manifold, "DISTANCES", 50)
    monkeypatch.setattr(manifold, "squared_distances", lambda a, b: held.append(len(a) * len(b)) or real(a, b))
    a, b = rng(3).standard_normal((23, 3)), 1.5 * rng(4).standard_normal((19, 3)) + 1.2
    precision, recall = manifold.precision_recall(a, b, 3)
    assert (precision.tolist(), recall.tolist()) == (reference.covered(a, b, 3), reference.covered(b, a, 3))
    assert 1 < max(held) <= 50


def test_equal_rows_are_at_no_distance_and_others_at_theirs():
    """Far from the origin, where the rounding of products would leave a copy outside of a ball of no radius."""
    rows = rng(5).standard_normal((9, 333)) + 100
    found = manifold.squared_distances(rows, rows)
    assert np.diag(found).tolist() == [0] * 9
    np.testing.assert_allclose(found, ((rows[:, None] - rows) ** 2).sum(axis=2), rtol=1e-8)
    precision, recall = manifold.precision_recall(np.repeat(rows[:4], 5, axis=0), np.repeat(rows, 5, axis=0), 3)
    assert precision.all()
    assert recall.tolist() == [True] * 20 + [False] * 25


def test_inception_score_matches_the_definition():
    logits = 3 * rng(6).standard_normal((40, 5))
    parts = [reference.inception_score(logits[k::10].tolist()) for k in range(10)]
    for size in (1, 9, 40):
        found = classes.inception_score((logits[i : i + size] for i in range(0, 40, size)), 0, 0)
        assert found["value"] == pytest.approx(np.mean(parts), rel=1e-12)
        assert found["error"] == pytest.approx(np.std(parts, ddof=1), rel=1e-9)


def test_inception_score_knows_its_ends():
    alike = np.zeros((50, 7))
    assert classes.inception_score([alike], 4, 0)["value"] == pytest.approx(1)
    sure = 1e3 * np.eye(5)[np.arange(500) // 10 % 5]
    assert classes.inception_score([sure], 4, 0)["value"] == pytest.approx(5)


def test_inception_score_interval_is_what_it_varies_by():
    def logits(seed):
        return rng(seed).standard_normal((400, 3))

    found = classes.inception_score([logits(0)], 300, 0)
    whole = [classes.inception_score([logits(seed)], 0, 0)["value"] for seed in range(100)]
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(np.std(whole), rel=0.4)


def test_ranks_match_the_definition(stored):
    pictures, real = rng(7).standard_normal((6, 4)), rng(8).standard_normal((20, 4))
    own = [[0], [3, 4], [19], [5], [5], [0, 1, 2]]
    near = [row.tolist() for row in real.astype(np.float32).astype(np.float64)]
    found = matches.ranks(stored(pictures), stored(real), own, 17, seed=1)
    for row, mine in enumerate(own):
        others = matches._others(20, mine, 16, 1, row)
        assert len({*others.tolist(), *mine}) == 16 + len(mine)
        expected = reference.rank(
            pictures[row].astype(np.float32).astype(np.float64), [near[i] for i in mine], [near[i] for i in others]
        )
        assert found[row] == expected
    assert len(set(found.tolist())) > 2


def test_others_are_all_that_are_not_ones_own_and_each_as_likely():
    assert sorted(matches._others(6, [4, 1], 4, 0, 0).tolist()) == [0, 2, 3, 5]
    counts = np.bincount(np.concatenate([matches._others(6, [4, 1], 1, 0, row) for row in range(4000)]), minlength=6)
    assert counts[[1, 4]].tolist() == [0, 0]
    assert counts[[0, 2, 3, 5]].min() > 850


def test_blind_features_find_nothing(stored):
    alike = np.ones((9, 3))
    assert matches.ranks(stored(alike), stored(alike), [[i] for i in range(9)], 5, 0).tolist() == [4] * 9


def test_shuffled_captions_are_never_ones_own():
    own = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    for seed in range(30):
        other = matches.shuffled(own, seed)
        assert (other != own).all()
        assert sorted(other.tolist()) == sorted(own.tolist())
    assert matches.shuffled(np.array([0, 0, 0, 1]), 0) is None


def test_cosines_are_those_of_each_with_its_own(stored):
    pictures, captions = rng(9).standard_normal((5, 3)), rng(10).standard_normal((2, 3))
    own = np.array([1, 0, 0, 1, 1])
    expected = [
        np.dot(p, captions[k]) / np.linalg.norm(p) / np.linalg.norm(captions[k])
        for p, k in zip(pictures, own, strict=True)
    ]
    np.testing.assert_allclose(matches.cosines(stored(pictures), stored(captions), own), expected, rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_that_of_torchmetrics(stored, sign):
    """torchmetrics' own CLIPScore on a model that looks features up; a mean below 0 is 0."""
    fidelity.importable()
    pytest.importorskip("torchmetrics")
    theirs = importlib.import_module("torchmetrics.functional.multimodal.clip_score").clip_score
    images, captions = rng(9).standard_normal((6, 3)), rng(10).standard_normal((6, 3))
    captions += 2 * sign * images

    class Model:
        config = None
        to = eval = lambda self, *_: self
        get_image_features = staticmethod(lambda pixels: torch.from_numpy(images)[pixels[:, 0, 0, 0].long()])
        get_text_features = staticmethod(lambda numbers, _: torch.from_numpy(captions)[numbers])

    def processor(images=None, text=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        return {"input_ids": torch.tensor([int(own) for own in text]), "attention_mask": torch.zeros(1, 1)}

    pixels = [torch.full((3, 1, 1), float(i)) for i in range(6)]
    expected = theirs(pixels, [str(i) for i in range(6)], lambda: (Model(), processor)).item()
    found = matches.clip_score(matches.cosines(stored(images), stored(captions), np.arange(6)).mean())
    assert found == pytest.approx(expected, abs=1e-4)
    assert (found > 0) == (sign > 0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 8.0])
def test_blur_matches_the_definition_and_scipy(sigma):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    found = gaussian_blur(images, sigma)
    rows = torch.tensor([reference.blurred(row.tolist(), sigma) for row in images[1, 2]])
    columns = torch.tensor([reference.blurred(row.tolist(), sigma) for row in rows.T]).T
    torch.testing.assert_close(found[1, 2], columns.to(found), rtol=0, atol=1e-6)
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_no_blur_is_the_very_picture():
    images = torch.rand(1, 3, 4, 4)
    assert gaussian_blur(images, 0) is images


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = rng(11).standard_normal(400) + 3
    found = bootstrap.of_mean(values, 500, 0, 1)
    assert found["value"] == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.3 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.3 * half)
    assert bootstrap.of_mean(values, 500, 0, 1) == found
    assert bootstrap.of_mean(values, 500, 1, 1) != found
    assert set(bootstrap.of_mean(values, 0, 0, 1)) == {"value"}


@pytest.mark.parametrize("most", [5000, 60])
def test_the_interval_of_a_frechet_distance_is_what_it_varies_by(stored, monkeypatch, most):
    """Also from a part of the rows."""
    monkeypatch.setattr(bootstrap, "FRECHET_ROWS", most)

    def sides(seed):
        return rng(seed).standard_normal((120, 3)), 1.3 * rng(seed + 1000).standard_normal((120, 3)) + 0.6

    def distance(x, y):
        return between(Moments.of([x], 3), Moments.of([y], 3))

    x, y = sides(0)
    found = bootstrap.of_frechet(distance(x, y), stored(x), stored(y), 200, 0)
    spread = np.std([distance(*sides(seed)) for seed in range(200)])
    assert found["low"] < found["value"] < found["high"]
    assert (found["high"] - found["low"]) / (2 * 1.96) == pytest.approx(spread, rel=0.4)
