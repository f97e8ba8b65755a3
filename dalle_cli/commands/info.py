"""`dalle info`: reads headers only, without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dalle_cli.options import Json

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact

EXAMPLE = "dalle info prior.safetensors --history"


def run(
    path: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="A file, a folder of shards, or a bundle: folder or name."),
    ],
    as_json: Json = False,
    history: Annotated[bool, typer.Option("--history", help="Only the stages that led here, oldest first.")] = False,
) -> None:
    """Say what an artifact is and how it was made; of a bundle, each of its weights."""
    from dalle_cli import console
    from dalle_cli.artifacts import open_artifact

    artifacts = [open_artifact(file) for file in _files(path)]
    if as_json:
        told = [{"history": a.history} if history else _describe(a) for a in artifacts]
        names = [a.path.name for a in artifacts]
        console.emit_json(told[0] if len(told) == 1 else dict(zip(names, told, strict=True)))
    else:
        console.emit("\n\n".join(_stages(a, len(artifacts)) if history else _text(_describe(a)) for a in artifacts))


def _files(path: Path) -> list[Path]:
    """What is to be described: the path itself, or the weights of the bundle that it is or names."""
    from dalle_cli.artifacts.container import SHARDS

    if not path.exists():
        from dalle_cli.hub.bundles import SHIPPED

        path = SHIPPED / path if (SHIPPED / path).is_dir() else path
    bundle = path.is_dir() and not any(path.glob(SHARDS))
    return (sorted(path.glob("*.safetensors")) if bundle else []) or [path]


def _stages(artifact: "Artifact", among: int) -> str:
    lines = [_stage(entry) for entry in artifact.history] or ["no history"]
    return "\n".join([f"{artifact.path}:"] * (among > 1) + lines)


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
    if not artifact.kind.startswith("weights."):
        return None
    return artifact.headers[0].n_parameters


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
