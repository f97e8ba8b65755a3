"""Noise schedules, and the timesteps of a schedule that a sampler uses.

T timesteps of training, N steps of a sampler. alpha_bar is alphas_cumprod at one timestep, the share of the data in the
variance of x_t = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4): 1 is data, 0 is noise.
sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise scale relative to the data (Karras et al. 2022). Schedules are
float64 on the CPU, because near data 1 - alpha_bar has few digits left in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

SCHEDULES = ("cosine", "linear", "flow")
SPACINGS = ("trailing", "linspace", "leading", "leading+1", "karras")
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, sec. 3.2: no singularity at the end
BETAS = (1e-4, 0.02)  # Ho et al. 2020, sec. 4: the first and the last of a linear schedule
SIGMA_MAX = 80.0  # Karras et al. 2022, table 1; a cosine schedule itself goes up to 20,000


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule: alphas_cumprod (T,) float64 on the CPU, decreasing, in [0, 1).

    Raises:
        DalleError: another shape, dtype, order or range.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        alpha_bars = self.alphas_cumprod
        if alpha_bars.dtype != torch.float64 or alpha_bars.ndim != 1 or len(alpha_bars) < 2:
            found = f"{alpha_bars.dtype} of shape {tuple(alpha_bars.shape)}"
            raise DalleError(f"expected alphas_cumprod (T,) float64 with T of 2 or more, found {found}; convert them")
        if not (alpha_bars[-1] >= 0 and alpha_bars[0] < 1 and bool((alpha_bars.diff() < 0).all())):
            found = f"{alpha_bars[0]:.3g} to {alpha_bars[-1]:.3g}"
            raise DalleError(f"expected decreasing alphas_cumprod in [0, 1), found {found}; use `make_schedule`")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def previous(self) -> Tensor:
        """alphas_cumprod of the timestep before each one, 1 before the first: (T,)."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio of each timestep, alpha_bar / (1 - alpha_bar): (T,)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def log_sigmas(self) -> Tensor:
        """ln sigma of each timestep: (T,), increasing; inf where alpha_bar is 0."""
        return -self.snr.log() / 2

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at whole timesteps, ready to broadcast: (B,) int64, (B, ...) -> (B, 1, ...) float64, CPU."""
        return extract(self.alphas_cumprod, t, like)

    def alpha_bar(self, t: float) -> float:
        """alphas_cumprod at one timestep in [0, T - 1]; log sigma is interpolated linearly between whole timesteps."""
        below = int(t)
        if below == t:
            return float(self.alphas_cumprod[below])
        low, high = (float(log) for log in self.log_sigmas[below : below + 2])
        return to_alpha_bar(math.exp(low + (t - below) * (high - low)))

    def timestep(self, sigma: float) -> float:
        """The timestep, possibly fractional, with this sigma, clamped to the schedule; the inverse of `alpha_bar`."""
        logs, wanted = self.log_sigmas, math.log(sigma)
        above = int(torch.searchsorted(logs, wanted))
        if above in (0, len(self)):
            return float(min(above, len(self) - 1))
        low, high = (float(log) for log in logs[above - 1 : above + 1])
        return above - 1 + (wanted - low) / (high - low)


def extract(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Values of a (T,) table at timesteps, ready to broadcast: (B,) int64, (B, ...) -> (B, 1, ...).

    Keep `t` on the CPU, where the table is, to avoid waiting for a device.
    """
    return table[t.to(table.device)].view(-1, *[1] * (like.ndim - 1))


def to_sigma(alpha_bar: float) -> float:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar): inf at 0, 0 at 1."""
    return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else math.inf


def to_alpha_bar(sigma: float) -> float:
    """alpha_bar = 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma * sigma)


def linear(n: int, betas: Sequence[float] = BETAS) -> Schedule:
    """Linear betas from the first to the last for 1000 timesteps (Ho et al. 2020, sec. 4), times 1000 / n for n.

    Raises:
        DalleError: not two betas in (0, 1), the smaller one first.
    """
    if len(betas) != 2 or not 0 < betas[0] <= betas[1] < 1:
        raise DalleError(f"expected two betas between 0 and 1, the smaller one first, found {list(betas)}; change them")
    every = torch.linspace(betas[0], betas[1], n, dtype=torch.float64) * 1000 / n
    return Schedule((1 - every.clamp(max=MAX_BETA)).cumprod(0))


def cosine(n: int) -> Schedule:
    """f(t) / f(0) with f(t) = cos^2((t / n + s) / (1 + s) * pi / 2), s = 0.008 (Nichol & Dhariwal 2021, eq. 17)."""
    f = (((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008) * math.pi / 2).cos().square()
    betas = 1 - f[1:] / f[:-1]
    return Schedule((1 - betas.clamp(max=MAX_BETA)).cumprod(0))


def flow(n: int) -> Schedule:
    """Straight paths from data to noise, x_s = (1 - s) x_start + s noise, s = (t + 1) / n (Lipman et al. 2023).

    Scaled to unit variance they are a variance-preserving process, alpha_bar = (1 - s)^2 / ((1 - s)^2 + s^2); samplers
    and networks see the scaled x_t. The last timestep is noise alone.
    """
    s = torch.arange(1, n + 1, dtype=torch.float64) / n
    return Schedule((1 - s).square() / ((1 - s).square() + s.square()))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first as it was (Lin et al. 2023, algorithm 1)."""
    roots = schedule.alphas_cumprod.sqrt()
    return Schedule(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square())


def make_schedule(name: str, n: int, zero_snr: bool = False, betas: Sequence[float] = BETAS) -> Schedule:
    """The schedule of this name with n timesteps; `betas` are those of the linear one.

    Raises:
        DalleError: an unknown name, fewer than 2 timesteps, or betas out of range.
    """
    if name not in SCHEDULES:
        raise DalleError(f"expected a noise schedule among {', '.join(SCHEDULES)}, found {name!r}; take one of them")
    if n < 2:
        raise DalleError(f"expected 2 timesteps or more, found {n}; 1000 is the papers' number")
    schedule = linear(n, betas) if name == "linear" else {"cosine": cosine, "flow": flow}[name](n)
    return zero_terminal_snr(schedule) if zero_snr else schedule


@dataclass(frozen=True)
class Timesteps:
    """N timesteps of a sampler, from noise to data, and N + 1 alphas_cumprod: at each of them, and at the end."""

    timesteps: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]


def select_timesteps(schedule: Schedule, n: int, spacing: str = "trailing") -> Timesteps:
    """Select n timesteps of a schedule, from noise to data.

    `trailing` includes the last timestep, `leading` the first, `linspace` both (Lin et al. 2023, table 2); all are
    whole, and n is at most T. `leading+1` is `leading` one timestep later, as some published weights are sampled; n is
    below T. `karras` spaces sigmas as Karras et al. (2022), at fractional timesteps.

    Raises:
        DalleError: an unknown spacing, or a number of steps out of range.
    """
    if spacing not in SPACINGS:
        raise DalleError(f"expected a spacing among {', '.join(SPACINGS)}, found {spacing!r}; take one of them")
    total = len(schedule)
    offset = int(spacing == "leading+1")
    if n < 1 or (n > total - offset and spacing != "karras"):
        raise DalleError(
            f"expected 1 to {total - offset} steps, as many as the model was trained with, found {n}; try 50"
        )
    if spacing == "karras":
        return karras(schedule, n)
    if spacing.startswith("leading"):
        chosen = [i * (total // n) + offset for i in range(n)]
    elif spacing == "trailing" or n == 1:
        chosen = [round(total * (i + 1) / n) - 1 for i in range(n)]
    else:
        width = (total - 1) / (n - 1)  # divided first, as by others: halves then round as theirs do
        chosen = [round(i * width) for i in range(n)]
    chosen.reverse()
    return Timesteps(tuple(chosen), (*(schedule.alpha_bar(t) for t in chosen), 1.0))


def karras(schedule: Schedule, n: int, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> Timesteps:
    """n timesteps evenly spaced in sigma^(1/rho) (Karras et al. 2022, eq. 5); they are fractional.

    Sigma goes from `sigma_max`, or the schedule's largest if that is less, to the schedule's least, then to data.
    """
    logs = schedule.log_sigmas
    least, largest = float(logs[0].exp()), float(logs[logs.isfinite()].max().exp())
    high, low = min(largest, sigma_max) ** (1 / rho), least ** (1 / rho)
    sigmas = [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]
    return Timesteps(tuple(schedule.timestep(s) for s in sigmas), (*(to_alpha_bar(s) for s in sigmas), 1.0))
