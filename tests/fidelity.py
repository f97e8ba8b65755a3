"""torch-fidelity without its own __init__, which wants torchvision; torchmetrics imports parts of it, too."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest


def importable():
    """Let parts of torch-fidelity be imported one by one from now on; skips the test where it is not installed."""
    if "torch_fidelity" in sys.modules:
        return
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.origin is None:
        pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["torch_fidelity"] = package
