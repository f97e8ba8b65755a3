"""What a network is trained to give, and what follows from it (Ho et al. 2020; Salimans & Ho 2022, app. D).

B batch, C channels. With level = alphas_cumprod of the timestep,
x_t = sqrt(level) x_start + sqrt(1 - level) epsilon, and v = sqrt(level) epsilon - sqrt(1 - level) x_start.
A network gives one of epsilon, x_start and v; with x_t each of them determines the other two. A level is a number, or
one for each sample as `Schedule.at` gives them; both are float64 until they meet the samples.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from dalle_cli.diffusion.schedules import Schedule
from dalle_cli.errors import DalleError

PREDICTIONS = ("epsilon", "x_start", "v")
Level = TypeVar("Level", float, Tensor)


@dataclass(frozen=True)
class Process:
    """A schedule, what the network predicts, and whether it gives as many channels more for the variance.

    Raises:
        DalleError: an unknown prediction, or epsilon where the last timestep has no data left to tell it from.
    """

    schedule: Schedule
    prediction: str = "epsilon"
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise DalleError(f"expected a prediction among {known}, found {self.prediction!r}; take one of them")
        if self.prediction == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
            raise DalleError("expected v or x_start where the last timestep is all noise, found epsilon; predict v")

    def noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of given noise (Ho et al. 2020, eq. 4): (B, ...), (B,) int64, (B, ...) -> (B, ...)."""
        level = self.schedule.at(t, x_start)
        return times(level**0.5, x_start) + times((1 - level) ** 0.5, noise)

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's output as prediction and place of the log variance, in the dtype of `like`.

        (B, C, ...) -> the same and None; (B, 2C, ...) -> twice (B, C, ...), the place being 0 at the lower bound and 1
        at the upper. The network's own numbers for it are from -1 to 1, as in Nichol & Dhariwal's code.

        Raises:
            DalleError: another number of channels.
        """
        expected = like.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != expected:
            raise DalleError(f"expected {expected} channels from the network, found {output.shape[1]}; see its config")
        if not self.learned_variance:
            return output.to(like.dtype), None
        prediction, place = output.to(like.dtype).chunk(2, dim=1)
        return prediction, (place + 1) / 2


def times(coefficient: float | Tensor, x: Tensor) -> Tensor:
    """A coefficient, one or one for each sample, times samples, in their dtype and on their device."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(x.dtype).to(x.device)  # in this order: MPS has no float64
    return coefficient * x


def target(prediction: str, x_start: Tensor, epsilon: Tensor, level: Level) -> Tensor:
    """What a network of this prediction should give."""
    if prediction == "epsilon":
        return epsilon
    if prediction == "x_start":
        return x_start
    return times(level**0.5, epsilon) - times((1 - level) ** 0.5, x_start)


def to_x_start(prediction: str, output: Tensor, x: Tensor, level: Level) -> Tensor:
    """The data that an output at x_t stands for (Ho et al. 2020, eq. 15 for epsilon)."""
    if prediction == "epsilon":
        return times(level**-0.5, x - times((1 - level) ** 0.5, output))
    if prediction == "x_start":
        return output
    return times(level**0.5, x) - times((1 - level) ** 0.5, output)


def to_epsilon(prediction: str, output: Tensor, x: Tensor, level: Level) -> Tensor:
    """The noise that an output at x_t stands for."""
    if prediction == "epsilon":
        return output
    if prediction == "x_start":
        return times((1 - level) ** -0.5, x - times(level**0.5, output))
    return times(level**0.5, output) + times((1 - level) ** 0.5, x)


def posterior_mean(x_start: Tensor, x: Tensor, level: Level, following: Level) -> Tensor:
    """Mean of q(x_s | x_t, x_start), with the levels of t and of an s nearer to data (Ho et al. 2020, eq. 7)."""
    alpha = level / following
    of_start = following**0.5 * (1 - alpha) / (1 - level)
    return times(of_start, x_start) + times(alpha**0.5 * (1 - following) / (1 - level), x)


def variance_bounds(level: Level, following: Level) -> tuple[Level, Level]:
    """Variances of q(x_s | x_t, x_start) and q(x_t | x_s): the least and the most for p (Ho et al. 2020, sec. 3.2)."""
    beta = 1 - level / following
    return beta * (1 - following) / (1 - level), beta
