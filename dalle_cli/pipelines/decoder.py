"""CLIP image embeddings to images: a diffusion decoder and the upsamplers beside it (2022, sec. 2.1).

Shapes: B batch, D embedding width, T caption length, S side of the images in pixels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact
from dalle_cli.devices import Arithmetic
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.movq import MOVQ
from dalle_cli.models.packed import pack_convolutions
from dalle_cli.models.upsampler import Upsampler
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.clip import ClipScorer, shared_clip
from dalle_cli.pipelines.prior import find_clip
from dalle_cli.pipelines.prompts import batched, token_tensors
from dalle_cli.sampling.decoder import (
    CaptionBatch,
    SamplerConfig,
    invert,
    sample_images,
    to_images,
    to_signed,
    upsample,
    upsampler_order,
)
from dalle_cli.sampling.defaults import sampling_defaults

STEPS, SAMPLER, UPSAMPLER_STEPS = 20, "dpm++", 10
PIXELS_AT_ONCE = 64 * 64**2  # of all images that a network computes at once, which bounds the memory
LOW_NOISE = "--low-noise"


class ImageDecoder:
    """A diffusion decoder and, of the same bundle: its tokenizer if it reads captions, its autoencoder if it samples
    latents, and the upsamplers in order.
    """

    kind = "embeddings"

    def __init__(self, model: str | None, machine: Arithmetic, options: DecoderOptions | None = None, seed: int = 0):
        """Raises: DalleError for weights that are missing or do not follow each other, or a setting out of range."""
        options = options or DecoderOptions()
        self.weights, self.machine = bundles.weights(model, "weights.decoder"), machine
        self.defaults = sampling_defaults(self.weights)
        decoder_config(options, self.defaults)  # refuse wrong ones before anything is loaded
        self.model = model
        self.decoder = pack_convolutions(loading.decoder(self.weights, machine.device, machine.dtype), machine.dtype)
        self.of_states = self.decoder.config.captions == "states"
        self.tokenizer = loading.tokenizer(self.weights) if self.decoder.config.n_text and not self.of_states else None
        self.autoencoder = self._autoencoder() if self.decoder.config.channels != 3 else None
        found = bundles.upsamplers(model)
        models = [
            pack_convolutions(loading.upsampler(weights, machine.device, machine.dtype), machine.dtype)
            for weights in found
        ]
        order = upsampler_order([m.config for m in models], self.small_size)
        self.upsamplers = [(found[i], models[i]) for i in order]
        self.set(options, seed)

    def set(self, options: DecoderOptions, seed: int) -> "ImageDecoder":
        """Sample with these options and this seed from now on.

        Raises:
            DalleError: an option out of range, or more `low_noise` than the upsamplers were trained with.
        """
        self.seed = seed
        self.config = decoder_config(options, self.defaults)
        return self.set_upsamplers(options)

    def set_upsamplers(self, options: DecoderOptions) -> "ImageDecoder":
        """Sample from the upsamplers alone with these options from now on; raises as `set`."""
        found = [sampling_defaults(weights) for weights, _ in self.upsamplers]
        self.upsampler_configs = [upsampler_config(options, defaults) for defaults in found]
        self.low_noise = [
            self._low_noise(weights, upsampler, options, defaults.get("low_noise", 0.0))
            for (weights, upsampler), defaults in zip(self.upsamplers, found, strict=True)
        ]
        if options.low_noise and not any(self.low_noise):
            raise DalleError(f"expected upsamplers trained with low_noise for {LOW_NOISE}, found none; leave it out")
        return self

    @staticmethod
    def _low_noise(weights: Artifact, upsampler: Upsampler, options: DecoderOptions, default: float) -> float:
        """The noise on an upsampler's input: the option, else the default; 0 if not trained with any."""
        most = upsampler.config.low_noise
        low_noise = options.low_noise if most and options.low_noise is not None else default
        if not 0 <= low_noise <= most:
            found = f"found {low_noise}"
            raise DalleError(f"expected {LOW_NOISE} in [0, {most}], as {weights.path} was trained with, {found}")
        return low_noise

    @cached_property
    def clip(self) -> ClipScorer:
        """The CLIP whose text tower a decoder of states reads captions with."""
        return shared_clip(find_clip(self.weights, self.model), self.machine)

    def _autoencoder(self) -> tuple[Artifact, MOVQ]:
        """The autoencoder of the bundle. Raises: DalleError if there is none, or it is of other latents."""
        weights, channels = bundles.weights(self.model, "weights.autoencoder"), self.decoder.config.channels
        autoencoder = loading.autoencoder(weights, self.machine.device, self.machine.dtype)
        if (found := autoencoder.config.n_latent) != channels:
            raise DalleError(f"expected an autoencoder of {channels} channels, found {found} in {weights.path}")
        return weights, autoencoder

    @property
    def small_size(self) -> int:
        """Side of the images in pixels, before the first upsampler."""
        side = self.decoder.config.image_size
        return side * self.autoencoder[1].config.reduction if self.autoencoder else side

    @property
    def size(self) -> int:
        """Side of the images in pixels, after the last upsampler."""
        return self.upsamplers[-1][1].config.image_size if self.upsamplers else self.small_size

    @property
    def settings(self) -> dict[str, Any]:
        """How the images are sampled, as a history records it."""
        c = self.config
        settings: dict[str, Any] = {
            "decoder_steps": c.steps, "decoder_sampler": c.sampler, "decoder_guidance": c.guidance, "eta": c.eta,
            "seed": self.seed, "dtype": self.machine.name,
        }  # fmt: skip
        if self.upsamplers:
            steps = [config.steps for config in self.upsampler_configs]
            settings["upsampler_steps"] = steps[0] if len(set(steps)) == 1 else steps
        if any(self.low_noise):
            settings["low_noise"] = self.low_noise
        return settings

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The weights, as a history names them."""
        upsamplers = {f"upsampler_{i}": weights for i, (weights, _) in enumerate(self.upsamplers, 1)}
        autoencoder = {"autoencoder": self.autoencoder[0]} if self.autoencoder else {}
        return {"decoder": self.weights, **autoencoder, **upsamplers}

    def check(self, embeddings: Artifact) -> None:
        """Raises: DalleError if they are of another CLIP than the decoder was trained with."""
        found, expected = embeddings.require("encoder", str), self.weights.require("encoder", str)
        bundles.check_digest("CLIP", found, expected, self.weights.path)

    def decode(
        self, embeddings: Any, numbers: Sequence[int], texts: Sequence[str] | None = None, start: Tensor | None = None
    ) -> Any:
        """Sample images: (B, D) embeddings, numbers of their rows, B captions -> (B, 3, S, S) uint8.

        The noise of a row depends on the seed and its number alone. A missing or empty caption is null. `start`
        (B, 3, s, s), from `invert`, replaces the decoder's initial noise.
        """
        return self.enlarge(self.decode_small(embeddings, numbers, texts, start), numbers)

    def decode_small(
        self, embeddings: Any, numbers: Sequence[int], texts: Sequence[str] | None = None, start: Tensor | None = None
    ) -> Any:
        """What the decoder alone makes, before the upsamplers, as `decode`: -> (B, 3, s, s) float32 in [-1, 1]."""
        texts = [""] * len(numbers) if texts is None else texts
        rows, parts = torch.from_numpy(np.asarray(embeddings).astype(np.float32)), []
        for part in batched(len(rows), at_once(self.decoder.config.image_size)):
            captions, noise = self._captions(texts[part]), row_noise(self.seed, numbers[part], "decoder")
            first = None if start is None else start[part]
            with self.machine.autocast():
                x = sample_images(self.decoder, rows[part], captions, self.config, noise, start=first)
                parts.append(self._pixels(x).cpu())
        return torch.cat(parts).numpy()

    def _pixels(self, x: Tensor) -> Tensor:
        """Images of what the decoder samples: decoded from its latents, or the same."""
        if self.autoencoder is None:
            return x
        return torch.cat([self.autoencoder[1].decode(x[part]) for part in batched(len(x), at_once(self.small_size))])

    def enlarge(self, images: Any, numbers: Sequence[int]) -> Any:
        """Enlarge what `decode_small` made of the rows of these numbers: (B, 3, s, s) -> (B, 3, S, S) uint8."""
        x = torch.from_numpy(np.asarray(images))
        for (_, upsampler), config, low_noise in zip(
            self.upsamplers, self.upsampler_configs, self.low_noise, strict=True
        ):
            parts, size = [], upsampler.config.image_size
            for part in batched(len(x), at_once(size)):
                noise = row_noise(self.seed, numbers[part], f"upsampler {size}")
                with self.machine.autocast():
                    parts.append(upsample(upsampler, x[part], config, noise, low_noise).cpu())
            x = torch.cat(parts)
        return to_images(x).numpy()

    def invert(self, images: Any, embeddings: Any, iterations: int) -> Tensor:
        """DDIM inversion (sec. 3): the noise from which the decoder samples the images again, without captions.

        (B, 3, s, s) uint8, (B, D) -> (B, 3, s, s) float32 on the CPU, or latents; s is `small_size`.
        """
        captions, x = self._captions([""] * len(images)), to_signed(torch.from_numpy(images))
        rows = torch.from_numpy(np.asarray(embeddings).astype(np.float32))
        with self.machine.autocast():
            if self.autoencoder:
                x = self.autoencoder[1].encode(x.to(self.machine.device))
            return invert(self.decoder, x, rows, captions, self.config, iterations).cpu()

    def _captions(self, texts: Sequence[str]) -> CaptionBatch:
        """Captions as the decoder takes them; an empty text is the null caption."""
        if self.of_states:
            unique = list(dict.fromkeys([*texts, ""]))
            states = CaptionBatch(*self.clip.text_states(unique))
            return states.rows([unique.index(text) for text in texts])._replace(null=states.rows([unique.index("")]))
        length = self.decoder.config.n_text
        if self.tokenizer is None:
            return CaptionBatch(torch.zeros(len(texts), length).long(), torch.zeros(len(texts)).long())
        tokens, lengths = token_tensors(self.tokenizer, texts, length, "captions")
        return CaptionBatch(tokens, lengths * torch.tensor([bool(text) for text in texts]))


def at_once(side: int) -> int:
    """How many images of this side a network computes at once."""
    return max(1, PIXELS_AT_ONCE // side**2)


def to_bytes(images: Any) -> Any:
    """Images (B, 3, s, s) as uint8, of float32 in [-1, 1] or of uint8."""
    return images if images.dtype == np.uint8 else to_images(torch.from_numpy(images)).numpy()


def decoder_config(options: DecoderOptions, defaults: Mapping[str, Any]) -> SamplerConfig:
    """How a decoder is sampled: by the options given, else as its weights say, else by the defaults.

    Raises:
        DalleError: an unknown sampler, or eta with another one than ddim.
    """
    given = {
        "steps": options.decoder_steps, "sampler": options.decoder_sampler, "guidance": options.decoder_guidance,
        "eta": options.eta,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    values = {"steps": STEPS, "sampler": SAMPLER, **defaults, **given}
    return SamplerConfig(**(values if values["sampler"] == "ddim" or "eta" in given else _without_eta(values)))


def upsampler_config(options: DecoderOptions, defaults: Mapping[str, Any]) -> SamplerConfig:
    """How an upsampler is sampled: as its weights say, but for the number of steps; else as the decoder is.

    Raises:
        DalleError: an unknown sampler.
    """
    values = {"steps": UPSAMPLER_STEPS, "sampler": options.decoder_sampler or SAMPLER, "eta": options.eta or 0.0}
    values |= {name: value for name, value in defaults.items() if name != "low_noise"}
    values |= {} if options.upsampler_steps is None else {"steps": options.upsampler_steps}
    return SamplerConfig(**(values if values["sampler"] == "ddim" else _without_eta(values)))


def _without_eta(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "eta"}
