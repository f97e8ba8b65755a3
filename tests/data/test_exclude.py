"""`--exclude`: lists of ids, and that training sees none of them."""

import json

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.artifacts import open_artifact
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.exclude import exclude_digest, format_id, read_exclude_list, read_ids
from dalle_cli.data.pairs import Pairs
from dalle_cli.errors import DalleError

GONE = ("02", "03", "07", "11", "19")


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "gone.txt"
    path.write_text("# a comment\n\n" + "\n".join(GONE) + "\n")
    return path


def test_a_text_holds_an_id_a_line(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes('\ufeff# comment\r\n a/b 1 \r\n\n#x\n"# no comment"\n{x}\na/b 1\né\n'.encode())
    assert read_ids(path) == {"a/b 1", "# no comment", "{x}", "é"}
    path.write_text("")
    assert read_ids(path) == frozenset()


def test_json_holds_them_too(tmp_path):
    path = tmp_path / "ids.JSON"
    path.write_text('["a", "# b"]')
    assert read_ids(path) == {"a", "# b"}
    path.write_text('{"pairs": [], "ids": ["c"]}')
    assert read_ids(path) == {"c"}


@given(st.frozensets(st.text(st.characters(exclude_categories=["Cs"]))))
def test_what_is_written_is_read(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("ids") / "ids.txt"
    path.write_text("# head\n" + "".join(f"{format_id(name)}\n" for name in sorted(ids)), encoding="utf-8", newline="")
    assert read_ids(path) == ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.json", b'{"ids": [1]}'),
        ("a.json", b'{"pairs": []}'),
        ("a.json", b"3"),
        ("a.json", b"[" * 100_000),
        ("a.txt", b'"open\n'),
        ("a.txt", b"\xff\xfe\x00"),
        ("none.txt", None),
        (".", None),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DalleError, match=r"expected a list of ids, found .*overlap") as error:
        read_ids(path)
    assert "\n" not in str(error.value)


def test_what_is_excluded_is_counted_and_unknown_ids_are_named(listed, capsys):
    assert read_exclude_list(None, ["02"]) == frozenset()
    assert capsys.readouterr().err == ""
    known = [f"{i:02d}" for i in range(24) if i != 19]
    assert read_exclude_list(listed, known) == set(GONE) - {"19"}
    said = capsys.readouterr().err
    assert "4 of 23 images are excluded by gone.txt" in said
    assert "warning: expected ids of these images in" in said
    assert said.strip().endswith("found 1 of no image: 19")
    assert read_exclude_list(listed, [*known, "19"]) == set(GONE)
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(DalleError, match="found all 2 excluded"):
        read_exclude_list(listed, ["02", "03"])


def test_a_history_has_the_digest_of_what_was_excluded():
    assert exclude_digest(frozenset()) == {}
    assert exclude_digest(frozenset("ab")) == exclude_digest(frozenset("ba"))
    assert exclude_digest(frozenset("ab")) != exclude_digest(frozenset("a"))
    assert exclude_digest(frozenset(["a", "b"])) != exclude_digest(frozenset(["a\nb"]))


def test_a_data_set_without_some(data):
    whole = open_dataset(data, need_captions=True)
    part = whole.exclude(frozenset(GONE))
    assert list(part.ids) == [name for name in whole.ids if name not in GONE]
    assert part.captions[2] == whole.captions[4]
    assert np.array_equal(part.read(2), whole.read(4))
    assert part.skipped is whole.skipped
    assert whole.exclude(frozenset()) is whole


def test_pairs_without_some(chain):
    whole = Pairs(open_artifact(chain.captions), open_artifact(chain.codes))
    part = whole.exclude(frozenset(GONE))
    assert part.ids == [name for name in whole.ids if name not in GONE]
    assert len(whole) == 24
    places, picks = np.arange(len(part)), np.zeros((len(part), 2))
    of_whole = np.array([whole.ids.index(name) for name in part.ids])
    for mine, theirs in zip(part.draw(places, picks), whole.draw(of_whole, picks), strict=True):
        assert np.array_equal(mine, theirs)
    training, validation = part.split(0.2)
    seen = {part.ids[place] for place in (*training, *validation)}
    assert seen == set(whole.ids) - set(GONE)


def arguments(chain, stage, out):
    """A training stage as the chain runs it, to another output."""
    more = {
        "train-dvae": (chain.data,),
        "train-clip": (chain.data, "-t", chain.tokenizer),
        "train-prior": (chain.captions, chain.codes, "-t", chain.tokenizer),
    }
    name = stage.removeprefix("train-")
    quick = ("--set", f"{name}.train.steps=2", "--dtype", "float32", "--workers", 0)[: 4 if name == "prior" else 6]
    return (stage, *more[stage], "--config", chain.recipe, *quick, "-o", out)


class Seen(Exception):
    """The ids that a task was to train and to validate on."""


@pytest.mark.parametrize("stage", ["train-dvae", "train-clip", "train-prior"])
def test_training_sees_none_of_them(chain, tmp_path, listed, stage, monkeypatch):
    """Neither to learn from nor to validate on; everything else is there."""
    from dalle_cli.training import clip, dvae, prior

    seen = []

    def spy(module, name):
        init = getattr(module, name).__init__

        def watched(task, *args, **more):
            init(task, *args, **more)
            if name == "PriorTask":
                seen.append({task.pairs.ids[i] for i in (*task.places, *task.held_out)})
            else:
                seen.append({task.data.ids[i] for i in (*task.rows, *task.held_out)})

        monkeypatch.setattr(getattr(module, name), "__init__", watched)

    spy(dvae, "DVAETask")
    spy(clip, "CLIPTask")
    spy(prior, "PriorTask")
    run_ok(*arguments(chain, stage, tmp_path / "all.safetensors"))
    result = run_cli(*arguments(chain, stage, tmp_path / "some.safetensors"), "--exclude", listed)
    assert result.status == 0, result.stderr
    assert "5 of 24 images are excluded by gone.txt" in result.stderr
    everything = {f"{i:02d}" for i in range(24)}
    assert seen == [everything, everything - set(GONE)]


@pytest.mark.parametrize("stage", ["train-dvae", "train-clip", "train-prior"])
def test_a_run_is_another_one_with_another_list(chain, tmp_path, listed, stage):
    out = tmp_path / "out.safetensors"
    command = arguments(chain, stage, out)
    run_ok(*command, "--exclude", listed)
    first = out.read_bytes()
    entry = open_artifact(out).history[-1]
    assert set(exclude_digest(frozenset(GONE)).items()) <= set(entry["inputs"].items())
    as_json = tmp_path / "gone.json"
    as_json.write_text(json.dumps(sorted(GONE)))
    before = out.stat().st_mtime_ns
    run_ok(*command, "--exclude", as_json)  # the same ids: finished already
    assert (out.read_bytes(), out.stat().st_mtime_ns > before) == (first, True)
    assert "found a finished run of another config or other inputs" in run_bad(*command)
    assert out.read_bytes() == first
    run_ok(*command, "--fresh")
    assert out.read_bytes() != first
    assert "exclude" not in open_artifact(out).history[-1]["inputs"]


def test_an_unfinished_run_of_another_list_is_refused(chain, tmp_path, listed):
    out = tmp_path / "dvae.safetensors"
    command = (*arguments(chain, "train-dvae", out), "--set", "dvae.train.steps=6")
    run_ok(*command, "--exclude", listed)
    out.unlink()
    (tmp_path / "dvae.run" / "checkpoint-00000006.safetensors").unlink()  # as if it had been stopped after four updates
    assert "an unfinished run of another config or other inputs" in run_bad(*command)
    run_ok(*command, "--exclude", listed)


def test_a_list_of_everything_is_refused(chain, tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("".join(f"{i:02d}\n" for i in range(24)))
    for stage in ("train-dvae", "train-clip", "train-prior"):
        line = run_bad(*arguments(chain, stage, tmp_path / "out.safetensors"), "--exclude", path)
        assert "found all 24 excluded" in line
