"""Networks whose features images are compared by: a CLIP, the Inception-v3 of FID, or an ONNX file.

Shapes: B batch, S side in pixels, D features, K classes; pixels are in [0, 1].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.feature_batch import FeatureBatch, Features, Floats
from dalle_cli.hub import bundles
from dalle_cli.models.inception import WIDTHS, InceptionV3
from dalle_cli.pipelines.clip import ClipScorer

# SHA-256 of pt_inception-2015-12-05-6726825d.pth, the network of published FID, KID and Inception scores.
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CHECKPOINTS = (".pth", ".pt")


def check_enough(features: Features, **counts: int) -> None:
    """Raises: DalleError if a set has too few images for a covariance of the features."""
    check_at_least(features.width + 1, f"the covariance of {features.width} features of {features.name}", **counts)


def check_at_least(fewest: int, reason: str, **counts: int) -> None:
    """Raises: DalleError if a set has fewer than `fewest` images."""
    for name, count in counts.items():
        if count < fewest:
            raise DalleError(
                f"expected at least {fewest} images in each set for {reason}, found {count} {name}; "
                "give more, features of fewer dimensions, or leave it out with --scores"
            )


def title(features: Features, published: str = "FID", other: str = "Frechet distance") -> str:
    """The name of a metric: the published one only for the features of the published network."""
    official = features.digest == PUBLISHED and features.width == WIDTHS[-1]
    return published if official else f"{other} ({features.name})"


class ClipFeatures:
    """Embeddings of a CLIP, not normalized."""

    classes = 0

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.scorer, self.weights, self.digest = ClipScorer(weights, machine), weights, weights.digest
        self.width, self.name = self.scorer.width, f"clip-{weights.digest[:8]}"

    def __call__(self, images: Tensor) -> FeatureBatch:
        """(B, 3, S, S) in [0, 1] -> (B, D)."""
        return FeatureBatch(self.scorer.image_features(images).cpu().numpy(), None)

    def captions(self, texts: Sequence[str]) -> Floats:
        """Embeddings of N captions: (N, D).

        Raises:
            DalleError: the tokenizer is not beside the weights.
        """
        return np.asarray(self.scorer.text_features(texts).cpu().numpy())


class InceptionFeatures:
    """Inception-v3; its name has a digest unless the file is the published one."""

    def __init__(self, path: Path, width: int, machine: Arithmetic):
        self.machine, self.digest, self.width = machine, digest_file(path), width
        self.classes = 0 if width < WIDTHS[-1] else 1008
        known = "" if self.digest == PUBLISHED else f"-{self.digest[:8]}"
        self.name = f"inception-v3{known}" + (f":{width}" if width < WIDTHS[-1] else "")
        self.network = InceptionV3(width)
        _load_state(self.network, path)
        self.network.to(machine.device).fuse()

    def __call__(self, images: Tensor) -> FeatureBatch:
        """(B, 3, S, S) in [0, 1] -> (B, D), (B, 1008)."""
        with torch.inference_mode():
            with self.machine.autocast():
                features = self.network(images)
            logits = self.network.logits(features).cpu().numpy() if self.classes else None
            return FeatureBatch(features.cpu().numpy(), logits)


def _load_state(network: InceptionV3, path: Path) -> None:
    """Raises: DalleError if the file holds other tensors; counts of batches, used in training only, may be missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix in CHECKPOINTS:  # only tensors are unpickled: no code in the file runs
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(str(path))
        missing, unexpected = network.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if not unexpected and not missing:
            return
        found = f"{unexpected[0]}, which is unknown," if unexpected else f"no {missing[0]}"
    except (OSError, RuntimeError, ValueError, EOFError, TypeError, SafetensorError) as error:
        found = (str(error).splitlines() or [type(error).__name__])[-1].strip()
    except Exception as error:  # pickle's own errors, without an import of it
        if type(error).__name__ != "UnpicklingError":
            raise
        found = "a pickle of something else than tensors"
    raise DalleError(f"expected the Inception-v3 of pytorch-fid, found {found} in {path}; give its checkpoint")


def load_features(spec: str | None, model: str | None, machine: Arithmetic) -> Features:
    """The network of `--features FILE[:OUTPUT]`; without it, the CLIP of `-m`.

    FILE is a CLIP, a bundle with one, a checkpoint of Inception-v3 (.pth or safetensors; OUTPUT is a width: 64, 192,
    768 or 2048), or an .onnx (OUTPUT is the name of its features, and after a comma of its class logits). The last two
    may be in a hub repository: hf://OWNER/REPO/FILE[@REVISION].

    Raises:
        DalleError: no such file, or one of something else.
    """
    if spec is None:
        return ClipFeatures(bundles.weights(model, "weights.clip"), machine)
    name, output = _split(spec)
    try:
        path = _download(name) if name.startswith("hf://") and name.count("/") > 3 else bundles.locate(name)
    except DalleError as error:
        raise DalleError(str(error).replace("check -m", "check --features")) from None
    if path.suffix == ".onnx":
        from dalle_cli.evaluation.onnx import OnnxFeatures

        return OnnxFeatures(path, output, machine)
    if path.is_file() and (path.suffix in CHECKPOINTS or _is_plain(path)):
        if output not in ("", *(known := list(map(str, WIDTHS)))):
            raise DalleError(f"expected a width of {', '.join(known)} after the colon, found {output}; choose one")
        return InceptionFeatures(path, int(output or WIDTHS[-1]), machine)
    if output:
        raise DalleError(f"expected a CLIP without an output's name, found {spec}; leave out :{output}")
    clip = bundles.weights(name, "weights.clip") if path.is_dir() else open_artifact(path, "weights.clip")
    return ClipFeatures(clip, machine)


def _split(spec: str) -> tuple[str, str]:
    """FILE:OUTPUT -> both; the name of a file may have a colon, too."""
    head, colon, tail = spec.rpartition(":")
    known = (".onnx", ".safetensors", *CHECKPOINTS)
    return (head, tail) if colon and head.endswith(known) and not Path(spec).exists() else (spec, "")


def _is_plain(path: Path) -> bool:
    """Whether this is a safetensors file but no artifact, such as converted weights of Inception-v3."""
    try:
        read_header(path)
    except DalleError as error:
        return "plain safetensors" in str(error)
    return False


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, repo, file = name.removeprefix("hf://").split("/", 2)
    file, _, revision = file.partition("@")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DalleError(f"expected {file} in the hub repository {owner}/{repo}, found {reason}; check both") from None
