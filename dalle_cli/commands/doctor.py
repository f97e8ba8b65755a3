"""`dalle doctor`: check a trained model for the usual failures, from its weights and its data."""

from pathlib import Path
from typing import Annotated

from dalle_cli.options import Device, Dtype, Exclude, Json, Limit, Seed, Workers, arg, opt

EXAMPLE = """dalle doctor embedding-prior.safetensors captions.safetensors embeddings/
dalle doctor decoder.safetensors photos/ embeddings/ --captions captions.safetensors
dalle doctor prior.safetensors captions.safetensors codes/ --no-overfit --json"""


Weights = Annotated[str, arg("RUN", "Weights that a train-* wrote, or the .run folder or bundle of them.")]
Inputs = Annotated[
    list[str] | None,
    arg(
        "INPUT...",
        "What it was trained with: of a dVAE, a CLIP or an upsampler the data set; of a prior captions and codes or "
        "embeddings; of a decoder the data set and embeddings.",
    ),
]
Captions = Annotated[
    Path | None, opt("FILE", "What `tokenize` wrote, for a decoder that reads captions.", "--captions")
]
NoOverfit = Annotated[bool, opt(None, "Do not train fresh weights of these sizes on eight rows.", "--no-overfit")]


def run(
    weights: Weights,
    inputs: Inputs = None,
    captions: Captions = None,
    no_overfit: NoOverfit = False,
    exclude: Exclude = None,
    limit: Limit = 64,
    seed: Seed = 0,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Check a trained model for the usual failures; the exit status is 0 whatever it finds."""
    from dalle_cli import console
    from dalle_cli.devices import arithmetic
    from dalle_cli.doctor import checks, kinds, overfit, tables
    from dalle_cli.doctor.examination import Request

    found, machine = kinds.find_weights(weights), arithmetic(device, dtype)
    examination = kinds.open_examination(Request(found, inputs or [], captions, exclude, machine, seed, limit, workers))
    if not as_json:
        rows = f"{examination.n} rows {'held out' if examination.held_out else 'of training, as none is held out'}"
        console.note(f"{found.path.name}: {found.headers[0].table.about}, on {rows}")
    findings = tables.examine(examination)
    if not no_overfit:
        with console.progress("overfit", overfit.UPDATES, unit="updates") as advance:
            findings.append(overfit.overfit_rows(examination, advance))
    if not as_json:
        console.emit(checks.text(findings))
        return
    inputs_of = {"model": found.digest, **examination.digests}
    facts: dict[str, object] = {"rows": examination.n, "held_out": examination.held_out}
    facts |= {"verdict": checks.worst(findings), "findings": checks.rows(findings)}
    console.emit_json({"stage": "doctor", "kind": found.kind, "inputs": inputs_of, **facts})
