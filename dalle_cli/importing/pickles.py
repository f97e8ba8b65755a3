"""Pickles, read without running them: a closed list of names becomes tensors, every other name an inert stub.

`pickletools` takes a pickle apart into its instructions; `Interpreter` follows them over plain data. It imports no
name and calls no object of the pickle, whatever the pickle says.
"""

import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, cast

import torch

from dalle_cli.artifacts.region import Region, RegionFile
from dalle_cli.errors import DalleError
from dalle_cli.importing.publication import Shape

MAX_STEPS = 1_000_000  # instructions of one pickle
MAX_TABLES = 200_000  # tables, modules and tensors of a checkpoint
MAX_DEPTH = 64  # of tables and modules within each other
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
# Names that no checkpoint needs and that attacks use. They would be inert, too, but a person should know of them.
PROGRAMS = {"os", "posix", "nt", "subprocess", "pty", "runpy", "shutil", "socket", "webbrowser", "importlib", "ctypes"}
BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals", "delattr", "setattr"}


class Global(NamedTuple):
    """A name that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:80]

    @property
    def hostile(self) -> bool:
        """Whether it runs programs or code, or touches files."""
        top = self.module.partition(".")[0]
        return top in PROGRAMS or (top in ("builtins", "__builtin__") and self.name in BUILTINS)


@dataclass(eq=False)
class Stub:
    """What stands for an object of an unknown class: its class, and the state it would have been given."""

    of: object
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers elsewhere in the checkpoint, by its key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor, as a view of a storage."""

    storage: Storage
    offset: int
    shape: Shape
    stride: Shape


class Interpreter:
    """Follows the instructions of a pickle over a stack and a memo of plain data.

    `data` are dicts, lists, tuples, texts, numbers, `StoredTensor` and `Stub`.
    """

    def __init__(self, region: Region, file: RegionFile | None = None):
        self.region, self.file = region, file or RegionFile(region)
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """The value of the next pickle of the file.

        Raises:
            DalleError: it is cut short, makes no sense, is too large, or names what runs programs.
        """
        self.stack: list[Any] = []
        self.marks: list[int] = []  # where on the stack lists of arguments begin
        self.memo: dict[int, Any] = {}
        try:
            for step, (code, value, _) in enumerate(pickletools.genops(cast(IO[bytes], self.file))):
                if step > MAX_STEPS:
                    raise self.region.damaged(f"a pickle of more than {MAX_STEPS:,} instructions")
                self._step(code.name, value)
            return self.stack.pop()
        except _SENSELESS as error:
            raise self.region.damaged(f"a pickle that makes no sense ({' '.join(str(error).split())[:60]})") from None

    def _step(self, code: str, value: Any) -> None:
        if code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code](value))
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(value)] = self.stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(value)])
        elif code in _STEPS:
            _STEPS[code](self, value)
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise self.region.damaged(f"the instruction {code}, which no checkpoint has,")

    def since_mark(self) -> list[Any]:
        """What lies above the last mark, taken off the stack with it."""
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def name(self, module: object, name: object) -> None:
        """Push a name. Raises: DalleError if it runs programs."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = Global(module, name)
        if found.hostile:
            raise DalleError(
                f"expected tensors, found {found} in {self.region.name}, which no checkpoint needs; "
                "nothing of it was run, and it should not be trusted"
            )
        self.stack.append(found)

    def reduce(self) -> None:
        """What a pickle wants called: a tensor, a table, or a stub that stands for anything else."""
        arguments = self.stack.pop()
        made = self.stack.pop()
        self.stack.append(self.made(made, tuple(arguments)))

    def made(self, of: object, arguments: tuple[Any, ...]) -> Any:
        """The value that a known name makes of its arguments; a stub for any other name."""
        if isinstance(of, Global):
            if of in _TENSORS:
                return self._tensor(*arguments[:4])
            if of in _FIRST:
                return arguments[0] if arguments else []
            if of == ("collections", "OrderedDict"):
                return {key: value for key, value in (arguments[0] if arguments else ()) if _is_key(key)}
            if of == ("torch._tensor", "_rebuild_from_type_v2"):
                return self.made(arguments[0], tuple(arguments[2]))
        return Stub(of)

    def build(self) -> None:
        """An object's state: kept for a stub, left out for a table."""
        state = self.stack.pop()
        if isinstance(state, tuple) and len(state) == 2:  # the state and the slots
            state = state[0]
        if isinstance(self.stack[-1], Stub) and isinstance(state, dict):
            self.stack[-1].state.update(state)

    def set_items(self, pairs: list[Any]) -> None:
        """Keys and values in turns, into the table on the stack; keys that are neither texts nor numbers are left."""
        table = self.stack[-1].state if isinstance(self.stack[-1], Stub) else self.stack[-1]
        table.update({key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True) if _is_key(key)})

    def add(self, items: list[Any]) -> None:
        """Items into the list on the stack; a stub or a set has no use for them."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def persistent(self, value: Any) -> Any:
        """What a checkpoint keeps outside of the pickle: a storage, or (older ones) a class with its source text."""
        if isinstance(value, tuple) and value[:1] == ("module",):
            return value[1]
        if not isinstance(value, tuple) or value[:1] != ("storage",) or not isinstance(value[1], Global):
            raise ValueError("a reference to something other than a storage")
        kind, key, numel = value[1], str(value[2]), value[4]
        dtype = STORAGES.get(kind.name.removesuffix("Storage")) if kind.module.startswith("torch") else None
        if dtype is None or type(numel) is not int or numel < 0 or (len(value) > 5 and value[5] is not None):
            raise ValueError(f"a storage of {kind}")
        return self.storages.setdefault(key, Storage(key, dtype, numel))

    def _tensor(self, storage: object, offset: int, shape: Shape, stride: Shape) -> StoredTensor:
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        shape, stride = tuple(shape), tuple(stride)
        self.region.check_shape(shape, "a tensor")
        self.region.check_shape((offset, *stride), "a tensor")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        numel = torch.Size(shape).numel()
        if numel > storage.numel or (numel and last >= storage.numel):
            raise ValueError("a tensor beyond its storage")
        return StoredTensor(storage, offset, shape, stride)


_SENSELESS = (
    ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError,
    struct.error,
)  # fmt: skip


def _is_key(key: object) -> bool:
    return isinstance(key, (str, int, float, type(None)))


_FIRST = {
    Global("torch._utils", "_rebuild_parameter"), Global("torch._utils", "_rebuild_parameter_with_state"),
    Global("torch", "Size"), Global("torch.jit._pickle", "restore_type_tag"),
    Global("builtins", "set"), Global("__builtin__", "set"),
    *(Global("torch.jit._pickle", f"build_{kind}list") for kind in ("int", "double", "bool", "tensor")),
}  # fmt: skip
_TENSORS = {Global("torch._utils", "_rebuild_tensor"), Global("torch._utils", "_rebuild_tensor_v2")}
_VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_CONSTANTS: dict[str, Callable[[Any], Any]] = {name: lambda value: value for name in _VALUES} | {
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: (), "EMPTY_SET": lambda _: [],
}  # fmt: skip


def _tuple(n: int) -> Callable[[Interpreter, Any], None]:
    def step(machine: Interpreter, _: Any) -> None:
        if len(machine.stack) < n:
            raise ValueError("too little on the stack")
        machine.stack[-n:] = [tuple(machine.stack[-n:])]

    return step


def _pop(machine: Interpreter, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _pairs(machine: Interpreter, _: Any) -> None:
    pairs = machine.since_mark()
    machine.stack.append({})
    machine.set_items(pairs)


def _new(machine: Interpreter, _: Any) -> None:
    machine.stack.pop()
    machine.stack.append(Stub(machine.stack.pop()))


def _new_with_names(machine: Interpreter, _: Any) -> None:
    machine.stack.pop()
    _new(machine, _)


def _instance(machine: Interpreter, value: str) -> None:
    machine.since_mark()
    machine.name(*value.split(" ", 1))
    machine.stack.append(Stub(machine.stack.pop()))


_STEPS: dict[str, Callable[[Interpreter, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": _pop,
    "POP_MARK": lambda m, _: m.stack.__delitem__(slice(m.marks.pop(), None)),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "FROZENSET": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": _pairs,
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "APPEND": lambda m, _: m.add([m.stack.pop()]),
    "APPENDS": lambda m, _: m.add(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, value: m.name(*value.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": _new,
    "NEWOBJ_EX": _new_with_names,
    "INST": _instance,
    "OBJ": lambda m, _: m.stack.append(Stub(m.since_mark()[0])),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, value: m.stack.append(m.persistent(value)),
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.stack.pop())),
}


def named_tensors(region: Region, root: object) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by dotted names: of a table, of a Lightning checkpoint's, or of a whole module.

    Raises:
        DalleError: there are none, or something else stands in the place of one.
    """
    if isinstance(root, dict) and isinstance(root.get("state_dict"), (dict, Stub)):
        root = root["state_dict"]
    found: dict[str, StoredTensor] = {}
    left, seen = [("", root, 0)], 0
    while left:
        prefix, value, depth = left.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_TABLES:
            raise region.damaged("too many tables in each other")
        for name, inner in _entries(region, value, prefix):
            if not isinstance(inner, StoredTensor):
                left.append((name + ".", inner, depth + 1))
            elif found.setdefault(name, inner) is not inner or len(found) > MAX_TABLES:
                raise region.damaged(f"too many tensors, or two of the name {name[:60]!r},")
    if not found:
        raise DalleError(f"expected tensors by name, found {_described(root)} in {region.name}; give another file")
    return found


def _entries(region: Region, value: object, prefix: str) -> Iterator[tuple[str, Any]]:
    """The tensors, tables and modules of a table or a module, by name."""
    table = value if isinstance(value, dict) else _state(value) if isinstance(value, Stub) else {}
    plain = isinstance(value, dict) and any(isinstance(inner, StoredTensor) for inner in value.values())
    for key, inner in table.items():
        if not isinstance(key, str) or not isinstance(inner, (StoredTensor, dict, Stub)):
            continue
        if plain and isinstance(inner, Stub) and not inner.state:
            found = f"{_described(inner)} in {region.name}; nothing of it was run"
            raise DalleError(f"expected a tensor for {(prefix + key)[:80]!r}, found {found}")
        yield prefix + key, inner


def _state(stub: Stub) -> dict[Any, Any]:
    """A module's parameters, buffers and parts, or (TorchScript) its attributes."""
    parts = [stub.state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    if not isinstance(parts[2], dict):
        return stub.state
    left_out = stub.state.get("_non_persistent_buffers_set")
    left = set(left_out) if isinstance(left_out, list) and all(map(_is_key, left_out)) else set()
    return {key: value for part in parts if isinstance(part, dict) for key, value in part.items() if key not in left}


def _described(value: object) -> str:
    if isinstance(value, Stub):
        return f"an object of {value.of}" if isinstance(value.of, Global) else "an object of an unknown class"
    return f"a {type(value).__name__} without any" if isinstance(value, dict) else f"a {type(value).__name__}"
