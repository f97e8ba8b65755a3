"""What a run tells of itself while it goes on: means of its figures, and how fast it is."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle_cli.console import Pace
from dalle_cli.devices import Arithmetic, peak_flops, peak_memory
from dalle_cli.errors import DalleError

FINITE = {  # figures that end a run when they are no number, and what to change
    "loss": "lower lr, or lengthen warmup",
    "grad_norm": "lower lr, lengthen warmup, or compute in --dtype float32",
}


class Averages:
    """Means of the figures since they were last taken; kept as tensors, so that no update waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Take in the figures of one update; only scalars count."""
        self.count += 1
        for key, value in figures.items():
            if value.ndim == 0:
                self.sums[key] = self.sums[key] + value if key in self.sums else value

    def check(self, step: int) -> None:
        """Raises: DalleError if a figure is no longer a finite number; the last checkpoint is the good one."""
        for name, advice in FINITE.items():
            if name in self.sums and not torch.isfinite(self.sums[name]).item():
                found = self.sums[name].item()
                raise DalleError(
                    f"expected a finite {name.replace('_', ' ')}, found {found} by update {step}; {advice}"
                )

    def means(self) -> dict[str, float]:
        """The means so far; none before the first update."""
        return {key: (value / self.count).item() for key, value in self.sums.items()}

    def take(self) -> dict[str, float]:
        """The means; begins anew."""
        means = self.means()
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Tensor]:
        """The sums, so that the next row of a resumed run is that of one never stopped; memory of their own."""
        return {"count": torch.tensor(self.count)} | {f"sum/{key}": value.clone() for key, value in self.sums.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `state`; nothing where a checkpoint has none."""
        self.count = int(state.get("count", 0))
        self.sums = {key[4:]: value.to(device) for key, value in state.items() if key.startswith("sum/")}


class Meter:
    """Seconds, rate and memory of a run; never part of what a run makes."""

    def __init__(self, machine: Arithmetic, flops: float | None, window: int):
        """`flops` are those of one update; rates are over the last `window` updates."""
        self.machine, self.flops = machine, flops
        self.unit = ""
        self.seconds = 0.0
        self.peak: float | None = None
        self.last: deque[tuple[float, int]] = deque(maxlen=window)

    def measure_machine(self) -> None:
        """Find out what the machine could do at best, to show a share of it; a third of a second."""
        if self.flops is not None:
            self.peak = peak_flops(self.machine)

    def add(self, seconds: float, unit: str, units: int) -> None:
        """One update took so long and dealt with so many of its units."""
        self.seconds += seconds
        self.unit = unit
        self.last.append((seconds, units))

    def pace(self) -> Pace:
        """What to show a person."""
        seconds = max(sum(s for s, _ in self.last), 1e-9)
        rate = sum(units for _, units in self.last) / seconds
        share = self.flops * len(self.last) / seconds / self.peak if self.flops and self.peak else None
        return Pace(rate, self.unit, peak_memory(self.machine.device), share)

    def row(self) -> dict[str, float]:
        """What a row of the log says of it."""
        pace = self.pace()
        memory = {} if pace.memory is None else {"peak_memory": round(pace.memory, 1)}
        return {"seconds": round(self.seconds, 3), "rate": round(pace.rate, 2), **memory}


class Silent:
    """A display of nothing, for all processes but the first."""

    live = False

    def due(self) -> bool:
        return False

    def tell(self, pace: Pace, /, **figures: object) -> None:
        pass

    def advance(self) -> None:
        pass
