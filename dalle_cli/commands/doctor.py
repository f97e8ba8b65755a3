"""`dalle doctor`: check a trained model for the usual failures, from its weights and its data."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.options import Device, Dtype, Exclude, Json, Limit, Seed, Workers

EXAMPLE = """dalle doctor embedding-prior.safetensors captions.safetensors embeddings/
dalle doctor decoder.safetensors photos/ embeddings/ --captions captions.safetensors
dalle doctor prior.safetensors captions.safetensors codes/ --no-overfit --json"""


def run(
    weights: Annotated[
        str, typer.Argument(metavar="RUN", help="Weights that a train-* wrote, or the .run folder or bundle of them.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="What it was trained with: of a dVAE, a CLIP or an upsampler the data set; of a prior captions and "
            "codes or embeddings; of a decoder the data set and embeddings.",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", metavar="FILE", help="What `tokenize` wrote, for a decoder that reads captions."),
    ] = None,
    no_overfit: Annotated[
        bool, typer.Option("--no-overfit", help="Do not train fresh weights of these sizes on eight rows.")
    ] = False,
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
    from dalle_cli.doctor.subject import Request

    found, machine = kinds.find_weights(weights), arithmetic(device, dtype)
    subject = kinds.open_subject(Request(found, inputs or [], captions, exclude, machine, seed, limit, workers))
    if not as_json:
        rows = f"{subject.n} rows {'held out' if subject.held_out else 'of training, as none is held out'}"
        console.note(f"{found.path.name}: {found.headers[0].table.about}, on {rows}")
    findings = tables.examine(subject)
    if not no_overfit:
        with console.progress("overfit", overfit.UPDATES, unit="updates") as advance:
            findings.append(overfit.overfit_subject(subject, advance))
    if not as_json:
        console.emit(checks.text(findings))
        return
    facts: dict[str, object] = {
        "stage": "doctor",
        "kind": found.kind,
        "inputs": {"model": found.digest, **subject.digests},
    }
    facts |= {"rows": subject.n, "held_out": subject.held_out, "verdict": checks.worst(findings)}
    console.emit_json({**facts, "findings": checks.rows(findings)})
