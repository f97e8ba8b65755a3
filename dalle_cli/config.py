"""Hyper-parameters: a recipe's TOML and `--set section.key=value` to frozen dataclasses, every key checked."""

import copy
import difflib
import math
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dalle_cli.errors import DalleError

T = TypeVar("T")
SECTIONS = (  # the top level of a recipe
    "data", "tokenizer", "dvae", "clip", "prior", "embedding_prior", "decoder", "upsampler_1", "upsampler_2",
)  # fmt: skip


def _loads(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        import tomli as toml
    return toml.loads(text)


def read(recipe: Path | str | Mapping[str, Any] | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A recipe, a TOML file or its tables, as nested tables with `section.key=value` overrides laid over it.

    Raises:
        DalleError: no such file, not TOML, an unknown section, an override that is no `key=value`.
    """
    table: dict[str, Any] = {}
    if isinstance(recipe, Mapping):
        table = copy.deepcopy(dict(recipe))
    elif recipe is not None:
        path = Path(recipe)
        try:
            table = _loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DalleError(f"expected a recipe, found {error.strerror}: {path}; give a .toml file") from None
        except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
            raise DalleError(f"expected TOML, found {error}: {path}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise DalleError(f"expected --set section.key=value, found {override!r}")
        _assign(table, key.strip().split("."), _value(text.strip()), override)
    for name in table:
        if name not in SECTIONS:
            raise _unknown(name, SECTIONS, "section")
    return table


def _assign(table: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise DalleError(f"expected a table before the last dot, found a value at {key!r} in --set {override}")
    table[keys[-1]] = value


def _value(text: str) -> Any:
    try:
        return _loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text  # a bare word is a string


def _unknown(name: str, known: Iterable[str], what: str) -> DalleError:
    known = list(known)
    near = difflib.get_close_matches(name.split(".")[-1], known, 1, 0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return DalleError(f"expected a known {what}, found {name!r}; {hint}")


def section(
    table: Mapping[str, Any], name: str, model: type[Any], known: Mapping[str, Any] | None = None, **parts: type[Any]
) -> list[Any]:
    """Build a section's dataclasses: `model` from [name], each of `parts` from its sub-table [name.part].

    `known` are values of the model that the inputs decide, such as the vocabulary.

    Raises:
        DalleError: an unknown key (naming the nearest), a value of another type, or one that the inputs contradict.
    """
    body = table.get(name, {})
    if not isinstance(body, dict):
        raise DalleError(f"expected a table [{name}], found {body!r}")
    known = known or {}
    for key, value in known.items():
        if body.get(key, value) != value:
            raise DalleError(f"expected {name}.{key} = {value}, as the inputs have it, found {body[key]}; leave it out")
    own = {**{key: value for key, value in body.items() if key not in parts}, **known}
    also = tuple(parts)
    return [build(model, own, name, also), *(build(cls, body.get(k, {}), f"{name}.{k}") for k, cls in parts.items())]


def build(cls: type[T], values: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> T:
    """A dataclass from a table, every key and type checked; `where` names the table in messages.

    Raises:
        DalleError: an unknown key (`also` are hints for its spelling), a missing one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise DalleError(f"expected a table [{where}], found {values!r}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise _unknown(f"{where}.{key}", [*known, *also], "key")
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise DalleError(f"expected {where}.{f.name}, found nothing; set it in the recipe or with --set")
    return cls(**{key: _coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(item, args[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    if hint is float and type(value) is float and math.isfinite(value):
        return value
    if hint in (int, str, bool) and type(value) is hint and (hint is not int or abs(value) < 2**63):
        return value
    name = "a list" if origin is tuple else getattr(hint, "__name__", str(hint))
    raise DalleError(f"expected {name} for {where}, found {value!r}")
