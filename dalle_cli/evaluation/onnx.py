"""Features from an ONNX file, through onnxruntime.

Images are given as the file declares: NCHW or NHWC, resized to its height and width if those are fixed. Pixels are RGB
in [0, 1], or 0 to 255 if the input is uint8; the file must hold any other normalization.

Shapes: B batch, S side in pixels, D features, K classes.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_cli.artifacts import digest_file
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.feature_batch import FeatureBatch, Floats

DTYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8,
}  # fmt: skip


class Input(NamedTuple):
    """The input of the file; None for sizes that are not fixed."""

    name: str
    dtype: Any
    channels_last: bool
    batch: int | None
    size: tuple[int, int] | None


class OnnxFeatures:
    """One output of the file as features, and perhaps another as class logits."""

    def __init__(self, path: Path, output: str, machine: Arithmetic):
        self.digest = digest_file(path)
        self.session = _session(path, machine)
        self.input = _input(self.session, path)
        names = [out.name for out in self.session.get_outputs()]
        self.outputs = output.split(",") if output else names[:1]
        if len(self.outputs) > 2 or set(self.outputs) - set(names):
            raise DalleError(f"expected outputs of {', '.join(names)} in {path}, found {output}; name one, or two")
        self.name = f"{path.stem}:{self.outputs[0]}-{self.digest[:8]}"
        blank = self(torch.zeros(1, 3, *(self.input.size or (64, 64))))
        self.width = blank.features.shape[1]
        self.classes = 0 if blank.logits is None else blank.logits.shape[1]

    def __call__(self, images: Tensor) -> FeatureBatch:
        """(B, 3, S, S) in [0, 1] -> (B, D), (B, K)."""
        pixels = self._pixels(images)
        rows = self.input.batch or len(pixels)
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], -len(pixels) % rows, axis=0)])
        parts = [self._run(padded[start : start + rows]) for start in range(0, len(padded), rows)]
        features, *logits = (np.concatenate(columns)[: len(pixels)] for columns in zip(*parts, strict=True))
        return FeatureBatch(features, logits[0] if logits else None)

    def _pixels(self, images: Tensor) -> Any:
        """Images in the size, layout and type of the input."""
        images = images.float().cpu()
        if self.input.size and tuple(images.shape[2:]) != self.input.size:
            images = F.interpolate(images, size=self.input.size, mode="bicubic", antialias=True).clamp(0, 1)
        if self.input.dtype is np.uint8:
            images = (images * 255).round()
        pixels = images.numpy().astype(self.input.dtype)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if self.input.channels_last else pixels

    def _run(self, pixels: Any) -> list[Floats]:
        try:
            outs = self.session.run(self.outputs, {self.input.name: pixels})
        except Exception as error:  # the errors of onnxruntime have no other base class
            found = f"{str(error).splitlines()[0]}; check it"
            raise DalleError(f"expected the ONNX file to take images {pixels.shape}, found {found}") from None
        outs = [np.asarray(out).astype(np.float32) for out in outs]
        outs = [out.reshape(out.shape[:2]) if out.ndim > 2 and out[0, 0].size == 1 else out for out in outs]
        for name, out in zip(self.outputs, outs, strict=True):
            if out.ndim != 2 or len(out) != len(pixels):
                raise DalleError(f"expected {name} of ({len(pixels)}, D), found {out.shape}; name another output")
        return outs


def _session(path: Path, machine: Arithmetic) -> Any:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        raise DalleError(
            "expected onnxruntime for an .onnx file, found it is not installed; run pip install 'dalle-cli[onnx]'"
        ) from None
    wanted = ["CPUExecutionProvider"]
    if machine.device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        wanted = ["CUDAExecutionProvider", *wanted]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(str(path), sess_options=options, providers=wanted)
    except Exception as error:
        raise DalleError(f"expected an ONNX file, found {str(error).splitlines()[0]}; check {path}") from None


def _input(session: Any, path: Path) -> Input:
    """Raises: DalleError if the file takes anything but one batch of images."""
    inputs = session.get_inputs()
    shape = [n if isinstance(n, int) and n > 0 else None for n in inputs[0].shape]
    if len(inputs) != 1 or len(shape) != 4 or 3 not in (shape[1], shape[3]) or inputs[0].type not in DTYPES:
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise DalleError(f"expected one input (B, 3, H, W) or (B, H, W, 3), found {found} in {path}; give another file")
    last = shape[1] != 3
    height, width = shape[1:3] if last else shape[2:]
    size = (height, width) if height and width else None
    return Input(inputs[0].name, DTYPES[inputs[0].type], last, shape[0], size)
