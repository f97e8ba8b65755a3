"""The rooms: imports point down only, models know torch alone, and only the console prints."""

import ast
import itertools
import sys
from pathlib import Path

import pytest

import dalle_cli

ROOT = Path(dalle_cli.__file__).parent
# Floors from the top down. A room imports from floors below its own; rooms beside each other do not know each other.
FLOORS = (
    ("cli",),
    ("commands",),
    ("planning", "doctor", "report"),
    ("training", "evaluation"),
    ("pipelines",),
    ("importing",),
    ("sampling", "data", "viz", "hub"),
    ("models", "diffusion"),
    ("options",),
    ("artifacts", "config", "console", "cut_files", "devices", "paths"),
    ("errors",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Each module that a file imports anywhere, as a dotted name; names of a package that are modules, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names)
                if node.module == "dalle_cli"
                else (node.module,)
            )


def private_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dalle_cli"):
            yield from (
                alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    if path == ROOT / "__init__.py":
        tree = ast.parse(path.read_text())  # the package itself loads nothing of its own until it is asked
        assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module.startswith("dalle_cli")]
        return
    if room == "__main__":
        assert list(imports(path)) == ["dalle_cli.cli"]
        return
    assert room in FLOOR, f"{room} has no floor in this test: give it one"
    for name in imports(path):
        if not name.startswith("dalle_cli."):
            continue
        other = name.split(".")[1]
        if other in (room, "__version__"):
            continue
        assert FLOOR[other] > FLOOR[room], f"{path.relative_to(ROOT)} imports {name}"
    assert list(private_names(path)) == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) in ("models", "diffusion")], ids=lambda path: path.name
)
def test_models_know_torch_alone(path):
    for name in imports(path):
        top = name.split(".")[0]
        own = name.startswith(("dalle_cli.errors", f"dalle_cli.{room_of(path)}"))
        assert own or top == "torch" or top in sys.stdlib_module_names, name
        assert top not in ("io", "os", "pathlib", "shutil"), f"{name}: models do no I/O"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_console_prints(path):
    if room_of(path) in ("console", "cli"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("stdout", "stderr"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            body = list(itertools.dropwhile(lambda n: isinstance(n, (ast.Import, ast.ImportFrom)), body))  # a stage's
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40, f"{path}:{node.lineno} {node.name} has {lines} lines"
            assert not [a for a in (node.args.kwarg,) if a and node.name == "run"], f"{path}: **kwargs in a stage"
    assert path.name != "utils.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path):
    """Weights that only one version of Python and torch can read, and that run code when opened, are never written."""
    assert not {"pickle", "joblib", "shelve"} & {name.split(".")[0] for name in imports(path)}
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # A published checkpoint may be read where nothing but tensors is unpickled, which the call has to say itself.
    safe = {call.func for call in calls if any(ast.unparse(word) == "weights_only=True" for word in call.keywords)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr != "save", f"{path}:{node.lineno}"
            assert node.attr != "load" or node in safe, f"{path}:{node.lineno}"


def modules_imported(path):
    """The modules of the package that a file imports anywhere, as paths; an import for type checkers does not count."""
    tree = ast.parse(path.read_text())
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typed and (node.module or "").startswith("dalle_cli"):
            for alias in node.names:
                for name in (f"{node.module}.{alias.name}", node.module):
                    found = ROOT.parent / (name.replace(".", "/") + ".py")
                    if found.exists():
                        yield found
                        break


def test_no_two_files_import_each_other_in_a_circle():
    graph = {path: set(modules_imported(path)) for path in FILES if path.name != "__init__.py"}
    done, path_here = set(), []

    def visit(path):
        assert path not in path_here, " -> ".join(str(p.relative_to(ROOT)) for p in [*path_here, path])
        if path in done:
            return
        path_here.append(path)
        for other in sorted(graph.get(path, ())):
            visit(other)
        path_here.pop()
        done.add(path)

    for path in graph:
        visit(path)


def test_no_class_name_means_two_things():
    names = [
        node.name for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize("path", sorted((ROOT / "commands").glob("*.py")), ids=lambda path: path.name)
def test_a_command_is_thin_and_imports_no_other(path):
    assert not [other for other in modules_imported(path) if other.parent == path.parent]
    heavy = {"torch", "numpy", "PIL", "matplotlib"}
    assert not heavy & {name.split(".")[0] for name in imports(path)}
