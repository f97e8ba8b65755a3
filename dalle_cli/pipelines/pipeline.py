"""Prompt to images: a prior, what turns its latents into images, and the CLIP that ranks them.

Shapes: N candidates, B of them in a batch, H W code grid, D embedding width, S side of the images in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.artifacts import history
from dalle_cli.devices import Arithmetic, arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.options import DecoderOptions, InpaintingOptions, SamplingOptions, refuse_given
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.editing import Editor, SourceImage
from dalle_cli.pipelines.inpainting import InpaintingMask, read_mask
from dalle_cli.pipelines.prior import BATCH, PRIORS, EmbeddingPrior, TokenPrior, open_prior
from dalle_cli.pipelines.prompts import Candidate, Progress, Quiet, batched, candidates
from dalle_cli.pipelines.ranking import TopK, check_keep

SHOWN = 4  # images of a prompt that are kept by default
AT_ONCE = 64  # images decoded and scored at once, however many candidates are sampled at once


@dataclass(frozen=True)
class Settings:
    """All that an image of `generate` depends on beside its prompt and its number."""

    n: int = 8
    keep: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    inpainting: InpaintingOptions = field(default_factory=InpaintingOptions)
    batch_size: int = BATCH
    compiled: bool = False

    @classmethod
    def of(cls, **values: Any) -> "Settings":
        """Settings by the names of their fields and of the groups' fields, as `n=16, temperature=0.7`.

        Raises:
            DalleError: a name that none of them has.
        """
        made: dict[str, Any] = {}
        for name, group in (
            ("sampling", SamplingOptions),
            ("decoder", DecoderOptions),
            ("inpainting", InpaintingOptions),
        ):
            own = {key: values.pop(key) for key in list(values) if key in group.__dataclass_fields__}
            made[name] = group(**own)
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise DalleError(f"expected settings of sampling, decoder or inpainting, found {unknown[0]!r}; see docs")
        return cls(**made, **values)

    @property
    def kept(self) -> int:
        """How many images of each prompt are kept."""
        return min(SHOWN, self.n) if self.keep is None else self.keep


@dataclass
class Generated:
    """The best candidates of each prompt, and how they were made."""

    top: TopK
    history: list[dict[str, Any]]
    mask: InpaintingMask | None = None
    interrupted: bool = False

    def pil(self) -> list[Image.Image]:
        """The images, best first, each with `.score` and `.info` (prompt, candidate number)."""
        images = []
        for ranked in self.top.ranked():
            image = Image.fromarray(np.ascontiguousarray(ranked.image.transpose(1, 2, 0)))
            image.score = ranked.score  # type: ignore[attr-defined]
            image.info = {"prompt": ranked.candidate.text, "candidate": ranked.candidate.number, "score": ranked.score}
            images.append(image)
        return images


class Pipeline:
    """The models of a bundle; each is loaded when it is first used.

    `latents` is `codes` (DALL-E) or `embeddings` (DALL-E 2), where a bundle holds a prior over each.
    """

    def __init__(
        self, model: str | None = None, *, latents: str | None = None, machine: Arithmetic | None = None,
        device: str = "auto", dtype: str = "float32",
    ):  # fmt: skip
        """Raises: DalleError if the model, the device or the dtype does not exist."""
        if latents not in (None, *PRIORS):
            raise DalleError(
                f"expected --latents among {', '.join(PRIORS)}, found {latents!r}; take one, or leave it out"
            )
        self.model, self.latents = model, latents
        self.machine = machine or arithmetic(device, dtype)
        self.path = bundles.locate(model)
        self._parts: dict[str, Any] = {}

    def _part(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]

    @property
    def prior(self) -> TokenPrior | EmbeddingPrior:
        """The prior over codes or embeddings."""
        kinds = [kind for name, kind in PRIORS.items() if self.latents in (None, name)]
        made = self._part("prior", lambda: open_prior(bundles.weights(self.model, *kinds), self.machine, self.model))
        return made  # type: ignore[no-any-return]

    @property
    def codec(self) -> Codec:
        """The dVAE, which must be the one that a prior over codes was trained with."""

        def make() -> Codec:
            weights, prior = bundles.weights(self.model, "weights.dvae"), self._parts.get("prior")
            if isinstance(prior, TokenPrior):
                return Codec.of(weights, prior.encoder, prior.weights.path, self.machine)
            return Codec(weights, self.machine)

        return self._part("codec", make)  # type: ignore[no-any-return]

    @property
    def scorer(self) -> ClipScorer:
        """The CLIP that scores images against captions."""
        make = lambda: ClipScorer(bundles.weights(self.model, "weights.clip"), self.machine)  # noqa: E731
        return self._part("scorer", make)  # type: ignore[no-any-return]

    def decoder(self, options: DecoderOptions | None = None, seed: int = 0) -> ImageDecoder:
        """The diffusion decoder with its upsamplers, set to these options."""
        made: ImageDecoder = self._part("decoder", lambda: ImageDecoder(self.model, self.machine))
        return made.set(options or DecoderOptions(), seed)

    def generate(
        self, prompts: str | Sequence[str], *, progress: Progress = Quiet, **settings: Any
    ) -> list[Image.Image]:
        """Sample, decode, rank and keep the best images of each prompt.

        Settings are those of the command line with underscores: n, keep, seed, temperature, guidance, decoder_steps ...

        Raises:
            DalleError: a setting that does not exist, or that this model does not have; no prompt.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.run(texts, Settings.of(**settings), progress).pil()

    def run(self, texts: Sequence[str], settings: Settings, progress: Progress = Quiet) -> Generated:
        """As `generate`, with the scores, the history, and what is there when it is interrupted (Ctrl-C)."""
        rows, prior = candidates(texts, settings.n), self.prior
        check_keep([row.text for row in rows], settings.kept)
        mask, images, told, inputs = self._images(rows, settings)
        scorer, top = self.scorer, TopK(settings.kept)
        options: dict[str, Any] = {"keep": settings.kept, "dtype": self.machine.name, **told}
        interrupted, done = False, 0
        try:
            with progress("generate", len(rows), unit="candidates") as advance:
                count = Counter(prior.n_parts, advance, top)
                for part in images(count):
                    own = rows[done : done + len(part)]
                    top.add(own, scorer.score(part, [row.text for row in own]), part)
                    done += len(part)
                    count(0)
        except KeyboardInterrupt:
            if not top.seen:
                raise
            interrupted, options["seen"] = True, top.seen
        sampled = prior.history(settings.n, settings.sampling, mask)
        made = history("generate", options, **inputs, clip=scorer.weights)
        whole = [*sampled, *(entry for entry in made if entry not in sampled)]
        return Generated(top, whole, mask, interrupted)

    def _images(
        self, rows: Sequence[Candidate], settings: Settings
    ) -> tuple[InpaintingMask | None, Callable[[Any], Iterator[Any]], dict[str, Any], dict[str, Any]]:
        """The mask, what yields the images of all candidates (B, 3, S, S), and what a history says of decoding."""
        prior = self.prior
        how: dict[str, Any] = {"batch_size": settings.batch_size, "compiled": settings.compiled}
        if isinstance(prior, TokenPrior):
            refuse_given(settings.decoder, "a prior over codes")
            prior.settings(settings.sampling)  # before the dVAE is loaded
            codec = self.codec
            mask = read_mask(settings.inpainting, codec)

            def of_codes(count: Any) -> Iterator[Any]:
                for codes in prior.sample(rows, settings.sampling, mask=mask, progress=count, **how):
                    for part in batched(len(codes), AT_ONCE):
                        yield codec.decode(codes[part])

            return mask, of_codes, {}, {"dvae": codec.weights}
        refuse_given(settings.inpainting, "a prior over embeddings")
        seed = prior.settings(settings.sampling)["seed"]
        decoder = self.decoder(settings.decoder, seed)
        decoder.check(prior.weights)

        def of_embeddings(count: Any) -> Iterator[Any]:
            done = 0
            for embeddings in prior.sample(rows, settings.sampling, **how):
                for part in batched(len(embeddings), AT_ONCE):
                    numbers = range(done, done + part.stop - part.start)  # rows of the file that `sample` would write
                    yield decoder.decode(embeddings[part], numbers, [rows[number].text for number in numbers])
                    done += len(numbers)
                    count(len(numbers))

        return None, of_embeddings, decoder.settings, decoder.inputs

    def sample(self, prompts: str | Sequence[str], n: int = 8, **settings: Any) -> Any:
        """Latents of n candidates of each prompt: codes (N, H, W) uint16, or embeddings (N, D) float32."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        made = Settings.of(n=n, **settings)
        rows, prior = candidates(texts, n), self.prior
        how: dict[str, Any] = {"batch_size": made.batch_size, "compiled": made.compiled}
        mask = read_mask(made.inpainting, self.codec) if made.inpainting.image else None
        return np.concatenate(list(prior.sample(rows, made.sampling, mask=mask, **how)))

    def decode(self, latents: Any, texts: Sequence[str] | None = None, *, seed: int = 0, **options: Any) -> Any:
        """Images (N, 3, S, S) uint8 of codes (N, H, W), or of embeddings (N, D) with their captions."""
        latents = np.asarray(latents)
        if latents.ndim == 3:
            return np.concatenate([self.codec.decode(latents[part]) for part in batched(len(latents), AT_ONCE)])
        decoder = self.decoder(DecoderOptions(**options), seed)
        parts = batched(len(latents), AT_ONCE)
        return np.concatenate(
            [decoder.decode(latents[p], range(len(latents))[p], None if texts is None else texts[p]) for p in parts]
        )

    def encode(self, images: Sequence[Image.Image]) -> Any:
        """Images as codes of the dVAE (N, H, W); of a model without one, as CLIP embeddings (N, D)."""
        encoder = self.codec if isinstance(self.prior, TokenPrior) else self.prior.clip
        pixels = np.stack([SourceImage.read(image).pixels(encoder.size) for image in images])
        return encoder.encode(pixels)

    def score(self, images: Any, texts: Sequence[str]) -> Any:
        """CLIP's cosine of each image with its text: (N, 3, S, S) uint8 -> (N,) float32."""
        return self.scorer.score(images, list(texts))

    def edit(self, *, seed: int = 0, progress: Progress = Quiet, **options: Any) -> Editor:
        """An `Editor` of this model: vary, interpolate, diff, reconstruct."""
        return Editor(self.model, self.machine, DecoderOptions(**options), seed=seed, progress=progress)


class Counter:
    """Candidates done, from parts of them, for progress: a candidate of codes has H x W parts."""

    def __init__(self, n_parts: int, advance: Any, top: TopK):
        self.n_parts, self.advance, self.top = n_parts, advance, top
        self.parts = self.done = 0

    def __call__(self, n: int) -> None:
        self.parts += n
        new, self.done = self.parts // self.n_parts - self.done, self.parts // self.n_parts
        self.advance(new, **({"best": self.top.best()} if self.top.seen else {}))


def load(model: str | Path | None = None, **options: Any) -> Pipeline:
    """The models that `model` names: a shipped bundle, a folder, a file, or hf://owner/repo. Options as `Pipeline`.

    Raises:
        DalleError: there is no such model.
    """
    return Pipeline(None if model is None else str(model), **options)


__all__ = ["Generated", "Pipeline", "Settings", "load"]
