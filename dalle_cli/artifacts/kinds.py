"""The table of artifact kinds: the tensors that a file of each kind holds.

The first dimension of every column is the number of rows. A string column is two tensors, `NAME.bytes` and
`NAME.offsets`.
"""

from dataclasses import dataclass, field

VERSION = 1


@dataclass(frozen=True)
class Column:
    """A column of numbers: its allowed dtypes, by safetensors' names, and its number of dimensions.

    `channels` is the size of the dimension after the rows, if the kind fixes it.
    """

    dtypes: tuple[str, ...]
    ndim: int
    required: bool = True
    channels: int | None = None


@dataclass(frozen=True)
class Kind:
    """What a file of this kind holds: columns, and string columns with whether they are required.

    Weights and checkpoints have no rows: any tensor may be in them.
    """

    name: str
    about: str
    columns: dict[str, Column] = field(default_factory=dict)
    strings: dict[str, bool] = field(default_factory=dict)

    @property
    def rows(self) -> bool:
        return bool(self.columns)

    @property
    def main(self) -> str:
        """The column whose first dimension counts the rows."""
        return next(iter(self.columns))


_INDEX = ("U16", "I32")
_FLOAT = ("F16", "F32")
_SAMPLED = {
    "prompt": Column(("I32",), 1, required=False),  # the number of the prompt
    "seed": Column(("I64",), 1, required=False),
}
_SCORE = {"score": Column(("F32",), 1, required=False)}
_IDS, _IDS_AND_TEXT = {"ids": True, "text": False}, {"ids": True, "text": True}
_CAPTIONS = {
    "tokens": Column(_INDEX, 2),
    "lengths": Column(("U16",), 1),
    "embeddings": Column(_FLOAT, 2, required=False),
}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("captions", "tokenized captions", _CAPTIONS, _IDS_AND_TEXT),
        Kind("codes", "dVAE codes of images", {"codes": Column(_INDEX, 3), **_SAMPLED, **_SCORE}, _IDS),
        Kind("embeddings", "CLIP embeddings", {"embeddings": Column(_FLOAT, 2), **_SAMPLED}, _IDS),
        Kind("images", "images", {"images": Column(("U8",), 4, channels=3), **_SCORE}, _IDS),
        Kind("weights.dvae", "weights of a dVAE"),
        Kind("weights.prior.codes", "weights of a prior over codes"),
        Kind("weights.prior.embeddings", "weights of a prior over embeddings"),
        Kind("weights.clip", "weights of a CLIP"),
        Kind("weights.decoder", "weights of a diffusion decoder"),
        Kind("weights.upsampler", "weights of an upsampler"),
        Kind("weights.autoencoder", "weights of an autoencoder whose latents a decoder samples"),
        Kind("checkpoint", "the state of a training run"),
    )
}
