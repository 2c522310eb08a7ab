"""Published configurations, each with one thing changed as a newer model would have it, or as nobody should.

`python tests/config_changes.py SHARE OF` tries the changes of every so manieth configuration and tells what is wrong.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.errors import InputError
from apex_opt.ir import model_from_config
from apex_opt.ir.huggingface import read_file
from apex_opt.ir.understood import BESIDE, IDLE, changes_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.ir import Model

HERE: Final = Path(__file__).resolve().parent
TEXT: Final = ("text_config", "llm_config", "language_config", "thinker_config")
NEWER: Final[dict[str, object]] = {
    "attention_type": "differential",
    "layer_kinds": ["x"],
    "num_memory_tokens": 4,
    "use_new_gate": True,
    "attention_chunk_len": 128,
    "rope_kind": "xpos3",
    "quant_kind": "int3",
    "sliding_windows": [1, 2],
    "moe_hidden_compress": 512,
    "kv_sharing": True,
    "cross_layer_kv": 2,
    "head_dim_v": 99,
    "num_loops": 3,
    "dense_layers": [0, 1],
    "cross_attention_layers": [1],
    "dual_chunk_config": {"size": 8},
    "activity_config": {"layers": 4},
    "hidden_act": "newact",
    "rope_theta": "x",
    "rope_scaling": {"rope_type": "xpos3"},
    "scoring_func": "entmax",
    "layer_types": ["new_kind"],
}
"""Fields as of models that are yet to come, and known ones that say what nobody knows."""
ODD: Final[dict[str, object]] = {
    "null": None,
    "negative": -1,
    "zero": 0,
    "nan": math.nan,
    "infinite": math.inf,
    "vast": 10**5000,
    "large": 1e30,
    "word": "new-kind",
    "list": [1, 2],
    "object": {"a": 1},
    "fraction": 2.5,
}
NONE: Final = frozenset({"null", "zero", "gone", "falsy"})
"""Changes that say that there is nothing of a kind, which may be read."""
_ENTRIES: Final = ("new_kind", None, -1, 10**30, math.nan, [1], {"a": 1}, 1.5)
_FREE: Final = ("id2label", "label2id", "auto_map", "task_specific_params")


class Change(NamedTuple):
    """A changed configuration: where, what it is, and how it was changed."""

    path: tuple[str | int, ...]
    kind: str
    config: dict[str, Any]

    @property
    def leaf(self) -> str:
        """Name of the field."""
        return str(next(part for part in reversed(self.path) if isinstance(part, str)))

    @property
    def of_decoder(self) -> bool:
        """Whether it is a field of the decoder or of an object in it."""
        if self.path[0] not in TEXT and any(name in self.config for name in TEXT):
            return False
        inner = [part for part in self.path if isinstance(part, str) and part not in TEXT]
        return not any(BESIDE.search(part) or "quant" in part or part == "compression_config" for part in inner)


def published() -> Iterator[tuple[str, dict[str, Any]]]:
    """All configurations of the tests and of the registry that are read."""
    folders = [HERE / "cases" / "models", HERE.parent / "apex_opt" / "ir" / "configs", HERE / "cases" / "configs"]
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    found = {file.stem: read_file(file)[0] for file in files if file.name not in ("index.json", "stubs.json")}
    classes = json.loads((HERE / "cases" / "classes.json").read_text(encoding="utf-8"))["types"]
    for name, fields in classes.items():
        found[f"class of {name}"] = fields if "text_config" in fields else {"vocab_size": 32_000, **fields}
    for name, config in found.items():
        try:
            read(config)
        except InputError:
            continue
        yield name, config


def read(config: dict[str, Any]) -> Model:
    return model_from_config(config, "changed", "changed.json")


def _paths(config: dict[str, Any], at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    for key, value in config.items():
        if key in _FREE:
            continue
        yield (*at, key), value
        if isinstance(value, dict) and len(at) < 3:
            yield from _paths(value, (*at, key))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from _paths(value[0], (*at, key, 0))


def _put(config: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value there."""
    if not path:
        return value
    first, *rest = path
    if isinstance(config, list):
        return [_put(entry, tuple(rest), value) if at == first else entry for at, entry in enumerate(config)]
    return {**config, str(first): _put(config.get(first), tuple(rest), value)}


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value may be changed to, and how that is called."""
    yield from ((kind, odd) for kind, odd in ODD.items() if type(odd) is not type(value))
    if isinstance(value, bool | int | float) and not isinstance(value, bool):
        yield "text", str(value)
    if isinstance(value, str):
        yield "later", f"{value}_v9"
    if isinstance(value, list) and value:
        yield "shorter", value[:-1]
        yield "longer", [*value, value[-1]]
        middle = len(value) // 2
        for entry in _ENTRIES:
            yield "entry", [*value[:middle], entry, *value[middle + 1 :]]


def changes(config: dict[str, Any]) -> Iterator[Change]:
    """The configuration with each of its fields changed in each way, and with each newer field."""
    for path, value in _paths(config):
        for kind, other in _others(value):
            yield Change(path, kind, _put(config, path, other))
    decoders = [(name,) for name in TEXT[:3] if isinstance(config.get(name), dict)] or [()]
    if isinstance(spoken := config.get("thinker_config"), dict):
        decoders = [("thinker_config", name) for name in TEXT[:3] if isinstance(spoken.get(name), dict)] or [()]
    for at in decoders:
        for key, value in NEWER.items():
            yield Change((*at, key), "newer", _put(config, (*at, key), value))


def fault_of(change: Change, plain: Model) -> str:
    """What is wrong with how a change is read or refused; empty where nothing is."""
    try:
        found = read(change.config)
    except InputError as error:
        text = str(error)
        if "\n" in text or not text.startswith("changed.json"):
            return f"no line of its own: {text}"
        known = changes_nothing(change.leaf) or change.leaf in ("num_hidden_layers", "num_layers", *TEXT, "layer_types")
        if change.of_decoder and not known and change.kind not in NONE and change.leaf not in text:
            return f"not named: {text}"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not change.of_decoder:
        return ""
    if change.kind == "newer":
        return "a newer field is read past"
    if change.kind in NONE or change.kind in ("shorter", "longer", "fraction") or changes_nothing(change.leaf):
        return ""
    if found != plain:
        return "an odd value is read as something else"
    return ""


def faults(config: dict[str, Any], most: int | None = None, seed: int = 0) -> list[str]:
    """What is wrong with how a configuration's changes are read; of some of them, where there is a limit."""
    plain, every = read(config), list(changes(config))
    chosen = every if most is None or most >= len(every) else random.Random(seed).sample(every, most)
    found = ((one, fault_of(one, plain)) for one in chosen)
    return [f"{'.'.join(map(str, one.path))} {one.kind}: {fault:.160}" for one, fault in found if fault]


def main() -> None:
    """Try the changes of some of the configurations."""
    share, of = map(int, sys.argv[1:])
    tried: Counter[str] = Counter()
    for index, (name, config) in enumerate(published()):
        if index % of == share:
            tried["changes"] += sum(1 for _ in changes(config))
            for fault in faults(config):
                tried["faults"] += 1
                print(f"{name}: {fault}")
    print(dict(tried), f"{len(IDLE)} groups of fields change nothing")


if __name__ == "__main__":
    main()
