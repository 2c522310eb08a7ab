"""The one gate between what is given and typed values: arguments as fields of dataclasses, each read by its option.

A field is an argument of the Python function and an option of the command line. Its type says which values it takes,
with `Param` for a range or the ending of a file's name; its line in the docstring of the dataclass says what it means.
`--help`, the names that are known and every check follow from these. Values are read strictly, never repaired silently.
Nothing heavy is imported here, so that `--help` and a mistyped option answer at once.
"""

# The gate reads annotations as they are evaluated here: no `from __future__ import annotations`.

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.figures.registry import goals_help, latencies_help, objectives_help
from apex_opt.schema import lines_of

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps of it are done, and of how many; 0 where that is not known."""

REQUIRED: Final[Any] = MISSING
"""Default of an argument that must be given."""

LONGEST_TEXT: Final = 4096
"""Characters of one value: as long as a path may be."""

GONE: Final = {"policy": "how batches are formed goes with the engine: --engine=orca or --engine=static"}
"""Arguments that there were, and what to say in their place."""

_WHOLE: Final = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SWITCH: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Param:
    """Which values an argument may have, beyond what its type says.

    Parameters
    ----------
    least, most : number   range of an int or float, both ends included
    suffix : str           how the name of a file to write must end, so that no other text is taken for one; ".a or .b"
                           for two ways
    hint : str             what to say beside a value that it cannot have
    """

    least: float = 0
    most: float = 0
    suffix: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An argument as its field describes it, and the gate for its values.

    Parameters
    ----------
    name : str             without the dashes
    text : str             what it means, as `--help` says it
    kind : type            str, int, float or bool
    default : its value where it is not given; None where that follows from others; `REQUIRED`
    param : Param
    choices : tuple        the only texts allowed; any where empty
    several : bool         a number may be several with commas between them, a text may be given several times: a tuple
                           where there are more than one
    loaded : bool          what a name stands for may be given in its place
    """

    name: str
    text: str
    kind: type[Any]
    default: Any
    param: Param
    choices: tuple[str, ...]
    several: bool
    loaded: bool

    @classmethod
    def of(cls, name: str, text: str, hint: Any, default: Any) -> Self:
        """From the type of a field, its line in the docstring and its default.

        Parameters
        ----------
        name : str       of the field
        text : str       what it means
        hint : Any       type of the field
        default : Any    the value where it is left out
        """
        base, param = get_args(hint) if get_origin(hint) is Annotated else (hint, Param())
        parts = get_args(base) if get_origin(base) not in (None, Literal) else (base,)
        plain = [part for part in parts if part in (str, int, float, bool)]
        return cls(
            name=name,
            text=text,
            kind=plain[0] if plain else str,
            default=default,
            param=param,
            choices=next((get_args(part) for part in parts if get_origin(part) is Literal), ()),
            several=any(get_origin(part) is tuple for part in parts),
            loaded=any(isinstance(part, type) and part not in (*plain, NoneType) for part in parts),
        )

    @property
    def again(self) -> bool:
        """Whether it may be given several times."""
        return self.several and self.kind is str

    @property
    def _range(self) -> str:
        return f"between {self.param.least:.10g} and {self.param.most:.10g}"

    def read(self, value: Any) -> Any:
        """A value in its type and range, from a text as typed or from a value that has its type.

        Raises
        ------
        UsageError, UnknownNameError    naming the option, the value and what is allowed
        """
        if value is self.default or (
            self.loaded and not isinstance(value, str | int | float | tuple | list | NoneType)
        ):
            return value
        if self.several and (parts := self._parts(value)):
            one = replace(self, several=False, default=MISSING)
            values = tuple(one.read(part) for part in parts)
            if self.kind is not str and len(set(values)) < len(values):
                raise UsageError(f"--{self.name}: {value!r:.60} names a value twice")
            return values if len(values) > 1 else values[0]
        if self.kind is str:
            return self._text(value)
        given = value
        if isinstance(value, str):
            value = self._spelled(value)
        if type(value) is not self.kind and not (self.kind is float and type(value) is int):
            raise UsageError(f"--{self.name}: expected {self.kind.__name__}, got {value!r:.60}")
        if self.kind is not bool and not self.param.least <= value <= self.param.most:
            raise UsageError(f"--{self.name}: {_short(f'{given}')} is not {self._range}")
        return value

    def _parts(self, value: Any) -> Sequence[Any]:
        """Values of a tuple or a list or, of numbers, of a text with commas between them; empty where it is neither."""
        if isinstance(value, str) and self.kind is not str and "," in value:
            value = [part.strip() for part in value.split(",")]
        return value if isinstance(value, tuple | list) else ()

    def _text(self, value: Any) -> str:
        """A text that is not empty, one of the choices where there are any."""
        if not isinstance(value, str):
            raise UsageError(f"--{self.name}: expected str, got {value!r:.60}")
        if not value.strip():
            raise UsageError(f"--{self.name}: needs a value, got an empty text")
        if len(value) > LONGEST_TEXT:
            raise UsageError(f"--{self.name}: {len(value):,} characters are more than the {LONGEST_TEXT:,} allowed")
        if self.choices and value not in self.choices:
            several = all(one.strip() in self.choices for one in value.split(","))
            raise UnknownNameError(f"--{self.name}", value[:60], self.choices, "one at a time" if several else "")
        suffixes = tuple(self.param.suffix.split(" or "))
        if not value.endswith(suffixes) or value in suffixes:
            raise UsageError(f"--{self.name}: expected a file name that ends in {self.param.suffix}, got {value!r:.60}")
        return value

    def _spelled(self, text: str) -> Any:
        """A text as the int, float or bool it spells exactly."""
        if self.kind is bool:
            if text.lower() not in _SWITCH:
                hint = f"; {self.param.hint}" if self.param.hint else ""
                raise UsageError(f"--{self.name}: expected true or false, got {text!r:.60}{hint}")
            return _SWITCH[text.lower()]
        pattern, expected = (_WHOLE, "a whole number") if self.kind is int else (_NUMBER, "a number")
        if not pattern.fullmatch(text):
            raise UsageError(f"--{self.name}: expected {expected} {self._range}, got {text!r:.60}")
        if len(text) > 40:
            raise UsageError(f"--{self.name}: {_short(text)} has {len(text)} digits; it must be {self._range}")
        return self.kind(text)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}..."


_SHARED: Final = {
    "{clocks}": "GPU clocks to choose from, in MHz, such as 1200,1600,1980, or all: six from half to the highest. "
    "Times and power at others than the highest follow published laws.",
    "{aims}": objectives_help(),
    "{goals}": goals_help(),
    "{latencies}": latencies_help(),
    "{plan}": "Replicas, pipeline stages, cut of attention, cut of FFN, number formats: "
    '"dp2 pp2 attn(tp2) ffn(tp2) bf16", "attn(dp4,tp2) ffn(ep8) fp8 kv=fp8"; "tp8" alone cuts both cells; '
    '"pp2[41,39]" sets the layers of each stage.',
    "{pools}": 'On several types of GPU a plan for each that is used, "TYPE: PLAN + TYPE: PLAN", such as '
    '"h100-sxm: dp2 tp4 + a100-sxm: tp8".',
}
"""What several arguments say alike."""


_OPTIONS: Final[dict[type[Any], tuple[Option, ...]]] = {}


def options_of(arguments: type[Any]) -> tuple[Option, ...]:
    """The options of a dataclass, those that must be given first."""
    if arguments in _OPTIONS:
        return _OPTIONS[arguments]
    texts = dict(lines_of(arguments))
    for word, shared in _SHARED.items():
        texts = {name: text.replace(word, shared) for name, text in texts.items()}
    named = [each for each in fields(arguments) if each.init and each.name != "progress"]
    found = [Option.of(each.name, texts.get(each.name, ""), each.type, each.default) for each in named]
    _OPTIONS[arguments] = tuple(sorted(found, key=lambda option: option.default is not REQUIRED))
    return _OPTIONS[arguments]


def check_progress(given: Any) -> None:
    """Refuse what cannot be told of progress.

    Raises
    ------
    UsageError    what is no function, or one of other arguments
    """
    try:
        inspect.signature(given).bind("", 0, 0)
    except ValueError:
        pass  # of what is built in the arguments may not be known
    except TypeError:
        raise UsageError(
            f"progress: expected a function of what is done, steps done and steps in all, got {given!r:.60}"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Arguments of a command, each read by its option; `progress` is told what is being done, or True for a bar."""

    progress: Progress | bool | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.progress is not None and not isinstance(self.progress, bool):
            check_progress(self.progress)
        for option in options_of(type(self)):
            object.__setattr__(self, option.name, option.read(getattr(self, option.name)))

    def tell(self, what: str, done: int, total: int) -> None:
        """Tell of progress, where somebody listens.

        Parameters
        ----------
        what : str     what is being done
        done : int     steps done
        total : int    steps there are; 0 where not known
        """
        if callable(self.progress):
            self.progress(what, done, total)
