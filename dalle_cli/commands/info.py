"""`dalle info`: it reads headers only, without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import Json

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact

EXAMPLE = "dalle info prior.safetensors --history"


def run(
    path: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A file, a folder of shards, or a bundle: folder or name.")
    ],
    as_json: Json = False,
    history: Annotated[bool, typer.Option("--history", help="Only the stages that led here, oldest first.")] = False,
) -> None:
    """Describe an artifact and how it was made; of a bundle, each of its weights."""
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact

    artifacts = [open_artifact(file) for file in _files(path)]
    if as_json:
        found = {a.path.name: {"history": a.history} if history else _describe(a) for a in artifacts}
        console.emit_json(found if len(artifacts) > 1 else next(iter(found.values())))
    else:
        console.emit("\n\n".join(_stages(a, len(artifacts)) if history else _text(_describe(a)) for a in artifacts))


def _files(path: Path) -> list[Path]:
    """The path itself, or the weights of the bundle at the path or of that name."""
    from dalle_cli.artifacts.container import SHARDS

    if not path.exists():
        from dalle_cli.hub.bundles import SHIPPED

        path = SHIPPED / path if (SHIPPED / path).is_dir() else path
    bundle = path.is_dir() and not any(path.glob(SHARDS))
    return (sorted(path.glob("*.safetensors")) if bundle else []) or [path]


def _stages(artifact: "Artifact", of: int) -> str:
    lines = [_stage(entry) for entry in artifact.history] or ["no history"]
    return "\n".join([f"{artifact.path}:"] * (of > 1) + lines)


def _describe(artifact: "Artifact") -> dict[str, Any]:
    first = artifact.headers[0]
    shapes = {name: list(info.shape) for name, info in first.tensors.items()}
    for name in shapes if first.table.rows else ():
        if not name.endswith(".offsets"):
            shapes[name][0] = sum(header.tensors[name].shape[0] for header in artifact.headers)
    tensors = {name: {"dtype": info.dtype, "shape": shapes[name]} for name, info in first.tensors.items()}
    return {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "about": first.table.about,
        "version": first.version,
        "rows": len(artifact) if first.table.rows else None,
        "shards": len(artifact.headers),
        "bytes": sum(header.path.stat().st_size for header in artifact.headers),
        "parameters": first.n_parameters if artifact.kind.startswith("weights.") else None,
        "config": artifact.config,
        "tensors": tensors,
        "history": artifact.history,
    }


def _text(about: dict[str, Any]) -> str:
    shards = f" in {about['shards']} shards" if about["shards"] > 1 else ""
    counts = [f"{about['rows']:,} rows{shards}"] if about["rows"] is not None else []
    counts += [f"{about['parameters']:,} parameters"] if about["parameters"] is not None else []
    lines = [
        f"{about['path']}: {about['about']} ({about['kind']}, version {about['version']})",
        f"  {', '.join([*counts, format(about['bytes'], ',')])} bytes",
    ]
    lines += [f"  {key} = {_short(value)}" for key, value in _flat(about["config"])]
    tensors = about["tensors"]
    shown = list(tensors.items())[:12]
    lines += [f"  {name}: {t['dtype']} {'x'.join(map(str, t['shape'])) or 'scalar'}" for name, t in shown]
    if len(tensors) > len(shown):
        lines.append(f"  ... and {len(tensors) - len(shown)} more tensors (--json lists all)")
    if about["history"]:
        lines.append("  made by " + " > ".join(entry["stage"] for entry in about["history"]))
    return "\n".join(lines)


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def _stage(entry: dict[str, Any]) -> str:
    options = " ".join(f"{key}={_short(value)}" for key, value in _flat(entry.get("options", {})))
    inputs = " ".join(f"{name}:{digest[:12]}" for name, digest in entry.get("inputs", {}).items())
    return " ".join(part for part in (entry["stage"], inputs and f"<{inputs}>", options) if part)
