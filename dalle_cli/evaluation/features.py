"""What pictures are compared by: a CLIP, the Inception-v3 of FID, or an ONNX file. A score carries the features' name.

Shapes: B batch, S side in pixels, D features, K classes; pixels are in [0, 1].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dalle_cli.artifacts import Artifact, digest_file, open_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle
from dalle_cli.models.inception import WIDTHS, InceptionV3
from dalle_cli.pipelines import loading as load

# SHA-256 of pt_inception-2015-12-05-6726825d.pth, whose features the FID of the literature is made of.
PUBLISHED = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CHECKPOINTS = (".pth", ".pt")

Floats = npt.NDArray[np.float32]


class Found(NamedTuple):
    """What a network makes of pictures: features (B, D), and class logits (B, K) where it knows classes."""

    features: Floats
    logits: Floats | None


class Features(Protocol):
    """A network that features come from."""

    name: str  # as scores are called by it: no path
    digest: str  # of its file
    width: int  # D
    classes: int  # K; 0 without classes

    def __call__(self, images: Tensor) -> Found:
        """(B, 3, S, S) in [0, 1] -> features."""
        ...


def title(features: Features) -> str:
    """What the Frechet distance of these features is called: FID for those of the literature alone."""
    official = features.digest == PUBLISHED and features.width == WIDTHS[-1]
    return "FID" if official else f"Frechet distance ({features.name})"


class ClipFeatures:
    """Image embeddings of a CLIP, not normalized; it embeds captions, too."""

    classes = 0

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.weights, self.machine, self.digest = weights, machine, weights.digest
        self.clip = load.clip(weights, machine.device)
        self.width, self.name = self.clip.config.n_proj, f"clip-{weights.digest[:8]}"

    def __call__(self, images: Tensor) -> Found:
        """(B, 3, S, S) in [0, 1] -> (B, D)."""
        with torch.inference_mode(), self.machine.autocast():
            return Found(self.clip.encode_image(images).float().cpu().numpy(), None)

    def captions(self, texts: Sequence[str]) -> Floats:
        """Embeddings of captions, not normalized: n -> (n, D).

        Raises:
            DalleError: the tokenizer is not beside the weights.
        """
        tokenizer = tokenizers.load(bundle.tokenizer(self.weights))
        tokens, lengths, _ = tokenizer.encode_batch(texts, self.clip.config.n_text)
        columns = (torch.from_numpy(x.astype(np.int64)).to(self.machine.device) for x in (tokens, lengths))
        with torch.inference_mode(), self.machine.autocast():
            return np.asarray(self.clip.encode_text(*columns).float().cpu().numpy())


class InceptionFeatures:
    """Inception-v3; the name is that of the literature's only where the file is."""

    def __init__(self, path: Path, width: int, machine: Arithmetic):
        self.machine, self.digest, self.width = machine, digest_file(path), width
        self.classes = 0 if width < WIDTHS[-1] else 1008
        known = "" if self.digest == PUBLISHED else f"-{self.digest[:8]}"
        self.name = f"inception-v3{known}" + (f":{width}" if width < WIDTHS[-1] else "")
        self.network = InceptionV3(width)
        _fill(self.network, _checkpoint(path), path)
        self.network.to(machine.device).fuse()

    def __call__(self, images: Tensor) -> Found:
        """(B, 3, S, S) in [0, 1] -> (B, D), (B, 1008)."""
        with torch.inference_mode():
            with self.machine.autocast():
                features = self.network(images)
            logits = self.network.logits(features).cpu().numpy() if self.classes else None
            return Found(features.cpu().numpy(), logits)


def _checkpoint(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix in CHECKPOINTS:  # tensors alone are unpickled: nothing in the file is run
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(str(path))
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise _not_inception(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    except Exception as error:  # pickle's own errors, without an import of it
        if type(error).__name__ != "UnpicklingError":
            raise
        raise _not_inception(path, "a pickle of something else than tensors") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise _not_inception(path, "something else than a table of tensors")
    return state


def _fill(network: InceptionV3, state: dict[str, Any], path: Path) -> None:
    """Raises: DalleError if names or shapes are others; counts of batches, of use in training alone, may be missing."""
    own = network.state_dict()
    counts = {name for name in own if name.endswith("num_batches_tracked")}
    for name in sorted((own.keys() ^ state.keys()) - counts):
        raise _not_inception(path, f"{name} {'missing' if name in own else 'that is unknown'}")
    for name in own.keys() - counts:
        if own[name].shape != state[name].shape:
            raise _not_inception(path, f"{name} of {list(state[name].shape)} where {list(own[name].shape)} is due")
    network.load_state_dict({name: state.get(name, own[name]) for name in own})


def _not_inception(path: Path, found: str) -> DalleError:
    return DalleError(f"expected the Inception-v3 of pytorch-fid, found {found} in {path}; give its checkpoint")


def load_features(spec: str | None, model: str | None, machine: Arithmetic) -> Features:
    """The features that `--features` names as FILE[:OUTPUT]; without it the CLIP that `-m` names.

    FILE is weights.clip, a bundle that holds one, a checkpoint of Inception-v3 (.pth or safetensors; OUTPUT is a
    width: 64, 192, 768 or 2048), an .onnx (OUTPUT is a name, and after a comma that of class logits), or one of the
    last two in a hub repository as hf://OWNER/REPO/FILE.

    Raises:
        DalleError: no such file, or one of something else.
    """
    if spec is None:
        return ClipFeatures(bundle.weights(model, "weights.clip"), machine)
    name, output = _split(spec)
    path = _download(name) if name.startswith("hf://") and name.count("/") > 3 else _located(name)
    if path.suffix == ".onnx":
        from dalle_cli.evaluation.onnx import OnnxFeatures

        return OnnxFeatures(path, output, machine)
    if path.is_file() and (path.suffix in CHECKPOINTS or _is_plain(path)):
        return InceptionFeatures(path, _width(output), machine)
    if output:
        raise DalleError(f"expected a CLIP without an output's name, found {spec}; leave out :{output}")
    return ClipFeatures(
        bundle.weights(name, "weights.clip") if path.is_dir() else open_artifact(path, "weights.clip"), machine
    )


def _located(name: str) -> Path:
    try:
        return bundle.locate(name)
    except DalleError as error:
        raise DalleError(str(error).replace("check -m", "check --features")) from None


def _split(spec: str) -> tuple[str, str]:
    """FILE:OUTPUT -> both; a file's own name may have a colon."""
    head, colon, tail = spec.rpartition(":")
    known = (".onnx", ".safetensors", *CHECKPOINTS)
    return (head, tail) if colon and head.endswith(known) and not Path(spec).exists() else (spec, "")


def _is_plain(path: Path) -> bool:
    """Whether this is a safetensors file that is no artifact, such as converted weights of Inception-v3."""
    try:
        read_header(path)
    except DalleError as error:
        return "plain safetensors" in str(error)
    return False


def _width(output: str) -> int:
    if output and output not in map(str, WIDTHS):
        raise DalleError(
            f"expected a width of {', '.join(map(str, WIDTHS))} after the colon, found {output}; choose one"
        )
    return int(output or WIDTHS[-1])


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
