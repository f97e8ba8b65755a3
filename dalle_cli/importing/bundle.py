"""Write a publication as a bundle: check the whole plan against the files' headers, then stream tensor by tensor."""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dalle_cli.artifacts import digest_bytes, history, open_artifact
from dalle_cli.artifacts.weights import stream_tensors
from dalle_cli.errors import DalleError
from dalle_cli.hub import card
from dalle_cli.hub.transfer import BUNDLE_FILE
from dalle_cli.importing.publication import From, Part, Publication, Shape, TensorFile
from dalle_cli.importing.source import OpenedSource
from dalle_cli.sampling.defaults import check_sampling_defaults

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LICENSE = re.compile(r"(LICENSE|NOTICE)(\.md|\.txt)?")
Stored = tuple[torch.dtype, Shape]


class ByteProgress(Protocol):
    """`console.progress`, or nothing: called with what is done, how much there is, and the unit."""

    def __call__(self, label: str, total: int, done: int = 0, unit: str = "") -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class PartPlan:
    """A weights file to be, checked: where each of its tensors comes from, and its dtype and shape."""

    source: OpenedSource
    publication: Publication
    part: Part
    names: Mapping[str, tuple[TensorFile, str]]  # names that `origins` use -> the file and its own name
    origins: Mapping[str, From]
    entries: Mapping[str, Stored]

    @property
    def n_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(dtype.itemsize * _numel(shape) for dtype, shape in self.entries.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, made of the source's."""
        for file in {id(file): file for file, _ in self.names.values()}.values():
            file.release()
        origin = self.origins[name]
        return _built(self, name, [file.read(own) for file, own in map(self.names.__getitem__, origin.names)])


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _built(plan: PartPlan, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    origin = plan.origins[name]
    try:
        with torch.no_grad():
            return origin.build(*tensors)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        reason = " ".join(str(error).split())[:80]
        raise DalleError(
            f"expected tensors that make {name} of {plan.part.file}, found {origin.names[:3]} of {shapes} "
            f"({reason}); the files are of something else"
        ) from None


def plan_part(source: OpenedSource, publication: Publication, part: Part, dtype: str | None) -> PartPlan:
    """Check that every tensor of the model is made exactly once, of the right shape, and no source tensor is over.

    Raises:
        DalleError: a tensor is missing, unexpected, or of another shape.
    """
    names = _source_names(source, part)
    shapes = {name: file.shapes[own] for name, (file, own) in names.items()}
    with understood(f"the tensors of {publication.name}", source):
        origins = part.tensors(shapes)
        with torch.device("meta"):
            model = {name: tuple(tensor.shape) for name, tensor in part.model(part.sizes).state_dict().items()}
    where = f"{', '.join(part.sources)} of {source.name}"
    for name in sorted(model.keys() ^ origins.keys()):
        due = "no such tensor" if name in origins else f"tensors for {name} of {part.file}"
        found = f"one for {name}" if name in origins else "none"
        raise DalleError(f"expected {due}, found {found} in {where}; the files are of something else")
    used = {own for origin in origins.values() for own in origin.names}
    if missing := sorted(used - names.keys()):
        raise DalleError(f"expected the tensor {missing[0][:80]!r}, found none in {where}; fetch it again")
    over = [name for name in shapes if name not in used and not any(re.fullmatch(p, name) for p in part.ignored)]
    if over:
        more = f" and {len(over) - 1} more" if over[1:] else ""
        found = f"{over[0][:80]!r}{more} in {where}; the files are of something else"
        raise DalleError(f"expected only tensors of {publication.name}, found {found}")
    plan = PartPlan(source, publication, part, names, origins, {})
    entries = {name: _entry(plan, name, shape, dtype) for name, shape in sorted(model.items())}
    return dataclasses.replace(plan, entries=entries)


@contextmanager
def understood(what: str, source: OpenedSource) -> Iterator[None]:
    """What goes wrong while an importer reads names, shapes and JSON, as one line: the files are not what it knows."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise DalleError(f"expected {what}, found others in {source.name} ({reason}); give other files") from None


def _source_names(source: OpenedSource, part: Part) -> dict[str, tuple[TensorFile, str]]:
    """The names that the part's map sees, each with its file and its own name there."""
    files = {name: source.tensors(name) for name in part.sources}
    plain = len({own for file in files.values() for own in file.shapes}) == sum(len(f.shapes) for f in files.values())
    return {(own if plain else f"{name}:{own}"): (file, own) for name, file in files.items() for own in file.shapes}


def _entry(plan: PartPlan, name: str, shape: Shape, dtype: str | None) -> Stored:
    """The dtype and the shape of a tensor, by making it on the meta device; by reading it where that cannot be."""
    places = [plan.names[own] for own in plan.origins[name].names]
    try:
        with torch.no_grad(), torch.device("meta"):
            metas = [torch.empty(file.shapes[own], dtype=file.dtype(own), device="meta") for file, own in places]
            made = plan.origins[name].build(*metas)
    except Exception:  # whatever a map does that only works on numbers
        made = plan.read(name)
    if tuple(made.shape) != shape:
        origin = ", ".join(f"{own} of {list(file.shapes[own])}" for file, own in places[:3])
        raise DalleError(
            f"expected {list(shape)} for {name} of {plan.part.file}, found {list(made.shape)} from {origin}; "
            f"the files are not those of {plan.publication.name}"
        )
    return _stored_dtype(made, dtype), shape


def _stored_dtype(tensor: torch.Tensor, dtype: str | None) -> torch.dtype:
    """`dtype` for numbers with a point; but vectors (norms, biases, statistics) are never rounded to fewer digits."""
    wanted = DTYPES[dtype] if dtype and tensor.is_floating_point() else tensor.dtype
    narrower = wanted.itemsize < tensor.dtype.itemsize or (tensor.dtype, wanted) == (torch.float16, torch.bfloat16)
    return tensor.dtype if tensor.ndim < 2 and narrower else wanted


def write(
    publications: Sequence[tuple[OpenedSource, Publication]],
    folder: Path,
    dtype: str | None,
    progress: ByteProgress,
) -> None:
    """Write publications, the main one last, as one bundle into a new folder.

    `dtype` is that of matrices, None as they are stored.

    Raises:
        DalleError: a tensor is missing, unexpected or of another shape, before anything is written; the disk is full.
    """
    plans = [plan_part(source, made, part, dtype) for source, made in publications for part in made.parts]
    plans.sort(key=lambda plan: bool(plan.part.encoder))  # encoders first: others name their digests
    texts = {name: text for _, made in publications for name, text in made.texts.items()}
    for source, _ in publications:
        texts |= {name: source.data(name) for name in source.files if LICENSE.fullmatch(name) and name not in texts}
    n_bytes = sum(plan.n_bytes for plan in plans)
    if (free := shutil.disk_usage(folder.parent).free) < n_bytes:
        raise DalleError(f"expected {n_bytes:,} bytes of free disk for the bundle, found {free:,}; make room")
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    digests = {name: digest_bytes(text) for name, text in texts.items()}
    with progress("import", n_bytes, unit="bytes") as advance:
        for plan in plans:
            digests[plan.part.file] = _write_part(plan, folder, dtype, digests, advance)
    main = publications[-1][1]
    artifacts = [open_artifact(folder / plan.part.file) for plan in plans]
    for artifact in artifacts:
        artifact.digest = digests[artifact.path.name]  # just computed
    page = card.write(_card(publications), main.name, artifacts, None, main.license)
    (folder / card.CARD).write_text(page, encoding="utf-8")


def _write_part(plan: PartPlan, folder: Path, dtype: str | None, digests: Mapping[str, str], advance: Any) -> str:
    part, source = plan.part, plan.source
    files = {name: source.digest(name) for name in part.sources}
    repository, revision = source.origin(part.sources[0])
    config: dict[str, Any] = {"model": dataclasses.asdict(part.sizes), **part.header}
    if part.sampling:
        config["sampling"] = check_sampling_defaults(part.kind, dict(part.sampling), part.file)
    config |= {key: digests[name] for key in ("tokenizer", "encoder") if (name := getattr(part, key))}
    config["source"] = {"name": plan.publication.name, "license": plan.publication.license, "files": files}
    config["source"] |= {"repository": repository, "revision": revision} if repository else {}
    made = history("import", {"name": plan.publication.name, "dtype": dtype or "as stored"}, **files)
    return stream_tensors(folder / part.file, part.kind, plan.entries, plan.read, config, made, advance)


def _card(publications: Sequence[tuple[OpenedSource, Publication]]) -> str:
    """The model card's head and text, before the table of files."""
    main = publications[-1][1]
    lines = [f"---\nlicense: {main.license}\n---\n\n# {main.name}\n"]
    for source, made in reversed(publications):
        origins = sorted({source.origin(name) for part in made.parts for name in part.sources} - {("", "")})
        places = ", ".join(f"hf://{name} at {revision}" for name, revision in origins) or "local files"
        about = f"{made.paper}\n\n" if made.paper else ""
        lines.append(
            f"{about}{made.name}, imported from {places}. License: {made.license}. {made.terms}".rstrip() + "\n"
        )
    return "\n".join(lines)


def check_free(out: Path, force: bool) -> None:
    """Check that a bundle may be written to `out`.

    Raises:
        DalleError: there is a file, a folder of other files, or a bundle that is not to be replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DalleError(f"expected a folder to write to, found a file: {out}; choose another -o")
    present = sorted(path.name for path in out.iterdir())
    if other := [name for name in present if not BUNDLE_FILE.fullmatch(name)]:
        raise DalleError(f"expected an empty folder to write to, found {other[0]} in {out}; choose another -o")
    if present and not force:
        raise DalleError(f"expected an empty folder, found {present[0]} in {out}; choose another -o or give --force")


@contextmanager
def temporary(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, removed at the end; what a killed import has left there is swept.

    Raises:
        DalleError: another process is writing the same bundle, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout  # huggingface-hub's

    folder = out.absolute().with_name(f".{out.name}.import")
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DalleError(f"expected to write {out}, found another import that writes it; wait for that one") from None
    except OSError as error:
        raise DalleError(f"expected to write {out}, found {error.strerror}; choose another -o") from None
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.errno is None:
            raise
        raise DalleError(f"expected to write {out}, found {error.strerror}; nothing was changed") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def replace(folder: Path, out: Path) -> None:
    """Rename the finished folder to `out`, in the place of what was checked to be an older bundle."""
    old = folder.with_name("replaced")
    try:
        if out.exists():
            os.replace(out, old)
        os.replace(folder, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
