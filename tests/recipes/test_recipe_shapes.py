"""The shapes recipe: a generator that keeps its promises and a scorer that is right about the truth."""

import importlib
import io
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "recipes" / "shapes"
sys.path.insert(0, str(FOLDER))
scenes = importlib.import_module("scenes")
score = importlib.import_module("score")
Scene, Thing = scenes.Scene, scenes.Thing


@pytest.fixture(scope="module")
def truth():
    """300 fresh images and captions, every other one with a pair that training never sees."""
    sampled = [scenes.sample(11, 9, i, i % 2 == 1) for i in range(300)]
    return [d[1] for d in sampled], [d[2] for d in sampled]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files that the script writes, twice, with equal arguments."""
    folders = [tmp_path_factory.mktemp("shapes") for _ in range(2)]
    for folder in folders:
        small = ["--count", "400", "--truth", "20", "--prompts", "32", "--seed", "5"]
        subprocess.run([sys.executable, str(FOLDER / "scenes.py"), str(folder), *small], check=True)
    return folders


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_same_seed_same_bytes_and_other_seed_other_bytes(written):
    names = sorted(p.name for p in written[0].iterdir())
    assert names == ["prompts-seen.txt", "prompts-unseen.txt", "train.tar", "truth.tar"]
    for name in names:
        assert (written[0] / name).read_bytes() == (written[1] / name).read_bytes()
    assert scenes.sample(0, 0, 3, False)[2] != scenes.sample(1, 0, 3, False)[2]


def test_training_never_sees_a_held_out_pair_in_words_or_in_pixels(written):
    files = members(written[0] / "train.tar")
    assert len(files) == 800
    for name in (n for n in files if n.endswith(".txt")):
        assert not score.parse_caption(files[name].decode()).has_held_out_pair()
        image = np.asarray(Image.open(io.BytesIO(files[name[:-4] + ".png"])))
        assert image.shape == (32, 32, 3)
        found = {(o.thing.color, o.thing.shape) for o in score.find_objects(image)}
        assert found
        assert not found & scenes.HELD_OUT


def test_prompts_are_distinct_and_on_the_right_side(written):
    for name, unseen in (("prompts-seen.txt", False), ("prompts-unseen.txt", True)):
        lines = (written[0] / name).read_text("utf-8").splitlines()
        listed = [score.parse_caption(line) for line in lines]
        assert len(set(lines)) == 32
        assert sum(len(scene.things) == 1 for scene in listed) == 16
        assert all(scene.has_held_out_pair() == unseen for scene in listed)


def test_a_tenth_of_the_pairs_is_held_out_and_nothing_becomes_rare():
    pairs = set(product(scenes.COLORS, scenes.SHAPES))
    assert len(pairs) == 48
    assert pairs > scenes.HELD_OUT
    assert len(scenes.HELD_OUT) == 5
    left = pairs - scenes.HELD_OUT
    assert min(sum(c == color for c, _ in left) for color in scenes.COLORS) == 5
    assert min(sum(s == shape for _, s in left) for shape in scenes.SHAPES) == 7


def test_objects_lie_inside_and_apart():
    for index in range(200):
        rng = np.random.default_rng(index)
        scene = scenes.random_scene(rng, unseen=False)
        places = scenes.place(scene, rng)
        masks = []
        for thing, (x, y) in zip(scene.things, places, strict=True):
            side = scenes.SIZES[thing.size]
            assert min(x, y) >= 0
            assert max(x, y) + side <= scenes.CELLS
            mask = np.zeros((scenes.CELLS + 2, scenes.CELLS + 2), bool)
            mask[y : y + side + 2, x : x + side + 2] = True  # the object and one cell around it
            masks.append(mask)
        if len(masks) == 2:
            inner = masks[1] & np.roll(masks[1], 1, 0) & np.roll(masks[1], 1, 1)
            assert not (masks[0] & inner & np.roll(inner, -1, 0)).all()
            (x0, y0), (x1, y1) = places
            along, across = (x1 - x0, y1 - y0) if scene.relation in ("left", "right") else (y1 - y0, x1 - x0)
            assert (along > 0) == (scene.relation in ("left", "above"))
            assert abs(along) > 1.5 * abs(across)


def test_shapes_are_distinct_and_fill_their_box():
    seen = set()
    for shape, (size, side) in product(scenes.SHAPES, scenes.SIZES.items()):
        bits = scenes.bitmap(shape, size)
        assert bits.shape == (side, side)
        assert bits.any(0).all()
        assert bits.any(1).all()
        assert (bits == bits[:, ::-1]).all()
        seen.add((size, bits.tobytes()))
    assert len(seen) == 12


@pytest.mark.parametrize("width", [32, 48, 64])
def test_pictures_of_any_width_are_the_same_scene(width):
    _, image, caption = scenes.sample(3, 0, 7, False, width)
    assert image.shape == (width, width, 3)
    assert score.matches(image, caption)


def test_every_template_says_what_it_was_given():
    two = (Thing("small", "red", "circle"), Thing("large", "blue", "square"))
    said = set()
    for scene in [Scene(two[:1]), *(Scene(two, relation) for relation in scenes.RELATIONS)]:
        for seed in range(400):
            text = scenes.caption(scene, np.random.default_rng(seed))
            assert score.parse_caption(text) == scene
            said.add(score.NAMED.sub("#", text))
    assert said == set(score.SKELETONS)


@pytest.mark.parametrize("text", ["", "a red circle", "a small red circle near a large blue square", "a small red dog"])
def test_a_caption_of_another_world_is_refused(text):
    with pytest.raises(ValueError, match="expected a caption of the shapes world"):
        score.parse_caption(text)


def test_inverse_captions_are_understood():
    expected = Scene((Thing("small", "red", "circle"), Thing("large", "blue", "square")), "left")
    assert score.parse_caption("A small red circle left of a large blue square.") == expected
    assert score.parse_caption("a large blue square right of a small red circle").canonical() == expected


def test_scorer_is_right_about_the_truth_and_at_chance_on_shuffled_captions(truth):
    images, captions = truth
    assert score.score(images, captions)["accuracy"] > 0.99
    shuffled = captions[1:] + captions[:1]
    by_words = np.mean(
        [
            score.parse_caption(a).canonical() == score.parse_caption(b).canonical()
            for a, b in zip(captions, shuffled, strict=True)
        ]
    )
    assert score.score(images, shuffled)["accuracy"] == pytest.approx(by_words, abs=0.01)
    assert score.chance(captions) < 0.01


@pytest.mark.parametrize(("how", "least"), [("blur", 0.99), ("noise", 0.99), ("jpeg", 0.85)])
def test_scorer_stands_degraded_pictures(truth, how, least):
    images, captions = truth
    spoiled = [score.degrade(p, how, i) for i, p in enumerate(images)]
    assert any((a != b).any() for a, b in zip(images, spoiled, strict=True))
    assert score.score(spoiled, captions)["accuracy"] > least


RIGHT = "a small red circle left of a large blue square"


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small black circle left of a large blue square", "color"),
        ("a small blue circle left of a large red square", None),
        ("a small red square left of a large blue square", "shape"),
        ("a large red circle left of a large blue square", "size"),
        ("a small red circle right of a large blue square", "relation"),
        ("a small red circle above a large blue square", "relation"),
        ("a small red circle", "count"),
    ],
)
def test_each_kind_of_wrongness_is_noticed_and_named(caption, wrong):
    for seed in range(10):
        image = scenes.render(score.parse_caption(RIGHT), np.random.default_rng(seed))
        assert score.matches(image, RIGHT)
        assert not score.matches(image, caption)
        if wrong:
            assert getattr(score.compare(image, score.parse_caption(caption)), wrong) is False


def test_an_extra_object_and_an_empty_picture_are_wrong():
    image = scenes.render(
        score.parse_caption("a small red circle left of a small blue square"), np.random.default_rng(0)
    )
    extra = image.copy()
    found = score.find_objects(image)
    row = 2 if min(o.y for o in found) > 0.45 else 24
    extra[row : row + 6, 12:18] = scenes.COLORS["green"]
    assert len(score.find_objects(extra)) == 3
    assert not score.matches(extra, "a small red circle left of a small blue square")
    assert not score.matches(np.full((32, 32, 3), 255, np.uint8), "a small red circle")


def test_a_shapeless_blob_matches_no_caption():
    image = np.full((32, 32, 3), 255, np.uint8)
    image[4:9, 4:28] = scenes.COLORS["red"]
    things = [Thing(size, "red", shape) for size, shape in product(scenes.SIZES, scenes.SHAPES)]
    assert not any(score.compare(image, Scene((thing,))).right for thing in things)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_judged_without_complaint(seed):
    image = np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert not score.matches(image, RIGHT)


def test_scores_read_from_a_tar_and_from_an_artifact_agree(written, tmp_path):
    images, captions = score._read(written[0] / "truth.tar")
    assert score.score(images, captions)["accuracy"] == 1
    artifacts = pytest.importorskip("dalle_cli.artifacts")
    path = tmp_path / "images.safetensors"
    stored = np.stack(images).transpose(0, 3, 1, 2).copy()
    ids = [str(i) for i in range(len(captions))]
    artifacts.write_artifact(path, "images", {"images": stored, "text": captions, "ids": ids}, {}, [])
    read, said = score._read(path)
    assert said == captions
    assert all((a == b).all() for a, b in zip(read, images, strict=True))
