"""Draw the small picture that a token prior's codes then follow, by diffusion (`models/sketch.py`).

P captions, T their positions, N candidates, s side of a sketch, W side of the code grid. A candidate's noise is a
function of (seed, its index) alone, so its sketch is the same whatever is drawn beside it.
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

STAGE = "sketch"  # in the noise's name
N_TIMESTEP = 1000
STEPS = 30  # of DDIM
PROCESS = Process(schedules.cosine(N_TIMESTEP), "x_start")  # an MLP cannot carry the noise through, as v asks


def sketch_losses(prior: Prior, tokens: Tensor, lengths: Tensor, pictures: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Squared error of x_start: captions (B, T), (B,), pictures (B, 3, s, s), timesteps (B,), their noise -> (B,).

    Raises: DalleError where the prior draws no sketch.
    """
    x = PROCESS.add_noise(pictures, t, noise)
    sketch = _of(prior)
    output = sketch(x, t, sketch.read(tokens, prior.written(lengths)))
    return losses(PROCESS, output, pictures, x, t, noise).total


@torch.inference_mode()
def sample_sketches(
    prior: Prior,
    tokens: Tensor,
    lengths: Tensor,
    indices: Sequence[int],
    seed: int,
    *,
    guidance_scale: float = 1.0,
    kept: tuple[Tensor, Tensor] | None = None,
    steps: int = STEPS,
) -> Tensor:
    """One sketch for each candidate: (N, T), (N,) int64 -> (N, 3, s, s) float32 in [-1, 1], on the prior's device.

    `kept` are codes (N, W, W) and which of them stay, (W, W) bool: a cell all of whose codes stay is at every step what
    they look like.

    Raises: DalleError where the prior draws no sketch.
    """
    sketch = _of(prior)
    noise = row_noise(seed, indices, STAGE)
    known = None if kept is None else (sketch.of(kept[0]), _whole_cells(kept[1], sketch.side))

    def partly(free: Denoiser) -> Denoiser:
        def denoise(x: Tensor, t: float) -> Denoised:
            found = free(x, t)
            if known is None:
                return found
            x_start = torch.where(known[1], known[0], found.x_start)
            return Denoised(x_start, to_epsilon("x_start", x_start, x, PROCESS.schedule.alpha_bar(t)))

        return denoise

    x = noise(0, (3, sketch.side, sketch.side)).to(tokens.device)
    return _drawn(sketch, tokens, prior.written(lengths), x, guidance_scale, steps, partly)


@torch.no_grad()
def resample_sketches(
    prior: Prior,
    tokens: Tensor,
    lengths: Tensor,
    pictures: Tensor,
    since: Tensor,
    noise: Tensor,
    *,
    guidance_scale: float = 1.0,
    steps: int = STEPS,
) -> Tensor:
    """True sketches with the errors of drawn ones: noised to a timestep of their own, and drawn again from there.

    Captions (N, T), (N,), pictures and their noise (N, 3, s, s), timesteps (N,) -> (N, 3, s, s). As in SDEdit (Meng et
    al. 2022, algorithm 1). One whose timestep is below the last of the steps stays the picture.

    Raises: DalleError where the prior draws no sketch.
    """
    sketch = _of(prior)
    latest = since.max().item()

    def partly(free: Denoiser) -> Denoiser:
        def denoise(x: Tensor, t: float) -> Denoised:
            if t > latest:
                return Denoised(pictures, noise)
            found, drawn = free(x, t), (t <= since)[:, None, None, None]
            x_start = torch.where(drawn, found.x_start, pictures)
            return Denoised(x_start, torch.where(drawn, found.epsilon, noise))

        return denoise

    return _drawn(sketch, tokens, prior.written(lengths), noise, guidance_scale, steps, partly)


def _drawn(
    sketch: Sketch,
    tokens: Tensor,
    written: Tensor,
    x: Tensor,
    guidance_scale: float,
    steps: int,
    partly: Callable[[Denoiser], Denoiser],
) -> Tensor:
    """By DDIM from noise x, (N, 3, s, s), and by what `partly` makes of the guided denoiser."""
    training = sketch.training
    sketch.eval()
    with torch.autocast(x.device.type, enabled=False):
        words = sketch.read(tokens, written)
        null = sketch.read(tokens[:1], torch.zeros_like(written[:1]))
        rows = torch.cat([words, null.expand_as(words)])
        free = denoiser(lambda x, t: sketch(x, t, rows[: len(x)]), PROCESS, Guidance(guidance_scale), Threshold())
        drawn = samplers.ddim(partly(free), x, schedules.select_timesteps(PROCESS.schedule, steps))
    sketch.train(training)
    return drawn


def _whole_cells(kept: Tensor, side: int) -> Tensor:
    """Where all codes of a cell are kept: (W, W) bool -> (s, s) bool."""
    ratio = len(kept) // side
    return kept.view(side, ratio, side, ratio).all(3).all(1)


def _of(prior: Prior) -> Sketch:
    if prior.sketch is None:
        raise DalleError("expected a prior that sketches, found one with sketch 0; train one with prior.sketch")
    return prior.sketch
