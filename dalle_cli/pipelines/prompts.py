"""Prompts and their candidates."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import digest_bytes
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.errors import DalleError

log = logging.getLogger("dalle_cli")


class Progress(Protocol):
    """How a pipeline reports progress: a context that yields `advance(n, **metrics)`, as `console.progress` does."""

    def __call__(self, label: str, total: int, *, unit: str = "") -> Any: ...


class Quiet:
    """No progress report: the default of the Python API."""

    def __init__(self, label: str = "", total: int = 0, *, unit: str = ""):
        pass

    def __enter__(self) -> "Quiet":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, n: int = 1, /, **metrics: object) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Candidate:
    """One sample of a prompt: the prompt, its number in the list, and the sample's own number among the prompt's."""

    text: str
    prompt: int
    number: int

    @property
    def id(self) -> str:
        """The id of its row."""
        return f"{self.prompt:05d}-{self.number:05d}"


def candidates(texts: Sequence[str], n: int) -> list[Candidate]:
    """`n` candidates of each prompt, prompt after prompt."""
    return [Candidate(text, p, k) for p, text in enumerate(texts) for k in range(n)]


def read_prompts(prompts: Sequence[str] | None, file: Path | None = None) -> list[str]:
    """The prompts given, then those of a file, without empty lines.

    Raises:
        DalleError: no prompt, or a file that cannot be read.
    """
    texts = list(prompts or [])
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DalleError(f"expected prompts, one a line in UTF-8, found {error}; check --prompts") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise DalleError('expected a prompt, found none; give one, as "a red circle", or --prompts FILE')
    return texts


class SamplerInputs(NamedTuple):
    """N candidates as samplers take them: P distinct texts, and for each candidate its text and its noise."""

    texts: list[str]
    captions: list[int]  # (N,) rows of texts
    indices: list[int]  # (N,) identify the noise: functions of the text and the candidate's number alone

    @classmethod
    def of(cls, rows: Sequence[Candidate]) -> "SamplerInputs":
        """The inputs of these candidates."""
        texts = list(dict.fromkeys(row.text for row in rows))
        number = {text: i for i, text in enumerate(texts)}
        noise = {text: int(digest_bytes(text.encode(errors="surrogatepass"))[:16], 16) << 32 for text in texts}
        return cls(texts, [number[row.text] for row in rows], [noise[row.text] | row.number for row in rows])


def token_tensors(tokenizer: Tokenizer, texts: Sequence[str], length: int, what: str) -> tuple[Tensor, Tensor]:
    """Tokens (P, T) and lengths (P,) int64 of texts; logs a warning that counts those that were cut."""
    tokens, lengths, cut = tokenizer.encode_batch(list(texts), length)
    if cut:
        log.warning("%s of more than %d tokens, which were cut: %d", what, length, cut)
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))


def columns(rows: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """The columns of sampled latents beside the latents: ids, texts, prompts' numbers and the seed."""
    return {
        "prompt": np.array([row.prompt for row in rows], dtype=np.int32),
        "seed": np.full(len(rows), seed, dtype=np.int64),
        "ids": [row.id for row in rows],
        "text": [row.text for row in rows],
    }


def batched(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover n rows."""
    for at in range(0, n, size):
        yield slice(at, min(at + size, n))
