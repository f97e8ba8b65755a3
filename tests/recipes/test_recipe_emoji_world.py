"""The emoji's world: captions that can be read back, nothing withheld in what is trained on, an exact scorer."""

import importlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dalle_cli.data import datasets

FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path.insert(0, str(FOLDER))
exact, grammar, holdout, hues, reader, sprites, things, world = (
    importlib.import_module(name)
    for name in ("exact", "grammar", "holdout", "hues", "reader", "sprites", "things", "world")
)
Item, Scene, parse = grammar.Item, grammar.Scene, grammar.parse
SPRITES = FOLDER / "small.sprites.tar"
LISTS = ("colors", "pairs", "worn", "walked", "korean")


class Names:
    """All things of the table, each in every color: what scenes are made of, without an image."""

    def __init__(self, path):
        self.things = self.flat = tuple(things.table())

    def own(self, name):
        return "red" if name == "apple" else ""

    def choices(self, name):
        return tuple(color for color in things.COLORS if color != self.own(name))


@pytest.fixture(scope="module")
def small():
    return world.World(SPRITES)


@pytest.fixture(scope="module")
def whole():
    """The world of all things, which has no images."""
    patch = pytest.MonkeyPatch()
    patch.setattr(world, "Sprites", Names)
    own = world.World(Path())
    patch.undo()
    return own


@pytest.fixture(scope="module")
def judge(small):
    return reader.Reader(small)


def scenes(own, count, seed=0):
    kinds = Random(seed).choices(own.kinds, own.weights, k=count)
    return [own.scene(kind, Random(f"{seed}/{n}")) for n, kind in enumerate(kinds)]


def verdict(judge, image, scene):
    return exact.verdicts(judge, [image], [scene])[0]


# The table and the grammar


def test_the_table_has_things_enough_and_every_name_once():
    table = things.table()
    assert len(table) >= 250
    assert len({thing.korean for thing in table.values()}) == len(table)
    assert len({thing.icon for thing in table.values()}) == len(table)
    assert {"radish", "tutu", "leash", "party hat"} <= set(table)
    assert set(things.WORN) <= set(table)
    for thing in table.values():
        assert thing.walks in ("", "yes", "legs")
        assert all(0 <= number <= 1 for numbers in thing.at.values() for number in numbers)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("orange car", "an"),
        ("umbrella", "an"),
        ("unicorn", "a"),
        ("radish", "a"),
        ("T-shirt", "a"),
        ("ice cream", "an"),
    ],
)
def test_articles(phrase, expected):
    assert things.article(phrase) == expected


def test_particles():
    assert things.particle("고양이", "이가") == "고양이가"
    assert things.particle("곰", "을를") == "곰을"
    assert things.particle("무", "과와") == "무와"


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_caption_states_its_scene(whole, language):
    for n, scene in enumerate(scenes(whole, 4000, seed=1)):
        text = grammar.caption(scene, language, Random(n))
        assert parse(text).canonical() == scene.canonical(), text


def test_there_are_several_phrasings_of_each_fact():
    scene = Scene((Item("cat", "blue"), Item("tree", size="small")), "left", "pink")
    for language, least in (("en", 60), ("ko", 60)):
        assert len({grammar.caption(scene, language, Random(n)) for n in range(1000)}) > least


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two cats", Scene((Item("cat", count=2),))),
        ("a small dog left of a large tree", Scene((Item("dog", size="small"), Item("tree", size="large")), "left")),
        ("a cat on a blue background", Scene((Item("cat"),), ground="blue")),
        ("a penguin wearing a crown", Scene((Item("penguin", worn="crown"),))),
        ("a tutu radish walking a dog", Scene((Item("radish", worn="tutu"), Item("dog")), "walks")),
        ("a radish in a tutu walking a dog", Scene((Item("radish", worn="tutu"), Item("dog")), "walks")),
        ("개를 산책시키는 튀튀를 입은 무", Scene((Item("radish", worn="tutu"), Item("dog")), "walks")),
        ("피자 세 조각", Scene((Item("pizza", count=3),))),
        ("a cat in flat style", Scene((Item("cat"),), style="flat")),
    ],
)
def test_captions_of_the_issue(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["a corgi", "a cat, a dog and a bird", "", "a red", "고양이 없는 개"])
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="expected a caption"):
        parse(text)


# What is withheld


def test_no_scene_to_train_on_has_anything_withheld(whole):
    for n, scene in enumerate(scenes(whole, 20_000, seed=2)):
        text = grammar.caption(scene, "ko" if n % 2 else "en", Random(n))
        assert not holdout.withheld(scene, whole.sprites.own)
        assert not holdout.withheld(parse(text), whole.sprites.own)


def test_one_in_ten_combinations_is_withheld(whole):
    seen = {
        c
        for scene in (whole.propose(kind, Random(n)) for n in range(3000) for kind in holdout_kinds())
        for c in holdout.combinations(scene, whole.sprites.own)
    }
    for kind in holdout_kinds():
        own = [c for c in seen if c[0] == kind]
        assert 0.07 < np.mean([holdout.by_hash(c) for c in own]) < 0.13, kind


def holdout_kinds():
    return ("color", "pair", "worn", "walked")


def test_a_thing_in_its_own_color_is_always_shown(whole):
    plain = Counter(whole.scene("thing", Random(n)).items[0].thing for n in range(6000))
    assert set(plain) == set(things.table())
    assert not holdout.withheld(Scene((Item("apple", "red"),)), whole.sprites.own)


@pytest.mark.parametrize("name", LISTS)
def test_sheets_are_of_the_grammar_and_wholly_new(whole, name):
    prompts = holdout.prompts(name)
    assert len(prompts) == 12
    for prompt in prompts:
        scene = parse(prompt)
        assert whole.can_show(scene), prompt
        assert holdout.withheld(scene, lambda thing: ""), prompt


def test_the_first_prompt_is_new_in_every_respect(whole):
    found = holdout.withheld(parse("a tutu radish walking a dog"), whole.sprites.own)
    assert set(found) == {("worn", "tutu", "radish"), ("walked", "radish", "dog"), ("pair", "dog", "radish")}


def test_unseen_scenes_are_new_by_their_own_combination_alone(whole):
    for kind in holdout_kinds():
        for n in range(40):
            scene = whole.scene(kind, Random(n), unseen=True)
            assert {c[0] for c in holdout.withheld(scene, whole.sprites.own)} == {kind}


# Images of things


def test_a_package_is_read_with_its_aliases(tmp_path):
    table = {"width": 8, "height": 8, "icons": {"a": {"body": "<path/>"}, "b": {"body": "<g/>", "width": 16}}}
    data = json.dumps(table | {"aliases": {"c": {"parent": "a"}, "d": {"parent": "a", "hFlip": True}}}).encode()
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        info = tarfile.TarInfo("package/icons.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    icons = sprites.package(tmp_path / "x.tgz")
    assert set(icons) == {"a", "b", "c"}
    assert icons["c"] == icons["a"] == '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path/></svg>'
    assert 'viewBox="0 0 16 8"' in icons["b"]


def test_our_own_drawings_fill_their_squares_and_stand_on_the_ground():
    for name in ("radish", "tutu", "leash", "party-hat"):
        ink = np.asarray(sprites.fit(sprites.draw(sprites.art(name), 384), 96))[..., 3] > 127
        rows, columns = (np.nonzero(ink.any(axis))[0] for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) >= 86
        assert 88 <= rows.max() <= 92
        assert abs(columns.min() + columns.max() - 95) <= 3


def test_what_is_written_of_an_image_was_measured_from_it(small):
    for name in ("apple", "frog", "panda", "bear", "sun"):
        measured = json.loads(json.dumps(sprites.measure(name, small.sprites.sources[f"noto/{name}"])))
        assert measured == small.sprites.facts[f"noto/{name}"]
    own = {name: small.sprites.own(name) for name in ("apple", "frog", "panda", "bear", "sun", "tutu")}
    assert own == {"apple": "red", "frog": "green", "panda": "", "bear": "brown", "sun": "yellow", "tutu": "pink"}


# Scenes


def test_a_scene_is_a_function_of_seed_stream_and_number(small):
    first, again = small.sample(0, "train", 7), small.sample(0, "train", 7)
    assert (first[0], first[2]) == (again[0], again[2])
    assert (first[1] == again[1]).all()
    assert small.sample(1, "train", 7)[2] != first[2]
    assert (first[1].shape, first[1].dtype) == ((64, 64, 3), np.uint8)


def test_things_lie_on_the_grid_of_codes_and_do_not_overlap(small):
    for n in range(300):
        scene = small.scene(("thing", "pair", "count")[n % 3], Random(n))
        stamps = small.stamps(scene, Random(n))
        covered = np.zeros((64, 64), int)
        for stamp in stamps:
            assert stamp.x % 8 == stamp.y % 8 == 0
            covered[stamp.y : stamp.y + len(stamp.image), stamp.x : stamp.x + len(stamp.image)] += 1
        assert len(stamps) == sum(item.count for item in scene.items)
        assert covered.max() == 1
        assert covered.sum() == sum(len(stamp.image) ** 2 for stamp in stamps)  # none is cut off


def test_a_turned_hue_keeps_lightness_and_alpha(small):
    own, turned = small.sprites.get("apple", 48), small.sprites.get("apple", 48, "blue")
    before, after = (hues.to_hsl(image[..., :3].astype(np.float32) / 255)[2] for image in (own, turned))
    assert (own[..., 3] == turned[..., 3]).all()
    assert np.abs(before - after)[own[..., 3] > 0].max() < 0.04
    assert abs(hues.leading(turned).hue - hues.TARGETS["blue"][0]) < 10
    leaf = (slice(2, 8), slice(30, 38))
    assert (own[leaf] == turned[leaf]).mean() > 0.9  # green, and not turned


def test_every_prompt_of_the_sheets_that_the_small_world_can_show_is_drawn(small):
    shown = [parse(p) for name in LISTS for p in holdout.prompts(name) if small.can_show(parse(p))]
    assert len(shown) > 20
    assert all(small.render(scene, Random(0)).std() > 5 for scene in shown)


# The scorer


@pytest.fixture(scope="module")
def truth(small):
    kinds = [(kind, False) for kind in (*small.kinds, "ground")] + [(kind, True) for kind in world.NEW]
    sampled = [small.sample(5, "truth", n, *kinds[n % len(kinds)]) for n in range(132)]
    return [s[1] for s in sampled], [parse(s[2][n % 2]) for n, s in enumerate(sampled)]


@pytest.mark.parametrize(("how", "least"), [("", 0.99), ("codec", 0.95), ("jpeg", 0.95)])
def test_the_truth_is_right(judge, truth, how, least):
    images = [exact.degrade(image, how, n) for n, image in enumerate(truth[0])]
    assert np.mean([v["right"] for v in exact.verdicts(judge, images, truth[1])]) >= least


def test_other_captions_are_wrong(judge, truth):
    others = [truth[1][n] for n in np.random.default_rng(0).permutation(len(truth[1]))]
    assert np.mean([v["right"] for v in exact.verdicts(judge, truth[0], others)]) < 0.01


CAT, DOG, PIG = Item("cat"), Item("dog"), Item("pig")
WALK = Scene((Item("bear", worn="party hat"), DOG), "walks")


@pytest.mark.parametrize(
    ("shown", "said", "fact"),
    [
        (Scene((DOG,)), Scene((CAT,)), "thing"),
        (Scene((Item("cat", "blue"),)), Scene((Item("cat", "green"),)), "color"),
        (Scene((Item("cat", count=3),)), Scene((Item("cat", count=2),)), "count"),
        (Scene((CAT,), ground="pink"), Scene((CAT,), ground="blue"), "ground"),
        (Scene((CAT, DOG), "left"), Scene((CAT, DOG), "right"), "relation"),
        (Scene((CAT, DOG), "above"), Scene((CAT, DOG), "below"), "relation"),
        (Scene((CAT, DOG), "above"), Scene((CAT, DOG), "beside"), "relation"),
        (
            Scene((Item("cat", "blue"), Item("dog", "pink")), "left"),
            Scene((Item("cat", "pink"), Item("dog", "blue")), "left"),
            "color",
        ),
        (Scene((CAT, replace(DOG, size="small")), "left"), Scene((CAT, DOG), "left"), ""),
        (
            Scene((replace(CAT, size="large"), replace(DOG, size="small")), "left"),
            Scene((replace(CAT, size="small"), replace(DOG, size="large")), "left"),
            "size",
        ),
        (Scene((Item("panda"),)), Scene((Item("panda", worn="crown"),)), "worn"),
        (Scene((Item("panda", worn="glasses"),)), Scene((Item("panda", worn="crown"),)), "worn"),
        (WALK, replace(WALK, items=(Item("bear"), DOG)), ""),
        (Scene((Item("bear"), DOG), "left"), Scene((Item("bear"), DOG), "walks"), "walked"),
        (Scene((Item("bear"), DOG), "walks"), Scene((Item("bear"), CAT), "walks"), "thing"),
    ],
)
def test_one_fact_wrong_is_seen(judge, small, shown, said, fact):
    image = small.render(shown, Random(3))
    found = verdict(judge, image, said)
    assert not found["right"]
    assert not fact or not found[fact]


def test_half_a_thing_and_more_things_than_said_are_wrong(judge, small):
    cat = small.render(Scene((Item("cat"),)), Random(0))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert not verdict(judge, noise, Scene((CAT,)))["right"]
    assert not verdict(judge, np.full((64, 64, 3), 255, np.uint8), Scene((CAT,)))["right"]
    half, ink = cat.copy(), np.argwhere((cat != 255).any(-1))[:, 1]
    half[:, : int(np.median(ink))] = 255
    assert not verdict(judge, half, Scene((CAT,)))["right"]
    pair = small.render(Scene((CAT, DOG), "left"), Random(0))
    assert not verdict(judge, pair, Scene((CAT,)))["right"]


# Files


def test_files_are_equal_for_equal_seeds_and_can_be_trained_on(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        options = ["--count", "60", "--shard", "40", "--truth", "30", "--prompts", "12", "--seed", "5"]
        subprocess.run([sys.executable, str(FOLDER / "world.py"), str(SPRITES), str(folder), *options], check=True)
    names = sorted(str(p.relative_to(folders[0])) for p in folders[0].rglob("*.t*"))
    assert {"train-000.tar", "train-001.tar", "truth.tar", "prompts/pair-withheld-ko.txt"} <= set(names)
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    dataset = datasets.open_dataset(str(folders[0] / "train-{000..001}.tar"), need_captions=True)
    assert len(dataset) == 60
    with tarfile.open(folders[0] / "train-000.tar") as tar:
        row = json.load(tar.extractfile("0000003.json"))
    english, korean = row["caption"]
    assert parse(english).canonical() == parse(korean).canonical()
    for kind in holdout_kinds():
        own = [
            (folders[0] / "prompts" / f"{kind}-withheld{end}.txt").read_text("utf-8").splitlines()
            for end in ("", "-ko")
        ]
        assert len(own[0]) == len(own[1]) == 12
        for first, second in zip(*own, strict=True):
            assert parse(first).canonical() == parse(second).canonical()
            assert kind in {c[0] for c in holdout.withheld(parse(first), lambda thing: "")}
    command = [sys.executable, str(FOLDER / "exact.py"), str(SPRITES), str(folders[0] / "truth.tar"), "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["all"]["images"] == 30
    assert found["all"]["right"] > 0.95
