"""Tokenizers of strangers: kinds that we write are read, everything else is refused before the library runs it."""

import json

import numpy as np
import pytest
from conftest import run_bad, run_ok
from tokenizers import Tokenizer as Library
from tokenizers import models, processors

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.data import tokenizer, tokenizer_kinds
from dalle_cli.data.tokenizer_rules import CLIP_WORDS_PUBLISHED, REPLACEMENTS
from dalle_cli.errors import DalleError

GOOD = json.loads(tokenizer.train(["a red circle", "a blue square", "a red square"], 280).data)
BPE = GOOD["model"]


def read(content):
    return tokenizer.Tokenizer(json.dumps(content).encode())


def split(pattern):
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {**GOOD, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [part, words]}}


def normalized(*parts):
    return {**GOOD, "normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def replace(pattern, content, kind="Regex"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def added(**changes):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {**GOOD, "added_tokens": [{"id": 3, "content": "red", **flags, **changes}]}


REFUSED = {
    "exploding": split("(a+)+$b|((a|aa)+)+$c"),
    "backreference": split(r"(a*)*\\1\\1c"),
    "broken": split("((("),
    "harmless": split(" "),
    "replacement grows": normalized(*[replace("a", "a" * 9, "String")] * 9),
    "long replacement": normalized(replace("%", "%" * 99)),
    "known pattern, other text": normalized(replace("%", "%%")),
    "prepend": normalized({"type": "Prepend", "prepend": "x" * 999}),
    "precompiled": normalized({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "long sequence": normalized(*[{"type": "NFC"}] * 65),
    "nested": normalized({"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    "no normalizer": {**GOOD, "normalizer": None},
    "no pre-tokenizer": {**GOOD, "pre_tokenizer": None},
    "of a list": {**GOOD, "normalizer": [{"type": "NFC"}]},
    "kind of a list": normalized({"type": ["NFC"]}),
    "delimiter": {**GOOD, "pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": " "}},
    "unknown setting": normalized({"type": "NFC", "x": 1}),
    "decoder grows": {**GOOD, "decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 9, "String")] * 9}},
    "ctc": {**GOOD, "decoder": {"type": "CTC"}},
    "unigram": {**GOOD, "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9}},
    "wordpiece": {**GOOD, "model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "wordlevel": {**GOOD, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "z"}},
    "no model": {**GOOD, "model": None},
    "no tokens": {**GOOD, "model": {**BPE, "vocab": {}, "merges": []}},
    "two of a number": {**GOOD, "model": {**BPE, "vocab": {"a": 0, "b": 0}, "merges": []}},
    "merges of others": {**GOOD, "model": {**BPE, "merges": [["zz", "yy"]]}},
    "merges of one": {**GOOD, "model": {**BPE, "merges": ["a"]}},
    "ids": {**GOOD, "model": {**BPE, "vocab": {k: v + 4_000_000_000 for k, v in BPE["vocab"].items()}}},
    "negative": {**GOOD, "model": {**BPE, "vocab": {"a": -1}, "merges": []}},
    "long token": {**GOOD, "model": {**BPE, "vocab": {"a" * 5000: 0}, "merges": []}},
    "prefix": {**GOOD, "model": {**BPE, "continuing_subword_prefix": "##"}},
    "fallback": {**GOOD, "model": {**BPE, "byte_fallback": True}},
    "dropout": {**GOOD, "model": {**BPE, "dropout": 0.5}},
    "dropout 2": {**GOOD, "model": {**BPE, "dropout": 2.0}},
    "added beyond": added(id=1 << 40),
    "added of nothing": added(content=""),
    "many added": {**GOOD, "added_tokens": added()["added_tokens"] * 2000},
    "template of nothing": {
        **GOOD,
        "post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    },
    "template twice": {
        **GOOD,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
            "pair": [],
            "special_tokens": {},
        },
    },
    "truncation": {
        **GOOD,
        "truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 99},
    },
    "padding": {
        **GOOD,
        "padding": {
            "strategy": {"Fixed": 2**40},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    },
    "pad beyond": {
        **GOOD,
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 5000,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    },
    "null": None,
    "list": [],
    "nothing": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_of_another_kind_is_refused(name):
    with pytest.raises(DalleError, match=r"expected (a tokenizer JSON|special tokens)"):
        read(REFUSED[name])


@pytest.mark.parametrize("data", [b"[" * 200_000, b"\xff{}", b'{"model": NaN}', b'{"a": 1, "a": 2}', b""])
def test_what_is_no_json(data):
    with pytest.raises(DalleError, match="expected a tokenizer JSON"):
        tokenizer.Tokenizer(data)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_kinds, "MAX_BYTES", 1000)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(json.dumps({**GOOD, "x": "y" * 1000}).encode())
    with pytest.raises(DalleError, match="at most 1,000 bytes"):
        tokenizer.load(path)


def test_our_own_and_published_kinds_are_read():
    text = "a red circle"
    own = read(GOOD)
    assert own.decode(own.encode([text])[0]) == text
    assert read(split(CLIP_WORDS_PUBLISHED)).encode([text])
    everything = [replace(pattern, content) for pattern, content in sorted(REPLACEMENTS)]
    assert read(normalized(*everything, {"type": "NFKD"}, {"type": "StripAccents"})).encode(["an \u0153uf, 100%"])
    roberta = {
        "type": "RobertaProcessing",
        "sep": ["b", 66],
        "cls": ["a", 65],
        "trim_offsets": False,
        "add_prefix_space": False,
    }
    assert read({**GOOD, "post_processor": roberta}).surrounding == ([65], [66])


def test_the_vocabulary_reaches_to_the_largest_number():
    gaps = {**GOOD, "model": {**BPE, "vocab": {token: 7 * i for token, i in BPE["vocab"].items()}}}
    assert read(gaps).vocab_size == 7 * (read(GOOD).vocab_size - 1) + 1


def test_special_tokens_lie_in_the_vocabulary():
    library = Library(models.BPE({"a": 0, "b": 1}, []))
    library.post_processor = processors.TemplateProcessing(single="$A b", special_tokens=[("b", 9)])
    content = {
        **json.loads(library.to_str()),
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    with pytest.raises(DalleError, match="special tokens below 2, found 9"):
        read(content)


def test_what_the_library_cannot_do_is_one_line():
    class PanicException(BaseException):
        """As the library's own, which is no Exception."""

    def panic():
        with tokenizer._one_line("expected text, found {}"):
            raise PanicException("a\nb")

    with pytest.raises(DalleError, match="expected text, found a b"):
        panic()
    with pytest.raises(KeyboardInterrupt), tokenizer._one_line("{}"):
        raise KeyboardInterrupt


def bundle_of(chain, folder, content):
    """A prior and its tokenizer, with these tokens' numbers."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(json.dumps(content).encode())
    found = open_artifact(chain.prior)
    config = {**found.config, "tokenizer": digest_file(folder / "tokenizer.json")}
    save_tensors(folder / "prior.safetensors", found.kind, load_tensors(found), config, [])
    return folder


def test_numbers_beyond_the_weights(chain, tmp_path):
    content = json.loads(chain.tokenizer.read_bytes())
    content["model"]["vocab"] = {token: 7 * i for token, i in content["model"]["vocab"].items()}
    model = bundle_of(chain, tmp_path / "m", content)
    assert "expected a tokenizer of at most" in run_bad(
        "sample", "a", "-n", 1, "-m", model, "-o", tmp_path / "x.safetensors"
    )
    model = bundle_of(chain, tmp_path / "n", json.loads(chain.tokenizer.read_bytes()))
    run_ok("sample", "a", "-n", 1, "-m", model, "-o", tmp_path / "x.safetensors")
    assert np.asarray(open_artifact(tmp_path / "x.safetensors").array("codes")).size
