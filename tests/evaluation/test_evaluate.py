"""`dalle evaluate`: pictures against real ones from end to end, and what it hands on to the judges of weights."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok
from PIL import Image

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.evaluation.cache import caption_embeddings
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.manifold import precision_recall
from dalle_cli.evaluation.tables import plain_rows

NAMES = {"frechet", "kernel", "precision", "recall", "clip", "retrieval"}


@pytest.fixture(scope="module")
def rebuilt(chain, tmp_path_factory):
    """The data set's pictures through the dVAE, as images with their captions."""
    folder = tmp_path_factory.mktemp("rebuilt")
    images = folder / "rebuilt.images.safetensors"
    run_ok("decode", chain.codes, "-m", chain.dvae, "-o", images)
    found = open_artifact(images)
    ids = list(found.strings("ids"))
    text = [(chain.data / f"{own}.txt").read_text().strip() for own in ids]
    write_artifact(images, "images", {"images": np.asarray(found.array("images")[:]), "ids": ids, "text": text}, {}, [])
    return images


@pytest.fixture
def evaluate(chain, rebuilt, tmp_path):
    """Runs the stage on the reconstructions; the scores it wrote."""

    def call(*options, out="scores.json", generated=rebuilt, reference=chain.data):
        target = tmp_path / out
        fixed = ("--reference", reference, "-m", chain.model, "--bootstrap", 8, "--workers", 0)
        assert run_ok("evaluate", generated, *fixed, "-o", target, *options) == str(target)
        return json.loads(target.read_text())

    return call


def features(folder, side, blur="0"):
    (found,) = folder.glob(f"{side}-clip-*-blur-{blur}")
    return np.asarray(open_artifact(found).array("embeddings")[:]).astype(np.float64)


def close(a, b):
    """Whether scores agree but for rounding in the network."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(a, float) else a == b


def test_scores_are_those_of_the_features_that_it_keeps(evaluate, tmp_path, chain, rebuilt):
    told = evaluate("--blur", "0,2")
    real, drawn = (features(tmp_path / "scores.features", side) for side in ("reference", "generated"))
    assert real.shape == drawn.shape == (24, 16)
    first, second = told["scores"]
    assert (first["blur"], second["blur"]) == (0, 2)
    assert first.keys() - {"blur"} == NAMES
    assert first["frechet"]["value"] == pytest.approx(
        between(Moments.of([drawn], 16), Moments.of([real], 16)), rel=1e-9
    )
    precision, recall = precision_recall(drawn, real)
    assert (first["precision"]["value"], first["recall"]["value"]) == (precision.mean(), recall.mean())
    assert first["frechet"]["name"] == told["name"] == f"Frechet distance ({told['features']['name']})"
    assert first["frechet"]["value"] != pytest.approx(second["frechet"]["value"], rel=1e-3)
    for name in NAMES - {"retrieval"}:
        assert first[name]["low"] <= first[name]["value"] <= first[name]["high"]
    assert told["inputs"]["generated"] == open_artifact(rebuilt).digest
    assert told["inputs"]["clip"] == told["inputs"]["features"] == open_artifact(chain.clip).digest
    assert told["counts"]["reference"] == {"images": 24, "skipped": 0, "exclude": 0}
    assert list(told["left_out"]) == ["inception"]
    assert (tmp_path / "scores.json").read_text() == json.dumps(told, sort_keys=True, indent=1) + "\n"
    assert str(tmp_path) not in json.dumps(told)


def test_the_clip_score_is_the_one_that_rerank_gives(evaluate, chain, rebuilt, tmp_path):
    told = evaluate("--scores", "clip")
    run_ok("rerank", rebuilt, "-m", chain.clip, "-o", tmp_path / "best.safetensors")
    expected = 100 * np.asarray(open_artifact(tmp_path / "best.safetensors").array("score")).mean()
    found = told["scores"][0]["clip"]
    assert found["value"] == pytest.approx(expected, abs=1e-3)
    assert found["shuffled"] != pytest.approx(expected, abs=1e-3)
    assert found["images"] == 24


def test_real_pictures_are_perfect(evaluate, chain):
    told = evaluate(generated=chain.data)
    scores = told["scores"][0]
    assert scores["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["precision"]["value"] == scores["recall"]["value"] == 1
    assert scores["retrieval"]["r1"] == {"value": 1, "low": 1, "high": 1, "chance": 1 / 24}
    assert scores["retrieval"]["k"] == 24


def test_a_captions_own_picture_is_found_by_text_where_ids_say_nothing(evaluate, rebuilt, tmp_path):
    """Ids that both sides count from 0, in another order, must not tie pictures of different captions."""
    found = open_artifact(rebuilt)
    ids, text = list(found.strings("ids")), list(found.strings("text"))
    columns = {"images": np.asarray(found.array("images")[:]), "ids": ids, "text": text}
    by_id = evaluate("--scores", "retrieval", "--seed", 1)["scores"][0]["retrieval"]
    write_artifact(tmp_path / "turned.safetensors", "images", {**columns, "ids": ids[1:] + ids[:1]}, {}, [])
    by_text = evaluate("--scores", "retrieval", "--seed", 1, generated=tmp_path / "turned.safetensors", out="b.json")
    assert by_text["scores"][0]["retrieval"] == by_id
    turned = {**columns, "text": text[1:] + text[:1], "ids": [f"x{i}" for i in ids]}
    write_artifact(tmp_path / "wrong.safetensors", "images", turned, {}, [])
    wrong = evaluate("--scores", "retrieval", "--seed", 1, generated=tmp_path / "wrong.safetensors", out="c.json")
    assert wrong["scores"][0]["retrieval"]["r1"]["value"] < by_id["r1"]["value"]


def test_nothing_depends_on_batch_size_or_workers(evaluate):
    one = evaluate("--blur", "0,1", "--batch-size", 1, out="one.json")
    other = evaluate("--blur", "0,1", "--batch-size", 17, "--workers", 2, out="other.json")
    assert close(one, other)
    assert not close(one, evaluate("--blur", "0,1", "--seed", 1, out="seed.json"))


def test_features_are_kept_and_used_again(evaluate, tmp_path, monkeypatch):
    first = evaluate("--blur", "0,1")
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "scores.features").rglob("*.safetensors")}
    assert len(kept) == 5  # two sides, two radii, captions
    for path in kept:
        os.utime(path, ns=(1, 1))

    def refuse(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("dalle_cli.evaluation.features.ClipFeatures.__call__", refuse)
    monkeypatch.setattr("dalle_cli.evaluation.features.ClipFeatures.captions", refuse)
    assert evaluate("--blur", "0,1") == first
    assert evaluate("--blur", "1", "--seed", 3, "--bootstrap", 0)["scores"][0]["blur"] == 1
    for option in (("--size", 12), ("--limit", 20), ("--blur", "3")):
        with pytest.raises(AssertionError, match="made again"):
            evaluate(*option)
    monkeypatch.undo()
    assert not all(path.exists() for path in kept)  # what is of other options goes
    assert evaluate("--blur", "0,1") == first
    assert {p: p.read_bytes() for p in kept} == {p: data for p, (_, data) in kept.items()}


def test_other_captions_are_embedded_anew(chain, tmp_path):
    """The cache of captions goes by their text."""
    from dalle_cli.devices import arithmetic
    from dalle_cli.evaluation.cache import FeaturePass
    from dalle_cli.evaluation.features import load_features

    machine = arithmetic("cpu", "float32")
    clip = load_features(None, str(chain.clip), machine)
    run = FeaturePass(tmp_path, [clip], [0], 16, machine, 1, 0)
    a, b = (np.array(caption_embeddings(t, clip, run).array("embeddings")) for t in (["a", "red"], ["a", "blue"]))
    np.testing.assert_array_equal(a[0], b[0])
    assert not np.array_equal(a[1], b[1])


def test_broken_pictures_are_listed_and_stay_listed(evaluate, chain, tmp_path):
    data = shutil.copytree(chain.data, tmp_path / "data")
    (data / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    listed = tmp_path / "scores.reference.skipped.jsonl"
    for _ in range(2):  # the second finds features of the others
        told = evaluate("--scores", "frechet,retrieval", reference=data)
        assert told["counts"]["reference"] == {"images": 23, "skipped": 1, "exclude": 0}
        assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == ["00"]
    assert not (tmp_path / "scores.generated.skipped.jsonl").exists()
    assert told["scores"][0]["retrieval"]["images"] == 23  # its picture's own real one cannot be read


def test_a_pass_that_was_stopped_goes_on_and_keeps_the_list(evaluate, chain, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle_cli.evaluation.cache.SHARD", 10)
    data = shutil.copytree(chain.data, tmp_path / "data")
    (data / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    first = evaluate("--scores", "frechet", reference=data)
    (folder,) = (tmp_path / "scores.features").glob("reference-*")
    assert len(list(folder.iterdir())) == 3
    (folder / "00001.safetensors").unlink()
    times = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert evaluate("--scores", "frechet", reference=data) == first
    assert {name: (folder / name).read_bytes() for name in times} == times
    listed = (tmp_path / "scores.reference.skipped.jsonl").read_text()
    assert [json.loads(line)["id"] for line in listed.splitlines()] == ["00"]


def test_ids_are_left_out_with_the_pictures_drawn_for_them(evaluate, chain, rebuilt, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("03\n17\nnobody\n")
    whole = evaluate("--scores", "frechet")
    part = evaluate("--scores", "frechet", "--exclude", ids)
    assert part["counts"]["generated"] == part["counts"]["reference"] == {"images": 22, "skipped": 0, "exclude": 2}
    found = open_artifact(rebuilt)
    columns = {"images": np.asarray(found.array("images")[:]), "text": list(found.strings("text"))}
    other = [f"drawn-{i}" for i in found.strings("ids")]
    write_artifact(tmp_path / "drawn.safetensors", "images", {**columns, "ids": other}, {}, [])
    drawn = evaluate("--scores", "frechet", "--exclude", ids, generated=tmp_path / "drawn.safetensors", out="b.json")
    assert drawn["counts"]["generated"]["exclude"] == 2  # by their captions
    assert drawn["scores"] == part["scores"] != whole["scores"]
    assert part["inputs"]["exclude"] != whole["inputs"].get("exclude")


def test_what_a_list_names_in_vain_is_warned_of(chain, rebuilt, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("03\n17\nnobody\n")
    fixed = ("--reference", chain.data, "-m", chain.model, "--bootstrap", 0, "--scores", "kernel")
    result = run_cli("evaluate", rebuilt, *fixed, "--exclude", ids, "-o", tmp_path / "s.json")
    assert result.status == 0
    assert "2 of 24 images are excluded by ids.txt" in result.stderr
    assert "found 1 of no image: nobody" in result.stderr


def test_too_few_pictures_are_refused_with_the_number_needed(chain, rebuilt, tmp_path):
    fixed = (rebuilt, "--reference", chain.data, "-m", chain.model, "-o", tmp_path / "s.json", "--bootstrap", 0)
    line = run_bad("evaluate", *fixed, "--limit", 16)
    assert "expected at least 17 images in each set for the covariance of 16 features" in line
    assert "found 16 generated" in line
    assert not (tmp_path / "s.features").exists()  # refused before any picture is looked at
    run_ok("evaluate", *fixed, "--limit", 17)
    run_ok("evaluate", *fixed, "--limit", 4, "--scores", "kernel,precision,recall")
    line = run_bad("evaluate", *fixed, "--limit", 3, "--scores", "precision")
    assert "at least 4 images in each set for a row and its 3 neighbors" in line
    assert "at least 4" in run_bad("evaluate", *fixed, "--limit", 3, "--scores", "kernel")


def test_scores_that_cannot_be_had_are_named_or_refused(chain, rebuilt, tmp_path):
    fixed = ("--reference", chain.data, "-o", tmp_path / "s.json", "--bootstrap", 0)
    found = open_artifact(rebuilt)
    bare = tmp_path / "bare.safetensors"
    ids = [f"drawn-{i}" for i in found.strings("ids")]
    write_artifact(bare, "images", {"images": np.asarray(found.array("images")[:]), "ids": ids}, {}, [])
    run_ok("evaluate", bare, *fixed, "-m", chain.model)
    assert set(json.loads((tmp_path / "s.json").read_text())["left_out"]) == {"clip", "inception", "retrieval"}
    for name in ("clip", "inception", "retrieval"):
        assert f"expected what {name} needs" in run_bad("evaluate", bare, *fixed, "-m", chain.model, "--scores", name)
    run_ok("evaluate", rebuilt, *fixed, "-m", chain.model, "-k", 24)
    assert json.loads((tmp_path / "s.json").read_text())["scores"][0]["retrieval"]["k"] == 24
    assert "choose 25 among" in run_bad(
        "evaluate", rebuilt, *fixed, "-m", chain.model, "--scores", "retrieval", "-k", 25
    )
    alone = shutil.copy(chain.clip, tmp_path / "clip.safetensors")  # its tokenizer stays behind
    assert "warning: no CLIP score: expected the tokenizer" in run_cli("evaluate", rebuilt, *fixed, "-m", alone).stderr
    assert "clip" in json.loads((tmp_path / "s.json").read_text())["left_out"]
    assert "tokenizer" in run_bad("evaluate", rebuilt, *fixed, "-m", alone, "--scores", "clip")


def test_another_network_beside_the_clip_in_one_pass(evaluate, tmp_path, chain):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["small"], ["pool"]),
        helper.make_node("Mul", ["pool", "pool"], ["logits"]),
    ]
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 12]) for name in ("pool", "logits")]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 16, 16])], outs
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "net.onnx"
    )
    told = evaluate("--features", f"{tmp_path / 'net.onnx'}:pool,logits")
    assert told["features"] == {"name": told["features"]["name"], "width": 12, "classes": 12}
    assert told["features"]["name"].startswith("net:pool-")
    assert told["scores"][0].keys() - {"blur"} == NAMES | {"inception"}
    assert told["scores"][0]["clip"]["features"] == f"clip-{open_artifact(chain.clip).digest[:8]}"
    assert told["scores"][0]["inception"]["value"] > 1
    assert len(list((tmp_path / "scores.features").iterdir())) == 5  # both networks on both sides, and captions


def test_the_plot_shows_each_score(evaluate, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate("--blur", "0,1,2", "--plot", tmp_path / "a.png")
    first = (tmp_path / "a.png").read_bytes()
    assert min(Image.open(tmp_path / "a.png").size) > 800
    evaluate("--blur", "0,1,2", "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == first
    evaluate("--blur", "1", "--plot", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() != first
    assert "expected an image's name" in run_bad(
        "evaluate", tmp_path, "--reference", tmp_path, "--plot", tmp_path / "b.txt", "-o", tmp_path / "s.json"
    )


def test_json_and_the_pipe(chain, rebuilt, tmp_path):
    fixed = ("--reference", chain.data, "-m", chain.model, "--bootstrap", 0, "--scores", "frechet")
    copy = shutil.copy(rebuilt, tmp_path / "red.images.safetensors")
    said = run_ok("evaluate", *fixed, "--json", stdin=f"{copy}\n")
    assert json.loads(said) == json.loads((tmp_path / "red.scores.json").read_text())


def test_only_scores_are_replaced(chain, rebuilt, tmp_path):
    fixed = (rebuilt, "--reference", chain.data, "-m", chain.model, "--bootstrap", 0, "--scores", "frechet")
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    assert "found something else" in run_bad("evaluate", *fixed, "-o", out)
    assert out.read_text() == '{"mine": 1}'
    run_ok("evaluate", *fixed, "-o", out, "--force")
    run_ok("evaluate", *fixed, "-o", out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give IMAGES --reference"),
        (("--reference", "nowhere"), "found no such file"),
        (("--reference", "DATA", "--blur", "1,x"), "radii of blur such as 0,1,2"),
        (("--reference", "DATA", "--blur", "-1"), "radii of blur"),
        (("--reference", "DATA", "--blur", "17"), "radii of blur below 16 pixels"),
        (("--reference", "DATA", "--blur", "16"), "radii of blur below 16 pixels"),
        (("--reference", "DATA", "--grid", "x.png"), "expected no --grid for images"),
        (("--reference", "DATA", "--everything"), "expected no --everything for images"),
        (("--reference", "DATA", "--scores", "fid"), "expected scores of frechet"),
        (("--reference", "DATA", "--exclude", "nowhere.txt"), "found"),
        (("more", "--reference", "DATA"), ", more; give IMAGES"),
    ],
)
def test_faults_are_one_line(chain, rebuilt, tmp_path, options, words):
    options = [chain.data if option == "DATA" else option for option in options]
    assert words in run_bad("evaluate", rebuilt, *options, "-m", chain.model, "-o", tmp_path / "s.json")


def test_what_is_no_input_is_named(chain, tmp_path):
    assert "found captions" in run_bad("evaluate", chain.captions, "--reference", chain.data, "-o", tmp_path / "s.json")
    assert "say where to write" in run_bad("evaluate", "{00..01}.tar", "--reference", chain.data)


def test_weights_go_to_their_judges(chain, tmp_path):
    out = tmp_path / "s.json"
    run_ok("evaluate", chain.dvae, "--reference", chain.data, "-o", out)
    told = json.loads(out.read_text())
    assert (told["kind"], told["inputs"]["model"]) == ("weights.dvae", open_artifact(chain.dvae).digest)
    assert told["scores"]
    run_ok("evaluate", chain.prior, chain.captions, chain.codes, "-o", out)
    told = json.loads(out.read_text())
    assert (told["kind"], told["inputs"]["codes"]) == ("weights.prior.codes", open_artifact(chain.codes).digest)
    assert "give DVAE --reference" in run_bad("evaluate", chain.dvae, "-o", out)
    assert "give PRIOR CAPTIONS CODES" in run_bad("evaluate", chain.prior, chain.captions, "-o", out)


def test_each_metric_has_its_function_and_its_row():
    from dalle_cli.evaluation.image_metrics import METRICS
    from dalle_cli.evaluation.options import SCORES
    from dalle_cli.viz.metric_charts import METRICS as ROWS

    assert set(METRICS) == set(SCORES)
    assert set(SCORES) - {"retrieval"} == set(ROWS) - {"r1", "r5"}


def test_figures_are_told_with_their_errors():
    told = {"psnr": 21.789, "psnr_error": 0.1786, "pairs": 1472, "held_out": True, "of": {"nats": 1.0}, "by": [[1.0]]}
    assert plain_rows({**told, "one": 2.0, "one_error": None, "lone_error": 0.5, "none": None}) == [
        ["psnr", "21.79 ± 0.18"], ["pairs", "1,472"], ["held out", "yes"], ["of: nats", "1"], ["one", "2"],
        ["lone error", "0.5"],
    ]  # fmt: skip
