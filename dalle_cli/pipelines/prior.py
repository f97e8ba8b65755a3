"""Priors over latents: prompts to codes, or to CLIP image embeddings.

Shapes: N candidates, B of them in a batch, P distinct prompts, T caption length, H W code grid, D embedding width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact, history
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.packed import pack
from dalle_cli.options import AUTO, SamplingOptions, flag, given, refuse_given
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.inpainting import InpaintingMask
from dalle_cli.pipelines.prompts import Candidate, Rows
from dalle_cli.sampling import memory
from dalle_cli.sampling.autoregressive import sample_batches
from dalle_cli.sampling.embeddings import Read, autoregressed, diffused

log = logging.getLogger("dalle_cli")
BATCH, STEPS = 64, 64  # candidates at once where the batch size is `auto`; steps of the paper's diffusion prior
PRIORS = {"codes": "weights.prior.codes", "embeddings": "weights.prior.embeddings"}  # the first where both are there
OF_CODES = ("temperature", "top_k", "top_p", "sketch_guidance", "int8")
OF_DIFFUSION = ("sampler", "steps")

Told = Callable[[int], None]


def trained_value(weights: Artifact, name: str, value: float | None) -> float:
    """A guidance or temperature: the value given, else what the weights' training wrote down, else 1.

    Raises:
        DalleError: what was written down is no such number.
    """
    if value is not None:
        return value
    train = weights.config.get("train")
    found = train.get(name, 1.0) if isinstance(train, dict) else 1.0
    if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
        raise DalleError(f"expected train.{name} of at least 0 in {weights.path}, found {found!r}; give {flag(name)}")
    return float(found)


def open_prior(weights: Artifact, machine: Arithmetic, model: str | None = None) -> "TokenPrior | EmbeddingPrior":
    """The prior of a weights file, of either kind; `model` is where the CLIP of a prior over embeddings is."""
    if weights.kind == PRIORS["codes"]:
        return TokenPrior(weights, machine)
    return EmbeddingPrior(weights, machine, find_clip(weights, model))


def find_clip(weights: Artifact, model: str | None) -> Artifact:
    """The CLIP that weights were trained with: one beside them, or that of the model that was named.

    Raises:
        DalleError: it is in neither place.
    """
    encoder = weights.require("encoder", str)
    beside = bundles.find_weights(encoder, weights.path.parent)
    if beside is not None and beside.kind == "weights.clip":
        return beside
    if weights.path.is_file() and model is not None and bundles.locate(model) == weights.path:
        raise DalleError(
            f"expected the CLIP of sha256 {encoder[:12]}, which {weights.path.name} was trained with, beside it, found "
            "none; copy it there"
        )
    clip = bundles.weights(model, "weights.clip")
    bundles.check_digest("CLIP", clip.digest, encoder, weights.path)
    return clip


def encode_prompts(weights: Artifact, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Tokens (P, T) and lengths (P,) int64 of prompts, with the tokenizer of these weights."""
    tokens, lengths, cut = tokenizers.load(bundles.tokenizer(weights)).encode_batch(list(texts), length)
    if cut:
        log.warning("prompts of more than %d tokens, which were cut: %d", length, cut)
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))


class TokenPrior:
    """A transformer over codes with its tokenizer (2021, sec. 2.2)."""

    kind = "codes"

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.weights, self.machine = weights, machine
        self.encoder = weights.require("encoder", str)
        self.model = loading.prior(weights, machine.device)
        self.config = self.model.config

    @property
    def n_parts(self) -> int:
        """Codes of one candidate, which progress counts."""
        return self.config.grid**2

    @property
    def dtype(self) -> Any:
        """The integers that codes are stored in."""
        return np.uint16 if self.config.n_image_vocab <= 2**16 else np.int32

    @property
    def header(self) -> dict[str, Any]:
        """What the header of an artifact of these codes says."""
        return {"n_vocab": self.config.n_image_vocab, "grid": self.config.grid, "encoder": self.encoder}

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Every setting that codes depend on: the options given, what the weights say, the defaults.

        Raises:
            DalleError: an option that only other priors have.
        """
        refuse_given(options, "a prior over codes", *OF_DIFFUSION)
        if options.sketch_guidance is not None and not self.config.sketch:
            raise DalleError(
                f"expected a prior with a sketch for --sketch-guidance, found none in {self.weights.path}; leave it out"
            )
        told: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **given(options)}
        for name in ("guidance", "temperature", *(("sketch_guidance",) if self.config.sketch else ())):
            told[name] = trained_value(self.weights, name, getattr(options, name))
        return told

    def batch_size(self, rows: Sequence[Candidate], settings: dict[str, Any], batch_size: int) -> int:
        """The batch size given; for `auto`, as many candidates as fit into half of the free memory."""
        if batch_size != AUTO:
            return batch_size
        several = len({row.text for row in rows}) > 1
        return memory.fitting_batch(self.model, len(rows), settings["guidance"] != 1, several, self.machine.dtype)

    def sample(
        self, rows: Sequence[Candidate], options: SamplingOptions | None = None, *, mask: InpaintingMask | None = None,
        batch_size: int = BATCH, compiled: bool = False, progress: Told | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Codes of candidates, batch after batch: (B, H, W) uint16 or int32.

        Candidate k of a prompt is a function of (weights, settings, prompt, k) alone. `progress` is told the number of
        codes sampled since it was last called. int8 and the layout of the matrices are those of the first call.
        """
        options = options or SamplingOptions()
        told, read = self.settings(options), Rows.of(rows)
        at_once = self.batch_size(rows, told, batch_size)
        tokens, lengths = encode_prompts(self.weights, read.texts, self.config.n_text)
        guided = told["guidance"] != 1
        packed_rows = min(at_once, len(rows)) * (2 if guided else 1)
        pack(self.model, packed_rows, self.machine.dtype, bool(told.get("int8")), plain=compiled)
        batches = sample_batches(
            self.model, tokens, lengths, read.indices, told["seed"],
            temperature=told["temperature"], top_k=told["top_k"], top_p=told["top_p"],
            guidance_scale=told["guidance"], guidance_span=options.guidance_span,
            sketch_guidance=told.get("sketch_guidance", 1.0), captions=read.captions,
            given=None if mask is None else torch.from_numpy(mask.codes),
            kept=None if mask is None else torch.from_numpy(mask.keep),
            batch_size=at_once, compiled=compiled, progress=progress,
        )  # fmt: skip
        for batch in batches:
            yield batch.cpu().numpy().astype(self.dtype)

    def history(
        self, n: int, options: SamplingOptions, mask: InpaintingMask | None = None, past: Artifact | None = None,
        rows: str | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """What led to the codes; `past` are the codes of which the rows named are sampled again."""
        told = _recorded(n, self.settings(options), options) | {"dtype": self.machine.name}
        inputs: dict[str, Artifact | str] = {"model": self.weights}
        if past is not None:
            told, inputs = {**told, "rows": rows}, {"drawn": past, **inputs}
        if mask is not None:
            told, inputs = {**told, **mask.options}, {**inputs, **mask.inputs}
        return history("sample", told, **inputs)


class EmbeddingPrior:
    """A diffusion or autoregressive prior over CLIP image embeddings, with its captions' CLIP (2022, sec. 2.2)."""

    kind, n_parts = "embeddings", 1

    def __init__(self, weights: Artifact, machine: Arithmetic, clip: Artifact):
        self.weights, self.machine, self.clip_weights = weights, machine, clip
        self.encoder = weights.require("encoder", str)
        self.model = loading.embedding_prior(weights, machine.device)
        self.config = self.model.config
        self._clip: ClipScorer | None = None

    @property
    def clip(self) -> ClipScorer:
        """The CLIP that embeds captions."""
        if self._clip is None:
            self._clip = ClipScorer(self.clip_weights, self.machine)
        return self._clip

    @property
    def header(self) -> dict[str, Any]:
        """What the header of an artifact of these embeddings says."""
        return {"encoder": self.encoder}

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Every setting that embeddings depend on: the options given, what the weights say, the defaults.

        Raises:
            DalleError: an option that only other priors have.
        """
        refuse_given(options, "a prior over embeddings", "int8", "sketch_guidance")
        own: dict[str, Any] = {"sampler": "ddpm", "steps": min(STEPS, getattr(self.config, "n_timestep", STEPS))}
        others: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if not isinstance(self.model, DiffusionPrior):
            own, others = others, own
        for name in others:
            if getattr(options, name) is not None:
                known = ", ".join(map(flag, own))
                found = f"for a prior of kind {self.config.kind!r}, found {flag(name)}"
                raise DalleError(f"expected {known} {found}; leave it out")
        guidance = trained_value(self.weights, "guidance", options.guidance)
        return {**own, "seed": 0, **given(options), "guidance": guidance}

    def batch_size(self, rows: Sequence[Candidate], settings: dict[str, Any], batch_size: int) -> int:
        """The batch size given, or 64 for `auto`."""
        return BATCH if batch_size == AUTO else batch_size

    def sample(
        self, rows: Sequence[Candidate], options: SamplingOptions | None = None, *, mask: InpaintingMask | None = None,
        batch_size: int = BATCH, compiled: bool = False, progress: Told | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """z_i of candidates, batch after batch: (B, D) float32 of length 1.

        Candidate k of a prompt is a function of (weights, settings, prompt, k) alone. `progress` is told the number of
        candidates sampled since it was last called.

        Raises:
            DalleError: a mask, or compilation, which are for codes.
        """
        for name, value in {"image": mask, "compile": compiled}.items():
            if value:
                raise DalleError(f"expected no --{name} for a prior over embeddings, found one; leave it out")
        options = options or SamplingOptions()
        told, read = self.settings(options), Rows.of(rows)
        tokens, lengths = encode_prompts(self.weights, read.texts, self.config.n_text)
        captions = Read(tokens, lengths, torch.from_numpy(self.clip.encode_texts(read.texts)))
        how: dict[str, Any] = {
            "captions": read.captions, "guidance_scale": told["guidance"], "guidance_span": options.guidance_span,
            "batch_size": self.batch_size(rows, told, batch_size), "progress": progress,
        }  # fmt: skip
        if isinstance(self.model, DiffusionPrior):
            how |= {"sampler": told["sampler"], "steps": told["steps"]}
            batches = diffused(self.model, captions, read.indices, told["seed"], **how)
        else:
            how |= {name: told[name] for name in ("temperature", "top_k", "top_p")}
            batches = autoregressed(self.model, captions, read.indices, told["seed"], **how)
        while True:
            with self.machine.autocast():  # never across a yield: it would be the caller's arithmetic, too
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.float().cpu().numpy()

    def history(self, n: int, options: SamplingOptions, *_: Any) -> list[dict[str, Any]]:
        """What led to the embeddings."""
        told = _recorded(n, self.settings(options), options) | {"dtype": self.machine.name}
        return history("sample", told, model=self.weights, clip=self.clip_weights)


def _recorded(n: int, settings: dict[str, Any], options: SamplingOptions) -> dict[str, Any]:
    """What a history says of settings: of those that are seldom given, only where they change something."""
    silent = {"guidance_from", "guidance_to"} if options.guidance_span == (0, 1) else set()
    silent |= set() if settings.get("int8") else {"int8"}
    whole = {"guidance_from": options.guidance_span[0], "guidance_to": options.guidance_span[1], **settings, "n": n}
    return {name: value for name, value in whole.items() if name not in silent}
