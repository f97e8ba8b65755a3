"""CLIP image embeddings to images: a diffusion decoder and the upsamplers beside it (2022, sec. 2.1).

Shapes: B batch, D embedding width, T caption length, S side of the images in pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact
from dalle_cli.devices import Arithmetic
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.upsampler import Upsampler
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.prompts import token_tensors
from dalle_cli.sampling.decoder import SamplerConfig, invert, sample_images, upsample, upsampler_order

STEPS, SAMPLER, UPSAMPLER_STEPS = 20, "dpm++", 10
LOW_NOISE = "--low-noise"


class ImageDecoder:
    """A diffusion decoder, its tokenizer if it reads captions, and the upsamplers of the same bundle in order."""

    kind = "embeddings"

    def __init__(self, model: str | None, machine: Arithmetic, options: DecoderOptions | None = None, seed: int = 0):
        """Raises: DalleError for weights that are missing or do not follow each other, or a setting out of range."""
        options = options or DecoderOptions()
        sampler_configs(options)  # refuse wrong ones before anything is loaded
        self.weights, self.machine = bundles.weights(model, "weights.decoder"), machine
        self.decoder = loading.decoder(self.weights, machine.device)
        n_text = self.decoder.config.n_text
        self.tokenizer = loading.tokenizer(self.weights) if n_text else None
        found = bundles.upsamplers(model)
        models = [loading.upsampler(weights, machine.device) for weights in found]
        order = upsampler_order([m.config for m in models], self.decoder.config.image_size)
        self.upsamplers = [(found[i], models[i]) for i in order]
        self.set(options, seed)

    def set(self, options: DecoderOptions, seed: int) -> "ImageDecoder":
        """Sample with these options and this seed from now on.

        Raises:
            DalleError: an option out of range, or more `low_noise` than the upsamplers were trained with.
        """
        self.seed = seed
        self.config, self.upsampler_config = sampler_configs(options)
        self.low_noise = [self._low_noise(weights, upsampler, options) for weights, upsampler in self.upsamplers]
        if options.low_noise and not any(self.low_noise):
            raise DalleError(f"expected upsamplers trained with low_noise for {LOW_NOISE}, found none; leave it out")
        return self

    @staticmethod
    def _low_noise(weights: Artifact, upsampler: Upsampler, options: DecoderOptions) -> float:
        """The noise on an upsampler's input: the option, else the default in the weights; 0 if not trained with any."""
        most = upsampler.config.low_noise
        low_noise = loading.trained_value(weights, "low_noise", options.low_noise if most else None, 0.0)
        if not 0 <= low_noise <= most:
            found = f"found {low_noise}"
            raise DalleError(f"expected {LOW_NOISE} in [0, {most}], as {weights.path} was trained with, {found}")
        return low_noise

    @property
    def size(self) -> int:
        """Side of the images in pixels, after the last upsampler."""
        return self.upsamplers[-1][1].config.image_size if self.upsamplers else self.decoder.config.image_size

    @property
    def settings(self) -> dict[str, Any]:
        """How the images are sampled, as a history records it."""
        c = self.config
        settings: dict[str, Any] = {
            "decoder_steps": c.steps, "decoder_sampler": c.sampler, "decoder_guidance": c.guidance, "eta": c.eta,
            "seed": self.seed, "dtype": self.machine.name,
        }  # fmt: skip
        if self.upsamplers:
            settings["upsampler_steps"] = self.upsampler_config.steps
        if any(self.low_noise):
            settings["low_noise"] = self.low_noise
        return settings

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The weights, as a history names them."""
        upsamplers = {f"upsampler_{i}": weights for i, (weights, _) in enumerate(self.upsamplers, 1)}
        return {"decoder": self.weights, **upsamplers}

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
        tokens, lengths = self._tokens(list(texts) if texts is not None else [""] * len(numbers))
        rows = torch.from_numpy(np.asarray(embeddings).astype(np.float32))
        with self.machine.autocast():
            noise = row_noise(self.seed, numbers, "decoder")
            images = sample_images(self.decoder, rows, tokens, lengths, self.config, noise, start=start)
            for (_, upsampler), low_noise in zip(self.upsamplers, self.low_noise, strict=True):
                noise = row_noise(self.seed, numbers, f"upsampler {upsampler.config.image_size}")
                images = upsample(upsampler, images, self.upsampler_config, noise, low_noise)
        return images.cpu().numpy()

    def invert(self, images: Any, embeddings: Any, iterations: int) -> Tensor:
        """DDIM inversion (sec. 3): the noise from which the decoder samples the images again, without captions.

        (B, 3, s, s) uint8, (B, D) -> (B, 3, s, s) float32 on the CPU; s is the decoder's size.
        """
        tokens, lengths = self._tokens([""] * len(images))
        rows, pixels = torch.from_numpy(np.asarray(embeddings).astype(np.float32)), torch.from_numpy(images)
        c = self.config
        with self.machine.autocast():
            noise = invert(self.decoder, pixels, rows, tokens, lengths, c.steps, iterations, guidance=c.guidance)
        return noise.cpu()

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) and lengths (B,), int64; an empty text has length 0."""
        length = self.decoder.config.n_text
        if self.tokenizer is None:
            return torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
        tokens, lengths = token_tensors(self.tokenizer, texts, length, "captions")
        return tokens, lengths * torch.tensor([bool(text) for text in texts])


def sampler_configs(options: DecoderOptions) -> tuple[SamplerConfig, SamplerConfig]:
    """The sampler settings of the decoder and of the upsamplers.

    Raises:
        DalleError: an unknown sampler, or eta with another one than ddim.
    """
    sampler, eta = options.decoder_sampler or SAMPLER, options.eta or 0.0
    guidance = 1.0 if options.decoder_guidance is None else options.decoder_guidance
    return (
        SamplerConfig(options.decoder_steps or STEPS, sampler, guidance, eta),
        SamplerConfig(options.upsampler_steps or UPSAMPLER_STEPS, sampler, 1.0, eta),
    )
