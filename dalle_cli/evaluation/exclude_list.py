"""`dalle overlap`: finds near-duplicates and writes an exclude list, with the pairs beside it as JSON."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from dalle_cli import console
from dalle_cli.artifacts.container import replace_file
from dalle_cli.artifacts.text import check_overwrite, head_of, read_json_key, write_text
from dalle_cli.data.exclude import format_id
from dalle_cli.data.loader import sequential
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.image_sets import open_images
from dalle_cli.evaluation.overlap import THRESHOLD, Overlap, find_pairs, network_matcher, pixel_matcher
from dalle_cli.pipelines.output import check_png

HEAD = "# dalle overlap: "  # the first line of a list, by which it is recognized
FORMAT = "dalle-overlap"


def overlap(
    train: str, test: str, out: Path, machine: Arithmetic, *, of: str = "test", threshold: float | None = None,
    features: str | None = None, neighbors: int = 8, grid: Path | None = None, batch_size: int = 64, workers: int = 2,
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write the ids of the images of TEST (or TRAIN) that have a near-duplicate in the other set; returns the counts.

    Raises:
        DalleError: no images, another `of`, or something else at an output.
    """
    if of not in ("test", "train"):
        raise DalleError(f"expected --of test or train, found {of!r}; choose one")
    _check_outputs(out, grid, force)
    (seen, seen_digest), (new, new_digest) = open_images(train), open_images(test)
    if seen_digest == new_digest:
        console.warn("expected two sets of images, found the same one twice; each image is a copy of itself")
    matcher = pixel_matcher(machine.device) if features is None else network_matcher(features, new, machine)
    read = partial(sequential, size=matcher.size, batch_size=batch_size, workers=workers, augment=matcher.read)
    pairs = find_pairs(seen, new, matcher, neighbors, read)
    found = Overlap(seen, new, pairs, THRESHOLD if threshold is None else threshold)
    if crowded := found.crowded(neighbors):
        console.warn(
            f"expected fewer than {neighbors} copies in TRAIN of each image, found {neighbors} of {crowded} in TEST, "
            "which may have more; raise --neighbors"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, images in (("train", seen), ("test", new)):
        images.skipped.write(out.with_name(f"{out.stem}.{name}.skipped.jsonl"))
    if grid is not None:
        image = found.grid()
        replace_file(grid, lambda part: image.save(part, format="PNG"))
    ids, n = found.ids(of), len(new if of == "test" else seen)
    table: dict[str, Any] = {"format": FORMAT, "features": matcher.name, "train": seen_digest, "test": new_digest}
    table |= {"of": of, "threshold": found.threshold, "ids": ids, "pairs": found.listed()}
    write_text(out.with_suffix(".json"), json.dumps(table, ensure_ascii=False, indent=1) + "\n")
    head = f"{HEAD}{len(ids)} of {n} images of {of.upper()}, by {matcher.name} from {found.threshold:g} on"
    write_text(out, "".join(f"{line}\n" for line in (head, *map(format_id, ids))))
    skipped = {f"{name}_skipped": images.skipped.count or None for name, images in (("train", seen), ("test", new))}
    return {"listed": len(ids), "of": f"{n} in {of.upper()}", "pairs": len(found.duplicates), **skipped}


def _check_outputs(out: Path, grid: Path | None, force: bool) -> None:
    """Raises: DalleError if something else lies there, or the list would have the name of the pairs."""
    if out.suffix == ".json":
        raise DalleError(f"expected a list of ids such as {out.with_suffix('.txt')}, found {out}; the pairs go there")
    check_overwrite(out, "a list of ids", lambda path: head_of(path).startswith(HEAD), force)
    check_overwrite(out.with_suffix(".json"), "pairs", lambda path: read_json_key(path, "format") == FORMAT, force)
    if grid is not None:
        check_png(grid, force)
