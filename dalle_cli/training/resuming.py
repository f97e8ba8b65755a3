"""Whether a checkpoint fits the model that is trained, by the shapes in its header."""

from collections.abc import Callable, Mapping

from torch import nn

Shape = tuple[int, ...]
Fits = Callable[[Mapping[str, Shape], bool], bool]


def fits(model: nn.Module, scales: Mapping[str, Shape]) -> Fits:
    """-> `check(shapes, whole)`: whether a checkpoint of these tensors continues the training of `model`.

    A checkpoint that is not `whole` has some of the tensors in shards beside it. `scales` are the shapes of the loss
    scales' state, if there is one.
    """
    weights = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def check(shapes: Mapping[str, Shape], whole: bool) -> bool:
        for part in ("model", "ema"):
            found = {n.removeprefix(f"{part}/"): s for n, s in shapes.items() if n.startswith(f"{part}/")}
            if found != {name: weights.get(name) for name in (weights if whole else found)}:
                return False
        return all(map(is_state, shapes, shapes.values()))

    def is_state(name: str, shape: Shape) -> bool:
        part, _, rest = name.partition("/")
        if part == "optimizer":
            parameter, _, key = rest.rpartition(":")
            return parameter in parameters and shape == (() if key == "step" else parameters[parameter])
        if part != "loop":
            return part in ("model", "ema")
        if rest == "plateau/state":
            return shape == (3,)
        if rest.startswith("scales/"):
            return not scales or scales.get(rest.removeprefix("scales/")) == shape
        return shape == ()  # counts and sums of metrics

    return check
