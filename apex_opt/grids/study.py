"""What a study asks: a command, options that are fixed, and axes along which others vary, read from a TOML file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Final

from apex_opt import __version__
from apex_opt.cluster import cluster_names
from apex_opt.cluster.toml_reader import read_toml
from apex_opt.commands import COMMANDS, read
from apex_opt.errors import ApexError, InputError, UnknownNameError
from apex_opt.gate import REQUIRED, options_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from apex_opt.gate import Arguments

ASKED: Final = ("plan", "energy", "capacity", "pareto")
"""Commands that a study can ask."""

MOST_POINTS: Final = 1_000_000
"""Points of the largest study: by then they take days on a hundred cores."""

Options = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A command and the grid of its options.

    Parameters
    ----------
    command : str         one of `ASKED`
    asks : type           of its arguments
    fixed : mapping       options of every point
    axes : mapping        lists of values of the others; the last one varies first
    """

    command: str
    asks: type[Arguments]
    fixed: Mapping[str, Any]
    axes: Mapping[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return prod(map(len, self.axes.values()))

    def points(self) -> Iterator[Options]:
        """The options along the axes of every point, in order."""
        for values in product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))

    def ask(self, point: Options) -> Arguments:
        """The arguments of the command at a point."""
        return read(self.asks, self.command, (), {**self.fixed, **point})

    @property
    def digest(self) -> str:
        """What tells this study from others: what it asks, and the release that answers."""
        told = [self.command, dict(self.fixed), list(self.axes.items()), __version__]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_study(path: Path) -> Study:
    """A study as its file has it, every option and every value of it checked by itself.

    Raises
    ------
    InputError, UsageError, UnknownNameError    naming the file, the option and the value
    """
    told = read_toml(path, "study")
    for key in told:
        if key not in ("command", "fixed", "axes"):
            raise UnknownNameError(f"key of study {path}", key[:60], ("command", "fixed", "axes"))
    command, fixed, axes = told.get("command"), told.get("fixed", {}), told.get("axes", {})
    if not isinstance(command, str):
        raise InputError(f'{path}: needs command = "NAME", one of {", ".join(ASKED)}')
    if command not in ASKED:
        raise UnknownNameError(f"command of study {path}", command[:60], ASKED)
    for name, part in (("fixed", fixed), ("axes", axes)):
        if not isinstance(part, dict):
            raise InputError(f"{path}: {name} is {part!r:.60}; write it as a table, [{name}]")
    if both := [name for name in axes if name in fixed]:
        raise InputError(f"{path}: {both[0]} is both in [fixed] and in [axes]; leave it out of one of them")
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: [axes] {name} is {values!r:.60}; give a list of values, such as {name} = [1, 2]")
    study = Study(
        command=command,
        asks=COMMANDS[command].asks,
        fixed={name: _given(value) for name, value in fixed.items()},
        axes={name: tuple(map(_given, values)) for name, values in axes.items()},
    )
    if len(study) > MOST_POINTS:
        raise InputError(f"{path}: {len(study):,} points are more than the {MOST_POINTS:,} allowed; shorten an axis")
    _check(study, path)
    if not axes:
        raise InputError(f"{path}: has no [axes]; give a list of values for one option or more, such as rate = [1, 2]")
    return study


def _given(value: Any) -> Any:
    """A value as Python takes it: several are a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _check(study: Study, path: Path) -> None:
    """Refuse options that there are not, and values that their options cannot have."""
    options = {option.name: option for option in options_of(study.asks)}
    for table, given in (("fixed", {name: (value,) for name, value in study.fixed.items()}), ("axes", study.axes)):
        for name, values in given.items():
            if name in ("workers", "ray"):
                raise InputError(
                    f"{path}: [{table}] {name} is for the whole study; leave it out and give --{name} to study itself"
                )
            if name not in options:
                raise UnknownNameError(f"option of {study.command} in [{table}] of study {path}", name[:60], options)
            try:
                known = [options[name].read(value) for value in values]
            except ApexError as error:
                raise InputError(f"{path}: [{table}] {error}") from None
            if twice := [value for place, value in enumerate(known) if value in known[:place]]:
                raise InputError(f"{path}: [{table}] {name} has {twice[0]!r:.60} twice; name it once")
            if name == "cluster" and (several := [value for value in known if len(cluster_names(value)) > 1]):
                raise InputError(
                    f"{path}: [{table}] cluster {several[0]!r:.60} is several; give each as a value of [axes]"
                )
    for option in options.values():
        if option.default is REQUIRED and option.name not in {**study.fixed, **study.axes}:
            raise InputError(f"{path}: {study.command} needs {option.name}; give it in [fixed] or in [axes]")
