"""Checks of a trained model for the usual failures, by the task's own loss and validation."""

from typing import Any

from dalle_cli.doctor.checks import Finding, rows, same_inputs, text, worst
from dalle_cli.doctor.kinds import find_weights, open_subject
from dalle_cli.doctor.overfit import UPDATES, overfit_subject
from dalle_cli.doctor.subject import Request, Subject
from dalle_cli.doctor.tables import CHECKS

__all__ = ["UPDATES", "Request", "examine", "facts", "find_weights", "open_subject", "overfit_subject", "text"]


def examine(subject: Subject) -> list[Finding]:
    """All checks of the subject's kind, after that of its inputs."""
    weights = subject.request.weights
    trained_on = weights.history[-1]["inputs"] if weights.history else {}
    return [same_inputs(trained_on, subject.digests), *CHECKS[weights.kind](subject)]


def facts(subject: Subject, findings: list[Finding]) -> dict[str, Any]:
    """The findings and what they are about, for JSON."""
    weights, digests = subject.request.weights, subject.digests
    about = {"stage": "doctor", "kind": weights.kind, "inputs": {"model": weights.digest, **digests}}
    counts = {"rows": subject.n, "held_out": subject.held_out, "verdict": worst(findings)}
    return {**about, **counts, "findings": rows(findings)}
