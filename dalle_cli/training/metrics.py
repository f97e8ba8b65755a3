"""What a run reports while it goes on: means of its metrics, and its speed."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from dalle_cli.console import Pace
from dalle_cli.devices import Arithmetic, peak_flops, peak_memory
from dalle_cli.errors import DalleError

FINITE = {  # metrics that end a run when they are not finite, and what to change
    "loss": "lower lr, or lengthen warmup",
    "grad_norm": "lower lr, lengthen warmup, or compute in --dtype float32",
}


class Averages:
    """Means of metrics since they were last taken; they stay tensors, so that no update waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of one update; only scalars count."""
        self.count += 1
        for key, value in metrics.items():
            if value.ndim == 0:
                self.sums[key] = self.sums[key] + value if key in self.sums else value

    def check(self, step: int) -> None:
        """Raises: DalleError if a metric is no longer finite; the last checkpoint is good."""
        for name, advice in FINITE.items():
            if name in self.sums and not torch.isfinite(self.sums[name]).item():
                found = self.sums[name].item()
                raise DalleError(
                    f"expected a finite {name.replace('_', ' ')}, found {found} by update {step}; {advice}"
                )

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {key: (value / self.count).item() for key, value in self.sums.items()}

    def take(self) -> dict[str, float]:
        """The means so far, and start again."""
        means = self.means()
        self.sums, self.count = {}, 0
        return means

    def state(self) -> dict[str, Tensor]:
        """A copy of the sums, for a checkpoint."""
        return {"count": torch.tensor(self.count)} | {f"sum/{key}": value.clone() for key, value in self.sums.items()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse of `state`; older checkpoints have none."""
        self.count = int(state.get("count", 0))
        self.sums = {key[4:]: value.to(device) for key, value in state.items() if key.startswith("sum/")}


class Meter:
    """Seconds, rate and memory of a run, which do not affect its results."""

    def __init__(self, machine: Arithmetic, flops: float | None, window: int):
        """`flops` are those of one update; rates are over the last `window` updates."""
        self.machine, self.flops = machine, flops
        self.unit = ""
        self.seconds = 0.0
        self.peak: float | None = None
        self.last: deque[tuple[float, int]] = deque(maxlen=window)

    def measure_machine(self) -> None:
        """Measure the machine's peak FLOP/s, of which the display shows a share; takes a third of a second."""
        if self.flops is not None:
            self.peak = peak_flops(self.machine)

    def add(self, seconds: float, unit: str, units: int) -> None:
        """Count one update: its seconds, and how many units it processed."""
        self.seconds += seconds
        self.unit = unit
        self.last.append((seconds, units))

    def pace(self) -> Pace:
        """What the display shows."""
        seconds = max(sum(s for s, _ in self.last), 1e-9)
        rate = sum(units for _, units in self.last) / seconds
        share = self.flops * len(self.last) / seconds / self.peak if self.flops and self.peak else None
        return Pace(rate, self.unit, peak_memory(self.machine.device), share)

    def row(self) -> dict[str, float]:
        """The columns of a log row."""
        pace = self.pace()
        memory = {} if pace.memory is None else {"peak_memory": round(pace.memory, 1)}
        return {"seconds": round(self.seconds, 3), "rate": round(pace.rate, 2), **memory}


class Silent:
    """The display of all processes but the first: none."""

    live = False

    def due(self) -> bool:
        return False

    def tell(self, pace: Pace, /, **metrics: object) -> None:
        pass

    def advance(self) -> None:
        pass
