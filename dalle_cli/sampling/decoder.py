"""Pictures from CLIP embeddings: the decoder, then upsamplers, each by a sampler of diffusion (2022, sec. 2.1).

Shapes: B batch, D width of an embedding, T caption length, S side in pixels. Between models pictures are stored ones:
uint8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_cli.diffusion.denoiser import Denoiser, Guidance, Network, Threshold, denoiser
from dalle_cli.diffusion.noise import Noise
from dalle_cli.diffusion.process import Process
from dalle_cli.diffusion.samplers import SAMPLERS, ddim_invert, sample
from dalle_cli.diffusion.schedules import Timesteps, make_schedule, select_timesteps
from dalle_cli.errors import DalleError
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.models.unet import UNetConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig, enlarge, resize


@dataclass(frozen=True)
class SamplerConfig:
    """How to paint: steps, sampler, classifier-free guidance (1 = off), and DDIM's eta.

    Raises: DalleError where a value is out of its range.
    """

    steps: int = 20
    sampler: str = "dpm++"
    guidance: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise DalleError(f"expected a sampler among {known}, found {self.sampler!r}; take one of them")
        if self.steps < 1:
            raise DalleError(f"expected 1 step or more, found {self.steps}; try 20")
        if self.eta and self.sampler != "ddim":
            raise DalleError(f"expected eta with the sampler ddim alone, found it with {self.sampler}; leave one out")


def process(config: UNetConfig) -> Process:
    """The diffusion that a U-Net was trained to denoise.

    Raises: DalleError for one that does not exist.
    """
    schedule = make_schedule(config.schedule, config.n_timestep, config.zero_snr)
    return Process(schedule, config.prediction, config.learned_variance)


def to_signed(images: Tensor) -> Tensor:
    """Stored pixels to those of diffusion: uint8 -> [-1, 1] float32."""
    return 2 * from_uint8(images) - 1


def to_images(x: Tensor) -> Tensor:
    """The way back: [-1, 1] -> uint8."""
    return to_uint8((x.float() + 1) / 2)


def network(
    decoder: Decoder, embeddings: Tensor, tokens: Tensor, lengths: Tensor, given: Tensor | None, guided: bool
) -> Network:
    """A decoder told of a batch once for all timesteps; guided, a second half of it is null."""
    device, n = decoder.null_embedding.device, len(embeddings)
    given = torch.ones(n, dtype=torch.bool, device=device) if given is None else given.to(device)
    rows = [embeddings.to(device), given, tokens.to(device), lengths.to(device)]
    if guided:
        nulls = [rows[0], torch.zeros_like(given), rows[2], torch.zeros_like(rows[3])]
        rows = [torch.cat(pair) for pair in zip(rows, nulls, strict=True)]
    told = decoder.condition(*rows)
    return lambda x, t: decoder(x, t, told.first(len(x)))


@torch.inference_mode()
def paint(
    decoder: Decoder, embeddings: Tensor, tokens: Tensor, lengths: Tensor, brush: SamplerConfig, noise: Noise,
    given: Tensor | None = None, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pictures of embeddings and captions: (B, D), (B, T) and (B,) int64 -> (B, 3, S, S) uint8.

    A caption of length 0 is null, and so is an embedding that is not `given` (B,). Guidance goes from both being null,
    in the same batch. `start` (B, 3, S, S), in place of the noise of the first step, is what `invert` found.
    """
    model, side = process(decoder.config), decoder.config.image_size
    told = network(decoder, embeddings, tokens, lengths, given, brush.guidance != 1)
    denoise = denoiser(told, model, Guidance(brush.guidance), Threshold(1.0))
    x = (noise(0, (3, side, side)) if start is None else start).to(decoder.null_embedding.device)
    return to_images(sample(brush.sampler, denoise, model.schedule, x, brush.steps, noise, eta=brush.eta))


@torch.inference_mode()
def invert(
    decoder: Decoder, pictures: Tensor, embeddings: Tensor, tokens: Tensor, lengths: Tensor, steps: int,
    iterations: int = 1, given: Tensor | None = None, guidance: float = 1.0,
) -> Tensor:  # fmt: skip
    """The noise from which `paint`, by ddim in as many steps, paints pictures (2022, sec. 3): uint8 -> (B, 3, S, S).

    Guidance and threshold are those of painting: it is that way which is gone back.
    """
    model = process(decoder.config)
    told = network(decoder, embeddings, tokens, lengths, given, guidance != 1)
    denoise = denoiser(told, model, Guidance(guidance), Threshold(1.0))
    x, way = to_signed(pictures.to(decoder.null_embedding.device)), select_timesteps(model.schedule, steps)
    if steps == 1:
        return ddim_invert(denoise, x, way, iterations)
    x = ddim_invert(denoise, x, Timesteps(way.timesteps[1:], way.alphas_cumprod[1:]), iterations)
    return _into_noise(denoise, x, way, iterations)


def _into_noise(denoise: Denoiser, x: Tensor, way: Timesteps, iterations: int) -> Tensor:
    """The first step of DDIM read backwards, x_start being taken at the point known rather than epsilon.

    Where hardly any data is left epsilon is x itself: however often it is taken anew it does not tell x_start, which a
    picture's brightness depends on.
    """
    level, following = way.alphas_cumprod[:2]
    found = x
    for _ in range(iterations):
        x_start = denoise(found, way.timesteps[0]).x_start
        epsilon = (x - following**0.5 * x_start) / (1 - following) ** 0.5
        found = level**0.5 * x_start + (1 - level) ** 0.5 * epsilon
    return found


def enlarge_noised(model: Process, low: Tensor, factor: int, level: Tensor, noise: Tensor) -> Tensor:
    """Small images as the upsampler sees them: enlarged, clamped to [-1, 1], then noised to a timestep.

    (B, 3, s, s) in [-1, 1], timesteps (B,) with -1 for none, noise (B, 3, s, s) -> (B, 3, f s, f s). The noise is that
    of the small image (Ho et al. 2021, sec. 4.2), so it is enlarged as well.
    """
    enlarged = enlarge(low, factor)
    noised = model.add_noise(enlarged, level.clamp(min=0).cpu(), resize(noise, factor))
    return torch.where((level < 0)[:, None, None, None], enlarged, noised)


@torch.inference_mode()
def upsample(upsampler: Upsampler, low: Tensor, brush: SamplerConfig, noise: Noise, low_noise: float = 0.0) -> Tensor:
    """Larger images of small ones, of any size: (B, 3, s, s) uint8 -> (B, 3, f s, f s) uint8, unguided.

    `low_noise` is the share of the timesteps that the small images are noised to, 0 for none, and hides artifacts that
    they have. The upsampler must have been trained with that much.

    Raises: DalleError where it was not.
    """
    c, device = upsampler.config, next(upsampler.parameters()).device
    if not 0 <= low_noise <= c.low_noise:
        found = f"found {low_noise}"
        raise DalleError(f"expected low_noise in [0, {c.low_noise}], as the upsampler was trained with, {found}")
    model, x_low = process(c), to_signed(low.to(device))
    level = torch.full((len(low),), int(low_noise * c.n_timestep) - 1, device=device)
    if low_noise:
        beside = enlarge_noised(model, x_low, c.factor, level, noise(-1, x_low.shape[1:]).to(device))
    else:
        beside = enlarge(x_low, c.factor)
    denoise = denoiser(lambda x, t: upsampler(x, t, beside, level), model, threshold=Threshold(1.0))
    x = noise(0, beside.shape[1:]).to(device)
    return to_images(sample(brush.sampler, denoise, model.schedule, x, brush.steps, noise, eta=brush.eta))


def chained(configs: Sequence[UpsamplerConfig], size: int) -> list[int]:
    """In which order upsamplers follow a picture of a size, by their numbers.

    Raises: DalleError where one of them does not fit.
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
