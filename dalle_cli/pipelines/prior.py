"""Priors over latents: prompts to codes, or to CLIP image embeddings.

Shapes: N candidates, B of them in a batch, P distinct prompts, T caption length, H W code grid, D embedding width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact, history
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.packed import pack
from dalle_cli.options import AUTO, SamplingOptions, flag, given, refuse_given
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.clip import ClipScorer, shared_clip
from dalle_cli.pipelines.inpainting import InpaintingMask
from dalle_cli.pipelines.prompts import Candidate, SamplerInputs, batched, token_tensors
from dalle_cli.sampling import memory
from dalle_cli.sampling.autoregressive import sample_batches
from dalle_cli.sampling.categorical import CategoricalOptions
from dalle_cli.sampling.defaults import sampling_defaults
from dalle_cli.sampling.embeddings import PromptBatch, sample_autoregressive, sample_diffusion

CPU = torch.device("cpu")
BATCH, STEPS = 64, 64  # candidates at once where the batch size is `auto`; steps of the paper's diffusion prior
PRIORS = {"codes": "weights.prior.codes", "embeddings": "weights.prior.embeddings"}  # the first if both exist
OF_DIFFUSION = ("sampler", "steps")
OF_WEIGHTS = ("spacing", "clip", "variance", "best_of")  # settings of a diffusion prior that only its weights decide


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
    return token_tensors(loading.tokenizer(weights), texts, length, "prompts")


class PriorPipeline:
    """What priors over codes and over embeddings have in common."""

    kind: str  # of the latents
    n_parts = 1  # what progress counts of one candidate
    config: Any

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.weights, self.machine = weights, machine
        self.encoder = weights.require("encoder", str)  # digest of the dVAE or CLIP whose latents it was trained on
        self.defaults = sampling_defaults(weights)

    @property
    def inputs(self) -> dict[str, Artifact | str]:
        """The weights, as a history names them."""
        return {"model": self.weights}

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Every setting that the latents depend on."""
        raise NotImplementedError  # each prior has its own

    def _settings(self, options: SamplingOptions, **defaults: Any) -> dict[str, Any]:
        """The settings with these defaults: the options given, else what the weights say, else the default."""
        own = {name: self.defaults.get(name, default) for name, default in defaults.items()}
        return {**own, "seed": 0, **given(options)}

    def history(
        self, n: int, options: SamplingOptions, mask: InpaintingMask | None = None, past: Artifact | None = None,
        rows: str | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The history of n candidates per prompt; `past` are the codes of which the rows named are sampled again."""
        recorded = _recorded(n, self.settings(options), options) | {"dtype": self.machine.name}
        inputs = self.inputs
        if past is not None:
            recorded, inputs = {**recorded, "rows": rows}, {"drawn": past, **inputs}
        if mask is not None:
            recorded, inputs = {**recorded, **mask.options}, {**inputs, **mask.inputs}
        return history("sample", recorded, **inputs)


class TokenPrior(PriorPipeline):
    """A transformer over codes with its tokenizer (2021, sec. 2.2)."""

    kind = "codes"

    def __init__(self, weights: Artifact, machine: Arithmetic):
        super().__init__(weights, machine)
        self.model = loading.prior(weights, machine.device, machine.dtype)
        self.config = self.model.config
        self.n_parts = self.config.grid**2
        self.dtype = np.uint16 if self.config.n_image_vocab <= 2**16 else np.int32

    @property
    def header(self) -> dict[str, Any]:
        """The header of an artifact of these codes."""
        return {"n_vocab": self.config.n_image_vocab, "grid": self.config.grid, "encoder": self.encoder}

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Every setting that codes depend on: the options given, else what the weights say, else the defaults.

        Raises:
            DalleError: an option that only other priors have.
        """
        refuse_given(options, "a prior over codes", *OF_DIFFUSION)
        if options.sketch_guidance is not None and not self.config.sketch:
            raise DalleError(
                f"expected a prior with a sketch for --sketch-guidance, found none in {self.weights.path}; leave it out"
            )
        sketch = {"sketch_guidance": 1.0} if self.config.sketch else {}
        return self._settings(options, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, **sketch)

    def batch_size(self, rows: Sequence[Candidate], settings: dict[str, Any], batch_size: int) -> int:
        """The batch size given; for `auto`, as many candidates as fit into half of the free memory."""
        if batch_size != AUTO:
            return batch_size
        several = len({row.text for row in rows}) > 1
        return memory.fitting_batch(self.model, len(rows), settings["guidance"] != 1, several, self.machine.dtype)

    def sample(
        self, rows: Sequence[Candidate], options: SamplingOptions | None = None, *, mask: InpaintingMask | None = None,
        batch_size: int = BATCH, compiled: bool = False, progress: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Sample codes of candidates, batch after batch: (B, H, W) uint16 or int32.

        Candidate k of a prompt depends on (weights, settings, prompt, k) alone. `progress` gets the number of codes
        sampled since its last call. The first call decides on int8 and on the layout of the matrices.
        """
        options = options or SamplingOptions()
        settings, inputs = self.settings(options), SamplerInputs.of(rows)
        at_once = self.batch_size(rows, settings, batch_size)
        tokens, lengths = encode_prompts(self.weights, inputs.texts, self.config.n_text)
        packed_rows = min(at_once, len(rows)) * (2 if settings["guidance"] != 1 else 1)
        pack(self.model, packed_rows, self.machine.dtype, bool(settings.get("int8")), plain=compiled)
        batches = sample_batches(
            self.model, tokens, lengths, inputs.indices, settings["seed"], categorical_options(settings, options),
            sketch_guidance=settings.get("sketch_guidance", 1.0), captions=inputs.captions,
            known=None if mask is None else torch.from_numpy(mask.codes),
            keep=None if mask is None else torch.from_numpy(mask.keep),
            batch_size=at_once, compiled=compiled, progress=progress,
        )  # fmt: skip
        for batch in batches:
            yield batch.cpu().numpy().astype(self.dtype)


class EmbeddingPrior(PriorPipeline):
    """A diffusion or autoregressive prior over CLIP image embeddings, with its captions' CLIP (2022, sec. 2.2)."""

    kind = "embeddings"

    def __init__(self, weights: Artifact, machine: Arithmetic, clip: Artifact):
        super().__init__(weights, machine)
        self.clip_weights = clip
        self.model = loading.embedding_prior(weights, machine.device, machine.dtype)
        self.config = self.model.config

    @cached_property
    def clip(self) -> ClipScorer:
        """The CLIP that embeds captions."""
        return shared_clip(self.clip_weights, self.machine)

    @property
    def inputs(self) -> dict[str, Artifact | str]:
        """The weights, as a history names them."""
        return {"model": self.weights, "clip": self.clip_weights}

    @property
    def header(self) -> dict[str, Any]:
        """The header of an artifact of these embeddings."""
        return {"encoder": self.encoder}

    def settings(self, options: SamplingOptions) -> dict[str, Any]:
        """Every setting that embeddings depend on: the options given, else what the weights say, else the defaults.

        Raises:
            DalleError: an option that only other priors have.
        """
        refuse_given(options, "a prior over embeddings", "int8", "sketch_guidance")
        steps = min(STEPS, getattr(self.config, "n_timestep", STEPS)) if getattr(self.config, "time", True) else 1
        own: dict[str, Any] = {"sampler": "ddpm", "steps": steps}
        others: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if not isinstance(self.model, DiffusionPrior):
            own, others = others, own
        for name in others:
            if getattr(options, name) is not None:
                known = ", ".join(map(flag, own))
                found = f"for a prior of kind {self.config.kind!r}, found {flag(name)}"
                raise DalleError(f"expected {known} {found}; leave it out")
        return self._settings(options, guidance=1.0, **own)

    @property
    def takes_states(self) -> bool:
        """Whether the prior takes captions as states of its CLIP, rather than tokens."""
        return isinstance(self.model, DiffusionPrior) and self.config.captions == "states"

    def prompt_batch(self, texts: Sequence[str]) -> PromptBatch:
        """P prompts as the prior takes them, with their z_t, on the CPU."""
        if not self.takes_states:
            tokens, lengths = encode_prompts(self.weights, texts, self.config.n_text)
            return PromptBatch(tokens, lengths, torch.from_numpy(self.clip.encode_texts(texts)))
        parts = [PromptBatch(*self.clip.text_states(texts[rows])).to(CPU) for rows in batched(len(texts), BATCH)]
        return PromptBatch(*map(torch.cat, zip(*parts, strict=True)))

    def batch_size(self, rows: Sequence[Candidate], settings: dict[str, Any], batch_size: int) -> int:
        """The batch size given, or 64 for `auto`."""
        return BATCH if batch_size == AUTO else batch_size

    def sample(
        self, rows: Sequence[Candidate], options: SamplingOptions | None = None, *, mask: InpaintingMask | None = None,
        batch_size: int = BATCH, compiled: bool = False, progress: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """Sample z_i of candidates, batch after batch: (B, D) float32, of length 1 if the CLIP's embeddings are.

        Candidate k of a prompt depends on (weights, settings, prompt, k) alone. `progress` gets the number of
        candidates sampled since its last call.

        Raises:
            DalleError: a mask, or compilation, which are for codes.
        """
        for name, value in {"image": mask, "compile": compiled}.items():
            if value:
                raise DalleError(f"expected no --{name} for a prior over embeddings, found one; leave it out")
        options = options or SamplingOptions()
        settings, inputs = self.settings(options), SamplerInputs.of(rows)
        prompts = self.prompt_batch(inputs.texts)
        at_once = self.batch_size(rows, settings, batch_size)
        how: dict[str, Any] = {"captions": inputs.captions, "batch_size": at_once, "progress": progress}
        if isinstance(self.model, DiffusionPrior):
            how |= {"sampler": settings["sampler"], "steps": settings["steps"]}
            how |= {"guidance_scale": settings["guidance"], "guidance_span": options.guidance_span}
            how |= {name: self.defaults[name] for name in OF_WEIGHTS if name in self.defaults}
            how |= {"null": self.prompt_batch([""])} if self.takes_states and settings["guidance"] != 1 else {}
            batches = sample_diffusion(self.model, prompts, inputs.indices, settings["seed"], **how)
        else:
            how["options"] = categorical_options(settings, options)
            batches = sample_autoregressive(self.model, prompts, inputs.indices, settings["seed"], **how)
        while True:
            with self.machine.autocast():  # never across a yield, where it would apply to the caller, too
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.float().cpu().numpy()


def categorical_options(settings: dict[str, Any], options: SamplingOptions) -> CategoricalOptions:
    """The part of the settings that the sampling of logits takes."""
    return CategoricalOptions(
        settings["temperature"], settings["top_k"], settings["top_p"], settings["guidance"], options.guidance_span
    )


def _recorded(n: int, settings: dict[str, Any], options: SamplingOptions) -> dict[str, Any]:
    """The settings that a history records; rarely used ones only where they change something."""
    silent = {"guidance_from", "guidance_to"} if options.guidance_span == (0, 1) else set()
    silent |= set() if settings.get("int8") else {"int8"}
    whole = {"guidance_from": options.guidance_span[0], "guidance_to": options.guidance_span[1], **settings, "n": n}
    return {name: value for name, value in whole.items() if name not in silent}
