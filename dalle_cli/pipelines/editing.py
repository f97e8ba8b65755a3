"""Edit images through their CLIP embedding and their DDIM noise (2022, sec. 3): the paper's four manipulations.

Shapes: N sampled images, D embedding width, S side of the images in pixels, s the decoder's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_cli.artifacts import Artifact, digest_bytes, history
from dalle_cli.data.augment import center
from dalle_cli.data.images import read_image
from dalle_cli.devices import Arithmetic, arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.embeddings import Principal
from dalle_cli.options import DecoderOptions, EditOptions
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.clip import shared_clip
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.output import check_outputs, terminal_preview, write_grid, write_labelled
from dalle_cli.pipelines.prior import find_clip
from dalle_cli.pipelines.prompts import Progress, Quiet, batched
from dalle_cli.sampling.interpolation import between, rising, slerp, text_diff

STEPS = 50  # of DDIM: with fewer, inversion does not retrace sampling
ITERATIONS = 10  # per step of inversion: without guidance 5 suffice; 1, the usual number, loses the image
NOISES = ("slerped", "fixed")


@dataclass(frozen=True)
class SourceImage:
    """An image to edit: its name, its pixels, and the SHA-256 of its file."""

    name: str
    image: Image.Image
    digest: str

    @classmethod
    def read(cls, source: "str | Path | Image.Image", argument: str = "IMAGE") -> "SourceImage":
        """Read a file, or take a PIL image as it is.

        Raises:
            DalleError: a file that is no image, or cannot be read.
        """
        if isinstance(source, Image.Image):
            image = source.convert("RGB")
            return cls("image", image, digest_bytes(image.tobytes()))
        return cls(str(source), *read_image(str(source), argument))

    def pixels(self, size: int) -> Any:
        """The central square, cropped and resized as `encode-images` does: (3, size, size) uint8."""
        return center(self.image, size).transpose(2, 0, 1).copy()


@dataclass(frozen=True)
class Edited:
    """Images (N, 3, S, S) uint8 including the originals, a label each, and the history of the artifact."""

    images: list[Any]
    labels: list[str]
    history: list[dict[str, Any]]
    title: str | None = None


class Editor:
    """A decoder that samples by DDIM, which can be inverted, and the CLIP whose embeddings it takes."""

    def __init__(
        self, model: str | None, machine: Arithmetic, options: DecoderOptions | None = None, *, seed: int = 0,
        batch_size: int = 64, progress: Progress = Quiet,
    ):  # fmt: skip
        """Raises: DalleError for weights that are missing or do not fit each other."""
        options = options or DecoderOptions()
        ddim = replace(options, decoder_sampler="ddim")
        self.model, self.batch_size, self.progress = model, batch_size, progress
        self.decoder = ImageDecoder(model, machine, ddim, seed)
        if options.decoder_steps is None:
            n_timestep = self.decoder.decoder.config.n_timestep
            self.decoder.config = replace(self.decoder.config, steps=min(STEPS, n_timestep))
        # eta is for the decoder; upsamplers keep their usual sampler
        self.decoder.set_upsamplers(DecoderOptions(upsampler_steps=options.upsampler_steps))
        self.clip = shared_clip(find_clip(self.decoder.weights, model), machine)

    def vary(self, source: SourceImage, n: int = 8) -> Edited:
        """n variations: sample from the image's embedding and noise, with eta > 0 (sec. 3.1)."""
        z = self.embed(source)
        images = self.sample("vary", z.expand(n, -1), range(n), self.invert(z, source).expand(n, -1, -1, -1))
        labels = [f"variation {k}" for k in range(1, n + 1)]
        return self._edited("vary", {"n": n}, {"image": source.digest}, images, labels, source)

    def interpolate(self, a: SourceImage, b: SourceImage, n: int = 8, noise: str = "slerped") -> Edited:
        """n images between two, by slerp of their embeddings, and of their noise unless it is fixed (sec. 3.2)."""
        check_noise(noise)
        shares, z = between(n), self.embed(a, b)
        own = self.invert(z, a, b) if noise == "slerped" else None
        start = None if own is None else slerp(own[0], own[1], shares)
        images = self.sample("interpolate", slerp(z[0], z[1], shares), [0] * n, start)
        made = self._history("interpolate", {"n": n, "noise": noise}, {"a": a.digest, "b": b.digest})
        labels = [f"A: {Path(a.name).name}", *(f"{share:.3g}" for share in shares), f"B: {Path(b.name).name}"]
        return Edited([self.original(a), *images, self.original(b)], labels, made)

    def diff(self, source: SourceImage, before: str, after: str, *, strength: float = 0.5, n: int = 5) -> Edited:
        """Text diffs (sec. 3.3): n images that move from an image towards the difference of two captions.

        `strength` is the share of the way for the last one. An empty `before` moves towards `after` itself.
        """
        check_diff(strength, after)
        texts = [text for text in (before, after) if text.strip()]
        z_t = torch.from_numpy(self.clip.encode_texts(texts))
        z_d = text_diff(z_t[0] if len(texts) == 2 else torch.zeros_like(z_t[-1]), z_t[-1])
        z, thetas = self.embed(source), rising(n, strength)
        if not self.clip.normalized:
            z_d = z_d * z[0].norm()  # so that the length of the image's embedding is kept along the way
        start = self.invert(z, source).expand(n, -1, -1, -1)
        images = self.sample("diff", slerp(z[0], z_d, thetas), [0] * n, start)
        options = {"from": before, "to": after, "strength": strength, "n": n}
        labels = [f"theta {theta:.3g}" for theta in thetas]
        title = " to ".join(f'"{text}"' for text in texts)
        return self._edited("diff", options, {"image": source.digest}, images, labels, source, title)

    def reconstruct(self, source: SourceImage, components: Sequence[int] | None = None) -> Edited:
        """Images of an embedding reduced to its first principal components (sec. 3, fig. 7).

        Raises:
            DalleError: no prior over embeddings, which holds the components; or numbers out of range.
        """
        prior = find_embedding_prior(self.model)
        bundles.check_digest("CLIP", self.clip.weights.digest, prior.require("encoder", str), prior.path)
        principal = loading.embedding_prior(prior, torch.device("cpu")).principal.float()
        if not isinstance(principal, Principal):
            found = f"one with the mean and deviation of each dimension alone in {prior.path}"
            raise DalleError(f"expected a prior with principal components, found {found}; train one on its embeddings")
        width = len(principal.mean)
        counts = component_counts(components, width)
        z = self.embed(source)
        rebuilt = torch.cat([principal.rebuild(principal.project(z, count)) for count in counts])
        images = self.sample("reconstruct", rebuilt, [0] * len(counts))
        variance = principal.spectrum.cumsum(0) / principal.spectrum.sum()
        labels = [f"{n} of {width} components, {variance[n - 1]:.0%} of variance" for n in counts]
        inputs: dict[str, Artifact | str] = {"image": source.digest, "prior": prior}
        return self._edited("reconstruct", {"components": counts}, inputs, images, labels, source)

    def original(self, source: SourceImage) -> Any:
        """An image in the size of the sampled ones: (3, S, S) uint8."""
        return source.pixels(self.decoder.size)

    def embed(self, *sources: SourceImage) -> Tensor:
        """z_i of B images: (B, D) float32, of length 1 if the CLIP's embeddings are."""
        return torch.from_numpy(self.clip.encode(np.stack([s.pixels(self.clip.size) for s in sources])))

    def invert(self, z: Tensor, *sources: SourceImage) -> Tensor:
        """DDIM inversion of B images with their embeddings (B, D): their noise (B, 3, s, s) float32."""
        size = self.decoder.small_size
        with self.progress("invert", len(sources), unit="images") as advance:
            noise = self.decoder.invert(np.stack([s.pixels(size) for s in sources]), z, ITERATIONS)
            advance(len(sources))
        return noise

    def sample(self, stage: str, z: Tensor, numbers: Sequence[int], start: Tensor | None = None) -> Any:
        """Images of embeddings (N, D), from `start` (N, 3, s, s) or noise of their numbers: (N, 3, S, S) uint8."""
        images = []
        with self.progress(stage, len(z), unit="images") as advance:
            for rows in batched(len(z), self.batch_size):
                first = None if start is None else start[rows]
                images.append(self.decoder.decode(z[rows], numbers[rows], start=first))
                advance(len(images[-1]))
        return np.concatenate(images)

    def _edited(
        self, stage: str, options: dict[str, Any], inputs: Mapping[str, Artifact | str], images: Any, labels: list[str],
        source: SourceImage, title: str | None = None,
    ) -> Edited:  # fmt: skip
        made = self._history(stage, options, inputs)
        return Edited([self.original(source), *images], ["original", *labels], made, title)

    def _history(
        self, stage: str, options: dict[str, Any], inputs: Mapping[str, Artifact | str]
    ) -> list[dict[str, Any]]:
        weights = {"clip": self.clip.weights, **self.decoder.inputs}
        return history(stage, {**options, **self.decoder.settings}, **inputs, **weights)


def edit_files(
    stage: str, sources: Sequence[str], options: EditOptions, arguments: dict[str, Any], progress: Progress = Quiet,
    preview: Callable[[str], None] | None = None, *, eta: float | None = None,
) -> tuple[Path, Edited]:  # fmt: skip
    """Edit image files by the `Editor` method named `stage`; write an image grid and, if requested, an artifact.

    Raises:
        DalleError: images that cannot be read, weights that do not fit, or something else at an output.
    """
    names = ["IMAGE"] if len(sources) == 1 else ["A", "B"]
    images = [SourceImage.read(source, name) for source, name in zip(sources, names, strict=True)]
    target = options.out or Path("-".join(Path(source).stem for source in sources) + f".{stage}.png")
    check_outputs(target, options.images, options.force, sources)
    decoder = DecoderOptions(options.decoder_steps, None, options.decoder_guidance, eta, options.upsampler_steps)
    machine = arithmetic(options.device, options.dtype)
    how: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size, "progress": progress}
    edited: Edited = getattr(Editor(options.model, machine, decoder, **how), stage)(*images, **arguments)
    if options.images is not None:
        write_labelled(options.images, edited.images, edited.labels, edited.history, options.force)
    columns = options.columns
    write_grid(target, edited.images, edited.labels, columns=columns, title=edited.title, force=options.force)
    if options.terminal and preview is not None:
        preview(terminal_preview(edited.images, columns))
    return target, edited


def check_noise(noise: str) -> None:
    """Raises: DalleError for an unknown kind of noise."""
    if noise not in NOISES:
        raise DalleError(f"expected --noise {' or '.join(NOISES)}, found {noise!r}; take one of them")


def check_diff(strength: float, after: str) -> None:
    """Raises: DalleError for a strength out of range, or an empty caption."""
    if not 0 <= strength <= 1:
        raise DalleError(f"expected --strength from 0 to 1, found {strength}; the paper's are from 0.25 to 0.5")
    if not after.strip():
        raise DalleError("expected a caption of the edited image, found an empty one; give TO")


def find_embedding_prior(model: str | None) -> Artifact:
    """The prior over embeddings, which holds the principal components.

    Raises:
        DalleError: there is none.
    """
    try:
        return bundles.weights(model, "weights.prior.embeddings")
    except DalleError as error:
        raise DalleError(
            f"{error}. Principal components come with a prior over embeddings, of either kind: `dalle train-prior "
            "CAPTIONS EMBEDDINGS` makes one, which is then put into the bundle"
        ) from None


def component_counts(components: Sequence[int] | None, width: int) -> list[int]:
    """Numbers of components, each once; by default 8, 32, 128 and so on, then all.

    Raises:
        DalleError: numbers that are not from 1 to the width of the embeddings.
    """
    if components is None:
        return [*(n for n in (8 * 4**i for i in range(width.bit_length())) if n < width), width]
    if not components or not 1 <= min(components) <= max(components) <= width:
        found = ",".join(map(str, components))
        raise DalleError(f"expected --components from 1 to {width}, found {found}; embeddings are {width} wide")
    return list(dict.fromkeys(components))


def parse_components(text: str | None) -> list[int] | None:
    """Numbers separated by commas.

    Raises:
        DalleError: not numbers.
    """
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise DalleError(f"expected --components as 8,32,128, found {text!r}; give numbers") from None
