"""`dalle report`: what is found in a run's folder, what the page says of it, and the page in a browser."""

import base64
import functools
import hashlib
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_bad, run_ok
from PIL import Image

from dalle_cli.artifacts import digest_file, history, open_artifact, write_artifact
from dalle_cli.report import charts, lineage, tables
from dalle_cli.report import html as pages
from dalle_cli.report import images as gallery
from dalle_cli.report.scan import scan
from dalle_cli.viz.charts import number
from dalle_cli.viz.curves import Curves, Line

EVIL = "<script>alert(1)</script> & \"a\" 'red' <img src=x onerror=alert(2)>"
VOID = {"meta", "link", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """A page taken apart: elements with attributes, the texts in each kind of element; all must be shut in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def of(self, tag, name=None):
        """The elements of a tag; of one class, where it is named."""
        return [a for t, a in self.elements if t == tag and (name is None or name in (a.get("class") or "").split())]


def make(*args):
    """Write a report; the page's text and the page taken apart."""
    text = Path(run_ok("report", *args)).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
    """The report of the whole tiny chain."""
    return make(chain.root, "-o", tmp_path_factory.mktemp("report") / "report.html")


def images(path, n, texts, scores=None, side=4, made_from=None):
    """An images artifact of n pictures, each of one color of its own."""
    pixels = np.zeros((n, 3, side, side), np.uint8)
    pixels[:, 0] = (np.arange(n) * 7 % 256)[:, None, None]
    columns = {"images": pixels, "ids": [f"{i:05d}" for i in range(n)], "text": texts}
    if scores is not None:
        columns["score"] = np.asarray(scores, np.float32)
    inputs = {} if made_from is None else {"images": open_artifact(made_from)}
    return write_artifact(path, "images", columns, {}, history("rerank" if inputs else "decode", {"n": n}, **inputs))


def log(folder, name="prior", rows=()):
    """A run's log."""
    path = folder / f"{name}.run" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def decoded(uri):
    """The picture of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_the_chain_has_all_its_parts(made, chain):
    _, page = made
    titles = [text for text in page.texts["h2"] if text.strip()]
    assert titles == ["Models", "Curves", "While training", "Samples", "Provenance", "Artifacts", "Left out"]
    assert page.texts["h1"] == [chain.root.name]
    names = page.texts["b"]
    for path in (chain.dvae, chain.prior, chain.best, chain.codes):
        assert path.relative_to(chain.root).as_posix() in names
    assert any("No scores" in text for text in page.texts["li"])
    parameters = sum(t.shape and int(np.prod(t.shape)) for t in open_artifact(chain.prior).headers[0].tensors.values())
    assert f"{parameters:,} parameters" in page.texts["span"]
    assert any(digest_file(chain.prior) == text for text in page.texts["code"])


def test_the_page_fetches_nothing_and_runs_its_own_script_alone(made):
    text, page = made
    assert not re.search(r"""(?:src|href|action|poster|data)=["'](?!data:|#)""", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!data:)", text)
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    assert not any(a.get("style") for _, a in page.elements)


def test_links_within_the_page_lead_somewhere(made):
    _, page = made
    places = {a["id"] for _, a in page.elements if "id" in a}
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(places)
    links = {a["href"][1:] for a in page.of("a")}
    assert len(links) > 10
    assert links <= places


def test_the_same_run_is_the_same_bytes_wherever_it_lies(chain, tmp_path, made):
    copy = tmp_path / "elsewhere" / chain.root.name
    shutil.copytree(chain.root, copy)
    assert make(copy)[0] == made[0]
    assert make(copy)[0] == made[0]  # the page itself, which lies there now, is no part of the run
    assert str(tmp_path) not in made[0]


def edges(branches, above=None):
    """(input, artifact) for each line of the list."""
    for branch in branches:
        yield from [(branch.node.name, above)] if above else []
        yield from edges(branch.inputs, branch.node.name)


def test_the_provenance_is_that_of_the_histories(chain):
    found = scan(chain.root)
    nodes = lineage.trace(found.items, {item.name: item.name for item in found.items})
    named = sorted((nodes[digest].name, node.name) for node in nodes.values() for digest in node.inputs)
    assert named == sorted([
        ("tokenizer.json", "captions"), ("data set", "captions"), ("data set", "dvae"), ("data set", "codes"),
        ("dvae", "codes"), ("data set", "clip"), ("tokenizer.json", "clip"), ("captions", "prior"), ("codes", "prior"),
        ("prior", "red.codes"), ("red.codes", "red.images"), ("dvae", "red.images"), ("red.images", "red.best"),
        ("clip", "red.best"),
    ])  # fmt: skip
    assert sorted(edges(lineage.tree(nodes))) == named  # each once, however many ways lead there
    assert {node.name for node in nodes.values() if not node.anchor} == {"data set"}


def test_a_file_by_itself_still_tells_of_its_inputs(chain, tmp_path):
    shutil.copy(chain.best, tmp_path)
    _, page = make(tmp_path / chain.best.name)
    assert (tmp_path / "red.best.report.html").exists()
    said = "\n".join(page.texts["span"])
    assert all(stage in said for stage in ("rerank", "train-prior", "train-dvae", "decode"))
    assert len(page.of("span", "absent")) >= 10
    assert "red.best" in page.texts["a"]


def test_a_history_that_lies_of_itself_does_not_loop(tmp_path):
    loop = [{"stage": "tokenize", "options": {}, "inputs": {"captions": "a" * 64}}]
    loop += [{"stage": "train-prior", "options": {}, "inputs": {"captions": "a" * 64, "codes": "b" * 64}}]
    columns = {"tokens": np.zeros((1, 2), np.uint16), "lengths": np.ones(1, np.uint16), "ids": ["x"], "text": ["y"]}
    path = write_artifact(tmp_path / "captions.safetensors", "captions", columns, {}, loop)
    _, page = make(path)
    assert page.of("div", "lineage")
    assert page.texts["a"].count("captions") == 1


def test_prompts_and_paths_are_text(tmp_path):
    folder = tmp_path / "<b>run & co"
    images(folder / "a<i>.images.safetensors", 3, [EVIL, EVIL, "</details></div>"], [0.5, 0.25, float("nan")])
    (folder / "scores.json").write_text(json.dumps({EVIL: EVIL, "nested": {"</table>": [EVIL, {EVIL: 1}]}}))
    (folder / "notes.txt").write_text(EVIL)
    log(folder, "c<u>", [{"step": s, EVIL: s, "loss": 1 / s} for s in (1, 2)])
    (folder / "cut<s>.safetensors").write_bytes(b"nothing")
    text, page = make(folder, "--title", EVIL)
    assert page.texts["h1"] == [EVIL]
    assert page.texts["title"] == [EVIL]
    assert len(page.of("script")) == 2
    assert not {"b", "i", "u", "s"} & {t for t, a in page.elements if not a} - {"b"}
    assert not page.of("u") + page.of("i") + page.of("s")
    assert EVIL in page.texts["h4"]
    assert EVIL in page.texts["pre"]
    assert not any("onerror" in a for _, a in page.elements)
    assert "alert(1)</script>" not in text
    assert json.loads(re.search(r'id="values">(.*?)</script>', text, re.DOTALL)[1])


def test_candidates_stand_beside_the_best_of_each_prompt(tmp_path):
    texts = [f"prompt {i // 4}" for i in range(12)]
    source = images(tmp_path / "x.images.safetensors", 12, texts)
    pixels = np.asarray(open_artifact(source).array("images"))[[2, 5, 11]]
    columns = {"images": pixels, "ids": ["00002", "00005", "00011"], "text": [f"prompt {i}" for i in range(3)]}
    columns["score"] = np.array([0.5, 0.25, 0.75], np.float32)
    made_by = history("rerank", {"keep": 1}, images=open_artifact(source))
    write_artifact(tmp_path / "x.best.safetensors", "images", columns, {}, made_by)
    _, page = make(tmp_path)
    assert page.texts["h3"] == ["x.best"]
    assert page.texts["h4"][:3] == ["prompt 0", "prompt 1", "prompt 2"]
    assert [text for text in page.texts["figcaption"] if text.strip()] == ["0.500", "0.250", "0.750"]
    assert any("best by CLIP among 4 for each of 3 prompts" in text for text in page.texts["p"])
    assert any("median 0.500, 0.250 to 0.750" in text for text in page.texts["p"])
    shown = [decoded(a["src"]).getpixel((0, 0))[0] // 7 for a in page.of("img")]
    assert shown == [2, 0, 1, 3, 5, 4, 6, 7, 11, 8, 9, 10]  # the best first, then the others in order
    assert len(page.of("figure", "first")) == 3


def test_small_pictures_are_what_they_were_and_enlarged_by_whole_pixels(tmp_path):
    path = images(tmp_path / "x.images.safetensors", 3, ["a", "b", "c"], side=16)
    _, page = make(path)
    stored = np.asarray(open_artifact(path).array("images"))
    for a, expected in zip(page.of("img"), stored, strict=True):
        np.testing.assert_array_equal(np.asarray(decoded(a["src"])).transpose(2, 0, 1), expected)
        assert a["width"] == a["height"] == "96"
        assert a["class"] == "small"


def test_many_pictures_stay_within_their_room_and_the_page_says_so(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (160, 3, 256, 256), np.uint8)
    columns = {"images": noise, "ids": [str(i) for i in range(160)], "text": [f"p{i // 2}" for i in range(160)]}
    path = write_artifact(tmp_path / "x.images.safetensors", "images", columns, {}, [])
    text, page = make(path)
    uris = [a["src"] for a in page.of("img")]
    assert 10 < len(uris) < 128
    assert sum(map(len, uris)) <= gallery.SAMPLE_BYTES
    assert all(uri.startswith("data:image/jpeg") for uri in uris)
    assert len(text) < 10_000_000
    assert any("more than the page has room for" in told for told in page.texts["li"])
    assert any("the first 64 prompts are shown" in told for told in page.texts["p"])


def test_sheets_are_spread_over_the_training_and_fit(tmp_path):
    weights = log(tmp_path, rows=[{"step": s, "loss": 1 / s} for s in (1, 2)])
    (weights / "samples").mkdir()
    for step in range(1, 31):
        Image.new("RGB", (40, 20), (step, 0, 0)).save(weights / "samples" / f"{step:08d}.png")
    (weights / "samples" / "00000031.png").write_bytes(b"no picture")
    _, page = make(tmp_path)
    steps = [decoded(a["src"]).getpixel((0, 0))[0] for a in page.of("img")]
    assert steps[0] == 1
    assert len(steps) == gallery.MOST_GRIDS - 1
    assert steps == sorted(steps)
    assert "after 1 update" in page.texts["figcaption"]
    assert page.of("input")[0]["max"] == str(len(steps) - 1)
    assert any("7 of 31 image grids shown" in told for told in page.texts["p"])
    assert any("00000031.png: no image" in told for told in page.texts["li"])
    assert [path.stem for path in gallery.spread([Path(str(i)) for i in range(100)])] == [
        "0", "14", "28", "42", "57", "71", "85", "99",
    ]  # fmt: skip


def test_images_are_png_then_jpeg_then_left_out():
    pictures = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(6)]
    whole, lossy = gallery.encode(pictures, 10**9)
    assert not lossy
    assert all(np.array_equal(decoded(uri), picture) for uri, picture in zip(whole, pictures, strict=True))
    small, lossy = gallery.encode(pictures, sum(map(len, whole)) - 1)
    assert lossy
    assert None not in small
    few, _ = gallery.encode(pictures, sum(map(len, small[:4])))
    assert few == [*small[:4], None, None]


def test_a_log_of_many_rows_makes_no_large_page(tmp_path):
    rows = [{"step": s, "seconds": s / 9, "loss": 5 + (s % 7), "psnr": s, "kl": s % 5} for s in range(1, 20_001)]
    log(tmp_path, rows=rows)
    text, page = make(tmp_path)
    assert len(text) < 200_000
    points = [len(line["x"]) for panel in values(text) for line in panel["lines"]]
    assert len(points) == 3
    assert max(points) <= 300
    assert len(page.of("svg", "panel")) == 3
    assert "20,000" in page.texts["td"]
    assert "37 min" in page.texts["td"]


def values(text):
    """What the page's script knows of the curves."""
    return json.loads(re.search(r'id="values">(.*?)</script>', text, re.DOTALL)[1])


def drawn(key, y, validation=()):
    """The points of a panel, as (x, y) in its own units, by its values and by its SVG; the SVG; and the values."""
    pytest.importorskip("matplotlib")
    training = {key: Line([float(i + 1) for i in range(len(y))], list(map(float, y)))}
    held_out = {key: Line([float(len(y))] * len(validation), list(map(float, validation)))} if validation else {}
    (panel,), _ = charts.draw(Curves("run", training, held_out), "run")
    path = re.search(r'<g class="training"><path d="([^"]*)"', panel.svg)[1]
    shown = np.array([pair.split() for pair in re.split("[ML]", path)[1:]], float)
    return np.array(panel.values["lines"][0]["at"]), shown, panel.svg, panel.values


def test_a_panel_is_to_scale_and_the_script_knows_its_points():
    points, shown, svg, values = drawn("psnr", [10, 20, 30])
    np.testing.assert_allclose(points, shown, atol=0.051)
    across, down = np.diff(points[:, 0]), np.diff(points[:, 1])
    np.testing.assert_allclose(across, across[0], atol=0.11)
    np.testing.assert_allclose(down, down[0], atol=0.11)
    assert down[0] < 0 < across[0]
    assert points[-1, 0] == charts.BOX[0] + charts.BOX[2]
    assert points[:, 1].min() >= values["top"]
    assert points[:, 1].max() <= values["bottom"]
    assert values["lines"][0]["y"] == [10, 20, 30]
    assert {10, 20, 30} <= {float(text) for text in Page(svg).texts["text"]}


def test_a_panel_is_in_the_colors_of_the_page_and_its_ids_are_its_own():
    _, _, svg, _ = drawn("loss", [3, 2], [2.5])
    page = Page(svg)
    assert not any("style" in a or "clip-path" in a for _, a in page.elements)
    assert not {"style", "metadata", "clippath"} & {tag for tag, _ in page.elements}
    assert {a["stroke"] for tag, a in page.elements if tag == "use"} >= {"var(--faint)"}
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert ids
    assert all(name.startswith("run-0-") for name in ids)
    assert {a["href"][1:] for tag, a in page.elements if tag == "use"} == set(ids)


@pytest.mark.parametrize("values", [[0], [5], [0, 0], [-1, -2], [1e-30, 1e30], [7, 7]], ids=str)
def test_any_values_can_be_drawn(values):
    assert np.isfinite(drawn("kl", values)[0]).all()


def test_the_value_at_the_end_is_of_the_validation_where_there_is_one():
    _, _, svg, _ = drawn("loss", [3, 2], [2.5])
    assert Page(svg).texts["text"][-1] == "2.5"
    assert "ends-validation" in svg
    _, _, svg, _ = drawn("loss", [3, 2])
    assert Page(svg).texts["text"][-1] == "2"
    assert "ends-training" in svg


def show(value):
    """A page with a JSON value as tables."""
    source = '{% import "tables.html" as tables with context %}{{ tables.show(value, {}) }}'
    return Page(pages.environment().from_string(source).render(value=value, json=tables))


def test_scores_of_any_form_are_told():
    value = {
        "frechet": {"value": 12.5, "low": 11.0, "high": 14.0, "subset": 100}, "n": 1200, "features": "a" * 64,
        "of": {"seen": {"fid": 1.5, "is": 2.5}, "unseen": {"fid": 3.5, "is": 4.5}},
        "by_position": [[0.0, 1.0], [0.25, 0.5]], "curve": [1.0, 2.0] * 20, "empty": {}, "none": None, "ok": True,
        "nats": {"value": 0.5, "error": 0.0125}, "deep": functools.reduce(lambda inner, _: {"x": inner}, range(12), 1),
    }  # fmt: skip
    page = show(value)
    told = [text for texts in page.texts.values() for text in texts]
    for expected in ("12.5 (11\xa0to\xa014)", "1,200", "0.5 ± 0.0125", "true", "none", "seen", "fid", "3.5", "a" * 12):
        assert expected in told, expected
    assert [float(a["opacity"]) for a in page.of("rect")] == [0.04, 1.0, 0.28, 0.52]
    assert any("40 values, 1 to 2" in text for text in told)
    assert any("deeper than is shown" in text for text in told)
    numbers = ([1, 10**400] * 9, [[1, 2], [3, 10**400]], [float("nan")] * 9, 10**400)
    for odd in (
        [],
        {},
        [[]],
        [1, "x", None],
        [[1, 2], [3]],
        [{}],
        {"a": []},
        3,
        "x",
        None,
        [[[[[[[[1]]]]]]]],
        *numbers,
    ):
        show(odd)


def test_a_figure_stands_with_its_error_or_interval_and_a_strange_one_by_itself():
    value = {"psnr": 21.75, "psnr_error": 0.5, "share": 0.5, "share_interval": [0.25, 0.75], "x": 1.5, "x_error": "big"}
    page = show({**value, "none": 2.5, "none_error": None, "lone_error": 3.5})
    assert page.texts["th"] == ["psnr", "share", "x", "x error", "none", "none error", "lone error"]
    assert page.texts["span"] == ["21.75 ± 0.5", "0.5 (0.25\xa0to\xa00.75)"]
    assert page.texts["td"] == ["1.5", "big", "2.5", "none", "3.5"]


def test_what_survey_and_overlap_write_are_tables(tmp_path):
    votes = [{"caption": f"c{i}", "realistic": {"A": i, "B": 2}, "matches": {"A": 3, "B": 4}} for i in range(20)]
    about = {"majority": 0.5, "majority_interval": [0.25, 0.75], "votes": {"A": 3, "B": 5}}
    page = show({"questions": {"realistic": about, "matches": about}, "by_caption": votes})
    heads = [["", "realistic", "matches"], ["caption", "realistic A", "realistic B", "matches A", "matches B"]]
    assert [text for text in page.texts["th"] if text in heads[0] + heads[1]] == heads[0][1:] + heads[1]
    assert {"majority", "votes A", "votes B"} <= set(page.texts["th"])
    assert not page.of("li")
    page = show({"ids": [f"id{i}" for i in range(100)]})
    assert not page.of("li")
    assert "and 76 more, which are not shown" in page.texts["p"]
    log(tmp_path, rows=[{"step": 1, "loss": 1}])
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    _, page = make(tmp_path)
    assert page.texts["pre"][0].splitlines()[-2:] == ["line 59", "... and 40 lines more"]


def test_scores_at_several_radii_stand_side_by_side(tmp_path):
    def score(value):
        return {"value": value, "low": value - 1, "high": value + 1}

    scores = [
        {"blur": b, "frechet": {"name": "FID", **score(10.0 + b)}, "retrieval": {"r1": score(2.5)}} for b in (0.0, 2.0)
    ]
    path = images(tmp_path / "x.images.safetensors", 2, ["a", "b"])
    inputs = {"generated": digest_file(path), "reference": "f" * 64}
    told = {"stage": "evaluate", "kind": "images", "inputs": inputs, "options": {"seed": 7}, "scores": scores}
    (tmp_path / "x.scores.json").write_text(json.dumps(told))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "x.scores.png")
    _, page = make(tmp_path)
    assert page.texts["th"][page.texts["th"].index("blur 0") :][:2] == ["blur 0", "blur 2"]
    assert {"FID", "retrieval r1", "options.seed"} <= set(page.texts["th"])
    assert {"10 (9\xa0to\xa011)", "12 (11\xa0to\xa013)"} <= set(page.texts["span"])
    assert "x.images.safetensors" in page.texts["a"]
    assert any(a.get("alt") == "x.scores.png" for a in page.of("img"))
    assert "x.scores.png" not in page.texts.get("summary", [])


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(chain, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(chain.root, root)
    data = chain.captions.read_bytes()
    (root / "captions.safetensors").write_bytes(data[: len(data) // 2])
    (root / "model" / "dvae.safetensors").unlink()
    (root / "broken.json").write_text('{"a": ')
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "codes.skipped.jsonl").write_text('{"id": "x"}\n{"id": "y"}\n')
    (root / "other" / "model").mkdir(parents=True)
    log(root / "model", "empty", [])
    _, page = make(root)
    notes = "\n".join(page.texts["li"])
    for expected in (
        "captions.safetensors: expected", "model/dvae.safetensors: not written yet", "broken.json: not read",
        "binary.txt: not read", "2 samples were skipped", "other/ is a run of its own", "model/empty.run: expected",
    ):  # fmt: skip
        assert expected in notes, expected
    assert str(tmp_path) not in notes
    assert any("checkpoint-" in text for text in page.texts["b"])
    assert "in training" in page.texts["td"]


@pytest.mark.parametrize("suffix", [".safetensors", ".run"])
def test_weights_and_their_folder_lead_to_the_same_page(chain, tmp_path, suffix):
    shutil.copytree(chain.model, tmp_path / "m")
    text, page = make(tmp_path / "m" / f"prior{suffix}")
    assert (tmp_path / "m" / "prior.report.html").read_text() == text
    assert page.texts["h1"] == ["prior"]
    assert page.texts["b"].count("prior.safetensors") == 1
    assert "clip.safetensors" not in page.texts["b"]
    assert page.of("svg", "panel")
    titles = [title for title in page.texts["h2"] if title.strip()]
    assert "Curves" in titles
    assert "Samples" not in titles


def test_shards_are_one_artifact_and_a_path_may_come_from_the_pipe(chain, tmp_path):
    shutil.copytree(chain.codes, tmp_path / "codes")
    text = Path(run_ok("report", stdin=f"{tmp_path / 'codes'}\n")).read_text()
    assert (tmp_path / "codes.report.html").exists()
    assert "24 rows in 3 shards" in Page(text).texts["span"]


def test_faults_are_told_in_a_line(tmp_path, chain):
    assert "no such file" in run_bad("report", tmp_path / "nothing")
    assert "found no artifact" in run_bad("report", tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert "x.safetensors" in run_bad("report", tmp_path / "x.safetensors")
    (tmp_path / "mine.html").write_text("<p>mine")
    assert "mine.html" in run_bad("report", chain.prior, "-o", tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    run_ok("report", chain.prior, "-o", tmp_path / "mine.html", "--force")
    run_ok("report", chain.prior, "-o", tmp_path / "mine.html")
    assert "folder" in run_bad("report", chain.prior, "-o", tmp_path)


@pytest.mark.parametrize("missing", ["torch", "matplotlib", "jinja2"])
def test_what_is_not_installed(chain, tmp_path, missing):
    """Nothing needs torch; without matplotlib the page says that it has no charts; without jinja2 there is none."""
    out = tmp_path / "x.html"
    code = (
        f"import sys; sys.modules[{missing!r}] = None;"
        f"sys.argv = ['dalle', 'report', {str(chain.root)!r}, '-o', {str(out)!r}];"
        "from dalle_cli.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (missing == "jinja2"), done.stderr
    if missing == "jinja2":
        assert "dalle-cli[report]" in done.stderr.splitlines()[-1]
        return
    page = Page(out.read_text())
    assert bool(page.of("svg", "panel")) == (missing == "torch")
    assert any("dalle-cli[plot]" in text for text in page.texts["p"]) == (missing == "matplotlib")


def test_numbers_for_people():
    assert [number(v) for v in (0.0284, 33, 12_000, 4_700_000, 2e-5)] == ["0.0284", "33", "12k", "4.7M", "2e-5"]
    assert [pages.size(v) for v in (12, 1500, 3_700_000)] == ["12 bytes", "1.5 kB", "3.7 MB"]
    assert [pages.duration(v) for v in (48, 390, 7200, 172_800)] == ["48 s", "6.5 min", "2 h", "2 days"]
    assert [pages.count(v, "image") for v in (1, 1200)] == ["1 image", "1,200 images"]


def test_templates_are_shipped():
    """As package data: what an installed package has beside its modules."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"report/templates/*"' in re.search(r"package-data.dalle_cli = \[(.*)\]", text)[1]
    for name in ("base.html", "report.html", "report.css", "report.js", "survey.html", "page.css", "tables.html"):
        assert (pages.TEMPLATES / name).is_file()
    assert "</" not in (pages.TEMPLATES / "report.js").read_text()


def test_in_a_browser(browser, chain, tmp_path):
    """No error, no request, no sideways scrolling; values at the pointer, sheets by slider, links that open."""
    root = tmp_path / "run"
    shutil.copytree(chain.root, root)
    rows = [{"step": 10 * s, "loss": 10.0 - s, "grad_norm": 1.0 * s} for s in range(1, 10)]
    (root / "model" / "prior.run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = root / "model" / "prior.run" / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    for step in (1, 2):
        Image.new("RGB", (40, 20), (step, 0, 0)).save(samples / f"{step:08d}.png")
    (root / "wide.json").write_text('{"stage": "evaluate", "scores": {"psnr": 1.5}}')
    Image.new("RGB", (1800, 600)).save(root / "wide.png")
    out = run_ok("report", root, "--title", EVIL, "-o", tmp_path / "x.html")
    for width, scheme in ((1280, "light"), (390, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said, asked = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("dialog", lambda dialog, said=said: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(f"file://{out}")
        assert page.locator("h1").inner_text() == EVIL
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = "images => images.map(i => [i.width, i.height, i.naturalWidth / i.naturalHeight])"
        for wide, high, ratio in page.locator("img:visible").evaluate_all(shown):
            assert wide == pytest.approx(high * ratio, abs=1 + ratio)  # made smaller, not squeezed
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 90) == (scheme == "dark")
        panel = page.locator("section#curves svg.panel").last
        panel.scroll_into_view_if_needed()
        panel.hover(position={"x": panel.bounding_box()["width"] * 0.85, "y": 40})
        assert page.locator(".tip:visible").inner_text() == "update 90\ntraining 9"
        panel.focus()
        panel.press("ArrowLeft")
        assert page.locator(".tip:visible").inner_text() == "update 80\ntraining 8"
        stepper = page.locator(".stepper").last
        assert stepper.locator("figure:visible figcaption").inner_text() == "after 2 updates"
        stepper.locator("input").press("ArrowLeft")
        assert stepper.locator("figure:visible figcaption").inner_text() == "after 1 update"
        link = page.locator(".lineage a").first
        target = link.get_attribute("href")
        assert page.locator(target).get_attribute("open") is None
        link.focus()
        link.press("Enter")
        page.locator(f"{target}[open]").wait_for()  # wait_for_function evaluates strings, which the policy forbids
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [f"file://{out}"]
        page.close()
