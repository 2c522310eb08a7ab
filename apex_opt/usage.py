"""How the command line explains itself: help with its options in groups, and completion in shells."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final, get_args

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.gate import Option

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "MOST USED": (
        *("plan", "model", "cluster", "trace", "rate", "slo", "objective", "weights", "gpus", "engine"),
        *("emit", "save", "format", "report"),
    ),
    "GPUS AND THEIR FIGURES": ("busy", "down", "clock", "price", "profiles", "expert_routing"),
    "TRAFFIC": ("trace_unit", "trace_block", "seed"),
    "ENGINE": (
        *("runnable", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "kv"),
        *("gpu_memory_utilization", "chunked_prefill", "prefix_caching", "async_scheduling", "speculation"),
        *("acceptance", "engine_settings"),
    ),
    "REPLICAS AND POOLS": ("serving", "routing", "shares", "overlap", "handover"),
    "SEARCH AND ANSWER": ("top", "time_limit", "check", "robust", "sources", "debug"),
}
"""Options that several commands have, in the order in which help tells of them; a command's own come after the first
group."""
_OWN: Final = "OF THIS COMMAND"
_FLAG: Final = re.compile(r"^    (?:-\w, )?--(\w+)=", re.MULTILINE)
_UNSAID: Final = re.compile(r"^        (?:Type: Optional\[\w+\]\n        Default: None|Type: \w+)\n", re.MULTILINE)

SHELLS: Final[Mapping[str, str]] = {
    "bash": """\
_apex_opt() {
    local IFS=$'\\n'
    COMPREPLY=($(apex-opt --complete bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]-} == *[=:] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _apex_opt apex-opt
""",
    "zsh": """\
#compdef apex-opt
_apex_opt() {
    local -a found open
    found=("${(@f)$(apex-opt --complete zsh "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    (( $#found )) || { _files; return }
    open=(${(M)found:#*[=:]})
    compadd -Q -S '' -a open
    found=(${found:#*[=:]})
    compadd -Q -a found
}
compdef _apex_opt apex-opt
""",
    "fish": """\
complete -c apex-opt -a '(apex-opt --complete fish (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}
"""What a shell reads to complete the words of a command."""


def wrapped(text: str, width: int = 80) -> str:
    """Help with its long lines broken, each at its own indentation."""
    lines = []
    for line in text.splitlines():
        if line.lstrip().startswith("solve.py ") and "--" in line:
            lines.append(line)  # a command to copy
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def grouped(text: str) -> str:
    """Help as fire writes it, with its flags in groups and without what their values already show.

    fire tells of `-h` for an option where no other starts with that letter; here `-h` asks for help.
    """
    head, heading, flags = text.replace("    -h, --", "    --").partition("\nFLAGS\n")
    if not heading:
        return head
    starts = [match.start() for match in _FLAG.finditer(flags)]
    blocks: dict[str, str] = {}
    for start, end in zip(starts, [*starts[1:], len(flags)], strict=True):
        match = _FLAG.match(flags, start)
        assert match is not None
        blocks[match[1]] = _UNSAID.sub("", flags[start:end].rstrip() + "\n")
    parts = [head.rstrip()]
    for title, names in _titled(blocks):
        parts += [f"\n{title}", *(blocks[name].rstrip() for name in names)]
    return "\n".join(parts)


def _titled(options: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Options by group: the most used, those of a command alone, then the other groups; empty ones left out."""
    known = {name for names in GROUPS.values() for name in names}
    given = list(options)
    first, *others = GROUPS
    titled = [
        (first, [name for name in GROUPS[first] if name in given]),
        (_OWN, [name for name in given if name not in known]),
        *((title, [name for name in GROUPS[title] if name in given]) for title in others),
    ]
    return [(title, names) for title, names in titled if names]


def completion(shell: str, option: str = "completion") -> str:
    """The script that completes `apex-opt` in a shell.

    Raises
    ------
    UsageError    a shell that there is none for, with the name of the option that asks
    """
    if shell not in SHELLS:
        raise UsageError(f"--{option}: words are completed in {', '.join(SHELLS)}, not in {shell!r:.40}")
    return SHELLS[shell]


def values_of(option: str) -> Iterable[str]:
    """Names that an option may be given, as far as they can be listed without reading much; `draft:` goes on."""
    return _NAMES[option]() if option in _NAMES else ()


def _models() -> Iterable[str]:
    from apex_opt.ir.registry import model_names

    return model_names()


def _gpus() -> Iterable[str]:
    from apex_opt.cluster import list_gpus

    return list_gpus()


def _clusters() -> Iterable[str]:
    from apex_opt.cluster import list_presets

    return *list_presets(), *(f"8x{gpu}" for gpu in _gpus())


def _engines() -> Iterable[str]:
    from apex_opt.engines import kind_names

    return kind_names()


def _traces() -> Iterable[str]:
    from apex_opt.workload.readers import list_traces

    return [name for name, _ in list_traces()]


def _weights() -> Iterable[str]:
    from apex_opt.ir.formats import FORMATS

    return FORMATS


def _caches() -> Iterable[str]:
    from apex_opt.ir.formats import KV_BYTES

    return KV_BYTES


def _routers() -> Iterable[str]:
    from apex_opt.plans.routing import ROUTINGS

    return ROUTINGS


def _figures() -> Iterable[str]:
    from apex_opt.figures.registry import names

    return names()


def _serving() -> Iterable[str]:
    from apex_opt.plans.deployment import Serving

    return get_args(Serving)


def _drafts() -> Iterable[str]:
    from apex_opt.plans.speculation import METHODS

    return "none", *(f"{method}:" for method in METHODS)


def _settings() -> Iterable[str]:
    from dataclasses import fields

    from apex_opt.engines import kind_names, load_kind

    return dict.fromkeys(f"{field.name}=" for name in kind_names() for field in fields(load_kind(name).scheduler))


_NAMES: Final[Mapping[str, Callable[[], Iterable[str]]]] = {
    "model": _models,
    "cluster": _clusters,
    "gpu": _gpus,
    "engine": _engines,
    "engine_settings": _settings,
    "trace": _traces,
    "weights": _weights,
    "kv": _caches,
    "routing": _routers,
    "objective": _figures,
    "serving": _serving,
    "speculation": _drafts,
}


def candidates(
    words: Sequence[str], commands: Mapping[str, Sequence[Option]], values: Callable[[str], Iterable[str]]
) -> list[str]:
    """What the last of the words may become; none where a file may stand or nothing is known.

    Parameters
    ----------
    words : after the name of the program; bash takes `--name=value` apart at its `=`
    commands : options of each, which may be of two words
    values : names that an option may be given, by the name of the option
    """
    joined = _joined(words)
    *before, last = joined or [""]
    names = [word for word in before if not word.startswith("-")]
    command = next((c for n in (2, 1) if (c := " ".join(names[:n])) in commands), None)
    if command is None:
        stem = "".join(f"{name} " for name in names)
        nexts = dict.fromkeys(c[len(stem) :].split()[0] for c in commands if c.startswith(stem))
        return [word for word in nexts if word.startswith(last)]
    option, equals, begun = last.partition("=")
    if not equals and before and before[-1].startswith("--") and "=" not in before[-1] and not last.startswith("-"):
        option, begun = before[-1], last
    elif not equals:
        flags = (word for word in before if word.startswith("--"))
        given = {flag.partition("=")[0].removeprefix("--").replace("-", "_") for flag in flags}
        return [f"--{o.name}=" for o in commands[command] if o.name not in given and f"--{o.name}".startswith(last)]
    name = option.removeprefix("--").replace("-", "_")
    known = next((o for o in commands[command] if o.name == name), None)
    if known is None:
        return []
    texts = known.choices or (("true", "false") if known.kind is bool else values(name))
    side = begun.rfind("/") + 1 if name == "routing" else 0  # of pools, before prefill and before decode instances
    at = max(begun.rfind(",") + 1, side)
    named = [one.partition("=")[0] for one in begun[side:at].split(",")]
    fitting = (text for text in map(str, texts) if text.startswith(begun[at:]) and text.removesuffix("=") not in named)
    found = [f"{begun[:at]}{text}" for text in fitting]
    whole = equals and "=" not in words[-2:]  # the shell completes the whole word, not what is behind its `=`
    return [f"{option}={text}" for text in found] if whole else found


def _joined(words: Sequence[str]) -> list[str]:
    """Words with those put together that bash takes apart at `=`."""
    joined: list[str] = []
    for word in words:
        if joined and (word == "=" or (joined[-1].endswith("=") and joined[-1].startswith("--"))):
            joined[-1] += word
        else:
            joined.append(word)
    return joined
