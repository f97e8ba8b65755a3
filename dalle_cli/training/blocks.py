"""What is done to a model's residual blocks from outside, without a change of the model or of its state's names."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_cli.errors import DalleError

BLOCK = re.compile(r"(.+\.)?(\d+|block_\d+)")  # the names of blocks: `blocks.3`, `encoder.group_1.block_2`


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model's stacks by name, in the order in which they were built; none lies in another.

    Raises:
        DalleError: the model has none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if BLOCK.fullmatch(name) and not inner and any(True for _ in module.parameters()):
            found[name] = module
    if not found:
        raise DalleError(
            f"expected a model of residual blocks, found none in {type(model).__name__}; "
            "leave out checkpoint_activations and --dtype float16"
        )
    return found


def surround(block: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let `wrap(forward)` take the place of this one block's forward; the wrapping done last is the outermost."""
    vars(block)["forward"] = wrap(block.forward)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps its input alone and is run again in the backward pass, with the same dropout."""

    def around(*args: Any, **named: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **named)

    return around
