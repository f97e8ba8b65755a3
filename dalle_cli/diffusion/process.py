"""The diffusion process and the parameterizations of a network (Ho et al. 2020; Salimans & Ho 2022, app. D).

B batch, C channels. alpha_bar is alphas_cumprod at a timestep: a number, or one for each sample as `Schedule.at` gives
them, in float64 until it multiplies the samples.
x_t = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) epsilon, v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_start.
A network predicts epsilon, x_start or v; together with x_t each of them determines the other two.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from dalle_cli.diffusion.schedules import Schedule
from dalle_cli.errors import DalleError

PREDICTIONS = ("epsilon", "x_start", "v")
AlphaBar = TypeVar("AlphaBar", float, Tensor)


@dataclass(frozen=True)
class Process:
    """A noise schedule, what the network predicts, and whether it has as many channels again for the variance.

    Raises:
        DalleError: an unknown prediction, or epsilon with a schedule of zero terminal SNR.
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

    def add_noise(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_start and noise (Ho et al. 2020, eq. 4): (B, ...), (B,) int64, (B, ...) -> (B, ...)."""
        alpha_bar = self.schedule.at(t, x_start)
        return scale(alpha_bar**0.5, x_start) + scale((1 - alpha_bar) ** 0.5, noise)

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output into prediction and variance interpolation, in the dtype of `like`.

        (B, C, ...) -> the same and None; (B, 2C, ...) -> (B, C, ...) twice. The interpolation is 0 at the lower bound
        of the log variance and 1 at the upper; the network outputs it as -1 to 1, as in Nichol & Dhariwal's code.

        Raises:
            DalleError: another number of channels.
        """
        expected = like.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != expected:
            raise DalleError(f"expected {expected} channels from the network, found {output.shape[1]}; see its config")
        if not self.learned_variance:
            return output.to(like.dtype), None
        prediction, interpolation = output.to(like.dtype).chunk(2, dim=1)
        return prediction, (interpolation + 1) / 2


def scale(coefficient: float | Tensor, x: Tensor) -> Tensor:
    """A coefficient, one for all samples or one for each, times samples, in their dtype and on their device."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(x.dtype).to(x.device)  # in this order: MPS has no float64
    return coefficient * x


def target(prediction: str, x_start: Tensor, epsilon: Tensor, alpha_bar: AlphaBar) -> Tensor:
    """The training target of a network with this prediction."""
    if prediction == "epsilon":
        return epsilon
    if prediction == "x_start":
        return x_start
    return scale(alpha_bar**0.5, epsilon) - scale((1 - alpha_bar) ** 0.5, x_start)


def to_x_start(prediction: str, output: Tensor, x: Tensor, alpha_bar: AlphaBar) -> Tensor:
    """x_start from the network's output at x_t (Ho et al. 2020, eq. 15 for epsilon)."""
    if prediction == "epsilon":
        return scale(alpha_bar**-0.5, x - scale((1 - alpha_bar) ** 0.5, output))
    if prediction == "x_start":
        return output
    return scale(alpha_bar**0.5, x) - scale((1 - alpha_bar) ** 0.5, output)


def to_epsilon(prediction: str, output: Tensor, x: Tensor, alpha_bar: AlphaBar) -> Tensor:
    """epsilon from the network's output at x_t."""
    if prediction == "epsilon":
        return output
    if prediction == "x_start":
        return scale((1 - alpha_bar) ** -0.5, x - scale(alpha_bar**0.5, output))
    return scale(alpha_bar**0.5, output) + scale((1 - alpha_bar) ** 0.5, x)


def posterior_mean(x_start: Tensor, x: Tensor, alpha_bar: AlphaBar, alpha_bar_next: AlphaBar) -> Tensor:
    """Mean of q(x_s | x_t, x_start) from alpha_bar at t and at an s nearer to data (Ho et al. 2020, eq. 7)."""
    alpha = alpha_bar / alpha_bar_next
    of_start = alpha_bar_next**0.5 * (1 - alpha) / (1 - alpha_bar)
    return scale(of_start, x_start) + scale(alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar), x)


def variance_bounds(alpha_bar: AlphaBar, alpha_bar_next: AlphaBar) -> tuple[AlphaBar, AlphaBar]:
    """Variances of q(x_s | x_t, x_start) and q(x_t | x_s): bounds of that of p (Ho et al. 2020, sec. 3.2)."""
    beta = 1 - alpha_bar / alpha_bar_next
    return beta * (1 - alpha_bar_next) / (1 - alpha_bar), beta
