"""Sample images from CLIP embeddings: the diffusion decoder, then upsamplers (2022, sec. 2.1).

Shapes: B batch, D width of an embedding, T caption length, S side in pixels. Images between models are float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle_cli.diffusion.denoiser import Denoiser, Guidance, Threshold, denoiser
from dalle_cli.diffusion.noise import Noise
from dalle_cli.diffusion.process import Process
from dalle_cli.diffusion.samplers import SAMPLERS, VARIANCES, ddim_invert, default_spacing, sample
from dalle_cli.diffusion.schedules import Schedule, Timesteps, make_schedule, select_timesteps
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.patch_decoder import PatchDecoder, PatchDecoderConfig
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.models.unet import UNetConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge, resize

DecoderNetwork = Decoder | PatchDecoder
DenoiserConfig = UNetConfig | PatchDecoderConfig


@dataclass(frozen=True)
class SamplerConfig:
    """How a diffusion model is sampled.

    Raises:
        DalleError: a value out of range.
    """

    steps: int = 20
    sampler: str = "dpm++"
    guidance: float = 1.0  # classifier-free; 1 = off
    eta: float = 0.0  # of ddim
    spacing: str | None = None  # of the timesteps; None = that of the sampler
    clip: float = 1.0  # range of the predicted x_start; 0 = any
    variance: str | None = None  # of ddpm; None = the learned one, else the smallest

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise DalleError(f"expected a sampler among {known}, found {self.sampler!r}; take one of them")
        if self.steps < 1:
            raise DalleError(f"expected 1 step or more, found {self.steps}; try 20")
        if self.eta and self.sampler != "ddim":
            raise DalleError(f"expected eta with the sampler ddim alone, found it with {self.sampler}; leave one out")
        if self.variance not in (None, *VARIANCES):
            raise DalleError(f"expected a variance among {', '.join(VARIANCES)}, found {self.variance!r}; leave it out")

    @property
    def threshold(self) -> Threshold | None:
        """What clips x_start."""
        return Threshold(self.clip) if self.clip else None

    def timesteps(self, schedule: Schedule) -> Timesteps:
        """The timesteps of these steps."""
        return select_timesteps(schedule, self.steps, self.spacing or default_spacing(self.sampler))

    def sample(self, denoise: Denoiser, schedule: Schedule, x: Tensor, noise: Noise) -> Tensor:
        """Sample with these settings: (B, ...) noise -> (B, ...) data."""
        more: dict[str, Any] = {"eta": self.eta, "spacing": self.spacing, "variance": self.variance}
        return sample(self.sampler, denoise, schedule, x, self.steps, noise, **more)


class CaptionBatch(NamedTuple):
    """Captions as a decoder takes them: tokens (B, T) int64, lengths (B,); or CLIP's states (B, T, W), lengths, z_t.

    z_t (B, D) is not normalized. `null`, one row, is what guidance is relative to; by default a caption of length 0.
    """

    text: Tensor
    lengths: Tensor
    z_t: Tensor | None = None
    null: "CaptionBatch | None" = None

    @property
    def nulls(self) -> "CaptionBatch":
        """As many null captions."""
        if self.null is None:
            return CaptionBatch(self.text, torch.zeros_like(self.lengths), self.z_t)
        n = len(self.lengths)
        return self.null.each(lambda x: x.expand(n, *x.shape[1:]))

    def rows(self, rows: Sequence[int]) -> "CaptionBatch":
        """Some of them, with the same null caption."""
        return self.each(lambda x: x[list(rows)])

    def each(self, change: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        """The same after a change of each tensor."""
        z_t = None if self.z_t is None else change(self.z_t)
        return CaptionBatch(change(self.text), change(self.lengths), z_t, self.null)

    def to(self, device: torch.device) -> list[Tensor]:
        """The tensors that there are, in order."""
        return [x.to(device) for x in (self.text, self.lengths, self.z_t) if x is not None]


def unet_process(config: DenoiserConfig) -> Process:
    """The diffusion process that a U-Net was trained with.

    Raises:
        DalleError: a schedule or a prediction that does not exist.
    """
    schedule = make_schedule(config.schedule, config.n_timestep, config.zero_snr, config.betas)
    return Process(schedule, config.prediction, config.learned_variance)


def to_signed(images: Tensor) -> Tensor:
    """Images to the range of diffusion: uint8 -> [-1, 1] float32."""
    return 2 * from_uint8(images) - 1


def to_images(x: Tensor) -> Tensor:
    """The inverse of `to_signed`: [-1, 1] -> uint8."""
    return to_uint8((x.float() + 1) / 2)


def _denoiser(
    decoder: DecoderNetwork, process: Process, embeddings: Tensor, captions: CaptionBatch, present: Tensor | None,
    config: SamplerConfig,
) -> Denoiser:  # fmt: skip
    """A denoiser conditioned once for all timesteps; with guidance, a second half of the rows is null."""
    device, n = decoder.null_embedding.device, len(embeddings)
    present = torch.ones(n, dtype=torch.bool, device=device) if present is None else present.to(device)
    rows = [embeddings.to(device), present, *captions.to(device)]
    if config.guidance != 1:
        nulls = [rows[0], torch.zeros_like(present), *captions.nulls.to(device)]
        rows = [torch.cat(pair) for pair in zip(rows, nulls, strict=True)]
    conditioning = decoder.condition(*rows)
    network = lambda x, t: decoder(x, t, conditioning.first(len(x)))  # noqa: E731
    return denoiser(network, process, Guidance(config.guidance), config.threshold)


@torch.inference_mode()
def sample_images(
    decoder: DecoderNetwork, embeddings: Tensor, captions: CaptionBatch, config: SamplerConfig, noise: Noise,
    present: Tensor | None = None, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sample images of B embeddings (B, D) and captions: -> (B, 3, S, S) float32 in [-1, 1], or latents (B, C, S, S).

    Guidance is relative to a null caption and a null embedding, as one is that is not `present` (B,) bool. `start`
    (B, 3, S, S), from `invert`, replaces the initial noise.
    """
    c, process = decoder.config, unet_process(decoder.config)
    denoise = _denoiser(decoder, process, embeddings, captions, present, config)
    x = noise(0, (c.channels, c.image_size, c.image_size)) if start is None else start
    x = x.to(decoder.null_embedding.device)
    return config.sample(denoise, process.schedule, x, noise)


@torch.inference_mode()
def invert(
    decoder: DecoderNetwork, images: Tensor, embeddings: Tensor, captions: CaptionBatch, config: SamplerConfig,
    iterations: int = 1, present: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """DDIM inversion: the noise from which `sample_images`, by ddim with this config, samples images (2022, sec. 3).

    (B, 3, S, S) in [-1, 1] -> (B, 3, S, S) float32. Timesteps, guidance and threshold are those of sampling, because
    that trajectory is the one to invert.
    """
    process = unet_process(decoder.config)
    denoise = _denoiser(decoder, process, embeddings, captions, present, config)
    x, at = images.to(decoder.null_embedding.device), config.timesteps(process.schedule)
    if config.steps == 1:
        return ddim_invert(denoise, x, at, iterations)
    x = ddim_invert(denoise, x, Timesteps(at.timesteps[1:], at.alphas_cumprod[1:]), iterations)
    return _invert_first_step(denoise, x, at, iterations)


def _invert_first_step(denoise: Denoiser, x: Tensor, at: Timesteps, iterations: int) -> Tensor:
    """Invert the first step of DDIM by a fixed-point iteration over x_start rather than epsilon.

    Where hardly any data is left, epsilon is nearly x itself and does not determine x_start, on which the brightness of
    the image depends.
    """
    alpha_bar, alpha_bar_next = at.alphas_cumprod[:2]
    found = x
    for _ in range(iterations):
        x_start = denoise(found, at.timesteps[0]).x_start
        epsilon = (x - alpha_bar_next**0.5 * x_start) / (1 - alpha_bar_next) ** 0.5
        found = alpha_bar**0.5 * x_start + (1 - alpha_bar) ** 0.5 * epsilon
    return found


def enlarge_noised(process: Process, low: Tensor, factor: int, t: Tensor, noise: Tensor, clamp: bool = True) -> Tensor:
    """Small images as the upsampler gets them: enlarged, clamped to [-1, 1], then noised to timesteps t.

    (B, 3, s, s) in [-1, 1], t (B,) int64 with -1 for no noise, noise (B, 3, s, s) -> (B, 3, f s, f s). The noise is
    that of the small image (conditioning augmentation, Ho et al. 2021, sec. 4.2), so it is enlarged as well.
    """
    enlarged = enlarge(low, factor, clamp)
    noised = process.add_noise(enlarged, t.clamp(min=0).cpu(), resize(noise, factor))
    return torch.where((t < 0)[:, None, None, None], enlarged, noised)


@torch.inference_mode()
def upsample(upsampler: Upsampler, low: Tensor, config: SamplerConfig, noise: Noise, low_noise: float = 0.0) -> Tensor:
    """Sample larger images of small ones of any size, unguided: (B, 3, s, s) -> (B, 3, f s, f s) float32 in [-1, 1].

    `low_noise` is how far the small images are noised, as a share of the timesteps; 0 is not at all. Noise hides their
    artifacts. The upsampler must have been trained with that much noise.

    Raises:
        DalleError: more noise than the upsampler was trained with.
    """
    c, device = upsampler.config, next(upsampler.parameters()).device
    if not 0 <= low_noise <= c.low_noise:
        found = f"found {low_noise}"
        raise DalleError(f"expected low_noise in [0, {c.low_noise}], as the upsampler was trained with, {found}")
    process, x_low = unet_process(c), low.to(device)
    low_t = torch.full((len(low),), int(low_noise * c.n_timestep) - 1, device=device)
    if low_noise:
        condition = enlarge_noised(process, x_low, c.factor, low_t, noise(-1, x_low.shape[1:]).to(device), c.clamp)
    else:
        condition = enlarge(x_low, c.factor, c.clamp)

    def denoiser_of(last: bool) -> Denoiser:
        return denoiser(lambda x, t: upsampler(x, t, condition, low_t, last), process, threshold=config.threshold)

    usual, final, end = denoiser_of(False), denoiser_of(True), config.timesteps(process.schedule).timesteps[-1]
    x = noise(0, condition.shape[1:]).to(device)
    return config.sample(lambda x, t: (final if t == end else usual)(x, t), process.schedule, x, noise)


def upsampler_order(configs: Sequence[UpsamplerConfig], size: int) -> list[int]:
    """The order in which upsamplers follow an image of this size, as indices of `configs`.

    Raises:
        DalleError: an upsampler that does not fit.
    """
    order: list[int] = []
    while True:
        fitting = [i for i, c in enumerate(configs) if c.low_size == size and i not in order]
        if not fitting:
            break
        if len(fitting) > 1:
            raise DalleError(f"expected one upsampler from {size} pixels, found {len(fitting)}; take one out")
        order.append(fitting[0])
        size = configs[fitting[0]].image_size
    for i, c in enumerate(configs):
        if i not in order:
            raise DalleError(f"expected upsamplers from {size} pixels on, found one from {c.low_size}; take it out")
    return order
