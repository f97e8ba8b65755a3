"""The tokenizer never meets an unknown character, is deterministic, and its BPE dropout is the library's BPE at 0."""

import hashlib
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, processors

from dalle_cli.data import tokenizer
from dalle_cli.errors import DalleError

WORDS = [
    "a",
    "the",
    "of",
    "left",
    "large",
    "small",
    "red",
    "green",
    "blue",
    "circle",
    "triangle",
    "square",
    "painting",
    "radish",
    "dog",
    "walking",
    "in",
    "tutu",
]
CAPTIONS = [" ".join(np.random.default_rng(i).choice(WORDS, 9)) for i in range(300)] + ["빨간 사과 🍎"] * 3


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train(iter(CAPTIONS), 400)


def folded(text):
    """What the text becomes: lower case by the character, then NFC."""
    return unicodedata.normalize("NFC", "".join(c.lower() for c in text))


# Characters that this Python's tables know; the library's tables may be newer.
characters = st.characters(exclude_categories=("Cs", "Cn"))


@settings(deadline=None, max_examples=300)
@given(text=st.text(characters, max_size=40))
def test_every_text_comes_back(bpe, text):
    (tokens,) = bpe.encode([text])
    assert bpe.decode(tokens) == folded(text)
    assert all(0 <= t < bpe.vocab_size for t in tokens)
    assert bpe.encode_dropout(text, 0, np.random.default_rng(0)) == tokens
    assert bpe.decode(bpe.encode_dropout(text, 0.5, np.random.default_rng(0))) == folded(text)


@pytest.mark.parametrize(
    "text", ["", " ", "  two  blanks ", "한국어 캡션", "👩‍👩‍👧‍👦 🇰🇷", "e\u0301", "\U0010fffd", "\ufffe\0", "ΣΑΣ", "İ"]
)
def test_hard_texts_come_back(bpe, text):
    assert bpe.decode(bpe.encode([text])[0]) == folded(text)


def test_all_planes(bpe):
    for start in range(0, 0x110000, 0x1000):
        text = "".join(map(chr, range(start, start + 0x1000, 37)))
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cs", "Cn"))
        assert bpe.decode(bpe.encode([text])[0]) == folded(text)


def test_case_and_composition_do_not_matter(bpe):
    a, b, c = bpe.encode(["A Red CAF\u00c9", "a red café", "a red cafe\u0301"])
    assert a == b == c


def test_first_word_is_the_same_token_as_elsewhere(bpe):
    (one,) = bpe.encode(["dog"])
    assert len(one) == 1
    assert bpe.encode(["red dog"])[0][-1] == one[0]
    assert bpe.decode(one) == "dog"


def test_training_is_deterministic_also_in_another_process(bpe):
    assert tokenizer.train(iter(CAPTIONS), 400).data == bpe.data
    program = (
        "import json, sys; from dalle_cli.data import tokenizer;"
        "sys.stdout.write(tokenizer.train(iter(json.load(sys.stdin)), 400).digest)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(CAPTIONS), capture_output=True, text=True, check=True
    )
    assert out.stdout == bpe.digest == hashlib.sha256(bpe.data).hexdigest()


def test_vocabulary(bpe):
    assert 256 < bpe.vocab_size <= 400
    assert tokenizer.train(CAPTIONS, 300).vocab_size == 300
    assert tokenizer.train([], 300).vocab_size == 256  # all bytes are there, whatever the captions
    with pytest.raises(DalleError, match="at least 256"):
        tokenizer.train(CAPTIONS, 255)
    model = json.loads(bpe.data)
    assert model["added_tokens"] == []
    assert model["model"]["unk_token"] is None


def test_save_and_load(tmp_path, bpe):
    path = tmp_path / "t.json"
    path.write_bytes(bpe.data)
    again = tokenizer.load(path)
    assert again.digest == bpe.digest
    assert again.encode(CAPTIONS) == bpe.encode(CAPTIONS)
    assert Library.from_file(str(path)).encode(CAPTIONS[0]).ids == bpe.encode(CAPTIONS[:1])[0]


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 3}', b"\xff\xfe", b"text", b"[]", b"null"])
def test_load_refuses_in_one_line(tmp_path, data):
    (tmp_path / "t.json").write_bytes(data)
    with pytest.raises(DalleError, match="expected a tokenizer JSON") as caught:
        tokenizer.load(tmp_path / "t.json")
    assert "\n" not in str(caught.value)
    assert "t.json" in str(caught.value)


def test_load_without_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DalleError, match="expected a tokenizer JSON at"):
            tokenizer.load(path)


def test_batches_are_padded_cut_and_counted(bpe):
    texts = ["", "dog", "red dog", "word " * 10_000]
    tokens, lengths, n_cut = bpe.encode_batch(texts, 5)
    assert tokens.shape == (4, 5)
    assert tokens.dtype == np.uint16
    assert lengths.dtype == np.uint16
    assert lengths.tolist() == [0, 1, 2, 5]
    assert n_cut == 1
    for row, n, text in zip(tokens, lengths, texts, strict=True):
        assert row[:n].tolist() == bpe.encode([text])[0][:5]
        assert not row[n:].any()
    assert bpe.encode_batch([], 5)[0].shape == (0, 5)
    for length in (0, 70_000):
        with pytest.raises(DalleError, match="from 1 to 65,535"):
            bpe.encode_batch(texts, length)


def test_large_vocabularies_take_int32():
    tokens, _, _ = tokenizer.pad([[70_000]], 2, 70_001)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[70_000, 0]]


def test_text_that_is_not_unicode(bpe):
    with pytest.raises(DalleError, match="expected text in UTF-8"):
        bpe.encode(["\udcff"])
    with pytest.raises(DalleError, match="expected text in UTF-8"):
        bpe.encode_dropout("\udcff", 0.1, np.random.default_rng(0))


def test_dropout_is_seeded_and_changes_tokens_but_not_text(bpe):
    a, b, c = (bpe.encode_dropout(CAPTIONS[0], 0.3, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert a == b != c
    assert bpe.decode(a) == bpe.decode(c) == CAPTIONS[0]
    assert bpe.encode_dropout("dog", 1, np.random.default_rng(0)) == bpe.encode_dropout(" dog", 1, _rng())[1:]
    with pytest.raises(DalleError, match="from 0 to 1"):
        bpe.encode_dropout("dog", 1.5, _rng())


def _rng():
    return np.random.default_rng(0)


def test_dropout_keeps_the_share_it_says():
    """Of one word of two bytes and a blank with the merges (blank, a), (blank a, b), all outcomes have known odds."""
    bpe = tokenizer.train(["ab"] * 3, 258)
    rng = np.random.default_rng(3)
    p, n = 0.3, 4000
    shown = [len(bpe.encode_dropout("ab", p, rng)) for _ in range(n)]
    # Three symbols stay if each pair that merges is dropped at the first step; two if the second step drops its pair.
    merges = [tuple(m) for m in json.loads(bpe.data)["model"]["merges"]]
    first_step = sum(pair in merges for pair in [("Ġ", "a"), ("a", "b")])
    three = p**first_step
    two = (1 - three) * p
    for length, share in ((3, three), (2, two), (1, 1 - three - two)):
        assert abs(shown.count(length) / n - share) < 4 * np.sqrt(share * (1 - share) / n)


def test_dropout_stops_at_the_length_asked_for(bpe):
    long = "red dog " * 5000
    tokens = bpe.encode_dropout(long, 0.1, _rng(), 7)
    assert len(tokens) == 7
    assert tokens == bpe.encode_dropout(long, 0.1, _rng())[:7]
    assert len(bpe.encode_dropout("字" * 100_000, 0.1, _rng(), 16)) == 16


def test_dropout_refuses_other_kinds_of_tokenizers():
    content = json.loads(tokenizer.train(CAPTIONS, 300).data)
    content["model"]["end_of_word_suffix"] = "</w>"
    foreign = tokenizer.Tokenizer(json.dumps(content).encode())
    with pytest.raises(DalleError, match="expected a byte-level BPE"):
        foreign.encode_dropout("dog", 0.1, _rng())


def surrounded(truncation, pad=0, before="<s> ", after=" </s>"):
    """A tokenizer of single letters with `<s>` 5 and `</s>` 6 around a text."""
    library = Library(models.BPE({"a": 1, "b": 2, "c": 3, "?": 4, "<s>": 5, "</s>": 6}, [], unk_token="?"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}", special_tokens=[("<s>", 5), ("</s>", 6)]
    )
    if truncation:
        library.enable_truncation(3)  # the number is not used
    library.enable_padding(pad_id=pad, length=9)
    return tokenizer.Tokenizer(library.to_str().encode())


def test_what_surrounds_a_text_is_written_and_counted():
    tokens, lengths, n_cut = surrounded(True, pad=4).encode_batch(["", "a b", "a b c a b"], 5)
    assert tokens.tolist() == [[5, 6, 4, 4, 4], [5, 1, 2, 6, 4], [5, 1, 2, 3, 6]]  # EOS stays
    assert (lengths.tolist(), n_cut) == ([2, 4, 5], 1)
    assert surrounded(True).encode(["a b c a b"]) == [[5, 1, 2, 3, 1, 2, 6]]
    one_sided = surrounded(True, before="")
    assert one_sided.encode_batch(["a b c"], 3)[0].tolist() == [[1, 2, 6]]
    assert one_sided.encode_batch(["a b c"], 4)[2] == 0


def test_without_truncation_in_the_file_the_end_is_cut():
    tokens, lengths, n_cut = surrounded(False).encode_batch(["a", "a b c a b"], 5)
    assert tokens.tolist() == [[5, 1, 6, 0, 0], [5, 1, 2, 3, 1]]
    assert (lengths.tolist(), n_cut) == ([3, 5], 1)


def test_special_tokens_are_not_decoded_and_leave_no_dropout():
    bpe = surrounded(True)
    assert bpe.decode([5, 1, 2, 6]) == "a b"
    with pytest.raises(DalleError, match="expected a byte-level BPE"):
        bpe.encode_dropout("a", 0.1, _rng())
    content = json.loads(tokenizer.train(CAPTIONS, 300).data)
    content["post_processor"] = json.loads(bpe.data)["post_processor"]
    with pytest.raises(DalleError, match="expected a byte-level BPE"):
        tokenizer.Tokenizer(json.dumps(content).encode()).encode_dropout("dog", 0.1, _rng())
    with pytest.raises(DalleError, match="from 2 to 65,535"):
        bpe.encode_batch(["a"], 1)
