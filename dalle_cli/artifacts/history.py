"""The history of an artifact: the stages that led to it, oldest first. No paths and no times: same work, same bytes."""

from collections.abc import Mapping
from typing import Any

from dalle_cli.artifacts.artifact import Artifact


def history(stage: str, options: Mapping[str, Any], **inputs: Artifact | str) -> list[dict[str, Any]]:
    """The histories of the inputs, each stage once, then this stage with its options and its inputs' SHA-256.

    Give an input that is not an artifact (a data set, a tokenizer) by its digest.
    """
    merged: list[dict[str, Any]] = []
    for source in inputs.values():
        if isinstance(source, Artifact):
            merged += [entry for entry in source.history if entry not in merged]
    digests = {name: source.digest if isinstance(source, Artifact) else source for name, source in inputs.items()}
    return [*merged, {"stage": stage, "options": dict(options), "inputs": digests}]
