"""Modules of installed packages whose own `__init__` imports too much, or changes torch's settings."""

import importlib.util
from pathlib import Path


def by_path(package, file):
    """The module in a file of a package, on its own. Raises: ModuleNotFoundError if the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(next(iter(spec.submodule_search_locations))) / file
    found = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
