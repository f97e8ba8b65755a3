"""Warm starts: training from existing weights (`--init`) instead of random ones."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from dalle_cli.artifacts import Artifact
from dalle_cli.artifacts.weights import load_tensors
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.sampling.defaults import check_sampling_defaults
from dalle_cli.training.config import C, affecting

LATER_PARTS = ("sketch.", "hint.")
CHECKPOINT = "checkpoint"
AVERAGE = "ema/"  # prefix of the tensors to take from a checkpoint


def open_weights(model: str | None, kind: str, stage: str) -> Artifact | None:
    """Open weights of this kind, by name, path or bundle, or a checkpoint of this stage; None for no model.

    Raises:
        DalleError: the model is neither, or a checkpoint of another stage.
    """
    if model is None:
        return None
    try:
        found = bundles.weights(model, kind, CHECKPOINT)
    except DalleError as error:  # the message names -m, the option of all other commands
        raise DalleError(re.sub(r"(?<=\s)-m\b", "--init", str(error))) from None
    if found.kind == CHECKPOINT and found.history[-1]["stage"] != stage:
        raise DalleError(f"expected a checkpoint of {stage}, found one of {found.history[-1]['stage']}: {model}")
    return found


def history_inputs(found: Artifact | None) -> dict[str, Artifact]:
    """The initial weights as an input for the history: {"init": weights}, or empty without them."""
    return {} if found is None else {"init": found}


def model_settings(
    found: Artifact | None, known: Mapping[str, Any], recipe: object, model: type[Any]
) -> dict[str, Any]:
    """The sizes of a model that the inputs (`known`) and the initial weights decide, if there are any.

    The recipe still sets a field of `model` with the metadata `warm_start`: "free", which the weights do not depend on,
    or "added", a part that trained weights may lack.

    Raises:
        DalleError: the inputs have another size than the weights, or the weights are of a model without training.
    """
    if found is None:
        return dict(known)
    own = found.require("model", dict)
    if "kind" in own and not hasattr(model, "kind"):
        raise DalleError(
            f"expected weights of a model that is trained here, found a {own['kind']} in {found.path}; it can be "
            "sampled here, not trained"
        )
    for name, value in known.items():
        fewer = name == "n_text_vocab" and isinstance(own.get(name), int) and value < own[name]  # a part of the table
        if own.get(name, value) != value and not fewer:
            raise DalleError(
                f"expected inputs with {name} = {own[name]}, as {found.path} was trained with, found {value}; "
                "make them with its tokenizer and its encoder"
            )
    named = recipe if isinstance(recipe, Mapping) else {}  # anything but a table is refused with the rest of the recipe
    free = {f.name for f in fields(model) if f.metadata.get("warm_start") and f.name in named}
    if own.get("sketch"):
        free.discard("sketch")
    return {**known, **{name: value for name, value in own.items() if name not in free}}


def sampling_settings(found: Artifact | None, kind: str, recipe: object, train: C) -> tuple[C, dict[str, Any]]:
    """Training settings with the sampling defaults of the initial weights where the recipe sets none, and all of these.

    Raises:
        DalleError: sampling defaults that weights of this kind do not have.
    """
    if found is None:
        return train, {}
    theirs = check_sampling_defaults(kind, found.config.get("sampling", {}), str(found.path))
    named = recipe.get("train", {}) if isinstance(recipe, Mapping) else {}
    own = affecting(type(train), "sampling") - set(named)
    return replace(train, **{name: value for name, value in theirs.items() if name in own}), theirs


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


def has_part(found: Artifact | None, part: str, width: object) -> bool:
    """Whether weights hold one of LATER_PARTS for a model with a sketch of this width."""
    model = {} if found is None else found.require("model", dict)
    return bool(model.get("sketch")) and (part != "sketch." or model.get("sketch_width") == width)


def initialize_from(model: nn.Module, found: Artifact) -> None:
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
        if not has_part(found, part, width):
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
