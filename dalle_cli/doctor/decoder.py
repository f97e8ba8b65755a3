"""What `doctor` asks of the models that paint: a diffusion decoder, and an upsampler.

B pictures, S their side, s that of small ones, D embedding width, T caption length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.diffusion.losses import losses
from dalle_cli.diffusion.noise import noise_for, row_noise
from dalle_cli.diffusion.process import Process, target
from dalle_cli.doctor.checks import Finding, at_least, dropped, gain, noise_bins, unit_scale
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.upsampler import Upsampler, enlarge
from dalle_cli.sampling.decoder import Brush, paint, process, to_signed

GOLDEN = (5**0.5 - 1) / 2
GUIDANCE, STEPS = 3.0, 8  # of what is painted
CHANGE_GOOD, CHANGE_FAIR = 1e-2, 1e-4  # root mean square of a change, as a share of what changes
LEVELS_GOOD, LEVELS_FAIR = 0.2, 0.01  # gray levels of 255 by which guidance moves a picture

Predict = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> what the network gives


@dataclass(frozen=True)
class Told:
    """B pictures uint8 (B, 3, S, S) and what a decoder is told of them: z_i (B, D), tokens (B, T), lengths (B,).

    `others` are the rows whose caption reads differently, one for each.
    """

    images: Tensor
    embeddings: Tensor
    tokens: Tensor
    lengths: Tensor
    others: Sequence[int]


@dataclass(frozen=True)
class Trial:
    """Pictures in [-1, 1], noised to the middle half of the timesteps, where what is told of them counts most."""

    process: Process
    x_start: Tensor
    x: Tensor
    t: Tensor
    noise: Tensor

    def output(self, predict: Predict) -> tuple[Tensor, Tensor]:
        """What is predicted (B, 3, S, S), and its squared error (B,) on the CPU."""
        output = predict(self.x, self.t.to(self.x.device))
        found = losses(self.process, output, self.x_start, self.x, self.t, self.noise)
        return self.process.split(output, self.x)[0], found.simple.double().cpu()


def trial(model: Process, images: Tensor, seed: int) -> Trial:
    """Timesteps and noise by the picture's number: (B, 3, S, S) uint8."""
    n, x_start = len(model.schedule), to_signed(images)
    t = torch.tensor([int((0.25 + 0.5 * (i * GOLDEN % 1)) * n) for i in range(len(images))])
    noise = noise_for(seed, range(len(images)), 0, x_start.shape[1:], "doctor").to(x_start.device)
    return Trial(model, x_start, model.noised(x_start, t, noise), t, noise)


@torch.no_grad()
def examine_decoder(
    decoder: Decoder, told: Told, losses_by_bin: dict[str, float], dropout: tuple[object, object], seed: int,
    advance: Callable[[], None],
) -> list[Finding]:  # fmt: skip
    """All that is asked of a decoder; `dropout` are the shares of z_i and of captions that training dropped."""
    model = process(decoder.config)
    found = [scale(decoder, told.embeddings), *by_bins(model, losses_by_bin, told.images)]
    found += conditions(decoder, told, trial(model, told.images, seed))
    advance()
    found.append(dropped("share of z_i dropped in training", dropout[0]))
    if decoder.text is not None:
        found.append(dropped("share of captions dropped in training", dropout[1]))
    found.append(guided(decoder, told, seed))
    advance()
    return found


def scale(decoder: Decoder, embeddings: Tensor) -> Finding:
    """Standard deviation of the entries of z_i as the U-Net's projections take them."""
    z = embeddings.double()
    if decoder.config.unit_variance:
        z = F.normalize(z, dim=1) * decoder.config.n_embedding**0.5
    advice = "set decoder.unit_variance = true, and train again"
    return unit_scale("scale of z_i as it is told", float(z.square().mean().sqrt()), advice)


def by_bins(model: Process, losses_by_bin: dict[str, float], images: Tensor) -> list[Finding]:
    """Figures `mse_t0_249` and so on of a validation, beside what predicting nothing costs there."""
    x, n = to_signed(images).double(), len(model.schedule)
    found = {}
    for name, loss in losses_by_bin.items():
        if name.startswith("mse_t"):
            first, last = (int(part) for part in name.removeprefix("mse_t").split("_"))
            t = torch.linspace(first, last, 9).round().long().clamp(max=n - 1)
            # E[target^2] for noise of unit variance that has nothing to do with the data
            costs = [_nothing(model, x, float(model.schedule.alphas_cumprod[place])) for place in t.tolist()]
            found[f"{first} to {last}"] = loss, sum(costs) / len(costs)
    return noise_bins(found)


def _nothing(model: Process, x_start: Tensor, level: float) -> float:
    """Mean square of what should be predicted at a level."""
    of_noise = target(model.prediction, torch.zeros(1), torch.ones(1), level)
    of_data = target(model.prediction, x_start, torch.zeros_like(x_start), level)
    return float(of_noise.double().square().mean() + of_data.square().mean())


def changes(what: str, own: Tensor, other: Tensor, advice: str) -> Finding:
    """How much the prediction changes with what is told, as a share of itself."""
    share = float((other - own).double().square().mean().sqrt() / own.double().square().mean().sqrt().clamp(min=1e-12))
    return at_least(f"change of the output with {what}", share, CHANGE_GOOD, CHANGE_FAIR, advice)


def conditions(decoder: Decoder, told: Told, at: Trial) -> list[Finding]:
    """Whether z_i and caption count: the output with those of other pictures, and with nulls."""
    given = torch.ones(len(told.images), dtype=torch.bool, device=told.images.device)

    def run(z: Tensor, counts: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return at.output(lambda x, t: decoder.denoise(x, t, z, counts, tokens, lengths))

    z, captions, others = told.embeddings, (told.tokens, told.lengths), list(told.others)
    own, loss = run(z, given, *captions)
    strange, strange_loss = run(z[others], given, *captions)
    null, _ = run(z, ~given, *captions)
    advice = "z_i is not heard: look at its projections, and at what is dropped"
    found = [
        changes("another's z_i", own, strange, advice),
        gain("loss with others' z_i, more than with own", strange_loss - loss, advice),
        changes("the null z_i", own, null, "the null z_i says as much as z_i: is the mask of dropped ones in use?"),
    ]
    if decoder.text is None:
        return found
    strange, _ = run(z, given, told.tokens[others], told.lengths[others])
    null, _ = run(z, given, told.tokens, torch.zeros_like(told.lengths))
    advice = "captions are not heard; beside z_i they count for little, but not for nothing"
    return [
        *found,
        changes("another's caption", own, strange, advice),
        changes("the null caption", own, null, advice),
    ]


def guided(decoder: Decoder, told: Told, seed: int) -> Finding:
    """Gray levels between what is painted from the same noise with and without guidance."""
    steps, noise = min(STEPS, decoder.config.n_timestep), row_noise(seed, range(len(told.images)), "doctor")
    plain, strong = (
        paint(decoder, told.embeddings, told.tokens, told.lengths, Brush(steps, guidance=guidance), noise).double()
        for guidance in (1.0, GUIDANCE)
    )
    advice = "guidance does nothing: nulls paint what z_i and caption do"
    question = f"gray levels that guidance {GUIDANCE:g} moves a picture by"
    return at_least(question, float((strong - plain).abs().mean()), LEVELS_GOOD, LEVELS_FAIR, advice)


@torch.no_grad()
def examine_upsampler(
    upsampler: Upsampler, images: Tensor, low: Tensor, losses_by_bin: dict[str, float], seed: int,
    advance: Callable[[], None],
) -> list[Finding]:  # fmt: skip
    """All that is asked of an upsampler: (B, 3, S, S) uint8, (B, 3, s, s) in [-1, 1]."""
    model = process(upsampler.config)
    found, at = by_bins(model, losses_by_bin, images), trial(model, images, seed)
    beside = enlarge(low, upsampler.config.factor)
    own, loss = at.output(lambda x, t: upsampler(x, t, beside))
    strange, strange_loss = at.output(lambda x, t: upsampler(x, t, beside.roll(1, 0)))
    advance()
    advance()
    advice = "the small picture is not seen: look at the channels that it comes in by"
    return [
        *found,
        changes("another's small picture", own, strange, advice),
        gain("loss beside others' small pictures, more than beside own", strange_loss - loss, advice),
    ]
