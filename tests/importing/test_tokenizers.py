"""Tokenizers of published models give the publishers' own ids, on a thousand captions in many languages."""

import json
import re
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from caption_samples import EDGES, WORDS, captions
from package_files import by_path
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, trainers

from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError
from dalle_cli.importing import tokenizers
from reference import youtokentome

CAPTIONS = captions()
LENGTH = 77


def files(library, **names):
    """`vocab.json` and `merges.txt` of a library's BPE."""
    model = json.loads(library.to_str())["model"]
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    return json.dumps(model["vocab"], ensure_ascii=False).encode(), f"#version: 0.2\n{merges}\n".encode()


def rows(data, texts, length=LENGTH):
    """Written tokens of each text, cut to `length`."""
    tokens, lengths, _ = Tokenizer(data).encode_batch(texts, length)
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's tokenizer, with CLIP's true vocabulary."""
    return by_path("open_clip", "tokenizer.py")


@pytest.fixture(scope="module")
def clip_files(open_clip):
    published = open_clip.SimpleTokenizer()
    merges = "\n".join(" ".join(pair) for pair in published.bpe_ranks)
    names = {"<start_of_text>": tokenizers.START, "<end_of_text>": tokenizers.END}  # which OpenAI writes otherwise
    vocab = {names.get(token, token): number for token, number in published.encoder.items()}
    return json.dumps(vocab).encode(), f"#version: 0.2\n{merges}\n".encode()


@pytest.fixture(scope="module")
def clip_json(clip_files):
    return tokenizers.clip_bpe_of_vocabulary(*clip_files, LENGTH)


@pytest.fixture(scope="module")
def transformers_clip(clip_files):
    from transformers import CLIPTokenizer

    vocab, merges = clip_files
    pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:-1]]
    return CLIPTokenizer(vocab=json.loads(vocab), merges=pairs)


def test_clip_equals_transformers(clip_json, transformers_clip):
    expected = transformers_clip(CAPTIONS, truncation=True, max_length=LENGTH)["input_ids"]
    assert rows(clip_json, CAPTIONS) == expected
    assert {row[0] for row in expected} == {49406}
    assert {row[-1] for row in expected} == {49407}
    assert Tokenizer(clip_json).vocab_size == 49408
    tokens, _, _ = Tokenizer(clip_json).encode_batch(["a dog"], 6)
    assert tokens.tolist() == [[49406, 320, 1929, 49407, 0, 0]]
    assert Tokenizer(clip_json).decode(tokens[0][:4]) == "a dog"


def test_clip_equals_open_clip_where_no_text_is_repaired(clip_json, open_clip):
    plain = captions(*WORDS, blanks=(" ", " ", "  ", "\n", ", "))
    texts = [text for text in [*EDGES, *plain] if open_clip.basic_clean(text) == text.strip()]
    assert len(texts) > 400
    expected = open_clip.SimpleTokenizer()(texts, LENGTH).numpy()
    tokens, lengths, _ = Tokenizer(clip_json).encode_batch(texts, LENGTH)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(lengths, expected.argmax(1) + 1)  # the pooled position: the highest id, EOS


def test_clip_of_other_files_is_the_same(clip_json, clip_files, transformers_clip, open_clip):
    of_merges = tokenizers.clip_bpe_of_merges(Path(open_clip.default_bpe()).read_bytes(), LENGTH)
    of_json = tokenizers.clip_bpe(transformers_clip.backend_tokenizer.to_str().encode(), LENGTH)
    assert rows(of_merges, CAPTIONS) == rows(of_json, CAPTIONS) == rows(clip_json, CAPTIONS)
    assert Tokenizer(of_json).encode_batch(["a"], 5)[0].tolist() == [[49406, 320, 49407, 0, 0]]


@pytest.fixture(scope="module")
def bart_files():
    """A byte-level BPE of the letters that are left after normalization."""
    library = Library(models.BPE(unk_token="<unk>"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(captions("english", "french", "numbers", "signs"), trainer)
    return files(library)


def to_ascii(text):
    """Python's way to what our stand-in for unidecode does."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
    for letters, stand_in in tokenizers.ASCII.items():
        text = re.sub(letters, stand_in, re.sub(letters.upper(), stand_in.upper(), text) if letters.isalpha() else text)
    return text.encode("ascii", "ignore").decode()


@pytest.fixture
def dalle_mini(monkeypatch):
    """The publisher's normalizer of captions, its spelling in ASCII replaced by ours, without emoji and hashtags."""
    stub = types.ModuleType("unidecode")
    stub.unidecode = to_ascii
    monkeypatch.setitem(sys.modules, "unidecode", stub)
    text = by_path("helm", "clients/image_generation/dalle_mini/model/text.py")
    monkeypatch.setattr(text.HashtagProcessor, "__init__", lambda self: None)
    monkeypatch.setattr(text.emoji, "demojize", lambda t: t)
    return text.TextNormalizer()


def test_bart_equals_dalle_mini(bart_files, dalle_mini):
    from transformers import BartTokenizer

    vocab, merges = bart_files
    pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:-1]]
    published = BartTokenizer(vocab=json.loads(vocab), merges=pairs)
    ours = tokenizers.bart_bpe(vocab, merges, 64)
    ours = tokenizers.bart_bpe(vocab, merges, 64)
    library = Library.from_str(ours.decode())
    normalized = [dalle_mini(text) for text in CAPTIONS]
    for text, expected in zip(CAPTIONS, normalized, strict=True):
        assert library.normalizer.normalize_str(text) == expected[1:], repr(text)
    expected = published(normalized, truncation=True, max_length=64)["input_ids"]
    expected = [[0, 2] if text == " " else row for row, text in zip(expected, normalized, strict=True)]  # no caption
    assert rows(ours, CAPTIONS, 64) == expected
    tokens, _, _ = Tokenizer(ours).encode_batch([""], 4)
    assert tokens.tolist() == [[0, 2, 1, 1]]
    assert Tokenizer(ours).decode(Tokenizer(ours).encode(["A tutu  Radish"])[0]) == "a tutu radish"


def test_bart_equals_min_dalle_for_words(bart_files):
    vocab, merges = bart_files
    minimal = by_path("min_dalle", "text_tokenizer.py")
    published = minimal.TextTokenizer(json.loads(vocab), merges.decode().split("\n")[1:-1])
    texts = [re.sub("[^A-Za-z ]", "", text) for text in captions("english", blanks=(" ",))]
    texts = [text for text in texts if not re.search(r"(\w)\1{3}", text)]
    assert rows(tokenizers.bart_bpe(vocab, merges, 200), texts, 200) == [published.tokenize(text) for text in texts]


@pytest.fixture(scope="module")
def char_files():
    from tokenizers import CharBPETokenizer

    library = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    library.train_from_iterator(
        captions("english", "french", "korean", "signs"), 500, special_tokens=["[UNK]", "[PAD]"], show_progress=False
    )
    return files(library)


def test_char_bpe_equals_the_librarys_own(char_files, tmp_path):
    from tokenizers import CharBPETokenizer

    for name, data in zip(("vocab.json", "merges.txt"), char_files, strict=True):
        (tmp_path / name).write_bytes(data)
    published = CharBPETokenizer.from_file(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="[UNK]", lowercase=True
    )
    published.add_special_tokens(["[PAD]"])
    pad = published.token_to_id("[PAD]")
    published.enable_padding(length=64, pad_id=pad)
    published.enable_truncation(max_length=64)
    ours = Tokenizer(tokenizers.char_bpe(*char_files))
    texts = [*CAPTIONS, "a [UNK] b [PAD]"]
    assert ours.encode_batch(texts, 64)[0].tolist() == [one.ids for one in published.encode_batch(texts)]
    assert ours.decode([*ours.encode(["a tutu radish"])[0], pad]) == "a tutu radish"


@pytest.fixture(scope="module")
def yttm_model():
    """A text model of YouTokenToMe: its characters and rules are those that the library finds."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace(tokenizers.SPACE, "always")
    known = [text.lower() for text in captions("russian", "english", "numbers", blanks=(" ",))]
    library.train_from_iterator(known, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(library.to_str())["model"]
    letters = sorted(token for token in model["vocab"] if len(token) == 1)
    ids = {token: 4 + i for i, token in enumerate(letters)}
    rules = []
    for left, right in model["merges"]:
        ids.setdefault(left + right, 4 + len(ids))
        rules.append(f"{ids[left]} {ids[right]} {ids[left + right]}")
    head = [f"{len(letters)} {len(rules)}", *(f"{ord(letter)} {ids[letter]}" for letter in letters)]
    return "\n".join([*head, *rules, "1 0 2 3", ""])


def test_youtokentome_equals_its_rule(yttm_model):
    texts = [text for text in CAPTIONS if "Σ" not in text]  # lower-cased by its place in a word, in Python alone
    expected = [[2, *youtokentome.encode(text.lower().strip(), yttm_model), 3] for text in texts]
    assert any(1 in row for row in expected)
    tokens, lengths, cut = Tokenizer(tokenizers.youtokentome(yttm_model.encode())).encode_batch(texts, 64)
    padded = [[*row[:64], *[0] * (64 - len(row))] for row in expected]  # a long text loses EOS, as there
    assert tokens.tolist() == padded
    assert lengths.tolist() == [min(len(row), 64) for row in expected]
    assert cut == sum(len(row) > 64 for row in expected) > 0
    without = Tokenizer(tokenizers.youtokentome(yttm_model.encode(), bos=False))
    assert without.encode(texts) == [row[1:] for row in expected]
    assert without.decode(without.encode(["Красный КОТ"])[0]) == "красный кот"


def test_youtokentomes_tokens_of_equal_text_are_counted(yttm_model, caplog):
    head, *body, last = yttm_model.strip().split("\n")
    n_chars, n_rules = map(int, head.split())
    again = body[-1].rsplit(" ", 1)[0] + " 9999"  # the last pair once more
    text = "\n".join([f"{n_chars} {n_rules + 1}", *body, again, last])
    tokenizers.youtokentome(text.encode())
    assert caplog.messages == ["tokens with the same text as another, which are not used: 1"]


BAD = {
    "no JSON": (tokenizers.clip_bpe_of_vocabulary, (b"[", b"a b\n", 9), "expected a vocab.json of tokens"),
    "a list": (tokenizers.bart_bpe, (b"[1]", b"a b\n", 9), "expected a vocab.json of tokens"),
    "words": (tokenizers.bart_bpe, (b'{"a": "b"}', b"a b\n", 9), "expected a vocab.json of tokens"),
    "no EOS": (tokenizers.bart_bpe, (b'{"<s>": 0}', b"a b\n", 9), "expected </s> in vocab.json"),
    "three": (tokenizers.char_bpe, (b'{"[UNK]": 0, "[PAD]": 1}', b"a b c\n", ), "expected a merges.txt with two"),
    "none": (tokenizers.char_bpe, (b'{"[UNK]": 0, "[PAD]": 1}', b"#version: 0.2\n"), "expected a merges.txt with two"),
    "bytes": (tokenizers.char_bpe, (b'{"[UNK]": 0, "[PAD]": 1}', b"\xff\xfe"), "expected a merges.txt in UTF-8"),
    "foreign": (tokenizers.char_bpe, (b'{"[UNK]": 0, "[PAD]": 1}', b"a b\n"), "expected merges of tokens in the voc"),
    "no gzip": (tokenizers.clip_bpe_of_merges, (b"a b", 9), "expected a gzip file"),
    "no BOS": (tokenizers.clip_bpe, (b"{}", 9), "expected a tokenizer JSON"),
    "prose": (tokenizers.youtokentome, (b"a text of words",), "expected a text model of YouTokenToMe"),
    "empty": (tokenizers.youtokentome, (b"",), "expected a text model of YouTokenToMe"),
    "cut": (tokenizers.youtokentome, (b"2 1\n97 4\n98 5\n1 0 2 3\n",), "expected a text model of YouTokenToMe"),
    "loop": (tokenizers.youtokentome, (b"1 1\n97 4\n4 9 9\n1 0 2 3\n",), "expected a text model of YouTokenToMe"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_refused_in_one_line(case):
    builder, given, words = BAD[case]
    with pytest.raises(DalleError, match=re.escape(words)) as caught:
        builder(*given)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_bos_is_not_clips(char_files):
    with pytest.raises(DalleError, match="writes BOS and EOS"):
        tokenizers.clip_bpe(tokenizers.char_bpe(*char_files), 77)
