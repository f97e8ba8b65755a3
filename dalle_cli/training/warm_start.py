"""Warm starts: training from existing weights (`--init`) instead of random ones."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle

FREE = ("dropout",)  # model settings that a recipe may choose whatever the weights
LATER = ("sketch", "sketch_width")  # sizes of parts that a recipe may add to a trained token prior
LATER_PARTS = ("sketch.", "hint.")
CHECKPOINT = "checkpoint"
AVERAGE = "ema/"  # prefix of the tensors to take from a checkpoint


def opened(model: str | None, kind: str, stage: str) -> Artifact | None:
    """Open weights of this kind, by name, path or bundle, or a checkpoint of this stage; None for no model.

    Raises:
        DalleError: the model is neither, or a checkpoint of another stage.
    """
    if model is None:
        return None
    try:
        found = bundle.weights(model, kind, CHECKPOINT)
    except DalleError as error:  # the message names -m, the option of all other commands
        raise DalleError(re.sub(r"(?<=\s)-m\b", "--init", str(error))) from None
    if found.kind == CHECKPOINT and found.history[-1]["stage"] != stage:
        raise DalleError(f"expected a checkpoint of {stage}, found one of {found.history[-1]['stage']}: {model}")
    return found


def named(found: Artifact | None) -> dict[str, Artifact]:
    """The entry for the inputs that a history records."""
    return {} if found is None else {"init": found}


def sizes(found: Artifact | None, known: Mapping[str, Any], told: object) -> dict[str, Any]:
    """The model settings that inputs (`known`) and weights fix; `told` is the recipe's table for the model.

    A recipe may add a sketch to a token prior that has none, or change the sketch's width.

    Raises:
        DalleError: the inputs have another size than the weights.
    """
    if found is None:
        return dict(known)
    own = found.fact("model", dict)
    for name, value in known.items():
        if own.get(name, value) != value:
            raise DalleError(
                f"expected inputs with {name} = {own[name]}, as {found.path} was trained with, found {value}; "
                "make them with its tokenizer and its encoder"
            )
    recipe = told if isinstance(told, Mapping) else {}  # anything else is refused when the recipe is read
    free = {name for name in (*FREE, *LATER) if name in recipe}
    if own.get("sketch"):
        free.discard("sketch")
    elif "n_image_vocab" not in own:  # not a token prior
        free -= {*LATER}
    return {**{name: value for name, value in own.items() if name not in free}, **known}


def check_inputs(found: Artifact | None, header: Mapping[str, Any]) -> None:
    """Raises: DalleError if the inputs were made by another tokenizer or encoder than those of the weights."""
    if found is None:
        return
    for name in ("tokenizer", "encoder"):
        expected, given = found.config.get(name), header.get(name)
        if expected and given and expected != given:
            raise DalleError(
                f"expected inputs made by the {name} of {found.path} (sha256 {expected[:12]}), found {given[:12]}; "
                f"make them with that one, or leave out --init"
            )


def gives(found: Artifact | None, part: str, width: object) -> bool:
    """Whether weights hold one of LATER_PARTS for a model with a sketch of this width."""
    model = {} if found is None else found.fact("model", dict)
    return bool(model.get("sketch")) and (part != "sketch." or model.get("sketch_width") == width)


def begin(model: nn.Module, found: Artifact) -> None:
    """Initialize a model from weights, or from the moving average of a checkpoint.

    A sketch that the weights lack, or have with another width, keeps its random initialization.

    Raises:
        DalleError: a tensor is missing, unknown, or of another shape.
    """
    tensors = load_tensors(found)
    if found.kind == CHECKPOINT:
        tensors = {name.removeprefix(AVERAGE): t for name, t in tensors.items() if name.startswith(AVERAGE)}
    width = getattr(getattr(model, "config", None), "sketch_width", None)
    for part in LATER_PARTS:
        if not gives(found, part, width):
            tensors = {name: t for name, t in tensors.items() if not name.startswith(part)}
            tensors |= {name: t for name, t in model.state_dict().items() if name.startswith(part)}
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(own.keys() | given.keys()):
        if own.get(name) != given.get(name):
            wanted, actual = own.get(name, "nothing"), given.get(name, "nothing")
            raise DalleError(
                f"expected {name} of {wanted} in {found.path}, found {actual}; give weights of the same model"
            )
    model.load_state_dict(tensors)
