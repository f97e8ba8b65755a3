"""The blocks that a model stacks, and how training wraps their forward without changing the model or its state."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_cli.errors import DalleError
from dalle_cli.models.blocks import StackedBlock


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The stacked blocks of a model by name, in the order in which they were built.

    Raises:
        DalleError: the model has none.
    """
    found: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, StackedBlock)}
    if not found:
        raise DalleError(
            f"expected a model of residual blocks, found none in {type(model).__name__}; "
            "leave out checkpoint_activations and --dtype float16"
        )
    return found


def wrap_forward(block: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace this one block's forward by `wrap(forward)`; the wrapper that came last is the outermost."""
    vars(block)["forward"] = wrap(block.forward)


def recompute(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps only its inputs and runs again in the backward pass, with the same dropout."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
