"""What an importer is made of: a source with the publisher's files, and a plan of the bundle that they become.

A publication is one module of this package with one `Importer`. It recognizes a source by its files, and plans the
bundle: for each weights file, which tensors of the source each of its tensors is made of. Nothing is read before the
whole plan fits: names and shapes of every tensor are known from the files' headers alone.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle_cli.errors import DalleError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class TensorFile(Protocol):
    """Named tensors of one file of any format, each read when it is asked for."""

    @property
    def shapes(self) -> Shapes:
        """Names and shapes, known without reading a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, known without reading it."""

    def read(self, name: str) -> Tensor:
        """One tensor in the dtype of the file, on the CPU: a view of the file where that is possible."""

    def release(self) -> None:
        """Give back the memory of what was read; tensors stay valid."""


class Source(Protocol):
    """A publisher's files: a file, a folder, a tar or a hub repository."""

    name: str  # as the user gave it
    files: Mapping[str, int]  # relative name -> bytes

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises: DalleError if it is no such thing."""

    def data(self, name: str, most: int = 1 << 26) -> bytes:
        """A whole small file. Raises: DalleError if it is larger than `most` bytes."""

    def tensors(self, name: str) -> TensorFile:
        """The tensors of a file. Raises: DalleError if it is damaged, of an unknown format, or names foreign code."""


def _first(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class From:
    """How one tensor of ours is made: from these tensors of the source, by this function of them."""

    names: tuple[str, ...]
    build: Callable[..., Tensor] = _first

    @classmethod
    def one(cls, name: str, build: Callable[..., Tensor] = _first) -> "From":
        """From a single tensor."""
        return cls((name,), build)


@dataclass(frozen=True)
class Part:
    """One weights file of the bundle.

    `model(sizes)`, built on the meta device, gives the names and shapes that must come out; `tensors` gives the origin
    of each of them, from the names and shapes in the source. A name of the source that no tensor is made of is refused
    unless a pattern of `ignored` matches it whole. If files of `sources` have a name in common, each name of all of
    them is written with its file, as "encoder.pt:embed_tokens.weight".
    """

    file: str  # in the bundle, as "prior.safetensors"
    kind: str  # "weights.prior.embeddings"
    model: Callable[[Any], nn.Module]
    sizes: Any  # the model's config, a dataclass
    sources: tuple[str, ...]  # files of the source, whose tensors are taken together
    tensors: Callable[[Shapes], dict[str, From]]
    sampling: Mapping[str, Any] = field(default_factory=dict)  # header `sampling`: defaults for steps, guidance ...
    header: Mapping[str, Any] = field(default_factory=dict)  # further keys of the header
    ignored: tuple[str, ...] = ()
    encoder: str = ""  # the file of this bundle, written before, whose digest the header's `encoder` is
    tokenizer: str = ""  # likewise, for the header's `tokenizer`


@dataclass(frozen=True)
class Publication:
    """A bundle to be: its weights files in the order in which they are written, and its other files."""

    name: str  # "Karlo v1-alpha"
    parts: Sequence[Part]
    texts: Mapping[str, bytes]  # other files of the bundle by name: tokenizers
    license: str  # as a model card names it: "apache-2.0"
    terms: str = ""  # one sentence on what the license forbids; "" if nothing out of the ordinary
    paper: str = ""  # what the model card says about the model


@dataclass(frozen=True)
class Importer:
    """How to import one publication.

    `clip` is the hub source of the CLIP that goes with it; the frame plans that CLIP's parts before this publication's,
    as clip.safetensors and clip-tokenizer.json. "" where the publication has or needs none. `clip_header` are keys that
    the header of these weights gets.

    `prior` are the folders of its prior, for which that of another publication can stand (`--prior`); () for none.

    `also` are hub repositories with further files of the publication: from the hub, their files count as the source's
    own, whose names win. A local source has them all in one folder.
    """

    name: str
    recognize: Callable[[Source], bool]  # by the names of the files, and small JSON files where names do not tell
    files: Callable[[Source], Sequence[str]]  # those of the source that are needed
    plan: Callable[[Source], Publication]
    clip: str = ""
    also: tuple[str, ...] = ()
    clip_header: Mapping[str, Any] = field(default_factory=dict)
    prior: tuple[str, ...] = ()


def renamed(names: Shapes, rules: Sequence[tuple[str, str]]) -> dict[str, From]:
    """Names by regular expressions: a name of the source that a rule matches whole becomes the rule's replacement."""
    made: dict[str, From] = {}
    for name in names:
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, name):
                made[match.expand(replacement)] = From.one(name)
                break
    return made


def n_layers(names: Shapes, pattern: str) -> int:
    """How many layers the names count: the numbers, from 0 on, that the pattern's group matches.

    Raises:
        DalleError: none, or not all of them.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not found:
        raise DalleError(f"expected tensors named like {pattern}, found none; the file is of something else")
    if max(found) + 1 != len(found):  # or one name could ask for any number of layers
        missing = next(i for i in range(len(found)) if i not in found)
        raise DalleError(f"expected tensors of every layer, found none of layer {missing} named like {pattern}")
    return len(found)


def check_values(config: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Check what a JSON file says; what it leaves out is as expected.

    Raises:
        DalleError: another value.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise DalleError(f"expected {key} {value!r} in {where}, found {config[key]!r}; this version knows no other")
