"""What `doctor` finds: a question, a number, the number that is expected, and what to do where it is not that."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dalle_cli.evaluation.likelihood import mean

OK, WARNING, BAD = "ok", "warning", "bad"
VERDICTS = (OK, WARNING, BAD)  # from good to bad
SURE = 2.0  # standard errors that a difference must be above 0
LEAST = 1e-6  # what rounding alone may come to
SCALE_GOOD, SCALE_FAIR = 1.25, 2.0  # times that entries of z_i may be larger or smaller than of unit variance
LEARNED, STARTED = 0.5, 0.9  # shares of what knowing nothing costs: learned, and hardly begun
MORE_THAN_NOTHING = 1.02  # of what knowing nothing costs, beyond which it is worse than that


@dataclass(frozen=True)
class Finding:
    """A question that was looked into; `value` None where there was nothing to measure."""

    question: str
    verdict: str
    value: float | None
    expected: str
    advice: str

    def line(self, width: int) -> str:
        """All of it in a line, the question padded to `width`; the advice where it is needed."""
        found = "-" if self.value is None else f"{self.value:.4g}"
        told = f"{self.verdict:<7}  {self.question:<{width}}  {found:>9}  expected {self.expected}"
        return told if self.verdict == OK else f"{told}; {self.advice}"


def lines(findings: Sequence[Finding]) -> str:
    """A line for each, and one that sums up."""
    width = max(len(finding.question) for finding in findings)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    return "\n".join([*(finding.line(width) for finding in findings), summary])


def table(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The same for JSON, in which there are no numbers that are not finite."""
    rows = [asdict(finding) for finding in findings]
    return [{**row, "value": _finite(row["value"])} for row in rows]


def worst(findings: Sequence[Finding]) -> str:
    """The worst verdict among them."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def at_least(question: str, value: float, good: float, fair: float, advice: str) -> Finding:
    """Good from `good` on, bad below `fair`."""
    verdict = OK if value >= good else WARNING if value >= fair else BAD  # what is no number is bad
    return Finding(question, verdict, value, f"at least {good:.4g}", advice)


def at_most(question: str, value: float, good: float, fair: float, advice: str) -> Finding:
    """Good up to `good`, bad above `fair`."""
    verdict = OK if value <= good else WARNING if value <= fair else BAD
    return Finding(question, verdict, value, f"at most {good:.4g}", advice)


def unit_scale(question: str, value: float, advice: str) -> Finding:
    """A standard deviation that should be 1."""
    away = max(value, 1 / value) if value > 0 else math.inf
    verdict = OK if away <= SCALE_GOOD else WARNING if away <= SCALE_FAIR else BAD
    return Finding(question, verdict, value, f"1, within {1 / SCALE_GOOD:.4g} to {SCALE_GOOD:.4g}", advice)


def gain(question: str, differences: Tensor, advice: str) -> Finding:
    """Whether the mean of (N,) differences, one for each picture, is above 0."""
    return surely_above(question, *mean(differences), advice)


def surely_above(question: str, value: float | None, error: float | None, advice: str) -> Finding:
    """Whether a mean is above 0 by twice its standard error; bad if it is not even so by one."""
    value, error = (math.nan if value is None else value), (0.0 if error is None else error)
    sure = max(SURE * error, LEAST)
    verdict = OK if value > sure else WARNING if value > max(error, LEAST) else BAD
    return Finding(question, verdict, value, f"above {sure:.2g}", advice)


def noise_bins(losses: dict[str, tuple[float, float]]) -> list[Finding]:
    """Squared errors by timestep, each beside that of knowing nothing; and how well the easiest is done."""
    advice = "it does no better than one that knows nothing: train longer, or lower lr"
    found = [
        at_most(f"loss at timesteps {name}", loss, nothing, MORE_THAN_NOTHING * nothing, advice)
        for name, (loss, nothing) in losses.items()
    ]
    if losses:
        best = min(loss / max(nothing, 1e-12) for loss, nothing in losses.values())
        advice = "where noise is easiest to tell it must be far below: is what is noised among the inputs?"
        found.append(at_most("least of them, of what knowing nothing costs", best, LEARNED, STARTED, advice))
    return found


def dropped(question: str, share: object) -> Finding:
    """The share of captions, or of z_i, that training made null."""
    value = float(share) if isinstance(share, (int, float)) else 0.0
    advice = "no null was trained, so draw without guidance, or train with 0.1"
    verdict = WARNING if value == 0 else BAD if value >= 1 else OK
    return Finding(question, verdict, value, "above 0 and below 1", advice if value < 1 else "nothing but nulls")


def same_inputs(wanted: dict[str, str], found: dict[str, str]) -> Finding:
    """Whether the inputs, by SHA-256, are those that history tells of."""
    other = [name for name, digest in found.items() if wanted.get(name) != digest]
    names = " and ".join(other)
    advice = f"{names} differ: what is said here is of data that it was not trained with, so of nothing held out"
    return Finding("inputs that are not those of training", WARNING if other else OK, float(len(other)), "0", advice)
