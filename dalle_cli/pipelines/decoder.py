"""CLIP image embeddings to images: a diffusion decoder and the upsamplers beside it (2022, sec. 2.1).

Shapes: B batch, D embedding width, T caption length, S side of the images in pixels.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.devices import Arithmetic
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.hub import bundles
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import loading
from dalle_cli.sampling.decoder import SamplerConfig, chained, invert, paint, upsample

log = logging.getLogger("dalle_cli")
STEPS, SAMPLER, UPSAMPLER_STEPS = 20, "dpm++", 10


class ImageDecoder:
    """A diffusion decoder, its tokenizer if it reads captions, and the upsamplers of the same bundle in order."""

    kind = "embeddings"

    def __init__(self, model: str | None, machine: Arithmetic, options: DecoderOptions | None = None, seed: int = 0):
        """Raises: DalleError for weights that are missing or do not follow each other, or a setting out of range."""
        self.weights, self.machine = bundles.weights(model, "weights.decoder"), machine
        self.set(options or DecoderOptions(), seed)
        self.decoder = loading.decoder(self.weights, machine.device)
        n_text = self.decoder.config.n_text
        self.tokenizer = tokenizers.load(bundles.tokenizer(self.weights)) if n_text else None
        found = bundles.upsamplers(model)
        models = [loading.upsampler(weights, machine.device) for weights in found]
        order = chained([m.config for m in models], self.decoder.config.image_size)
        self.upsamplers = [(found[i], models[i]) for i in order]

    def set(self, options: DecoderOptions, seed: int) -> "ImageDecoder":
        """Sample with these options and this seed from now on.

        Raises:
            DalleError: an option out of range.
        """
        self.seed, self.low_noise = seed, options.low_noise
        self.config, self.upsampler_config = sampler_configs(options)
        return self

    @property
    def size(self) -> int:
        """Side of the images in pixels, after the last upsampler."""
        return self.upsamplers[-1][1].config.image_size if self.upsamplers else self.decoder.config.image_size

    @property
    def settings(self) -> dict[str, Any]:
        """What a history says of how the images were sampled."""
        c = self.config
        told: dict[str, Any] = {
            "decoder_steps": c.steps, "decoder_sampler": c.sampler, "decoder_guidance": c.guidance, "eta": c.eta,
            "seed": self.seed, "dtype": self.machine.name,
        }  # fmt: skip
        if self.upsamplers:
            told["upsampler_steps"] = self.upsampler_config.steps
            told |= {} if self.low_noise is None else {"low_noise": self.low_noise}
        return told

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
        """(B, D) embeddings, the rows' numbers, B captions -> images (B, 3, S, S) uint8.

        The noise of a row is a function of the seed and its number. A caption that is missing or empty is null.
        `start` (B, 3, s, s), found by `invert`, stands in place of the decoder's first noise.
        """
        tokens, lengths = self._tokens(list(texts) if texts is not None else [""] * len(numbers))
        rows = torch.from_numpy(np.asarray(embeddings).astype(np.float32))
        with self.machine.autocast():
            noise = row_noise(self.seed, numbers, "decoder")
            images = paint(self.decoder, rows, tokens, lengths, self.config, noise, start=start)
            for weights, upsampler in self.upsamplers:
                noise = row_noise(self.seed, numbers, f"upsampler {upsampler.config.image_size}")
                low_noise = self.low_noise
                if low_noise is None:  # what the weights were trained to be sampled with
                    low_noise = weights.require("train", dict).get("low_noise", 0.0)
                images = upsample(upsampler, images, self.upsampler_config, noise, low_noise)
        return images.cpu().numpy()

    def invert(self, images: Any, embeddings: Any, iterations: int) -> Tensor:
        """The noise from which the decoder samples images again, without captions, by DDIM inversion (sec. 3).

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
        tokens, lengths, cut = self.tokenizer.encode_batch(texts, length)
        if cut:
            log.warning("captions of more than %d tokens, which were cut: %d", length, cut)
        written = [bool(text) for text in texts]
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64) * written)


def sampler_configs(options: DecoderOptions) -> tuple[SamplerConfig, SamplerConfig]:
    """The decoder's and the upsamplers' sampler settings.

    Raises:
        DalleError: an unknown sampler, or eta with another one than ddim.
    """
    sampler, eta = options.decoder_sampler or SAMPLER, options.eta or 0.0
    guidance = 1.0 if options.decoder_guidance is None else options.decoder_guidance
    return (
        SamplerConfig(options.decoder_steps or STEPS, sampler, guidance, eta),
        SamplerConfig(options.upsampler_steps or UPSAMPLER_STEPS, sampler, 1.0, eta),
    )
