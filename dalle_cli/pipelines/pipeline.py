"""Prompt to images: a prior, what turns its latents into images, and the CLIP that ranks them.

Shapes: N candidates, B of them in a batch, H W code grid, D embedding width, S side of the images in pixels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dalle_cli.artifacts import Artifact, history
from dalle_cli.devices import Arithmetic, arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.options import DecoderOptions, InpaintingOptions, SamplingOptions, refuse_given
from dalle_cli.pipelines.clip import ClipScorer, shared_clip
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.decoder import ImageDecoder, at_once, to_bytes
from dalle_cli.pipelines.editing import Editor, SourceImage
from dalle_cli.pipelines.inpainting import InpaintingMask, read_mask
from dalle_cli.pipelines.prior import BATCH, PRIORS, EmbeddingPrior, TokenPrior, open_prior
from dalle_cli.pipelines.prompts import Candidate, Progress, Quiet, batched, candidates
from dalle_cli.pipelines.ranking import TopK, check_keep

log = logging.getLogger("dalle_cli")
KEEP = 4  # images kept of each prompt by default
AT_ONCE = 64  # images decoded and scored at once, whatever the batch size of sampling
GROUPS: dict[str, type[Any]] = {"sampling": SamplingOptions, "decoder": DecoderOptions, "inpainting": InpaintingOptions}


@dataclass(frozen=True)
class Settings:
    """Everything that an image of `generate` depends on besides its prompt and its number."""

    n: int = 8
    keep: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    inpainting: InpaintingOptions = field(default_factory=InpaintingOptions)
    batch_size: int = BATCH
    compiled: bool = False

    @classmethod
    def of(cls, **values: Any) -> "Settings":
        """Settings from the names of their fields and of the groups' fields, as `n=16, temperature=0.7`.

        Raises:
            DalleError: an unknown name, or a value out of range.
        """
        groups: dict[str, Any] = {}
        for name, group in GROUPS.items():
            groups[name] = group(**{key: values.pop(key) for key in list(values) if key in group.__dataclass_fields__})
        unknown = sorted(values.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise DalleError(f"expected settings of sampling, decoder or inpainting, found {unknown[0]!r}; see docs")
        return cls(**groups, **values)

    @property
    def n_keep(self) -> int:
        """How many images of each prompt to keep."""
        return min(KEEP, self.n) if self.keep is None else self.keep


@dataclass
class Generated:
    """The best candidates of each prompt, the history of how they were made, and the mask if an image was inpainted."""

    top: TopK
    history: list[dict[str, Any]]
    mask: InpaintingMask | None = None
    interrupted: bool = False

    def pil(self) -> list[Image.Image]:
        """The images, best first, each with `.score`, None if nothing ranked them, and `.info` (prompt, candidate)."""
        images = []
        for ranked in self.top.ranked():
            image = Image.fromarray(np.ascontiguousarray(ranked.image.transpose(1, 2, 0)))
            image.score = ranked.score  # type: ignore[attr-defined]
            image.info = {"prompt": ranked.candidate.text, "candidate": ranked.candidate.number, "score": ranked.score}
            images.append(image)
        return images


class LatentDecoder(NamedTuple):
    """How `generate` turns latents into images, and what the history says of it."""

    decode: Callable[[Any, Sequence[int], list[str]], Any]  # latents, numbers of their rows, texts -> images
    mask: InpaintingMask | None
    options: dict[str, Any]
    inputs: dict[str, Artifact]
    small: bool = False  # whether upsamplers follow, so that images are float32 in [-1, 1] until then


class Pipeline:
    """The models of a bundle, each loaded when it is first used: prompt to images, and each step of that.

    `latents` is `codes` (DALL-E) or `embeddings` (DALL-E 2), for a bundle that has a prior over each.
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

    @cached_property
    def prior(self) -> TokenPrior | EmbeddingPrior:
        """The prior over codes or embeddings."""
        kinds = [kind for name, kind in PRIORS.items() if self.latents in (None, name)]
        return open_prior(bundles.weights(self.model, *kinds), self.machine, self.model)

    @cached_property
    def codec(self) -> Codec:
        """The dVAE; if a prior over codes is loaded, it must be the one that the prior was trained with."""
        weights, prior = bundles.weights(self.model, "weights.dvae"), vars(self).get("prior")
        if isinstance(prior, TokenPrior):
            return Codec.of(weights, prior.encoder, prior.weights.path, self.machine)
        return Codec(weights, self.machine)

    @cached_property
    def scorer(self) -> ClipScorer:
        """The CLIP that scores images against captions.

        Raises:
            DalleError: there is none that reads images, or several.
        """
        found = self._whole_clips()
        return shared_clip(found[0] if len(found) == 1 else bundles.weights(self.model, "weights.clip"), self.machine)

    def _whole_clips(self) -> list[Artifact]:
        """The CLIPs of the bundle that are not text encoders alone."""
        found = bundles.of_kind(self.path, "weights.clip")
        return [weights for weights in found if weights.require("model", dict).get("vision_layers") != 0]

    @cached_property
    def _decoder(self) -> ImageDecoder:
        return ImageDecoder(self.model, self.machine)

    def decoder(self, options: DecoderOptions | None = None, seed: int = 0) -> ImageDecoder:
        """The diffusion decoder with its upsamplers, set to these options."""
        return self._decoder.set(options or DecoderOptions(), seed)

    def generate(
        self, prompts: str | Sequence[str], *, progress: Progress = Quiet, **settings: Any
    ) -> list[Image.Image]:
        """Sample, decode, rank and keep the best images of each prompt.

        Settings are those of the command line with underscores: n, keep, seed, temperature, guidance, decoder_steps ...

        Raises:
            DalleError: a setting that does not exist, or that this model does not have; no prompt.
        """
        return self.run(_texts(prompts), Settings.of(**settings), progress).pil()

    def run(self, texts: Sequence[str], settings: Settings, progress: Progress = Quiet) -> Generated:
        """As `generate`, with scores and history; if interrupted (Ctrl-C), return the best images so far.

        The images are ranked as small as the decoder makes them, and only those kept are enlarged.
        """
        rows = candidates(texts, settings.n)
        check_keep([row.text for row in rows], settings.n_keep)
        prior, decoder, scorer = self.prior, self._latent_decoder(settings), self._ranking(settings)
        top = TopK(settings.n if scorer is None and settings.keep is None else settings.n_keep)
        options: dict[str, Any] = {"keep": top.keep, "dtype": self.machine.name, **decoder.options}
        interrupted = False
        try:
            with progress("generate", len(rows), unit="candidates") as advance:
                self._sample_and_rank(rows, settings, decoder, scorer, top, advance)
        except KeyboardInterrupt:
            if not top.seen:
                raise
            interrupted, options["seen"] = True, top.seen
        if decoder.small:
            self._enlarge(top, progress)
        sampled = prior.history(settings.n, settings.sampling, decoder.mask)
        ranked_by = {} if scorer is None else {"clip": scorer.weights}
        made = history("generate", options, **decoder.inputs, **ranked_by)
        whole = [*sampled, *(entry for entry in made if entry not in sampled)]
        return Generated(top, whole, decoder.mask, interrupted)

    def _sample_and_rank(
        self, rows: Sequence[Candidate], settings: Settings, decoder: LatentDecoder, scorer: ClipScorer | None,
        top: TopK, advance: Any,
    ) -> None:  # fmt: skip
        """Sample and decode candidates batch by batch, and add them to `top` with their scores."""
        prior = self.prior
        by_code, report = prior.kind == "codes", CandidateProgress(prior.n_parts, advance, top)
        for latents in prior.sample(
            rows, settings.sampling, mask=decoder.mask, batch_size=settings.batch_size, compiled=settings.compiled,
            progress=report if by_code else None,
        ):  # fmt: skip
            for part in batched(len(latents), AT_ONCE):
                numbers = range(top.seen, top.seen + part.stop - part.start)
                own = [rows[number] for number in numbers]
                images = decoder.decode(latents[part], numbers, texts := [row.text for row in own])
                top.add(own, None if scorer is None else scorer.score(to_bytes(images), texts), images)
                report(0 if by_code else len(own))

    def _enlarge(self, top: TopK, progress: Progress) -> None:
        """Replace the small images of `top` by those of the upsamplers."""
        small, images, decoder = top.ranked(), [], self._decoder
        with progress("enlarge", len(small), unit="images") as advance:
            for part in batched(len(small), at_once(decoder.size)):
                rows = [one.row for one in small[part]]
                images += list(decoder.enlarge(np.stack([one.image for one in small[part]]), rows))
                advance(len(rows))
        top.replace_images(images)

    def _ranking(self, settings: Settings) -> ClipScorer | None:
        """The CLIP that ranks candidates; None, with a warning, for a bundle without one that reads images."""
        if self._whole_clips():
            return self.scorer
        kept = "all are kept" if settings.keep is None else f"the first {settings.n_keep} of each prompt are kept"
        if settings.n > 1:
            log.warning("no CLIP in %s reads images, so nothing ranks them: %s", self.path.name, kept)
        return None

    def _latent_decoder(self, settings: Settings) -> LatentDecoder:
        """The dVAE or the diffusion decoder; refuses the settings that are for the other one."""
        prior = self.prior
        if isinstance(prior, TokenPrior):
            refuse_given(settings.decoder, "a prior over codes")
            prior.settings(settings.sampling)  # refuse wrong ones before the dVAE is loaded
            codec = self.codec
            mask = read_mask(settings.inpainting, codec)
            return LatentDecoder(lambda codes, *_: codec.decode(codes), mask, {}, {"dvae": codec.weights})
        refuse_given(settings.inpainting, "a prior over embeddings")
        decoder = self.decoder(settings.decoder, prior.settings(settings.sampling)["seed"])
        decoder.check(prior.weights)
        if not decoder.upsamplers:
            return LatentDecoder(decoder.decode, None, decoder.settings, decoder.inputs)
        options = {**decoder.settings, "ranked_size": decoder.small_size}
        return LatentDecoder(decoder.decode_small, None, options, decoder.inputs, small=True)

    def sample(self, prompts: str | Sequence[str], n: int = 8, **settings: Any) -> Any:
        """Latents of n candidates of each prompt: codes (N, H, W) uint16, or embeddings (N, D) float32."""
        made = Settings.of(n=n, **settings)
        mask = read_mask(made.inpainting, self.codec) if made.inpainting.image else None
        how: dict[str, Any] = {"mask": mask, "batch_size": made.batch_size, "compiled": made.compiled}
        return np.concatenate(list(self.prior.sample(candidates(_texts(prompts), n), made.sampling, **how)))

    def decode(self, latents: Any, texts: Sequence[str] | None = None, *, seed: int = 0, **options: Any) -> Any:
        """Images (N, 3, S, S) uint8 of codes (N, H, W), or of embeddings (N, D) with their captions."""
        latents = np.asarray(latents)
        parts = batched(len(latents), AT_ONCE)
        if latents.ndim == 3:
            return np.concatenate([self.codec.decode(latents[part]) for part in parts])
        decoder = self.decoder(DecoderOptions(**options), seed)
        return np.concatenate(
            [decoder.decode(latents[p], range(len(latents))[p], None if texts is None else texts[p]) for p in parts]
        )

    def encode(self, images: Sequence[Image.Image]) -> Any:
        """Images as codes of the dVAE (N, H, W); of a model without one, as CLIP embeddings (N, D)."""
        encoder = self.codec if isinstance(self.prior, TokenPrior) else self.prior.clip
        return encoder.encode(np.stack([SourceImage.read(image).pixels(encoder.size) for image in images]))

    def score(self, images: Any, texts: Sequence[str]) -> Any:
        """CLIP's cosine of each image with its text: (N, 3, S, S) uint8 -> (N,) float32."""
        return self.scorer.score(images, list(texts))

    def edit(self, *, seed: int = 0, progress: Progress = Quiet, **options: Any) -> Editor:
        """An `Editor` of this model: vary, interpolate, diff, reconstruct."""
        return Editor(self.model, self.machine, DecoderOptions(**options), seed=seed, progress=progress)


class CandidateProgress:
    """Report finished candidates, given finished parts of them: a candidate of codes has H x W parts."""

    def __init__(self, n_parts: int, advance: Any, top: TopK):
        self.n_parts, self.advance, self.top = n_parts, advance, top
        self.parts = self.done = 0

    def __call__(self, n: int) -> None:
        self.parts += n
        new, self.done = self.parts // self.n_parts - self.done, self.parts // self.n_parts
        best = self.top.best()
        self.advance(new, **({} if best is None else {"best": best}))


def load(model: str | Path | None = None, **options: Any) -> Pipeline:
    """The models that `model` names: a shipped bundle, a folder, a file, or hf://owner/repo. Options as `Pipeline`.

    Raises:
        DalleError: there is no such model.
    """
    return Pipeline(None if model is None else str(model), **options)


def _texts(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


__all__ = ["Generated", "Pipeline", "Settings", "load"]
