"""Artifacts: what is written is read again, shards read as one, and weights are those of their model."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from artifact_files import CONFIG, ENTRY, codes, refused, sparse, write_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dalle_cli.artifacts import KINDS, Strings, digest_bytes, history, open_artifact, write_artifact
from dalle_cli.artifacts.artifact import ShardedRows
from dalle_cli.artifacts.container import check_replaceable
from dalle_cli.artifacts.weights import load_into, load_tensors, save_tensors
from dalle_cli.errors import DalleError

# What is written is read again


def test_round_trip(tmp_path):
    path = write_codes(tmp_path / "a.safetensors", prompt=np.array([0, 0, 1], np.int32), text=["é", "", "빨간 🟥"])
    found = open_artifact(path, "codes", "captions")
    assert (found.kind, len(found), found.config, found.history) == ("codes", 3, CONFIG, [ENTRY])
    assert isinstance(found.array("codes"), np.memmap)
    assert not found.array("codes").flags.writeable
    np.testing.assert_array_equal(found.array("codes"), codes(3))
    assert list(found.strings("text")) == ["é", "", "빨간 🟥"]
    assert found.strings("ids")[-1] == "id 2"
    assert sorted(found.columns) == ["codes", "prompt"]
    assert "text" in found
    assert "codes" in found
    assert "score" not in found
    assert found.digest == digest_bytes(path.read_bytes())


def test_any_safetensors_reader_opens_it(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["codes"], codes(3))
    assert sorted(tensors) == ["codes", "ids.bytes", "ids.offsets"]


def test_same_content_is_the_same_bytes(tmp_path):
    write_codes(tmp_path / "a.safetensors", config={"grid": 2, "n_vocab": 9}, text=list("xyz"))
    columns = {"text": list("xyz"), "ids": [f"id {i}" for i in range(3)], "codes": codes(3)}
    write_artifact(tmp_path / "b.safetensors", "codes", columns, {"n_vocab": 9, "grid": 2}, [ENTRY])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_no_rows(tmp_path):
    found = open_artifact(write_codes(tmp_path / "a.safetensors", n=0))
    assert (len(found), found.array("codes").shape, list(found.strings("ids"))) == (0, (0, 2, 2), [])


def test_columns_that_are_views_are_written_as_they_look(tmp_path):
    wide = np.arange(40, dtype=np.uint16).reshape(5, 2, 4)
    columns = {"codes": wide[::2, :, ::2], "ids": ["a", "b", "c"]}
    path = write_artifact(tmp_path / "a.safetensors", "codes", columns, {}, [])
    np.testing.assert_array_equal(open_artifact(path).array("codes"), wide[::2, :, ::2])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_round_trip(texts):
    column = Strings.pack(texts)
    assert list(column) == texts
    assert column[:] == texts
    assert column[::-1] == texts[::-1]
    for i in range(-len(texts), len(texts)):
        assert column[i] == texts[i]
    with pytest.raises(IndexError):
        column[len(texts)]


def test_strings_of_half_a_surrogate_pair_are_made_text():
    assert list(Strings.pack(["a\ud800b"])) == ["a?b"]


def test_a_fact_of_the_header(tmp_path):
    found = open_artifact(write_codes(tmp_path / "a.safetensors", config={"grid": 2, "yes": True}))
    assert found.require("grid", int) == 2
    for name, type_ in (("encoder", str), ("grid", str), ("yes", int)):
        with pytest.raises(DalleError, match=name):
            found.require(name, type_)


# Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """ShardedRows 0 to 10 in shards of 4, 0, 5 and 2."""
    folder = tmp_path_factory.mktemp("shards") / "codes"
    at = 0
    for i, n in enumerate((4, 0, 5, 2)):
        write_codes(folder / f"{i:05d}.safetensors", n, at, {**CONFIG, "shards": 4})
        at += n
    return folder


INDICES = (
    *(0, 3, 4, 8, 10, -1, -11, np.int64(5)),
    *(slice(None), slice(2, 7), slice(9, 1, -3), slice(-3, None), slice(5, 5)),
    *([3, 4, 3], [-1, 0], [], np.array([10, 2], np.uint8), np.arange(11) % 3 == 0, np.zeros(11, bool)),
)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_shards_read_as_one(shards, index):
    rows, whole = open_artifact(shards).array("codes"), codes(11)
    expected = whole[np.asarray(index, int) if isinstance(index, list) else index]
    np.testing.assert_array_equal(rows[index], expected)
    assert rows[index].dtype == expected.dtype
    assert rows[index].shape == expected.shape


@pytest.mark.parametrize("index", [11, -12, [0, 11], (0, 1), 1.5, [[0, 1]], [True], "codes"], ids=str)
def test_shards_refuse_what_is_no_row(shards, index):
    with pytest.raises(IndexError):
        open_artifact(shards).array("codes")[index]


def test_shards_are_an_artifact(shards):
    found = open_artifact(shards, "codes")
    assert (len(found), found.config) == (11, CONFIG)
    np.testing.assert_array_equal(np.asarray(found.array("codes")), codes(11))
    np.testing.assert_array_equal(np.array(list(found.array("codes"))), codes(11))
    assert found.array("codes").shape == (11, 2, 2)
    assert np.asarray(found.array("codes"), dtype=np.int64).dtype == np.int64
    ids = found.strings("ids")
    assert [ids[i] for i in (0, 4, -1, -11)] == ["id 0", "id 4", "id 10", "id 0"]
    assert ids[3:6] == ["id 3", "id 4", "id 5"]
    assert list(ids) == [f"id {i}" for i in range(11)]
    for i in (11, -12):
        with pytest.raises(IndexError):
            ids[i]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_rows_index_as_the_whole_does(draw, sizes):
    whole = np.arange(2 * sum(sizes)).reshape(-1, 2)
    rows = ShardedRows(np.split(whole, np.cumsum(sizes)[:-1]))
    n = len(whole)
    bounds = st.none() | st.integers(-9, 9)
    choices = st.builds(slice, bounds, bounds, st.none() | st.integers(-3, 3).filter(bool))
    if n:
        choices |= st.integers(-n, n - 1) | st.lists(st.integers(-n, n - 1), min_size=1).map(np.array)
    index = draw.draw(choices)
    np.testing.assert_array_equal(rows[index], whole[index])


def test_digest_of_shards_is_of_all_of_them(shards, tmp_path):
    write_codes(tmp_path / "00000.safetensors", 4, 0, {**CONFIG, "shards": 1})
    assert open_artifact(tmp_path).digest != open_artifact(tmp_path / "00000.safetensors").digest
    assert open_artifact(shards).digest == open_artifact(shards).digest != open_artifact(tmp_path).digest


def test_incomplete_or_mixed_shards(tmp_path):
    def fill(name, configs, columns=({},) * 9):
        for i, config in enumerate(configs):
            if config is not None:
                write_codes(tmp_path / name / f"{i:05d}.safetensors", 2, 2 * i, config, **columns[i])
        return refused(tmp_path / name)

    def of(n, **more):
        return {**CONFIG, "shards": n, **more}

    assert "expected 3 shards, found 2" in fill("last missing", [of(3), of(3)])
    assert "expected 3 shards, found 2" in fill("first missing", [None, of(3), of(3)])
    assert "expected 2 shards, found 3" in fill("too many", [of(2)] * 3)
    assert "from another" in fill("of two configs", [of(2), of(2, grid=3)])
    assert "found others in" in fill("of two layouts", [of(2), of(2)], [{}, {"text": ["a", "b"]}])
    for lie in ("2", 1.0, -1, None, [1], True):
        fill(f"lying {lie!r}", [of(lie)] * 2)
    (tmp_path / "empty").mkdir()
    assert "folder without shards" in refused(tmp_path / "empty")


# History and digests


def test_history_holds_each_stage_once(tmp_path):
    first = history("tokenize", {"length": 8}, dataset="d1")
    a = open_artifact(write_codes(tmp_path / "a.safetensors", entries=first))
    second = history("train", {}, dataset="d1", model=a)
    b = open_artifact(write_codes(tmp_path / "b.safetensors", entries=second))
    both = history("sample", {"seed": 0}, one=a, two=b)
    assert [entry["stage"] for entry in both] == ["tokenize", "train", "sample"]
    assert both[-1] == {"stage": "sample", "options": {"seed": 0}, "inputs": {"one": a.digest, "two": b.digest}}
    assert second[-1]["inputs"] == {"dataset": "d1", "model": a.digest}


# Weights


def test_weights_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2).bfloat16(), "s": torch.tensor(1.5), "e": torch.zeros(0, 3)}
    path = save_tensors(tmp_path / "w.safetensors", "weights.dvae", tensors, {"model": {}}, [])
    found = open_artifact(path, "weights.dvae")
    assert len(found) == 0
    for name, tensor in load_tensors(found).items():
        assert tensor.dtype == tensors[name].dtype
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
    with pytest.raises(DalleError, match="BF16"):
        found.array("b")


def test_weights_that_are_not_those_of_the_model(tmp_path):
    def load(**state):
        path = save_tensors(tmp_path / "w.safetensors", "weights.dvae", state, {}, [])
        module = torch.nn.Linear(2, 3)
        load_into(module, open_artifact(path))
        return module

    weight, bias = torch.ones(3, 2), torch.ones(3)
    torch.testing.assert_close(load(weight=weight.bfloat16(), bias=bias).weight, weight)
    for state in (
        {"weight": weight},
        {"weight": weight, "bias": bias, "more": bias + 1},
        {"weight": weight.T, "bias": bias},
    ):
        with pytest.raises(DalleError, match="expected the weights"):
            load(**state)


# Reading does not read more than it must


def test_a_large_file_is_opened_without_reading_it(tmp_path):
    path = sparse(tmp_path / "large.safetensors")
    began = time.perf_counter()
    tracemalloc.start()
    found = open_artifact(path)
    tensor = found.array("w")
    assert tensor[1 << 29] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    print(f"1 GB opened in {1000 * (time.perf_counter() - began):.1f} ms")


# Kinds


def test_wrong_kinds(tmp_path):
    path = write_codes(tmp_path / "a.safetensors")
    assert "expected images or captions, found codes" in refused(path, "images", "captions")
    check_replaceable(path, "codes")


def test_every_kind_is_told_in_words_of_its_own():
    assert len({kind.about for kind in KINDS.values() if kind.about}) == len(KINDS)
