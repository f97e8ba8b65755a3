"""`dalle info`: reads headers only, without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import Json

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact

EXAMPLE = "dalle info prior.safetensors --history"


def run(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A file or a folder of shards.")],
    as_json: Json = False,
    history: Annotated[bool, typer.Option("--history", help="Only the stages that led here, oldest first.")] = False,
) -> None:
    """Say what an artifact is and how it was made."""
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact

    artifact = open_artifact(path)
    if history and as_json:
        console.emit_json({"history": artifact.history})
    elif history:
        console.emit("\n".join(_stage(entry) for entry in artifact.history) or "no history")
    elif as_json:
        console.emit_json(_describe(artifact))
    else:
        console.emit(_text(_describe(artifact)))


def _describe(artifact: "Artifact") -> dict[str, Any]:
    tensors = {
        name: {"dtype": info.dtype, "shape": [sum(h.tensors[name].shape[0] for h in artifact.headers), *info.shape[1:]]}
        if info.shape and artifact.headers[0].table.rows and not name.endswith(".offsets")
        else {"dtype": info.dtype, "shape": list(info.shape)}
        for name, info in artifact.headers[0].tensors.items()
    }
    return {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "about": artifact.headers[0].table.about,
        "version": artifact.headers[0].version,
        "rows": len(artifact) if artifact.headers[0].table.rows else None,
        "shards": len(artifact.headers),
        "bytes": sum(header.path.stat().st_size for header in artifact.headers),
        "parameters": _parameters(artifact),
        "config": artifact.config,
        "tensors": tensors,
        "history": artifact.history,
    }


def _parameters(artifact: "Artifact") -> int | None:
    import math

    if not artifact.kind.startswith("weights."):
        return None
    return sum(math.prod(info.shape) for info in artifact.headers[0].tensors.values())


def _text(about: dict[str, Any]) -> str:
    lines = [f"{about['path']}: {about['about']} ({about['kind']}, version {about['version']})"]
    if about["rows"] is not None:
        shards = f" in {about['shards']} shards" if about["shards"] > 1 else ""
        lines.append(f"  {about['rows']:,} rows{shards}, {about['bytes']:,} bytes")
    else:
        count = f"{about['parameters']:,} parameters, " if about["parameters"] is not None else ""
        lines.append(f"  {count}{about['bytes']:,} bytes")
    lines += [f"  {key} = {_short(value)}" for key, value in _flat(about["config"])]
    tensors = about["tensors"]
    shown = list(tensors.items())[:12]
    lines += [f"  {name}: {t['dtype']} {'x'.join(map(str, t['shape'])) or 'scalar'}" for name, t in shown]
    if len(tensors) > len(shown):
        lines.append(f"  ... and {len(tensors) - len(shown)} tensors more (--json names them all)")
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
