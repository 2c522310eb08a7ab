"""The command line, derived from the functions of `apex_opt.api` and their arguments: parse, then run.

fire runs a command before it has looked at all its words, so its words are checked first and quoted; fire then
dispatches and renders the help; what it returns is the command's arguments, which `main` has answered afterwards.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_opt import __version__, commands
from apex_opt.commands import read
from apex_opt.described import COMMANDS, GROUPS, Command
from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.files import expanded, there
from apex_opt.gate import GONE, REQUIRED, Arguments, Option, options_of
from apex_opt.process import end_on_signals, end_undisturbed, open_streams, put
from apex_opt.shown import General, Judged, Sourced, Started
from apex_opt.usage import candidates, completion, grouped, values_of, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.commands import Result

EXIT_FAULT: Final = 1
EXIT_INFEASIBLE: Final = 3
EXIT_INTERRUPTED: Final = 130
LONGEST_ERROR: Final = 1000

CONFIG_FILES: Final = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What is read of a model's folder."""

_READ: Final = ("model", "cluster", "gpu", "trace", "profiles", "at", "source", "measured", "engine")
"""Options that may name a file or a folder to read."""

_EXAMPLES: Final = {str: "TEXT", int: "8", float: "0.9", bool: "true"}


@dataclass(frozen=True, slots=True)
class Request:
    """A command with its arguments, and how its answer is to be shown; not yet run."""

    command: str
    arguments: Arguments
    shown: General

    @property
    def saved(self) -> Path | None:
        """The folder that is to hold what starts the plan."""
        return expanded(self.shown.save) if isinstance(self.shown, Started) and self.shown.save else None


def method(name: str) -> Callable[..., Request]:
    """A command as a method with keyword-only parameters and a docstring: what fire reads to dispatch and to help."""
    command = COMMANDS[name]

    def ask(self: object, **given: Any) -> Request:
        own = {option.name for option in options_of(command.shown)}
        shown = command.shown(**{key: value for key, value in given.items() if key in own})
        rest = {key: value for key, value in given.items() if key not in own}
        return Request(name, read(command.asks, name, (), rest), shown)

    keyword = inspect.Parameter.KEYWORD_ONLY
    defaults = {o.name: inspect.Parameter.empty if o.default is REQUIRED else o.default for o in command.options}
    ask.__name__ = ask.__qualname__ = name.split()[-1]
    ask.__doc__ = _docstring(command)
    ask.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(o.name, keyword, default=defaults[o.name], annotation=o.kind) for o in command.options),
        ]
    )
    return ask


def group(name: str) -> object:
    """The commands that share a first word, as an object with a method for each."""
    members = {command.split()[1]: method(command) for command in COMMANDS if command.startswith(f"{name} ")}
    return type(name, (), {"__doc__": f"{GROUPS[name].summary}\n\n{GROUPS[name].text}", **members})()


def files_of(request: Request) -> tuple[dict[str, Path], dict[str, Path]]:
    """Files that a request is to write, and files and folders that it reads, each by option."""
    given = {
        o.name: getattr(part, o.name) for part in (request.arguments, request.shown) for o in options_of(type(part))
    }
    suffixed = [option.name for option in COMMANDS[request.command].options if option.param.suffix]
    writes = {name: expanded(given[name]) for name in suffixed if given[name] is not None}
    reads: dict[str, Path] = {}
    for name in (name for name in _READ if writes and isinstance(given.get(name), str)):
        # Of several clusters each may be a file.
        for part in (given[name], *(re.split("[,+]", given[name]) if name == "cluster" else ())):
            if there(path := expanded(part.strip())):
                read = [path]
                if name == "model":
                    # A configuration is read with what lies beside it.
                    first = path / CONFIG_FILES[0] if path.is_dir() else path
                    read = [first, *(first.with_name(file) for file in CONFIG_FILES[1:])]
                reads |= {f"{name} {file}": file for file in read}
    return writes, reads


def _docstring(command: Command) -> str:
    """Summary, text and one line per option."""
    # Not broken into lines: fire takes a line that looks like "word:" for another option.
    arguments = "\n".join(f"    {option.name}: {option.text}" for option in command.options)
    return "\n\n".join(filter(None, (command.summary, command.text, f"Args:\n{arguments}")))


def arranged(words: Sequence[str]) -> list[str]:
    """Words of a command line as fire should see them, each option once and as `--name='value'`.

    fire runs a command before it has looked at all its words, takes `1.10` for a number and `--` for its own flags. So
    names are checked first, and values are quoted: fire unquotes them and changes nothing else.

    Parameters
    ----------
    words : a command of one word or two, then `--name=value`, `--name value` or, where no other option starts with
        that letter, `-n value`; a switch alone is true; `--help` anywhere asks for help

    Raises
    ------
    UnknownNameError    a command or an option that there is not, with suggestions
    UsageError          a word without option, an option given twice or without value, a required one left out
    """
    asks = any(word in ("-h", "--help") for word in words) or list(words[:1]) == ["help"]
    named = [word for word in words if word not in ("-h", "--help", "help")]
    if not named or (named[0] in GROUPS and len(named) == 1):
        return [*named, "--", "--help"]
    name = _command(named, words)
    parts = name.split()
    if asks:
        return [*parts, "--", "--help"]
    values = _values(name, words[len(parts) :])
    missing = [o.name for o in COMMANDS[name].options if o.default is REQUIRED and o.name not in values]
    if missing:
        raise UsageError(f"{name}: needs --{missing[0]}; see solve.py {name} --help")
    return [*parts, *(f"--{name}={value!r}" for name, value in values.items())]


def _command(named: Sequence[str], words: Sequence[str]) -> str:
    """The command that the first words name, the second too where the first is a group's."""
    group = f"{named[0]} " if named[0] in GROUPS else ""
    word = named[1 if group else 0]
    known = dict.fromkeys(command.removeprefix(group).split()[0] for command in COMMANDS if command.startswith(group))
    if word.startswith("-") and (given := [word for word in words if word in known]):
        raise UsageError(f"{word!r:.60} stands before the command; write solve.py {group}{given[0]} --name=value")
    if word not in known:
        kind = f"command of {named[0]}" if group else "command"
        raise UnknownNameError(kind, word[:60], known, f"see solve.py {group}--help")
    return group + word


def _values(command: str, words: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """Option names and the texts given for them."""
    values: dict[str, str | tuple[str, ...]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or _is_value(word):
            if (place := COMMANDS[command].place) and place not in values:
                values[place] = word
                continue
            raise UsageError(f"{command}: {word!r:.60} belongs to no option; options are given as --name=value")
        if word == "--":
            raise UsageError(f"{command}: '--' has no meaning here; options are given as --name=value")
        spelling, equals, value = word.partition("=")
        option = _option(command, spelling)
        if option.name in values and not option.again:
            raise UsageError(f"--{option.name}: given twice; give it once")
        if not equals:
            if rest and _is_value(rest[0]):
                value = rest.pop(0)
            elif option.kind is bool:
                value = "true"
            else:
                raise UsageError(f"--{option.name}: needs a value, such as --{option.name}={_EXAMPLES[option.kind]}")
        before = values.get(option.name, ())
        values[option.name] = (*((before,) if isinstance(before, str) else before), value) if before else value
    return values


def _option(command: str, spelling: str) -> Option:
    """The option meant by `--name`, `--na-me` or, where only one starts with it, `-n`."""
    options = COMMANDS[command].options
    name = spelling.removeprefix("--").replace("-", "_")
    found = [option for option in options if spelling.startswith("--") and option.name == name]
    if re.fullmatch("-[a-z]", spelling):
        found = [option for option in options if option.name.startswith(spelling[1])]
    elsewhere = [other for other, one in COMMANDS.items() if any(option.name == name for option in one.options)]
    if name in GONE:
        raise UsageError(f"--{name}: there is no such option; {GONE[name]}")
    if not found and elsewhere and spelling.startswith("--"):
        who = f"{', '.join(elsewhere[:4])}{' and others' if len(elsewhere) > 4 else ''}"
        has = "has" if len(elsewhere) == 1 else "have"
        raise UsageError(f"--{name}: {command} has no such option, {who} {has}; see solve.py {command} --help")
    if len(found) != 1:
        raise UnknownNameError(
            f"option of {command}",
            spelling[:60],
            [f"--{o.name}" for o in found or options],
            f"see solve.py {command} --help",
        )
    return found[0]


def _is_value(word: str) -> bool:
    """Whether a word is a value rather than an option: a negative number is."""
    return not word.startswith("-") or word[1:2].isdigit() or word[1:2] == "."


class Commands:
    """Find the provably best parallel execution plan for serving a large language model.

    Given a model, the GPUs, the traffic and the goals: how to split the
    model over the GPUs, what that gives, and the proof that no other plan of
    the space is better. An answer takes seconds.

      solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat

    Every command has its own help: solve.py plan --help
    The release: solve.py --version
    Words completed by the shell: apex-opt --completion bash (zsh, fish)
    """


for _name in (name for name in COMMANDS if " " not in name):
    setattr(Commands, _name, method(_name))
for _name in GROUPS:
    setattr(Commands, _name, group(_name))


def main(words: list[str] | None = None) -> None:
    """Parse and run; exit with 0 (answer), 2 (usage or input), 3 (infeasible) or 1 (a fault of ours)."""
    if own := words is None:
        end_on_signals()
        words = sys.argv[1:]
    open_streams()
    try:
        code = _main(words)
    except ApexError as error:
        code = error.exit_code
        if "--debug" in words or "--debug=true" in words:
            import traceback

            traceback.print_exc()
        # What was typed may hold line breaks and be long; an error is one line.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split()))
        print(f"error: {line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + ' ...'}", file=sys.stderr)
    except OSError as error:
        if "--debug" in words:
            raise
        what = f" {error.filename}" if error.filename else ""
        print(f"error: the system refuses{what} ({error.strerror or error}); --debug shows where", file=sys.stderr)
        code = EXIT_FAULT
    except MemoryError:
        print("error: out of memory; offer fewer GPUs (--gpus), smaller batches or a shorter trace", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if own:
        end_undisturbed()
    sys.exit(code)


def _main(words: list[str]) -> int:
    if words == ["--version"]:
        put(f"apex-opt {__version__}\n")
        return 0
    if words[:1] == ["--completion"]:
        put(completion(words[1] if len(words) == 2 else ""))
        return 0
    if words[:1] == ["--complete"]:
        # What shells ask for each time that a word is completed.
        completion(words[1] if len(words) > 1 else "", "complete")
        options = {name: command.options for name, command in COMMANDS.items()}
        put("".join(f"{text}\n" for text in candidates(words[2:], options, values_of)))
        return 0
    import fire

    fire.core.Display = _show_help
    name = "apex-opt" if Path(sys.argv[0]).stem == "apex-opt" else "solve.py"
    request = fire.Fire(Commands(), command=arranged(words), name=name, serialize=_hidden)
    assert isinstance(request, Request), "fire calls a method of Commands or shows help and exits"
    _check_files(request)
    from apex_opt.report.progress import Progress

    saved = request.saved
    more = {} if saved is None else {"emit": True}
    with Progress() as progress:
        result = commands.COMMANDS[request.command].run(replace(request.arguments, progress=progress, **more))
    written = [option.name for option in options_of(type(request.shown)) if option.param.suffix]
    files = {name: path for name in written if (path := getattr(request.shown, name)) is not None}
    if result.found and (lacking := [name for name in files if name not in result.written]):
        raise UsageError(
            f"--{lacking[0]}: is of one pool on GPUs of one type, and here there may be several; leave it out"
        )
    try:
        put(_form(request, result))
        if request.shown.format == "csv" and not result.found and (why := getattr(result.document, "reason", None)):
            print(f"{result.status}: {why}", file=sys.stderr)  # rows have no place for it
    finally:
        # An answer that cannot be shown is no reason to lose the files, nor the other way round.
        with progress:
            result.write(**(ready := {name: path for name, path in files.items() if name in result.written}))
        for name, path in ready.items():
            print(f"{name} written to {path}", file=sys.stderr)
    if saved is not None and result.found:
        from apex_opt.launch.saved import save

        names = ("model", "cluster", "engine")
        given = {name: value for name in names if isinstance(value := getattr(request.arguments, name), str)}
        save(result.to_dict(), saved, given, result.traffic)
    if not result.holds:
        return EXIT_FAULT  # a certificate that does not hold is a fault of ours, whatever the answer
    return 0 if result.found else EXIT_INFEASIBLE


def _form(request: Request, result: Result) -> str:
    """An answer in the form asked for."""
    shown = request.shown
    if shown.format == "json":
        return result.to_json()
    if shown.format == "csv":
        return result.to_csv()
    from apex_opt.report.layout import page_width
    from apex_opt.report.onward import onward

    page = result.page(
        sources=isinstance(shown, Sourced) and shown.sources, limit=shown.limit if isinstance(shown, Judged) else 0
    )
    line = onward(request.command, result.to_dict(), found=result.found, saved=request.saved)
    return f"{page.rstrip()}\n\n{wrapped(line, page_width())}\n" if line else page


def _check_files(request: Request) -> None:
    """Look at what options need before any work is done for them: files to write, and what draws pictures."""
    if request.shown.format == "csv" and getattr(request.arguments, "emit", False):
        raise UsageError(
            "--emit: commands are no rows, and --format=csv prints nothing else; leave --format out, use json, or "
            "write them with --save=DIR"
        )
    if request.saved is not None:
        from apex_opt.launch.saved import check_new

        check_new(request.saved)
        if "," in str(getattr(request.arguments, "cluster", "")):
            raise UsageError("--save: is of one cluster, and --cluster names several; give one of them")
    outputs, inputs = files_of(request)
    for option, path in outputs.items():
        if request.saved is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(request.saved)):
            raise UsageError(f"--{option}={path}: is in the folder that --save writes; name a path outside it")
    plans = getattr(request.arguments, "plan", None)
    single = [name for name in ("requests", "timeline") if name in outputs] + ["save"] * (request.saved is not None)
    if isinstance(plans, tuple) and single:
        raise UsageError(
            f"--{single[0]}: is for one plan, and {len(plans)} are given; leave it out, or give one --plan"
        )
    if request.saved is not None:
        from apex_opt.launch.saved import check_started

        check_started(request.saved, request.arguments)
    if outputs:
        from apex_opt.outputs import check_outputs

        check_outputs(outputs, inputs)
    for option in {"plot", "report"} & set(outputs):
        from apex_opt.report.picture import drawer

        drawer(option)


def _show_help(lines: Iterable[str], out: object) -> None:
    """Help goes to stdout as it is: fire would start a pager, or print to stderr."""
    put(wrapped(grouped("\n".join(lines))) + "\n")


def _hidden(_: object) -> None:
    """Keep fire from printing the request."""
