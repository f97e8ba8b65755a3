"""Captions and codes joined by id."""

import itertools

import numpy as np
import pytest

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data.pairs import Pairs
from dalle_cli.errors import DalleError


def artifacts(tmp_path, caption_ids, code_ids, n_vocab=100, grid=1, n_text=1):
    tokens = {
        "tokens": np.arange(len(caption_ids), dtype=np.uint16)[:, None],
        "lengths": np.ones(len(caption_ids), np.uint16),
    }
    captions = write_artifact(
        *(tmp_path / "captions.safetensors", "captions", {**tokens, "ids": caption_ids, "text": caption_ids}),
        *({"n_vocab": n_vocab, "n_text": n_text}, []),
    )
    codes = {"codes": np.arange(len(code_ids), dtype=np.uint16)[:, None, None], "ids": code_ids}
    latents = write_artifact(tmp_path / "codes.safetensors", "codes", codes, {"n_vocab": n_vocab, "grid": grid}, [])
    return open_artifact(captions), open_artifact(latents)


def test_pairs_are_joined_by_id(tmp_path):
    pairs = Pairs(*artifacts(tmp_path, ["b", "a", "b", "x"], ["y", "a", "b", "a", "b", "b"]))
    assert pairs.ids == ["a", "b"]
    assert pairs.unmatched == 2
    seen = set()
    for u, v in itertools.product(np.linspace(0, 0.999, 12), repeat=2):
        captions, latents = pairs.draw(np.array([0, 1]), np.array([[u, v], [u, v]]))
        seen |= {("a", captions[0], latents[0]), ("b", captions[1], latents[1])}
    assert seen == {("a", 1, r) for r in (1, 3)} | {("b", c, r) for c in (0, 2) for r in (2, 4, 5)}
    tokens, lengths = pairs.tokens(np.array([2, 0]))
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([[2], [0]], [1, 1], np.int64)
    assert pairs.codes(np.array([5])).tolist() == [[[5]]]


@pytest.mark.parametrize("lie", [{"n_vocab": 2}, {"grid": 2}, {"n_text": 3}], ids=str)
def test_rows_that_are_not_what_the_header_says(tmp_path, lie):
    inputs = artifacts(tmp_path, list("abc"), list("abc"), **lie)

    def read():
        pairs = Pairs(*inputs)
        pairs.tokens(np.arange(3))
        pairs.codes(np.arange(3))

    with pytest.raises(DalleError, match="make it again"):
        read()


def test_nothing_in_common(tmp_path):
    with pytest.raises(DalleError, match="no id in common \\('a' and 'b'\\)"):
        Pairs(*artifacts(tmp_path, ["a"], ["b"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 100),
        ("tokens", 65535),
        ("lengths", 2),
        ("codes", 100),
        ("codes", -1),
        ("n_vocab", 0),
        ("n_vocab", 2**30),
    ],
)
def test_numbers_beyond_the_vocabulary_are_found_before_training(tmp_path, name, value):
    ids = list("ab")
    captions = {"tokens": np.array([[1], [2]], np.uint16), "lengths": np.ones(2, np.uint16), "ids": ids, "text": ids}
    codes = {"codes": np.zeros((2, 1, 1), np.int32), "ids": ids}
    header = {"n_vocab": 100, "n_text": 1, "grid": 1}
    if name == "n_vocab":
        header[name] = value
    else:
        (codes if name == "codes" else captions)[name][1] = value
    first = write_artifact(tmp_path / "captions.safetensors", "captions", captions, header, [])
    second = write_artifact(tmp_path / "codes.safetensors", "codes", codes, header, [])
    with pytest.raises(DalleError, match=name):
        Pairs(open_artifact(first), open_artifact(second))
