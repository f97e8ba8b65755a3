"""`dalle evaluate`: chooses the evaluation by the kind of its input, and writes the metrics as JSON."""

import json
from pathlib import Path
from typing import Any

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.text import check_overwrite, read_json_key, write_text
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.dvae import evaluate_dvae
from dalle_cli.evaluation.image_sets import open_images
from dalle_cli.evaluation.images import evaluate_images
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.evaluation.prior import evaluate_prior
from dalle_cli.paths import named_after

KINDS = "images, a data set, weights.dvae or weights.prior.codes"
TAKEN = {  # what each kind is called, and the special options that it takes
    "images": ("images", "reference", "features", "blur", "scores", "candidates", "size", "plot"),
    "weights.dvae": ("a dVAE", "reference", "features", "grid"),
    "weights.prior.codes": ("a prior", "plot", "everything"),
}


def evaluate(
    inputs: list[str], out: Path | None, options: EvaluateOptions, machine: Arithmetic, force: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Evaluate images, a dVAE, or a prior with its captions and codes; the JSON that was written, and what it says.

    Raises:
        DalleError: inputs or options that do not fit, something else at `out`, or a metric that is no number.
    """
    weights = _open_weights(inputs[0])
    kind = "images" if weights is None else weights.kind
    options.check_for(*TAKEN[kind])
    target = out or named_after(inputs[0], ".scores.json")
    check_overwrite(target, "scores", lambda path: read_json_key(path, "stage") == "evaluate", force)
    if weights is None:
        if len(inputs) > 1:
            raise DalleError(f"expected images alone, found {inputs[1]} after them; real images go to --reference")
        metrics = evaluate_images(inputs[0], target, options, machine, force)
    elif weights.kind == "weights.dvae":
        metrics = _dvae(weights, inputs, target, options, machine, force)
    else:
        metrics = _prior(weights, inputs, options, machine, force)
    if options.exclude is not None:
        metrics["inputs"]["exclude"] = digest_file(options.exclude)
    metrics = {"stage": "evaluate", "kind": kind, **metrics}
    write_text(target, as_text(metrics))
    return target, metrics


def _open_weights(first: str) -> Artifact | None:
    """The weights to evaluate; None if the first input are images. Raises: DalleError for another artifact."""
    path = Path(first)
    if path.suffix != ".safetensors":
        return None
    found = open_artifact(path)
    if found.kind not in TAKEN:
        raise DalleError(f"expected {KINDS}, found {found.kind}: {path}; give one of those")
    return None if found.kind == "images" else found


def _dvae(
    weights: Artifact, inputs: list[str], out: Path, options: EvaluateOptions, machine: Arithmetic, force: bool
) -> dict[str, Any]:
    if len(inputs) > 1 or options.reference is None:
        found = f"{inputs[1]} after it" if len(inputs) > 1 else "none"
        raise DalleError(f"expected images for a dVAE to reconstruct, found {found}; give --reference DATASET")
    images, digest = open_images(options.reference)
    metrics = evaluate_dvae(weights, images, digest, out, options, machine, force)
    return {"inputs": {"model": weights.digest, "reference": digest}, "scores": metrics}


def _prior(
    weights: Artifact, inputs: list[str], options: EvaluateOptions, machine: Arithmetic, force: bool
) -> dict[str, Any]:
    if len(inputs) != 3:
        raise DalleError(f"expected a prior, captions and codes, found {', '.join(inputs)}; give PRIOR CAPTIONS CODES")
    captions, codes = open_artifact(Path(inputs[1]), "captions"), open_artifact(Path(inputs[2]), "codes")
    metrics = evaluate_prior(weights, captions, codes, options, machine, force)
    digests = {"model": weights.digest, "captions": captions.digest, "codes": codes.digest}
    return {"inputs": digests, "scores": metrics}


def as_text(metrics: dict[str, Any]) -> str:
    """Sorted JSON: equal metrics are equal bytes. Raises: DalleError if a metric is no number."""
    try:
        return json.dumps(metrics, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise DalleError(
            "expected scores that are numbers, found NaN or infinity; give --dtype float32, or other weights"
        ) from None
