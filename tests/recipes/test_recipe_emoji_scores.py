"""The table of scores of the emoji recipe, on the tiny chain: which images and captions each row is of."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ok

from dalle_cli.artifacts import open_artifact
from dalle_cli.data.datasets import open_dataset
from dalle_cli.evaluation.image_sets import open_image_set
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.pipelines import loading

FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path.insert(0, str(FOLDER))
scores = importlib.import_module("scores")
COUNT = 20


@pytest.fixture(scope="module")
def prompts(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "captions.txt"
    assert scores.main(["prompts", str(chain.data), str(COUNT), str(out)]) == 0
    return out


def test_prompts_are_the_captions_of_the_pictures_that_a_limit_leaves(chain, prompts):
    rows = open_image_set("reference", str(chain.data), COUNT).rows
    texts = open_dataset(str(chain.data), need_captions=True).captions
    assert prompts.read_text().splitlines() == [texts[row][0] for row in rows]


def test_no_prompt_is_that_of_two_pictures(chain, tmp_path, capsys):
    for n, text in enumerate(("a cat\nmy cat", "a cat\nyour cat")):
        (tmp_path / f"{n}.png").write_bytes((chain.data / "00.png").read_bytes())
        (tmp_path / f"{n}.txt").write_text(text)
    assert scores.titles(open_image_set("reference", str(tmp_path))) == {"0": "a cat", "1": "your cat"}
    (tmp_path / "1.txt").write_text("a cat")
    assert scores.main(["prompts", str(tmp_path), "2", str(tmp_path / "out.txt")]) == 1
    assert "scores: error: expected a caption of its own for each image, found none for 1" in capsys.readouterr().err


def test_what_is_rebuilt_goes_by_its_own_caption(chain, tmp_path):
    out = tmp_path / "rebuilt.safetensors"
    assert scores.main(["rebuilt", str(chain.data), str(COUNT), str(out), "-m", str(chain.model)]) == 0
    found, rows = open_artifact(out, "images"), open_image_set("reference", str(chain.data), COUNT).rows
    data = open_dataset(str(chain.data), need_captions=True)
    assert list(found.strings("ids")) == [data.ids[row] for row in rows]
    assert list(found.strings("text")) == [data.captions[row][0] for row in rows]
    pixels = np.stack([np.asarray(data.read(row)).transpose(2, 0, 1) for row in rows])
    dvae = loading.dvae(open_artifact(chain.dvae), torch.device("cpu"))
    shown = to_uint8(dvae.reconstruct(from_uint8(torch.from_numpy(pixels)))).numpy()
    np.testing.assert_array_equal(np.asarray(found.array("images")), shown)


def test_the_first_of_each_prompts_candidates_are_those_that_the_limit_leaves(chain, prompts, tmp_path):
    codes = tmp_path / "captions.codes.safetensors"
    run_ok("sample", "--prompts", prompts, "-n", 3, "-m", chain.model, "-o", codes)
    images = run_ok("decode", codes, "-m", chain.model)
    side = open_image_set("generated", images, COUNT)
    assert [side.captions[side.images.ids[row]] for row in side.rows.tolist()] == [
        (text,) for text in prompts.read_text().splitlines()
    ]
    assert side.rows.tolist() == list(range(0, 3 * COUNT, 3))


def test_mistitled_pictures_have_captions_of_others(chain, prompts, tmp_path):
    rebuilt, out = tmp_path / "rebuilt.safetensors", tmp_path / "mistitled.safetensors"
    scores.main(["rebuilt", str(chain.data), str(COUNT), str(rebuilt), "-m", str(chain.model)])
    assert scores.main(["mistitled", str(rebuilt), str(out)]) == 0
    old, new = (open_artifact(path, "images") for path in (rebuilt, out))
    before, after = (list(one.strings("text")) for one in (old, new))
    assert sorted(before) == sorted(after)
    assert all(a != b for a, b in zip(before, after, strict=True))
    np.testing.assert_array_equal(np.asarray(old.array("images")), np.asarray(new.array("images")))


def test_the_table_has_a_row_for_each_file(chain, tmp_path, capsys):
    rebuilt, rows = tmp_path / "rebuilt.safetensors", []
    scores.main(["rebuilt", str(chain.data), str(COUNT), str(rebuilt), "-m", str(chain.model)])
    for name, given in (("real", chain.data), ("shown", rebuilt)):
        rows.append(f"{name}, so called={tmp_path / name}.json")
        fixed = ("--reference", chain.data, "-m", chain.model, "--limit", COUNT, "--bootstrap", 4)
        run_ok("evaluate", given, *fixed, "-o", tmp_path / f"{name}.json", "--scores", "kernel,clip,retrieval")
    assert scores.main(["table", *rows]) == 0
    head, _, *lines = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()
    )
    assert head[:2] == ["pictures", "number"]
    assert head[2].startswith("kernel distance (clip-")
    assert {"CLIP score (100 x cosine, as torchmetrics)", "with others' captions", "retrieval R@1"} <= set(head)
    assert [line[:2] for line in lines] == [["real, so called", "20"], ["shown, so called", "20"]]
    assert lines[0][head.index("retrieval R@1")].startswith("1 (")


def test_the_graph_scores_each_kind_of_picture(tmp_path):
    small = {"OUT": "build/x", "DATA": "small.tar", "READY": "small.tar", "CONFIG": "small.toml", "EXCLUDE": ""}
    given = [f"{name}={value}" for name, value in {**small, "REFERENCE": "small.tar", "N": "4"}.items()]
    done = subprocess.run(
        ["make", "-n", "scores", *given, f"PY={sys.executable}"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    judged = [line.split() for line in done.stdout.splitlines() if " evaluate " in line]
    given = {Path(words[words.index("-o") + 1]).stem: Path(words[2]).name for words in judged}
    assert given == {
        "training": "small.tar",
        "rebuilt": "rebuilt.images.safetensors",
        "once": "captions.images.safetensors",
        "best": "captions.best.safetensors",
        "mistitled": "mistitled.best.safetensors",
    }
    assert "best of 4 by CLIP=" in done.stdout
