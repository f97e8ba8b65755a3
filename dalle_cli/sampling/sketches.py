"""Sample the sketch, a small image, that a token prior's codes are conditioned on, by diffusion (`models/sketch.py`).

P captions, T their positions, N candidates, s side of a sketch, W side of the code grid. A candidate's noise depends on
(seed, its index) alone, so its sketch does not depend on other candidates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_cli.diffusion import samplers, schedules
from dalle_cli.diffusion.denoiser import Denoised, Denoiser, Guidance, Threshold, denoiser
from dalle_cli.diffusion.losses import losses
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.process import Process, to_epsilon
from dalle_cli.errors import DalleError
from dalle_cli.models.prior import Prior
from dalle_cli.models.sketch import Sketch
from dalle_cli.sampling.batches import evaluating

STAGE = "sketch"  # in the noise's name
N_TIMESTEP = 1000
STEPS = 30  # of DDIM
PROCESS = Process(schedules.cosine(N_TIMESTEP), "x_start")  # v would make an MLP reproduce the noise


def sketch_losses(prior: Prior, tokens: Tensor, lengths: Tensor, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Squared error of x_start: captions (B, T), (B,), images (B, 3, s, s), timesteps (B,), their noise -> (B,).

    Raises:
        DalleError: a prior without a sketch.
    """
    x = PROCESS.add_noise(images, t, noise)
    sketch = _sketch(prior)
    output = sketch(x, t, sketch.read(tokens, prior.written(lengths)))
    return losses(PROCESS, output, images, x, t, noise).total


@torch.inference_mode()
def sample_sketches(
    prior: Prior, tokens: Tensor, lengths: Tensor, indices: Sequence[int], seed: int, *, guidance_scale: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None, steps: int = STEPS,
) -> Tensor:  # fmt: skip
    """Sample a sketch for each candidate: (N, T), (N,) int64 -> (N, 3, s, s) float32 in [-1, 1], on their device.

    `known` are codes (N, W, W) and which of them are kept, (W, W) bool. Where all codes of a sketch's pixel are kept,
    x_start is set to their color at every step.

    Raises:
        DalleError: a prior without a sketch.
    """
    sketch = _sketch(prior)
    noise = row_noise(seed, indices, STAGE)
    fixed = None if known is None else (sketch.of(known[0]), _whole_cells(known[1], sketch.side))

    def inpainting(free: Denoiser) -> Denoiser:
        def denoise(x: Tensor, t: float) -> Denoised:
            found = free(x, t)
            if fixed is None:
                return found
            x_start = torch.where(fixed[1], fixed[0], found.x_start)
            return Denoised(x_start, to_epsilon("x_start", x_start, x, PROCESS.schedule.alpha_bar(t)))

        return denoise

    x = noise(0, (3, sketch.side, sketch.side)).to(tokens.device)
    return _sample(sketch, tokens, prior.written(lengths), x, guidance_scale, steps, inpainting)


@torch.no_grad()
def resample_sketches(
    prior: Prior, tokens: Tensor, lengths: Tensor, images: Tensor, since: Tensor, noise: Tensor, *,
    guidance_scale: float = 1.0, steps: int = STEPS,
) -> Tensor:  # fmt: skip
    """True sketches with the errors of sampled ones: noise each to its own timestep and sample from there.

    Captions (N, T), (N,), images and their noise (N, 3, s, s), timesteps (N,) -> (N, 3, s, s), as SDEdit (Meng et al.
    2022, algorithm 1). An image whose timestep is below the last sampled one is returned unchanged.

    Raises:
        DalleError: a prior without a sketch.
    """
    sketch = _sketch(prior)
    latest = since.max().item()

    def from_image(free: Denoiser) -> Denoiser:
        def denoise(x: Tensor, t: float) -> Denoised:
            if t > latest:
                return Denoised(images, noise)
            found, sampled = free(x, t), (t <= since)[:, None, None, None]
            x_start = torch.where(sampled, found.x_start, images)
            return Denoised(x_start, torch.where(sampled, found.epsilon, noise))

        return denoise

    return _sample(sketch, tokens, prior.written(lengths), noise, guidance_scale, steps, from_image)


def _sample(
    sketch: Sketch, tokens: Tensor, written: Tensor, x: Tensor, guidance_scale: float, steps: int,
    wrap: Callable[[Denoiser], Denoiser],
) -> Tensor:  # fmt: skip
    """Sample by DDIM from noise x (N, 3, s, s) with the guided denoiser wrapped by `wrap`."""
    with torch.autocast(x.device.type, enabled=False), evaluating(sketch):
        words = sketch.read(tokens, written)
        null = sketch.read(tokens[:1], torch.zeros_like(written[:1]))
        rows = torch.cat([words, null.expand_as(words)])
        free = denoiser(lambda x, t: sketch(x, t, rows[: len(x)]), PROCESS, Guidance(guidance_scale), Threshold())
        return samplers.ddim(wrap(free), x, schedules.select_timesteps(PROCESS.schedule, steps))


def _whole_cells(keep: Tensor, side: int) -> Tensor:
    """Which pixels of a sketch have all their codes kept: (W, W) bool -> (s, s) bool."""
    ratio = len(keep) // side
    return keep.view(side, ratio, side, ratio).all(3).all(1)


def _sketch(prior: Prior) -> Sketch:
    if prior.sketch is None:
        raise DalleError("expected a prior with a sketch, found one with sketch 0; train one with prior.sketch")
    return prior.sketch
