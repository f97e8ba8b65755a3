"""Tokenizers of captions, by the `tokenizers` library: our own byte-level BPE, and those of published models.

Shapes: N captions, T length.

Our own lower-cases text and normalizes it to NFC. Its alphabet is the 256 bytes: no character
is unknown, and decoding restores the text. It has no special tokens; the prior learns its own start and padding.

A published model's tokenizer says in three sections of its JSON file what surrounds the text, as the library has them:
- `post_processor`: tokens that are written before and after each text, such as BOS and EOS;
- `truncation`: a text that is too long loses tokens before those after it; without the section it loses its end;
- `padding`: the token behind the end, 0 without the section.
The lengths in the sections do not count: a model knows its own.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dalle_cli.artifacts.regular import read_regular
from dalle_cli.data import tokenizer_kinds
from dalle_cli.errors import DalleError, one_line

BYTES = 256
Tokens = NDArray[np.uint16] | NDArray[np.int32]

_NOT_UNICODE = "expected text in UTF-8, found other bytes; check its encoding"
_NO_TOKENS = "expected text that the tokenizer can encode, found {}; check the text and the tokenizer"
_LONGEST = 1024  # bytes of a word; the cost of _merge grows with the square
_CHUNK = 4096  # captions encoded at once; the library's objects are some 50 times as large as the tokens


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes as in the paper (sec. 2.2): the vocabulary, and the most tokens of a caption."""

    vocab_size: int = 16384
    length: int = 256


def train(captions: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn merges from captions; the vocabulary stays smaller if no pair is left that occurs twice.

    Raises:
        DalleError: the vocabulary has no room for the 256 bytes.
    """
    if vocab_size < BYTES:
        raise DalleError(f"expected vocab_size of at least {BYTES}, one for each byte, found {vocab_size}; raise it")
    library = Library(models.BPE())
    # A blank before the text makes its first word the same token as elsewhere; decoding removes it.
    library.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC(), normalizers.Prepend(" ")])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(captions, trainer)
    return Tokenizer(library.to_str(pretty=False).encode())


def load(path: str | Path) -> "Tokenizer":
    """Read a tokenizer JSON.

    Raises:
        DalleError: no such file, or not a tokenizer.
    """
    try:
        data = read_regular(path, tokenizer_kinds.MAX_BYTES)
    except OSError as error:
        raise DalleError(f"expected a tokenizer JSON at {path}, found {error.strerror}; check the path") from None
    except DalleError as error:
        raise DalleError(f"expected a tokenizer JSON at {path}: {error}") from None
    try:
        return Tokenizer(data)
    except DalleError as error:
        raise DalleError(f"{path}: {error}") from None


def pad(
    rows: Sequence[Sequence[int]], length: int, vocab_size: int, *, fill: int = 0, last: Sequence[int] = ()
) -> tuple[Tokens, NDArray[np.uint16], int]:
    """Pad lists of tokens: -> (N, T) uint16 (int32 for a large vocabulary), (N,) uint16 lengths, how many were cut.

    Rows are padded with `fill`. A row that is cut ends with the tokens `last`.

    Raises:
        DalleError: a length that does not fit uint16, or has no room for a token before `last`.
    """
    fewest = 1 + len(last)
    if not fewest <= length < 1 << 16:
        raise DalleError(f"expected a length of captions from {fewest} to 65,535 tokens, found {length}; correct it")
    tokens = np.full((len(rows), length), fill, np.uint16 if vocab_size <= 1 << 16 else np.int32)
    lengths = np.zeros(len(rows), np.uint16)
    n_cut = 0
    for i, row in enumerate(rows):
        n = min(len(row), length)
        tokens[i, :n] = row[:n]
        lengths[i] = n
        if len(row) > length:
            n_cut += 1
            tokens[i, length - len(last) :] = last
    return tokens, lengths, n_cut


@contextmanager
def _one_line(message: str) -> Iterator[None]:
    """Raise whatever the library does, even where it panics, as an error of one line."""
    try:
        yield
    except (UnicodeEncodeError, TypeError):
        raise DalleError(_NOT_UNICODE) from None
    except BaseException as error:  # it raises a bare Exception, or a PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DalleError(message.format(one_line(str(error), 200))) from None


def _surrounding(library: Library) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer's post-processor writes before and after a text."""
    one = Library(models.WordLevel({"x": 0}, unk_token="x")).encode("x")
    made = library.post_process(one)
    at = made.special_tokens_mask.index(0)
    return made.ids[:at], made.ids[at + 1 :]


class Tokenizer:
    """A tokenizer; `data` is its JSON file, `digest` the file's SHA-256, by which weights name it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.digest = hashlib.sha256(data).hexdigest()
        content = tokenizer_kinds.check(data)
        with _one_line("expected a tokenizer JSON, found {}; make one with train-tokenizer"):
            self._library = Library.from_str(data.decode())
            self._library.no_padding()
            self._library.no_truncation()
            self.surrounding = self._before, self._after = _surrounding(self._library)  # tokens around each text
            self.vocab_size = 1 + max(self._library.get_vocab().values())  # numbers may have gaps
        self._fill = int((content.get("padding") or {}).get("pad_id", 0))
        self._last = self._after if content.get("truncation") else []
        if (largest := max(self._fill, *self._before, *self._after, 0)) >= self.vocab_size:
            raise DalleError(f"expected special tokens below {self.vocab_size}, found {largest}; correct the tokenizer")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts -> tokens of any length, with those that the tokenizer writes before and after each text.

        Raises:
            DalleError: a text is not valid Unicode, as from a command line in another encoding.
        """
        out: list[list[int]] = []
        for i in range(0, len(texts), _CHUNK):
            with _one_line(_NO_TOKENS):
                encodings = self._library.encode_batch_fast(list(texts[i : i + _CHUNK]), add_special_tokens=False)
            out.extend([*self._before, *encoding.ids, *self._after] for encoding in encodings)
        return out

    def encode_batch(self, texts: Sequence[str], length: int) -> tuple[Tokens, NDArray[np.uint16], int]:
        """N texts -> tokens (N, T) uint16 or int32, padded; lengths (N,) uint16; number cut to T.

        Lengths count all tokens that are written, BOS and EOS, too.
        """
        return pad(self.encode(texts), length, self.vocab_size, fill=self._fill, last=self._last)

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens -> text without special tokens; bytes that are not UTF-8, as at a cut, become U+FFFD."""
        special = {*self._before, *self._after}
        with _one_line("expected tokens that can be decoded, found {}; check the tokenizer"):
            ids = [int(t) for t in tokens if int(t) not in special]
            return str(self._library.decode(ids, skip_special_tokens=True))

    def encode_dropout(self, text: str, p: float, rng: np.random.Generator, length: int = sys.maxsize) -> list[int]:
        """Text -> at most `length` tokens with BPE dropout (Provilkov et al. 2020, algorithm 1).

        Each possible merge is skipped with probability p at each step. The library's own dropout cannot be seeded.
        With p = 0 the tokens are the library's, except that words over 1,024 bytes are merged in parts.

        Raises:
            DalleError: p is not a probability, the tokenizer is not a byte-level BPE, or the text is not Unicode.
        """
        if not 0 <= p <= 1:
            raise DalleError(f"expected a BPE dropout from 0 to 1, found {p}; correct it")
        byte, ranks, made = self._tables
        drops = _Drops(_gaps(p, rng))
        tokens: list[int] = []
        for word in self._words(text):
            for i in range(0, len(word), _LONGEST):
                tokens.extend(_merge([byte[c] for c in word[i : i + _LONGEST]], ranks, made, drops))
            if len(tokens) >= length:
                break
        return tokens[:length]

    def _words(self, text: str) -> list[str]:
        """The words of a text, each byte as the character that represents it in the vocabulary."""
        with _one_line(_NO_TOKENS):
            normalized = self._library.normalizer.normalize_str(text)
            return [word for word, _ in self._library.pre_tokenizer.pre_tokenize_str(normalized)]

    @cached_property
    def _tables(self) -> tuple[dict[str, int], dict[tuple[int, int], int], list[int]]:
        """The token of each character; the rank of each pair that merges; the merged token by rank."""
        content = json.loads(self.data)
        model: dict[str, Any] = content["model"]
        vocab: dict[str, int] = model.get("vocab", {})
        foreign = model.get("type") != "BPE" or model.get("end_of_word_suffix") or content.get("added_tokens")
        if foreign or self._before or self._after or not set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocab):
            raise DalleError("expected a byte-level BPE for BPE dropout, found another tokenizer; set the dropout to 0")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        ranks = {(vocab[a], vocab[b]): rank for rank, (a, b) in enumerate(pairs)}
        return vocab, ranks, [vocab[a + b] for a, b in pairs]


def _gaps(p: float, rng: np.random.Generator) -> Iterator[int]:
    """How many trials lie from one event of probability p to the next: most words need no random number."""
    while p:
        yield from rng.geometric(p, 64).tolist()
    yield sys.maxsize


class _Drops:
    """Independent events, given by the gaps between them."""

    def __init__(self, gaps: Iterator[int]) -> None:
        self.gaps = gaps
        self.left = next(gaps)  # trials up to and including the next event

    def among(self, n: int) -> list[int]:
        """Make n trials: -> the numbers, from 0, of those that are events."""
        events = []
        while self.left <= n:
            events.append(self.left - 1)
            self.left += next(self.gaps)
        self.left -= n
        return events


_NONE = sys.maxsize  # rank of a pair that does not merge


def _merge(symbols: list[int], ranks: dict[tuple[int, int], int], made: list[int], drops: _Drops) -> list[int]:
    """Merge the pair of lowest rank, leftmost first, until none is left or all that are left are dropped."""
    found = [ranks.get(pair, _NONE) for pair in pairwise(symbols)]
    while n := len(found) - found.count(_NONE):
        open_to = found
        if dropped := drops.among(n):
            open_to = found.copy()
            where = [i for i, rank in enumerate(found) if rank != _NONE]
            for k in dropped:
                open_to[where[k]] = _NONE
        best = min(open_to)
        if best == _NONE:
            break
        i = open_to.index(best)
        symbols[i : i + 2] = [made[best]]
        del found[i]
        if i > 0:
            found[i - 1] = ranks.get((symbols[i - 1], symbols[i]), _NONE)
        if i < len(found):
            found[i] = ranks.get((symbols[i], symbols[i + 1]), _NONE)
    return symbols
