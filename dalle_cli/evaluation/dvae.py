"""A dVAE's reconstructions of images: what `dalle evaluate DVAE --reference DATASET` computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_cli import console
from dalle_cli.artifacts import Artifact
from dalle_cli.data.exclude import read_exclude_list
from dalle_cli.data.loader import ImageSource, sequential
from dalle_cli.data.order import held_out
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.features import check_enough, load_features
from dalle_cli.evaluation.heldout import other_split, validation_share
from dalle_cli.evaluation.image_sets import spread
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.evaluation.reconstruction import ReconstructionDistance, Reconstructions
from dalle_cli.paths import skip_list
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.output import check_png, write_grid

WORST = 16  # images on the grid of reconstructions


def evaluate_dvae(
    weights: Artifact, images: ImageSource, digest: str, out: Path, options: EvaluateOptions, machine: Arithmetic,
    force: bool = False,
) -> dict[str, object]:  # fmt: skip
    """How well a dVAE reconstructs center-cropped images, and what its codes cost.

    Images that cannot be read are listed beside `out`. If `digest` is that of the data set of the dVAE's training,
    the images that training held out are evaluated separately, too. `options.features` adds a Frechet distance.

    Raises:
        DalleError: no image can be read, too few for the features, or no PNG lies where the grid goes.
    """
    if options.grid is not None:
        check_png(options.grid, force)
    codec, skips = Codec(weights, machine), skip_list(out.with_name(out.name.removesuffix(".json")))
    excluded = read_exclude_list(options.exclude, images.ids)
    left = np.array([row for row, name in enumerate(images.ids) if name not in excluded], np.int64)
    rows = left[spread(len(left), options.limit)].tolist()
    found = Reconstructions(codec.n_vocab, WORST if options.grid is not None else 0)
    distance = None
    if options.features:
        features = load_features(options.features, None, machine)
        check_enough(features, given=len(rows))
        distance = ReconstructionDistance(features)
    batches = sequential(images, codec.size, rows, options.batch_size, options.workers)
    _reconstruct(codec, batches, len(rows), found, distance)
    out.parent.mkdir(parents=True, exist_ok=True)
    images.skipped.write(skips)
    if not found.rows:
        raise DalleError(f"expected images that can be read, found none of {len(rows):,}; see {skips}")
    metrics = {**found.image_metrics(), "skipped": len(rows) - len(found.rows), **found.code_metrics()}
    metrics |= {"exclude": len(excluded)} if options.exclude is not None else {}
    metrics |= {"frechet": distance.metrics()} if distance is not None else {}
    if options.grid is not None:
        _write_worst(options.grid, found, images.ids, codec.size)
    return metrics | held_out_metrics(weights, digest, images.ids, excluded, found)


def _reconstruct(
    codec: Codec, batches: Any, n: int, found: Reconstructions, distance: ReconstructionDistance | None
) -> None:
    """Encode and decode n images, batch by batch."""
    device = codec.machine.device
    exact = "cpu" if device.type == "mps" else device  # MPS has no float64
    with console.progress("evaluate", n, unit="images") as advance:
        for kept, images in batches:
            codes = codec.encode(images)
            first, second = (torch.from_numpy(pixels) for pixels in (images, codec.decode(codes)))
            grids = torch.from_numpy(codes.astype("int64"))
            found.add(kept.tolist(), first.to(exact), second.to(exact), grids)
            if distance is not None:
                distance.add(first.to(device), second.to(device))
            advance(len(images))


def held_out_metrics(
    weights: Artifact, digest: str, ids: Sequence[str], excluded: frozenset[str], found: Reconstructions
) -> dict[str, object]:
    """`trained_on`: whether training used this data set; if so, also the metrics of the images that it held out."""
    if not any(entry["inputs"].get("dataset") == digest for entry in weights.history):
        return {"trained_on": False}
    if fault := other_split(weights, excluded):
        console.warn(f"{fault}; what training held out is not evaluated separately")
        return {"trained_on": True}
    share = validation_share(weights)
    kept = torch.tensor([share is not None and held_out(ids[row], share) for row in found.rows])
    return {"trained_on": True, "held_out": found.image_metrics(kept)}


def _write_worst(path: Path, found: Reconstructions, ids: Sequence[str], size: int) -> None:
    """An image grid of the worst reconstructions, worst first, each beside its original."""
    pixels: list[Any] = []
    texts: list[str] = []
    for one in found.worst:
        similarity = "" if one.ssim is None else f", SSIM {one.ssim:.2f}"
        pixels += [one.image.numpy(), one.decoded.numpy()]
        texts += [ids[one.row], f"{one.psnr:.1f} dB{similarity}"]
    columns = min(len(pixels), 8 if size <= 128 else 4)
    title = "Originals beside their reconstructions, worst first"
    write_grid(path, pixels, texts, columns=columns, title=title, force=True)
