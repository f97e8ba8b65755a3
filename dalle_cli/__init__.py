"""DALL-E and DALL-E 2: stages over safetensors artifacts, as commands and as Python objects.

    import dalle_cli as dalle

    model = dalle.load("emoji")
    images = model.generate("a red apple", n=8, keep=4, seed=0)

The names below are imported when they are first used, so that `import dalle_cli` loads nothing heavy.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError
    from dalle_cli.pipelines import Pipeline, load

__version__ = "0.1.0"
__all__ = ["DalleError", "Pipeline", "__version__", "load", "open_artifact"]
_WHERE = {"load": "pipelines", "Pipeline": "pipelines", "open_artifact": "artifacts", "DalleError": "errors"}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library is silent unless its user listens


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
