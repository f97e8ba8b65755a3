"""Noise schedules, and the timesteps at which a sampler visits them.

T timesteps of training, N steps of a sampler. The *level* of a timestep is its alphas_cumprod, the share of the data in
the variance of x_t: x_t = sqrt(level) x_start + sqrt(1 - level) noise (Ho et al. 2020, eq. 4). 1 is data, 0 is noise.
Its sigma, sqrt((1 - level) / level), is the noise beside data of unit scale (Karras et al. 2022). Schedules are kept in
float64 on the CPU: near data, 1 - level has few digits left in float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_cli.errors import DalleError

SCHEDULES = ("cosine", "linear")
SPACINGS = ("trailing", "linspace", "leading", "karras")
MAX_BETA = 0.999  # Nichol & Dhariwal 2021, sec. 3.2: no singularity at the end
SIGMA_MAX = 80.0  # Karras et al. 2022, table 1; a cosine schedule itself goes up to 20,000


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much data is left at each timestep: (T,) float64 on the CPU, falling, in [0, 1).

    Raises:
        DalleError: it is none of that.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        levels = self.alphas_cumprod
        if levels.dtype != torch.float64 or levels.ndim != 1 or len(levels) < 2:
            found = f"{levels.dtype} of shape {tuple(levels.shape)}"
            raise DalleError(f"expected alphas_cumprod (T,) float64 with T of 2 or more, found {found}; convert them")
        if not (levels[-1] >= 0 and levels[0] < 1 and bool((levels.diff() < 0).all())):
            found = f"{levels[0]:.3g} to {levels[-1]:.3g}"
            raise DalleError(f"expected alphas_cumprod to fall, in [0, 1), found {found}; take a schedule by its name")

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def previous(self) -> Tensor:
        """The level before each timestep, 1 before the first: (T,)."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @property
    def snr(self) -> Tensor:
        """Signal to noise of each timestep, level / (1 - level): (T,)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def log_sigmas(self) -> Tensor:
        """Logarithm of the sigma of each timestep: (T,), rising; inf where there is no data left."""
        return -self.snr.log() / 2

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """The levels of whole timesteps: (B,) int64, (B, ...) -> (B, 1, ...) float64 on the CPU."""
        return spread(self.alphas_cumprod, t, like)

    def level(self, t: float) -> float:
        """The level at one timestep in [0, T - 1]; between whole ones log sigma is taken as linear."""
        below = int(t)
        if below == t:
            return float(self.alphas_cumprod[below])
        low, high = (float(log) for log in self.log_sigmas[below : below + 2])
        return level_of_sigma(math.exp(low + (t - below) * (high - low)))

    def timestep(self, sigma: float) -> float:
        """The timestep, whole or between two, of a sigma; the inverse of `level`, and clamped to the schedule."""
        logs, wanted = self.log_sigmas, math.log(sigma)
        above = int(torch.searchsorted(logs, wanted))
        if above in (0, len(self)):
            return float(min(above, len(self) - 1))
        low, high = (float(log) for log in logs[above - 1 : above + 1])
        return above - 1 + (wanted - low) / (high - low)


def spread(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Rows of a (T,) table with as many dimensions as `like`: (B,) int64, (B, ...) -> (B, 1, ...).

    With `t` on the CPU, as the table is, no device is waited for.
    """
    return table[t.to(table.device)].view(-1, *[1] * (like.ndim - 1))


def sigma_of_level(level: float) -> float:
    """sqrt((1 - level) / level): inf at level 0, 0 at level 1."""
    return math.sqrt((1 - level) / level) if level > 0 else math.inf


def level_of_sigma(sigma: float) -> float:
    """1 / (1 + sigma^2), the inverse of `sigma_of_level`."""
    return 1 / (1 + sigma * sigma)


def linear(n: int) -> Schedule:
    """Betas from 1e-4 to 0.02 in a line, for 1000 timesteps (Ho et al. 2020, sec. 4); for n times 1000 / n."""
    betas = torch.linspace(1e-4, 0.02, n, dtype=torch.float64) * 1000 / n
    return Schedule((1 - betas.clamp(max=MAX_BETA)).cumprod(0))


def cosine(n: int) -> Schedule:
    """f(t) / f(0) with f(t) = cos^2((t / n + s) / (1 + s) * pi / 2), s = 0.008 (Nichol & Dhariwal 2021, eq. 17)."""
    f = (((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008) * math.pi / 2).cos().square()
    betas = 1 - f[1:] / f[:-1]
    return Schedule((1 - betas.clamp(max=MAX_BETA)).cumprod(0))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shift and scale sqrt(level) so that the last is 0 and the first as it was (Lin et al. 2023, algorithm 1)."""
    roots = schedule.alphas_cumprod.sqrt()
    return Schedule(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square())


def named(name: str, n: int, zero_snr: bool = False) -> Schedule:
    """The schedule that a config asks for, with n timesteps.

    Raises:
        DalleError: an unknown name, or fewer than 2 timesteps.
    """
    if name not in SCHEDULES:
        raise DalleError(f"expected a noise schedule among {', '.join(SCHEDULES)}, found {name!r}; take one of them")
    if n < 2:
        raise DalleError(f"expected 2 timesteps or more, found {n}; 1000 is the papers' number")
    schedule = cosine(n) if name == "cosine" else linear(n)
    return zero_terminal_snr(schedule) if zero_snr else schedule


@dataclass(frozen=True)
class Steps:
    """Where a sampler calls the denoiser, N timesteps from noise on, and N + 1 levels: there, and where it ends."""

    timesteps: tuple[float, ...]
    levels: tuple[float, ...]


def spaced(schedule: Schedule, n: int, spacing: str = "trailing") -> Steps:
    """Choose n of a schedule's timesteps, from noise to data.

    `trailing` holds the last timestep, `leading` the first, `linspace` both (Lin et al. 2023, table 2); these are whole
    and at most T. `karras` falls in sigma as Karras et al. (2022) do, between whole timesteps.

    Raises:
        DalleError: an unknown spacing, or a number of steps that the schedule has not.
    """
    if spacing not in SPACINGS:
        raise DalleError(f"expected a spacing among {', '.join(SPACINGS)}, found {spacing!r}; take one of them")
    total = len(schedule)
    if n < 1 or (n > total and spacing != "karras"):
        raise DalleError(f"expected 1 to {total} steps, as many as the model was trained with, found {n}; try 50")
    if spacing == "karras":
        return karras(schedule, n)
    if spacing == "leading":
        chosen = [i * (total // n) for i in range(n)]
    elif spacing == "trailing" or n == 1:
        chosen = [round(total * (i + 1) / n) - 1 for i in range(n)]
    else:
        chosen = [round((total - 1) * i / (n - 1)) for i in range(n)]
    chosen.reverse()
    return Steps(tuple(chosen), (*(schedule.level(t) for t in chosen), 1.0))


def karras(schedule: Schedule, n: int, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> Steps:
    """n sigmas equally apart in sigma^(1/rho), from `sigma_max` or the schedule's largest to its least, then data.

    Karras et al. 2022, eq. 5. Timesteps are fractions.
    """
    logs = schedule.log_sigmas
    least, largest = float(logs[0].exp()), float(logs[logs.isfinite()].max().exp())
    high, low = min(largest, sigma_max) ** (1 / rho), least ** (1 / rho)
    sigmas = [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]
    return Steps(tuple(schedule.timestep(s) for s in sigmas), (*(level_of_sigma(s) for s in sigmas), 1.0))
