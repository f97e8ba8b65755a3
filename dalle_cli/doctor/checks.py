"""What a check finds: its name, the measured value, the expected range, and what to do about it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

OK, WARNING, BAD = "ok", "warning", "bad"
VERDICTS = (OK, WARNING, BAD)  # from good to bad
STANDARD_ERRORS = 2.0  # by which a gain must exceed 0
ROUNDING = 1e-6  # no gain is credited below this
SCALE_GOOD, SCALE_FAIR = 1.25, 2.0  # factors by which a standard deviation may miss 1


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    question: str
    verdict: str
    value: float
    expected: str
    advice: str

    def line(self, width: int) -> str:
        """One line of text, the question padded to `width`; advice only where the verdict is not ok."""
        line = f"{self.verdict:<7}  {self.question:<{width}}  {self.value:>9.4g}  expected {self.expected}"
        return line if self.verdict == OK else f"{line}; {self.advice}"


def text(findings: Sequence[Finding]) -> str:
    """One line for each finding, then the number of each verdict."""
    width = max(len(finding.question) for finding in findings)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in VERDICTS}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    return "\n".join([*(finding.line(width) for finding in findings), summary])


def rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings for JSON, which has no infinity and no NaN: such a value is None."""
    return [{**asdict(f), "value": f.value if math.isfinite(f.value) else None} for f in findings]


def worst(findings: Sequence[Finding]) -> str:
    """The worst verdict among the findings."""
    return max((finding.verdict for finding in findings), key=VERDICTS.index)


def at_least(question: str, value: float, good: float, fair: float, advice: str) -> Finding:
    """Ok from `good` on, bad below `fair`; NaN is bad."""
    verdict = OK if value >= good else WARNING if value >= fair else BAD
    return Finding(question, verdict, value, f"at least {good:.4g}", advice)


def at_most(question: str, value: float, good: float, fair: float, advice: str) -> Finding:
    """Ok up to `good`, bad above `fair`; NaN is bad."""
    verdict = OK if value <= good else WARNING if value <= fair else BAD
    return Finding(question, verdict, value, f"at most {good:.4g}", advice)


def near_one(question: str, value: float, advice: str) -> Finding:
    """A scale that should be 1."""
    factor = max(value, 1 / value) if value > 0 else math.inf
    verdict = OK if factor <= SCALE_GOOD else WARNING if factor <= SCALE_FAIR else BAD
    return Finding(question, verdict, value, f"1, within {1 / SCALE_GOOD:.4g} to {SCALE_GOOD:.4g}", advice)


def gain(question: str, differences: Tensor, advice: str) -> Finding:
    """Whether the mean of differences (G,) exceeds 0 by two standard errors; it is bad below one."""
    value, n = float(differences.mean()), len(differences)
    error = float(differences.std()) / math.sqrt(n) if n > 1 else 0.0
    sure = max(STANDARD_ERRORS * error, ROUNDING)
    verdict = OK if value > sure else WARNING if value > max(error, ROUNDING) else BAD
    return Finding(question, verdict, value, f"above {sure:.2g}", advice)


def dropout(what: str, share: float) -> Finding:
    """The share of captions, or of z_i, that training replaced by the null."""
    advice = "training saw nothing but nulls" if share >= 1 else "sample without guidance, or train with 0.1"
    verdict = WARNING if share == 0 else BAD if share >= 1 else OK
    return Finding(f"share of {what} dropped in training", verdict, share, "above 0 and below 1", advice)


def temperature(scale: float, limit: float = 100.0) -> Finding:
    """The learned factor of a CLIP's similarities, which training clips at `limit`."""
    verdict = OK if 1 < scale < 0.999 * limit else WARNING if scale > 0 else BAD
    advice = "it is at its limit: use more data, or train less, unless the model is large"
    if scale <= 1:
        advice = "it has fallen, as it does where images and captions do not belong together: check the pairs"
    return Finding("inverse temperature", verdict, scale, f"above 1 and below {limit:g}", advice)


def same_inputs(trained_on: dict[str, str], found: dict[str, str]) -> Finding:
    """Whether the inputs, by SHA-256, are those that the weights' history names."""
    other = [name for name, digest in found.items() if trained_on.get(name) != digest]
    advice = f"{' and '.join(other)} differ: the model was not trained on this data, so none of it is held out"
    return Finding("inputs that are not those of training", WARNING if other else OK, float(len(other)), "0", advice)
