"""Modules of installed packages whose own `__init__` imports too much, or changes torch's settings."""

import importlib.util
import sys
from pathlib import Path


def by_path(package, file):
    """The module in a file of a package, on its own. Raises: ModuleNotFoundError if the package is not installed."""
    if package in sys.modules:  # perhaps a stand-in, which has no spec
        folders = sys.modules[package].__path__
    elif spec := importlib.util.find_spec(package):
        folders = spec.submodule_search_locations
    else:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(next(iter(folders))) / file
    found = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
