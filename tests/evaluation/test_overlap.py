"""`dalle overlap`: planted copies are found, and what is no copy is left alone."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from conftest import run_bad, run_cli, run_ok
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.artifacts import history, write_artifact
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.exclude import read_ids
from dalle_cli.evaluation import thumbnails
from dalle_cli.evaluation.overlap import THRESHOLD, Nearest, Overlap, Pair
from reference import neighbors as slow

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji" / "small.tar"
SOME = 80  # pictures of it, half of which are copied


def photos(n, seed=0):
    """Smooth pictures with edges, (n, 3, S, S) in 0 to 255."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(0, 255, (n, 3, 7, 7))).float()
    return torch.nn.functional.interpolate(small, (48, 48), mode="bicubic", align_corners=False).clamp(0, 255)


# Nearest neighbours


@pytest.mark.parametrize(("views", "most", "block"), [(1, 1, 7), (3, 4, 1), (2, 50, 13), (3, 5, 1000)])
def test_the_nearest_are_those_of_brute_force(monkeypatch, views, most, block):
    monkeypatch.setattr("dalle_cli.evaluation.overlap.QUERIES", 4)
    rng = np.random.default_rng(views)
    keys = torch.from_numpy(rng.normal(size=(40, 6)))
    keys[17] = keys[3]  # equals: the one that came first
    queries = torch.from_numpy(rng.normal(size=(11, views, 6)))
    queries[5, 0] = 9 * keys[3]
    nearest = Nearest(queries, most)
    for start in range(0, 40, block):
        rows = np.arange(start, min(start + block, 40))
        nearest.offer(keys[rows], rows)
    expected = slow.nearest(queries.tolist(), keys.tolist(), most)
    held = nearest.rows >= 0
    assert [row[own].tolist() for row, own in zip(nearest.rows, held, strict=True)] == [
        [r for r, _ in x] for x in expected
    ]
    np.testing.assert_allclose(nearest.similarities[held], [value for x in expected for _, value in x], rtol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_how_keys_are_cut_into_blocks_changes_nothing(cuts, most, seed):
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.integers(-2, 3, (sum(cuts), 3))).double()  # exact, with many equals
    queries = torch.from_numpy(rng.integers(-2, 3, (4, 2, 3))).double()
    whole, parts = Nearest(queries, most), Nearest(queries, most)
    whole.offer(keys, np.arange(len(keys)))
    ends = np.cumsum([0, *cuts])
    for start, stop in itertools.pairwise(ends.tolist()):
        parts.offer(keys[start:stop], np.arange(start, stop))
    assert torch.equal(parts.rows, whole.rows)
    assert torch.equal(parts.similarities, whole.similarities)


# Pairs


@pytest.mark.parametrize("cuts", [(0.0, 0.0), (0.05, 0.02), (-0.0375, -0.0375)])
@pytest.mark.parametrize("cells", [8, 16])
def test_cells_are_means_of_their_pixels(cuts, cells):
    """Against pixels that are split into a thousand parts; beyond the image, a cell is the mean of what lies within."""
    row = torch.rand(48, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    fine = 1000 * 48
    at = ((torch.arange(fine) + 0.5) / fine * (1 - sum(cuts)) + cuts[0]).double()
    inside = (at >= 0) & (at < 1)
    values = torch.where(inside, row[(at * 48).long().clamp(0, 47)], 0)
    expected = values.view(cells, -1).sum(1) / inside.view(cells, -1).sum(1)
    found = thumbnails._coverage(48, cells, *cuts).double() @ row
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_similarity_is_the_best_cosine_of_any_window():
    a, b = photos(2), photos(2, seed=1)

    def vector(image, x, y):
        rows, columns = (thumbnails._coverage(48, thumbnails.FINE, *cut) for cut in (y, x))
        cells = rows @ image @ columns.T
        cells = cells - cells.mean((1, 2), keepdim=True)
        flat = torch.cat([cells.flatten(), torch.tensor([thumbnails.CONTRAST * cells.numel() ** 0.5])])
        return flat / flat.norm()

    whole = (0, 0)
    for row in range(2):
        ways = [
            (vector(x, cut_x, cut_y) @ vector(y, whole, whole)).item()
            for x, y in ((a[row], b[row]), (b[row], a[row]))
            for cut_x in thumbnails.CUTS
            for cut_y in thumbnails.CUTS
        ]
        assert thumbnails.similarity(a, b)[row].item() == pytest.approx(max(ways), abs=1e-5)


def crop(images, left, right, top, bottom):
    n = images.shape[-1]
    part = images[..., round(top * n) : round((1 - bottom) * n), round(left * n) : round((1 - right) * n)]
    return torch.nn.functional.interpolate(part, (n, n), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("cuts", [(0, 0, 0, 0), (0.05, 0, 0.02, 0.03), (0, 0.1, 0.06, 0.04), (0.1, 0, 0, 0.1)])
def test_a_crop_is_found_in_its_original_whichever_comes_first(cuts):
    whole = torch.nn.functional.interpolate(photos(3), (480, 480), mode="bicubic").clamp(0, 255)
    part = crop(whole, *cuts) * 0.8 + 20  # darker, and paler
    small = [torch.nn.functional.interpolate(x, (48, 48), mode="area") for x in (whole, part)]
    for pair in (small, small[::-1]):
        assert thumbnails.similarity(*pair).min() > THRESHOLD
    found = (thumbnails.queries(small[1]) @ thumbnails.keys(small[0]).T).amax(1)
    assert (found.argmax(1) == torch.arange(3)).all()  # and is a candidate


def test_equal_images_are_alike_and_others_are_not():
    images = photos(6)
    assert torch.allclose(thumbnails.similarity(images, images), torch.ones(6), atol=1e-4)
    assert thumbnails.similarity(images, images.roll(1, 0)).max() < 0.8
    flat = torch.full((2, 3, 48, 48), 90.0)
    flat[1] += 3
    assert thumbnails.similarity(flat[:1], flat[1:]).item() == pytest.approx(1)
    tinted = (images * 0.9 + torch.tensor([8.0, 0, -8]).view(3, 1, 1)).clamp(0, 255)
    assert thumbnails.similarity(images, tinted).min() > THRESHOLD
    assert thumbnails.similarity(images, images.flip(1)).max() < 0.9  # red and blue exchanged


def test_views_find_what_a_crop_was_taken_from():
    whole = photos(40)
    part = crop(whole, 0.05, 0.05, 0.05, 0.05)
    plain = thumbnails.keys(part) @ thumbnails.keys(whole).T
    for a, b in ((part, whole), (whole, part)):
        several = (thumbnails.queries(a) @ thumbnails.keys(b).T).amax(1)
        assert (several.argmax(1) == torch.arange(40)).all()
        assert (several.diagonal() > plain.diagonal() + 0.01).float().mean() > 0.8


# The stage


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """Copies of real emoji among others; the lists and pairs of a run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("planted")
    train, test = planted.plant(EMOJI, folder, SOME)
    out = folder / "lists" / "overlap.txt"
    printed = run_ok("overlap", train, test, "-o", out, "--grid", folder / "closest.png")
    assert printed == str(out)
    return train, test, out, json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("kind", "floor"),
    [("recompressed", 0.97), ("cropped 5 %", 0.97), ("cropped 10 %", 0.95), ("recolored", 0.92), ("resized", 0.97)],
)
def test_copies_are_found(hidden, kind, floor):
    _, test, _, told = hidden
    ids = open_dataset(test, need_captions=False).ids
    recall, precision, right = planted.judge(told["pairs"], ids, THRESHOLD)[kind]
    assert recall >= floor
    assert precision >= 0.95
    assert right >= floor  # with the very picture that was copied


def test_the_list_is_of_the_pairs_from_the_threshold_on(hidden):
    train, test, out, told = hidden
    above = [pair for pair in told["pairs"] if pair["similarity"] >= told["threshold"] == THRESHOLD]
    assert told["of"] == "test"
    assert read_ids(out) == {pair["test"] for pair in above} == set(told["ids"]) == read_ids(out.with_suffix(".json"))
    assert {pair["test"] for pair in told["pairs"]} == set(open_dataset(test, need_captions=False).ids)
    assert [p["similarity"] for p in told["pairs"]] == sorted((p["similarity"] for p in told["pairs"]), reverse=True)
    assert told["train"] == open_dataset(train, need_captions=False).digest
    with Image.open(out.parents[1] / "closest.png") as sheet:
        assert sheet.size[0] > 1000


def test_an_exact_copy_is_1(tmp_path, data):
    (tmp_path / "test").mkdir()
    shutil.copy(data / "05.png", tmp_path / "test" / "copy.png")
    run_ok("overlap", data, tmp_path / "test", "-o", tmp_path / "o.txt")
    best = json.loads((tmp_path / "o.json").read_text())["pairs"][0]
    assert best == {"test": "copy", "train": "05", "similarity": pytest.approx(1, abs=1e-3)}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Six emoji, and a TEST of two copies of one of them, one of another, and two others."""
    folder = tmp_path_factory.mktemp("small")
    data = open_dataset(EMOJI, need_captions=False)
    for row in range(0, 60, 10):
        planted.save(data.read(row), folder / "train" / f"{row:02d}.png")
    rng = np.random.default_rng(0)
    for name, row, change in (("a1", 10, "recompressed"), ("a2", 10, "cropped 5 %"), ("b", 30, "resized")):
        planted.save(planted.KINDS[change](data.read(row), rng), folder / "test" / f"{name}.png")
    for row in (75, 85):
        planted.save(data.read(row), folder / "test" / f"{row}.png")
    return folder


def overlap(small, tmp_path, *more):
    """The ids of a run."""
    out = tmp_path / "o.txt"
    run_ok("overlap", small / "train", small / "test", "-o", out, *more)
    return read_ids(out)


def test_of_train_and_threshold(small, tmp_path):
    assert overlap(small, tmp_path) == {"a1", "a2", "b"}
    first = (tmp_path / "o.txt").read_text()
    assert first.splitlines()[0] == "# dalle overlap: 3 of 5 images of TEST, by pixels from 0.95 on"
    assert overlap(small, tmp_path, "--of", "train") == {"10", "30"}
    assert "2 of 6 images of TRAIN" in (tmp_path / "o.txt").read_text()
    assert overlap(small, tmp_path, "--threshold", -1) == {"a1", "a2", "b", "75", "85"}
    assert overlap(small, tmp_path, "--threshold", -1, "--of", "train") == {f"{row:02d}" for row in range(0, 60, 10)}
    assert overlap(small, tmp_path, "--threshold", 1) == {"b"}  # resized: equal to all four digits


def test_neighbors_limit_what_is_looked_at(small, tmp_path):
    assert overlap(small, tmp_path, "--threshold", -1, "--of", "train", "-k", 1) < {
        f"{row:02d}" for row in range(0, 60, 10)
    }
    result = run_cli("overlap", small / "test", small / "train", "-o", tmp_path / "o.txt", "-k", 1)
    assert "found 1 of 2 in TEST, which may have more; raise --neighbors" in result.stderr
    result = run_cli("overlap", small / "test", small / "train", "-o", tmp_path / "o.txt", "-k", 3)
    assert "warning" not in result.stderr


def test_neither_batches_nor_workers_matter(small, tmp_path):
    overlap(small, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("o.txt", "o.json")]
    overlap(small, tmp_path, "--batch-size", 1, "--workers", 0)
    assert [(tmp_path / name).read_bytes() for name in ("o.txt", "o.json")] == first


def test_images_artifacts_will_do(small, tmp_path):
    data = open_dataset(small / "test", need_captions=False)
    pixels = np.stack([np.asarray(data.read(i).resize((64, 64))).transpose(2, 0, 1) for i in range(len(data))])
    path = tmp_path / "test.safetensors"
    write_artifact(path, "images", {"images": pixels, "ids": list(data.ids)}, {}, history("made", {}))
    run_ok("overlap", small / "train", path, "-o", tmp_path / "o.txt")
    assert read_ids(tmp_path / "o.txt") == {"a1", "a2", "b"}
    run_ok("overlap", path, small / "train", "-o", tmp_path / "o.txt")
    assert read_ids(tmp_path / "o.txt") == {"10", "30"}


def test_features_of_a_network(chain, small, tmp_path):
    overlap(small, tmp_path, "--features", chain.model)
    told = json.loads((tmp_path / "o.json").read_text())
    assert told["features"].startswith("clip-")
    assert told["threshold"] == 0.95
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.loader import sequential
    from dalle_cli.models.pixels import from_uint8
    from dalle_cli.pipelines import loading

    clip = loading.clip(open_artifact(chain.clip), torch.device("cpu"))
    embedded = {}
    for side in ("train", "test"):
        data = open_dataset(small / side, need_captions=False)
        for kept, images in sequential(data, 64, range(len(data)), 2):
            for row, vector in zip(kept, clip.encode_image(from_uint8(torch.from_numpy(images))), strict=True):
                embedded[side, data.ids[row]] = vector
    assert open_dataset(small / "test", need_captions=False).read(0).size == (64, 64)  # so all are read at this size
    for pair in told["pairs"]:
        cosine = torch.cosine_similarity(embedded["test", pair["test"]], embedded["train", pair["train"]], 0)
        assert pair["similarity"] == pytest.approx(cosine.item(), abs=1e-4)


def test_a_broken_picture_is_counted_and_stops_nothing(small, tmp_path):
    test = shutil.copytree(small / "test", tmp_path / "test")
    (test / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    out = tmp_path / "new" / "o.txt"
    result = run_cli("overlap", small / "train", test, "-o", out)
    assert (result.status, read_ids(out)) == (0, {"a1", "a2", "b"})
    assert "test skipped 1" in result.stderr
    assert "broken" in (out.parent / "o.test.skipped.jsonl").read_text()
    assert not (out.parent / "o.train.skipped.jsonl").exists()
    for other in test.glob("*.png"):
        other.write_bytes(b"nothing")
    for both in ((small / "train", test), (test, small / "train")):
        assert "that can be read" in run_bad("overlap", *both, "-o", tmp_path / "none.txt")


def test_faults_are_told_in_a_line(small, tmp_path):
    both = (small / "train", small / "test")
    out = tmp_path / "o.txt"
    assert "--of test or train" in run_bad("overlap", *both, "-o", out, "--of", "neither")
    assert "o.txt" in run_bad("overlap", *both, "-o", tmp_path / "o.json")
    assert str(tmp_path / "none") in run_bad("overlap", tmp_path / "none", small / "test", "-o", out)
    for mine in (out, tmp_path / "o.json"):
        mine.write_text("something else\n")
        assert "--force" in run_bad("overlap", *both, "-o", out)
        assert mine.read_text() == "something else\n"
        mine.unlink()
    out.write_text("something else\n")
    run_ok("overlap", *both, "-o", out, "--force")
    run_ok("overlap", *both, "-o", out)  # its own
    (tmp_path / "s.png").write_text("no picture")
    assert "PNG" in run_bad("overlap", *both, "-o", out, "--grid", tmp_path / "s.png")


def test_the_same_set_twice_is_warned_of(small, tmp_path):
    result = run_cli("overlap", small / "train", small / "train", "-o", tmp_path / "o.txt")
    assert "found the same one twice" in result.stderr
    assert read_ids(tmp_path / "o.txt") == {f"{row:02d}" for row in range(0, 60, 10)}


class Plain:
    """Images of one color each."""

    def __init__(self, n):
        self.ids = [f"{i}" for i in range(n)]

    def read(self, i):
        return Image.new("RGB", (64, 64), (i, 0, 0))


def test_the_sheet_shows_the_closest_pairs_around_the_threshold():
    pairs = [Pair(i, i, i / 100) for i in range(100)] + [Pair(90, 1, 0.55)]
    found = Overlap(Plain(100), Plain(100), pairs, 0.6)
    above, below = found.around(10)
    assert [pair.test for pair in (*above, *below)] == [*range(64, 59, -1), *range(59, 54, -1)]
    above, below = Overlap(Plain(100), Plain(100), pairs, 0.985).around(10)
    assert ([p.test for p in above], [p.test for p in below]) == ([99], list(range(98, 89, -1)))
    above, below = Overlap(Plain(100), Plain(100), pairs, 0.015).around(10)
    assert ([p.test for p in above], [p.test for p in below]) == (list(range(9, 1, -1)), [1, 0])
    colors = {color[:3] for _, color in found.grid().getcolors(1 << 20)}
    shown = {i for i in range(100) if (i, 0, 0) in colors}
    assert shown == set(range(48, 72))
