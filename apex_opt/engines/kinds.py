"""Engine kinds: what `--engine` names, each from its own file of `data`.

A file holds one engine: its scheduler, whose rules it keeps to, its own time and its default settings with their
sources. Releases of an engine are kinds of their own, which take from it all that they do not say otherwise, as an
engine takes from the one it says it is like.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster.toml_reader import read_toml
from apex_opt.engines.handover import HandoverTimes
from apex_opt.engines.schedulers import SCHEDULINGS, Scheduling
from apex_opt.engines.sglang import SGLANG
from apex_opt.engines.trtllm import TRTLLM
from apex_opt.engines.vllm import VLLM
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.files import expanded, there
from apex_opt.units import GIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.engines.rules import EngineRules

DATA: Final = Path(__file__).parent / "data"
ENGINES: Final[Mapping[str, EngineRules]] = MappingProxyType({rules.name: rules for rules in (VLLM, SGLANG, TRTLLM)})
"""What engines can run, by name."""

COMMON: Final = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "chunked_prefill",
    "block_size",
    "prefix_caching",
    "async_scheduling",
    "gpu_memory_utilization",
)
"""Settings that every engine has, under one name or another, with a default of its own."""

_FILE: Final = ".toml"
_LONGEST_US: Final = 10_000_000
_LONGEST_SOURCE: Final = 2_000
_FAULTS: Final = 5
_MOST_RUNS: Final = 100_000
_FARTHEST: Final = 1e6
_SWITCH: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Default:
    """What a setting is where nothing is asked for.

    Parameters
    ----------
    value : bool, int, float or str
    source : str           where that was read, or that it is assumed
    below_gib : tuple      (GiB, value) for GPUs with less memory than that, rising
    """

    value: Any
    source: str
    below_gib: tuple[tuple[float, Any], ...] = ()

    def on(self, memory_bytes: float) -> Any:
        """The value on a GPU with so much memory."""
        return next((value for gib, value in self.below_gib if memory_bytes < gib * GIB), self.value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineKind:
    """An engine, or a release of one.

    Parameters
    ----------
    name : str                 as `--engine` takes it
    scheduler : type           how it forms batches
    rules : EngineRules        what it can run
    commands : bool            whether there are commands that start it, in the words of the engine of `rules`
    own_time : mapping         what kernels do not explain, as `apex_opt.cost.engine` reads it
    defaults : mapping         settings by name: those of `COMMON` and those of its scheduler
    handover : mapping         what it takes to hand a prompt from one pool to another; empty where that is not modelled
    left_out : mapping         settings of the engine that are not simulated, by name, and what they would do
    expected : tuple or None   of a user's file, the errors it was calibrated to: figure, runs, and measured over
                               predicted, low, middle and high; None of a shipped engine
    plain : str                where its times were fitted on plans that verify drafts and form no batch ahead, the
                               kind for all others; empty where it is for these too
    """

    name: str
    scheduler: type[Scheduling]
    rules: EngineRules
    commands: bool
    own_time: Mapping[str, Any]
    defaults: Mapping[str, Default]
    handover: Mapping[str, Default]
    left_out: Mapping[str, str]
    expected: tuple[tuple[str, int, float, float, float], ...] | None = None
    plain: str = ""

    def common(self, memory_bytes: float) -> dict[str, Any]:
        """The defaults of `COMMON`, on a GPU with so much memory."""
        return {name: self.defaults[name].on(memory_bytes) for name in COMMON}

    def scheduling(self, text: str | None = None) -> Scheduling:
        """The settings that only this engine has, some as given in a text such as `name=value,name=value`.

        Raises
        ------
        UsageError, UnknownNameError    what is no such text, names no setting, or a value that the setting refuses
        """
        own = {field.name: self.defaults[field.name].value for field in fields(self.scheduler)}
        given = self._given("engine_settings", "setting", text, own)
        try:
            return self.scheduler(**own | given)
        except UsageError as error:
            if not given:
                raise
            raise UsageError(f"--engine_settings: {error}") from None

    def check_drafting(self, *, drafts: bool, ahead: bool | None) -> None:
        """Refuse what the times of an engine that always verifies drafts are not of.

        Parameters
        ----------
        drafts : bool           whether every plan that is asked about makes some
        ahead : bool or None    whether batches are asked to be formed ahead; None: as the engine does

        Raises
        ------
        UsageError
        """
        if not self.plain:
            return
        if not drafts:
            raise UsageError(
                f"--engine={self.name}: its times are of plans that verify drafts, and there are plans without here; "
                f"give --speculation such as mtp:3, or --engine={self.plain}"
            )
        if ahead:
            raise UsageError(
                f"--async_scheduling=true: the times of {self.name} are without overlap; leave it out, or give "
                f"--engine={self.plain}"
            )

    def handing_over(self, text: str | None = None) -> HandoverTimes:
        """The times of handing a prompt over, some as given in a text such as `name=value,name=value`.

        Raises
        ------
        UsageError, UnknownNameError    an engine of which they are not known; a text as for `scheduling`
        """
        if not self.handover:
            raise UsageError(
                f"--serving: how {self.name} hands prompts over to another pool is not modelled; use vllm or sglang"
            )
        own = {name: float(known.value) for name, known in self.handover.items()}
        return HandoverTimes(**own | self._given("handover", "part of a hand-over", text, own))

    def _given(self, option: str, noun: str, text: str | None, own: Mapping[str, Any]) -> dict[str, Any]:
        """What the text of an option says of some settings, each a `noun`, of the types they have."""
        given: dict[str, Any] = {}
        for part in text.split(",") if text is not None else ():
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals or not value:
                raise UsageError(f"--{option}: {part.strip()[:40]!r} is not of the form name=value")
            if name in self.left_out:
                raise UsageError(f"--{option}: {name} is not simulated; leave it out: {self.left_out[name]}")
            if not own:
                raise UsageError(f"--{option}: {self.name} has no settings of its own; leave {name[:40]!r} out")
            if name not in own:
                raise UnknownNameError(f"{noun} of {self.name}", name[:60], own)
            if name in given:
                raise UsageError(f"--{option}: {name} is given twice; give it once")
            given[name] = _read(option, name, value, own[name])
        return given


def _read(option: str, name: str, text: str, like: Any) -> Any:
    """A value of the type of another, from its text.

    Parameters
    ----------
    option, name : str    whose value it is
    text : str
    like : of the type
    """
    if isinstance(like, bool):
        if text.lower() not in _SWITCH:
            raise UsageError(f"--{option}: {name} is true or false, not {text[:40]!r}")
        return _SWITCH[text.lower()]
    try:
        return type(like)(text[:40])
    except ValueError:
        kind = "a whole number" if isinstance(like, int) else "a number"
        raise UsageError(f"--{option}: {name} is {kind}, not {text[:40]!r}") from None


def kind_names(folder: Path = DATA) -> tuple[str, ...]:
    """Every engine kind: engines by name, each followed by its releases."""
    return tuple(_read_all(folder))


def load_kind(name: str, folder: Path = DATA) -> EngineKind:
    """The engine kind of a name, or of a file whose path ends in `.toml`.

    Parameters
    ----------
    name : str
    folder : Path    with a file for each engine

    Raises
    ------
    UnknownNameError    no such engine
    InputError          a file that cannot be read, or with faults
    """
    kinds = _read_all(folder)
    if name.endswith(_FILE):
        return _calibrated(expanded(name), kinds)
    if name not in kinds:
        path = expanded(name)
        if there(path):
            kind = "a folder" if path.is_dir() else "a file whose name does not end in .toml"
            raise InputError(
                f"engine {name!r:.100} is {kind}; give a name, or a file of solve.py calibrate such as m.toml"
            )
        raise UnknownNameError("engine", name, kinds)
    return kinds[name]


def engine_like(name: str) -> str:
    """The kind that an engine is of: its own name, or what the file of a path says that it is like.

    Raises
    ------
    InputError, UnknownNameError    as `load_kind`
    """
    kind = load_kind(name)
    return str(read_toml(expanded(name), "engine")["like"]) if name.endswith(_FILE) else kind.name


def _calibrated(path: Path, kinds: Mapping[str, EngineKind]) -> EngineKind:
    """The engine kind of a user's file: the one it is like, with times of its own.

    It says `like`, in `own_time` times in microseconds and their source, and in `expected` how far figures were off
    with them; nothing else is taken from it, as what an engine can run and how it forms batches are not measured from
    outside.
    """
    table = read_toml(path, "engine")
    faults = [f"there is no {key!r:.40} in it" for key in table if key not in ("like", "own_time", "expected")]
    expected, more = _errors(table.get("expected", {}))
    faults += more
    like, own = table.get("like"), table.get("own_time", {})
    if like is None:
        raise InputError(f"engine {path}: like is missing: give one of {', '.join(kinds)}")
    if not isinstance(like, str) or like not in kinds:
        raise InputError(f"engine {path}: like = {like!r:.40} must be one of {', '.join(kinds)}")
    base, known = kinds[like], [name for name in kinds[like].own_time if name.endswith("_us")]
    for name, value in own.items() if isinstance(own, dict) else ():
        if name == "source":
            if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_SOURCE:
                faults.append(f"own_time.source must be a text of up to {_LONGEST_SOURCE:,} characters")
        elif name not in known:
            faults.append(f"own_time.{name:.40} is none of {', '.join(known)}, source")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _LONGEST_US:
            faults.append(f"own_time.{name} = {value!r:.40} must be a number from 0 to {_LONGEST_US:,} us")
    if not isinstance(own, dict) or not own:
        faults.append("own_time must be a table of times in microseconds")
    if faults:
        raise InputError(f"engine {path}: {'; '.join(faults[:_FAULTS])}")
    source = {"source": own.get("source", f"given: {path.name}")}
    times = MappingProxyType({**base.own_time, **own, **source})
    return replace(base, name=path.name, own_time=times, expected=expected)


def _errors(table: Any) -> tuple[tuple[tuple[str, int, float, float, float], ...], list[str]]:
    """The errors that a user's file states, and its faults: by figure the runs, and measured over predicted."""
    if not isinstance(table, dict):
        return (), ["expected must be a table of figures"]
    found: list[tuple[str, int, float, float, float]] = []
    faults: list[str] = []
    for figure, entry in table.items():
        row = entry if isinstance(entry, dict) else {}
        runs, ratios = row.get("runs", 0), [row.get(name) for name in ("low", "middle", "high")]
        told = [float(one) for one in ratios if isinstance(one, int | float) and not isinstance(one, bool)]
        good = type(runs) is int and 2 <= runs <= _MOST_RUNS and len(told) == 3 == len(row) - 1
        if not good or not 0 < told[0] <= told[1] <= told[2] < _FARTHEST:
            faults.append(
                f"expected.{figure:.40} must have runs, a whole number from 2 to {_MOST_RUNS:,}, and low, middle and "
                f"high, rising numbers above 0 and below {_FARTHEST:g}"
            )
        else:
            found.append((figure, int(runs), told[0], told[1], told[2]))
    return tuple(found), faults


@lru_cache(maxsize=4)
def _read_all(folder: Path) -> dict[str, EngineKind]:
    """Engine kinds by name, those that others are like first."""
    tables = {path.stem: read_toml(path, "engine") for path in sorted(folder.glob("*.toml"))}
    kinds: dict[str, EngineKind] = {}
    for name in sorted(tables, key=lambda name: "like" in tables[name]):
        kinds |= _kinds(name, tables[name], kinds, folder / f"{name}.toml")
    if not kinds:
        raise InputError(f"engines: no file in {folder}")
    return kinds


def _kinds(name: str, table: dict[str, Any], others: Mapping[str, EngineKind], path: Path) -> dict[str, EngineKind]:
    """An engine and its releases, from its file."""
    try:
        base = others[table["like"]] if "like" in table else None
        kinds = {name: _kind(name, table, base)}
        for release, changes in table.get("releases", {}).items():
            kinds[release] = _kind(release, changes, kinds[name])
    except KeyError as error:
        raise InputError(f"engine {path}: {name} lacks {error}, or names what there is none of") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"engine {path}: {name} has a value of the wrong form ({error})") from None
    return kinds


def _kind(name: str, table: dict[str, Any], base: EngineKind | None) -> EngineKind:
    """An engine kind by what is said of it, the rest as of the one it is like."""
    scheduler = SCHEDULINGS[table["scheduler"]] if base is None or "scheduler" in table else base.scheduler
    said, times = _defaults(table.get("defaults", {})), _defaults(table.get("handover", {}))
    defaults = (dict(base.defaults) if base is not None else {}) | said
    known = (*COMMON, *(field.name for field in fields(scheduler)))
    if unknown := [setting for setting in said if setting not in known]:
        raise ValueError(f"defaults names {unknown[0]!r:.40}; known: {', '.join(known)}")
    # An engine that forms batches by other rules is not known to hand prompts over as the one it is like.
    alike = base if base is not None and "scheduler" not in table else None
    return EngineKind(
        name=name,
        scheduler=scheduler,
        rules=ENGINES[table["rules"]] if base is None or "rules" in table else base.rules,
        commands=bool(table["commands"] if base is None or "commands" in table else base.commands),
        own_time=MappingProxyType((dict(base.own_time) if base is not None else {}) | dict(table.get("own_time", {}))),
        defaults=MappingProxyType({setting: defaults[setting] for setting in known}),
        handover=MappingProxyType((dict(alike.handover) if alike is not None else {}) | times),
        left_out=MappingProxyType((dict(alike.left_out) if alike is not None else {}) | table.get("left_out", {})),
        plain=table.get("plain", ""),
    )


def _defaults(table: Mapping[str, Any]) -> dict[str, Default]:
    """Settings of a table, each with its source."""
    return {
        setting: Default(
            value=entry["value"],
            source=entry["source"],
            below_gib=tuple((gib, value) for gib, value in entry.get("below_gib", ())),
        )
        for setting, entry in table.items()
    }
