"""Documents as frozen dataclasses: written as plain data, and the JSON Schema that describes them.

The type hints of a dataclass say what a document holds. A field whose default is None is left out where it has none;
all others are always there. A line `name : what it means` in the docstring describes a field, and the ending of its
name tells the unit of a number. A field `further` is a dictionary of whatever else there is, under names of its own.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

D = TypeVar("D")
Document = dict[str, Any]
"""A document as plain data, as JSON has it."""

_FURTHER: Final = "further"
_LINE: Final = re.compile(r"^(\w+) : (.+(?:\n +.+)*)", re.MULTILINE)
_UNITS: Final = {
    "_bytes_per_s": "bytes/s",
    "_flops_per_s": "FLOP/s",
    "_tokens_per_s": "tokens/s",
    "_usd_per_h": "$/h",
    "_usd_per_mtoken": "$ per million output tokens",
    "usd_per_gpu_h": "$ per GPU and hour",
    "_per_s": "1/s",
    "_rps": "requests/s",
    "_bytes": "bytes",
    "_token_j": "J per output token",
    "_pct": "%",
    "_mhz": "MHz",
    "_s": "s",
    "_j": "J",
    "_w": "W",
    "_us": "us",
}
_NAMES: Final = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Described:
    """A document or a part of one: whatever inherits from it is a frozen dataclass, and what is undefined is None."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, each.name, _defined(getattr(self, each.name)))


def lines_of(described: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and of those above it say of each name, the nearest counting."""
    found: dict[str, str] = {}
    for each in described.__mro__:
        for name, text in _LINE.findall(inspect.cleandoc(each.__doc__ or "")):
            found.setdefault(name, " ".join(text.split()))
    return found


@cache
def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of)


def to_plain(value: Any) -> Any:
    """A document as dictionaries, lists, texts and numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(each, getattr(value, each.name)) for each in _named(value)]
        # A name that Python keeps for itself ends in an underscore.
        told = {f.name.rstrip("_"): to_plain(v) for f, v in pairs if v is not None or f.default is not None}
        return told | to_plain(getattr(value, _FURTHER, {}))
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def differences(said: Any, was: Any, where: str = "") -> Iterator[str]:
    """What plain data says otherwise than other plain data, each by its place.

    Parameters
    ----------
    said, was : documents, or parts of them, as `to_plain` gives them
    where : their place
    """
    if isinstance(said, dict) and isinstance(was, dict):
        for key in was | said:
            yield from differences(said.get(key), was.get(key), f"{where}.{key}" if where else key)
    elif isinstance(said, list) and isinstance(was, list) and len(said) == len(was):
        for index, (one, other) in enumerate(zip(said, was, strict=True)):
            yield from differences(one, other, f"{where}[{index}]")
    elif said is not was and said != was:
        yield f"{where} is {_short(said)}, and was answered as {_short(was)}"


def _short(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, dict | list):
        return f"{len(value)} values"
    return "nothing" if value is None else f"{value!r:.60}"


def of(kind: type[D], *sources: object, **more: Any) -> D:
    """A document from objects that have its fields as attributes, and from what goes by other names there.

    Parameters
    ----------
    kind : type of the document
    sources : what it tells of; a field is that of the first which has it
    more : fields by their names, whatever the sources say
    """
    for each in _named(kind):
        found = (source for source in sources if hasattr(source, each.name))
        if each.name not in more and (source := next(found, None)) is not None:
            more[each.name] = getattr(source, each.name)
    return kind(**more)


def _defined(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is undefined becomes None. What is frozen has tuples, not lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _defined(item) for key, item in value.items()}
    return tuple(map(_defined, value)) if isinstance(value, list | tuple) else value


def _named(of: Any) -> list[Field[Any]]:
    """The fields that are keys of a document."""
    return [each for each in fields(of) if each.name != _FURTHER]


def json_schema(of: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a document, with a definition for every dataclass within."""
    defined: dict[str, Any] = {}
    whole = _object(of, defined)
    whole["$defs"] = {name: defined[name] for name in sorted(defined)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": of.__name__, **whole}


def _object(of: type[Any], defined: dict[str, Any]) -> dict[str, Any]:
    told, hints, properties = lines_of(of), _hints(of), {}  # type: ignore[arg-type]
    for each in _named(of):
        hint = hints[each.name]
        if each.default is None:
            hint = reduce(or_, (part for part in get_args(hint) if part is not NoneType))
        entry = _typed(hint, defined)
        unit = next((unit for end, unit in _UNITS.items() if each.name.endswith(end)), None)
        if unit is not None and {"number", "integer"} & _types(entry):
            entry["unit"] = unit
        if each.name in told:
            entry["description"] = told[each.name]
        properties[each.name.rstrip("_")] = entry
    return {
        "description": inspect.cleandoc(of.__doc__ or "").partition("\n")[0],
        "type": "object",
        "properties": properties,
        "required": [f.name.rstrip("_") for f in _named(of) if f.default is not None],
        "additionalProperties": _typed(get_args(hints[_FURTHER])[1], defined) if _FURTHER in hints else False,
    }


def _types(entry: dict[str, Any]) -> set[str]:
    """Types of JSON that an entry allows, those of its parts too."""
    inner = entry.get("items") or entry.get("additionalProperties") or {}
    kinds = entry.get("type", [])
    return {*([kinds] if isinstance(kinds, str) else kinds), *(_types(inner) if inner else ())}


def _typed(hint: Any, defined: dict[str, Any]) -> dict[str, Any]:
    """What a type hint allows."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if all(part in _NAMES for part in parts):
            return {"type": [_NAMES[part] for part in parts]}
        return {"anyOf": [_typed(part, defined) for part in parts]}
    if origin is Literal:
        return {"const": parts[0]} if len(parts) == 1 else {"enum": list(parts)}
    if origin is tuple:
        return {"type": "array", "items": _typed(parts[0], defined)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _typed(parts[1], defined)}
    if is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in defined:
            defined[name] = {}  # it may hold itself
            defined[name] = _object(hint, defined)  # type: ignore[arg-type]
        return {"$ref": f"#/$defs/{name}"}
    return {"type": _NAMES[hint]}
