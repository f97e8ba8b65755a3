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
INPUTS = {
    "images": "IMAGES --reference DATASET", "weights.dvae": "DVAE --reference DATASET",
    "weights.prior.codes": "PRIOR CAPTIONS CODES",
}  # fmt: skip
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
    fits = len(inputs) == 3 if kind == "weights.prior.codes" else len(inputs) == 1 and options.reference is not None
    if not fits:
        found = f"{', '.join(inputs)}{'' if options.reference else ' and no --reference'}"
        raise DalleError(f"expected the inputs of an evaluation, found {found}; give {INPUTS[kind]}")
    if weights is None:
        metrics = evaluate_images(inputs[0], target, options, machine, force)
    elif weights.kind == "weights.dvae":
        images, digest = open_images(str(options.reference))
        metrics = {"inputs": {"model": weights.digest, "reference": digest}}
        metrics["scores"] = evaluate_dvae(weights, images, digest, target, options, machine, force)
    else:
        captions, codes = open_artifact(Path(inputs[1]), "captions"), open_artifact(Path(inputs[2]), "codes")
        metrics = {"inputs": {"model": weights.digest, "captions": captions.digest, "codes": codes.digest}}
        metrics["scores"] = evaluate_prior(weights, captions, codes, options, machine, force)
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


def as_text(metrics: dict[str, Any]) -> str:
    """Sorted JSON: equal metrics are equal bytes. Raises: DalleError if a metric is no number."""
    try:
        return json.dumps(metrics, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise DalleError(
            "expected scores that are numbers, found NaN or infinity; give --dtype float32, or other weights"
        ) from None
