"""What `vary`, `interpolate`, `diff` and `reconstruct` share: pictures in, a decoder with its CLIP, a sheet out.

Shapes: B pictures, N paintings, D width of an embedding, S side in pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.painting import Asked
    from dalle_cli.devices import Arithmetic

STEPS = 50  # of DDIM: with few of them the way back to the noise is not the way that painting goes
ITERATIONS = 10  # of each of them on the way back: of 5 guidance wants more, and 1, the usual number, loses the picture

PictureArg = Annotated[
    str, typer.Argument(metavar="PICTURE", help="An image: PNG, JPEG, WebP or BMP. Its middle square counts.")
]
SheetOut = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Where to write the sheet; named after the picture if left out."
    ),
]
KeptImages = Annotated[
    Path | None, typer.Option("--images", metavar="FILE", help="Also keep the sheet's pictures as an artifact here.")
]
STEPS_HELP = "Paint by DDIM in so many steps, and as many back to a picture's noise; else in 50."
Steps = Annotated[int | None, typer.Option("--steps", "--decoder-steps", min=1, metavar="N", help=STEPS_HELP)]
DecoderSteps = Annotated[int | None, typer.Option("--decoder-steps", min=1, metavar="N", help=STEPS_HELP)]
Guidance = Annotated[
    float, typer.Option(min=0.0, metavar="X", help="Classifier-free guidance towards the embedding; 1 = off.")
]
UpsamplerSteps = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Steps of each of the bundle's upsamplers; else 10.")
]


@dataclass(frozen=True)
class Source:
    """A picture that was given: where it lies, in mode RGB, and the SHA-256 of its file."""

    path: str
    image: "Image.Image"
    digest: str

    def pixels(self, size: int) -> Any:
        """The middle square, as `encode-images` takes it: (3, S, S) uint8."""
        from dalle_cli.data.augment import center

        return center(self.image, size).transpose(2, 0, 1).copy()


def read(path: str, argument: str = "PICTURE") -> Source:
    """Read a picture as the stages that read data sets do.

    Raises:
        DalleError: no picture, or none that can be read.
    """
    from dalle_cli.artifacts import digest_bytes
    from dalle_cli.data import files
    from dalle_cli.data.filters import Filters
    from dalle_cli.data.images import decode
    from dalle_cli.data.skips import BadSample

    try:
        data = files.read(path)
        return Source(path, decode(data, Filters()), digest_bytes(data))
    except OSError as error:
        raise DalleError(f"expected a picture, found {error.strerror or error}: {path}; check {argument}") from None
    except BadSample as reason:
        raise DalleError(f"expected a picture, found {path} {reason}; check {argument}") from None


class Sheet:
    """Where pictures will go: a PNG, and an artifact where one was asked for."""

    def __init__(self, stage: str, sources: Sequence[Source], out: Path | None, images: Path | None, force: bool):
        """Raises: DalleError if something else lies there."""
        from dalle_cli.artifacts.container import check_replaceable
        from dalle_cli.commands import drawing

        name = "-".join(Path(source.path).stem for source in sources)
        self.path, self.images, self.force = out or Path(f"{name}.{stage}.png"), images, force
        for source in sources:
            if self.path.is_file() and Path(source.path).is_file() and self.path.samefile(source.path):
                raise DalleError(f"expected -o, found that {self.path} would be written over itself; choose another")
        drawing.check_png(self.path, force)
        if images is not None:
            check_replaceable(images, "images", force)

    def write(
        self, pictures: Sequence[Any], labels: list[str], made: list[dict[str, Any]], columns: int, terminal: bool,
        title: str | None = None,
    ) -> None:  # fmt: skip
        """Write pictures (3, S, S) uint8 with a label below each; `made` is the artifact's history.

        Raises:
            DalleError: the disk is full.
        """
        import numpy as np

        from dalle_cli.artifacts import write_artifact
        from dalle_cli.commands import drawing

        if self.images is not None:
            ids = [f"{i:05d}" for i in range(len(labels))]
            rows = {"images": np.stack(pictures), "ids": ids, "text": labels}
            write_artifact(self.images, "images", rows, {}, made, self.force)
        drawing.save_sheet(self.path, list(pictures), labels, None, columns, title, self.force)
        if terminal:
            drawing.preview(list(pictures), columns)


class Explorer:
    """A decoder that paints by DDIM, which has a way back to the noise, and the CLIP whose embeddings it reads."""

    def __init__(self, model: str | None, asked: "Asked", machine: "Arithmetic", batch_size: int):
        """Raises: DalleError for weights that are missing or do not fit each other."""
        from dalle_cli.commands.drawing_embeddings import clip_of
        from dalle_cli.commands.encode_images import to_embeddings
        from dalle_cli.commands.painting import Asked, Painter

        self.painter = Painter(model, replace(asked, sampler="ddim"), machine)
        if asked.steps is None:
            most = self.painter.decoder.config.n_timestep
            self.painter.brush = replace(self.painter.brush, steps=min(STEPS, most))
        # eta is for what the decoder draws; upsamplers take their usual sampler
        self.painter.upsampler_brush = Asked(upsampler_steps=asked.upsampler_steps).brushes()[1]
        self.clip = clip_of(self.painter.weights, model)
        self.encoder = to_embeddings(self.clip, machine)
        self.batch_size = batch_size

    def original(self, source: Source) -> Any:
        """A picture as large as those that are painted: (3, S, S) uint8."""
        return source.pixels(self.painter.side)

    def embed(self, *sources: Source) -> "Tensor":
        """z_i of length 1: B pictures -> (B, D) float32."""
        import numpy as np
        import torch

        return torch.from_numpy(self.encoder.encode(np.stack([s.pixels(self.encoder.size) for s in sources])))

    def invert(self, z: "Tensor", *sources: Source) -> "Tensor":
        """The noise from which DDIM without eta paints pictures: their embeddings (B, D) -> (B, 3, S, S) float32."""
        import numpy as np

        from dalle_cli import console

        side = self.painter.decoder.config.image_size
        with console.progress("invert", len(sources), unit="pictures") as advance:
            found: Tensor = self.painter.invert(np.stack([s.pixels(side) for s in sources]), z, ITERATIONS)
            advance(len(sources))
        return found

    def paint(self, stage: str, z: "Tensor", numbers: Sequence[int], start: "Tensor | None" = None) -> Any:
        """Paint embeddings (N, D), from `start` (N, 3, S, S) or noise of their numbers: -> (N, 3, S, S) uint8."""
        import numpy as np

        from dalle_cli import console

        painted = []
        with console.progress(stage, len(z), unit="pictures") as advance:
            for at in range(0, len(z), self.batch_size):
                rows = slice(at, at + self.batch_size)
                first = None if start is None else start[rows]
                painted.append(self.painter.paint(z[rows], numbers[rows], start=first))
                advance(len(painted[-1]))
        return np.concatenate(painted)

    def history(
        self, stage: str, options: dict[str, Any], inputs: "Mapping[str, Artifact | str]"
    ) -> list[dict[str, Any]]:
        """What led to the paintings."""
        from dalle_cli.artifacts import history

        weights = {"clip": self.clip, **self.painter.inputs}
        return history(stage, {**options, **self.painter.options}, **inputs, **weights)
