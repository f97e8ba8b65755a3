"""The table of artifact kinds: which tensors a file of each kind holds.

Shapes: N rows, T caption length, H W code grid or pixels, D embedding width. A name ending in `.*` is a string
column (`NAME.bytes`, `NAME.offsets`). A row's first dimension is N for every column but the strings' two tensors.
"""

from dataclasses import dataclass, field

VERSION = 1


@dataclass(frozen=True)
class Column:
    """A tensor that a kind holds: allowed dtypes (safetensors' names), number of dimensions, whether it must be there.

    `channels` is the size of the dimension after the rows, where the kind fixes it.
    """

    dtypes: tuple[str, ...]
    ndim: int
    required: bool = True
    channels: int | None = None


@dataclass(frozen=True)
class Kind:
    """What a file of this kind holds; `rows` is False for weights and checkpoints, whose tensors are free."""

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

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "captions",
            "tokenized captions",
            {
                "tokens": Column(_INDEX, 2),
                "lengths": Column(("U16",), 1),
                "embeddings": Column(("F16", "F32"), 2, required=False),
            },
            {"ids": True, "text": True},
        ),
        Kind(
            "codes",
            "dVAE codes of pictures",
            {
                "codes": Column(_INDEX, 3),
                "prompt": Column(("I32",), 1, required=False),
                "seed": Column(("I64",), 1, required=False),
                "score": Column(("F32",), 1, required=False),
            },
            {"ids": True, "text": False},
        ),
        Kind(
            "embeddings",
            "CLIP embeddings",
            {
                "embeddings": Column(("F16", "F32"), 2),
                "prompt": Column(("I32",), 1, required=False),
                "seed": Column(("I64",), 1, required=False),
            },
            {"ids": True, "text": False},
        ),
        Kind(
            "images",
            "pictures",
            {"images": Column(("U8",), 4, channels=3), "score": Column(("F32",), 1, required=False)},
            {"ids": True, "text": False},
        ),
        Kind("weights.dvae", "weights of a dVAE"),
        Kind("weights.prior.codes", "weights of a prior over codes"),
        Kind("weights.prior.embeddings", "weights of a prior over embeddings"),
        Kind("weights.clip", "weights of a CLIP"),
        Kind("weights.decoder", "weights of a diffusion decoder"),
        Kind("weights.upsampler", "weights of an upsampler"),
        Kind("checkpoint", "a training run's state"),
    )
}
