"""The command line, derived from the functions of `apex_opt.api` and their arguments: parse, then run.

fire runs a command before it has looked at all its words, so its words are checked first and quoted; fire then
dispatches and renders the help; what it returns is the command's arguments, which `main` has answered afterwards.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_opt import __version__, api, commands
from apex_opt.arguments import Drawn, Front, General, Judged, Placed, Scored, Sourced, Started, StudyAsk
from apex_opt.commands import read
from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.files import expanded, there
from apex_opt.gate import GONE, REQUIRED, Arguments, Option, options_of
from apex_opt.process import end_on_signals, end_undisturbed, open_streams, put
from apex_opt.usage import candidates, completion, grouped, values_of, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

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


_TEXTS: Final[Mapping[str, tuple[type[General], str]]] = {
    "plan": (
        Started,
        "For example:\n\n"
        "  solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat\n"
        '  solve.py plan --slo="ttft_p95<=500ms,tpot_p95<=50ms" --objective=energy\n'
        "  solve.py plan --model=./config.json --weights=bf16,fp8 --format=json\n\n"
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
    ),
    "energy": (
        Started,
        "Over plans, numbers of GPUs, formats, limits of a batch and clocks; the plan with the best latency "
        "within the same goals is shown beside it. For example:\n\n"
        '  solve.py energy --slo="ttft_p95<=500ms,tpot_p95<=50ms" --weights=bf16,fp8\n'
        '  solve.py energy --slo="e2e_p95<=30s" --clock=1200,1600,1980\n\n'
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
    ),
    "pareto": (
        Front,
        "For example:\n\n"
        "  solve.py pareto --objective=e2e_mean,energy\n"
        '  solve.py pareto --objective=ttft_p95,tpot_p95,energy --slo="e2e_p95<=30s" --plot=front.png\n\n'
        "The front is exact: a plan is left out only where another is proved to beat it. Exit code: 0 with a front, 3 "
        "where no plan is feasible, 2 for bad input.",
    ),
    "explain": (
        Sourced,
        "For example:\n\n"
        "  solve.py explain --model=llama-3.1-70b --cluster=1xh100-sxm\n"
        '  solve.py explain --slo="ttft_p95<=60ms"\n'
        '  solve.py explain --plan="dp2 tp4"\n\n'
        "Where nothing fits: the fewest constraints that clash, with numbers, and the cheapest changes that were "
        "solved and found feasible. Exit code: 0 where a plan fits, 3 where none does, 2 for bad input.",
    ),
    "simulate": (
        Scored,
        "For example:\n\n"
        '  solve.py simulate --plan=tp8 --trace="poisson:rate=8,n=2000"\n'
        '  solve.py simulate --plan="dp2 attn(tp4) ffn(tp4) fp8" --slo="tpot_p95<=30ms"\n'
        '  solve.py simulate --plan=tp8 --plan="dp2 tp4"\n\n'
        "Of several plans it says where time, energy and memory differ. Exit code: 0 with the figures, goals met or "
        "not; 3 where no plan can run; 2 for bad input.",
    ),
    "place": (
        Placed,
        "For example:\n\n"
        '  solve.py place --plan="dp2 tp8" --cluster=4xdgx-h100 --busy="node0:0-3,node1:5"\n'
        "  solve.py place --plan=tp4 --cluster=server-8xl40s --model=llama-3.1-8b --within=socket\n"
        '  solve.py place --plan="dp2 tp4" --lose=node0:3 --rankfile=ranks.txt\n\n'
        "No other placement is better, which is proven. Exit code: 0 with a placement, 3 where the plan does not fit, "
        "2 for bad input.",
    ),
    "capacity": (
        Started,
        "For example:\n\n"
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms"\n'
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms" --rate=4\n'
        '  solve.py capacity --plan=tp8 --slo="tpot<=50ms@99%" --resolution=0.01\n\n'
        "A rate is judged by the trace repeated, until the answer no longer depends on how long it runs: lengths in "
        "their order, arrivals drawn anew (looped where recorded). Exit code: 0 with a rate or a plan, 3 where no plan "
        "meets the goals, 2 for bad input.",
    ),
    "study": (
        General,
        "For example:\n\n"
        "  solve.py study study.toml --dry_run\n"
        "  solve.py study study.toml --workers=8\n"
        "  solve.py study study.toml --ray=10.0.0.1:6379 --target=results --format=csv\n\n"
        "The same command again goes on where it was. Exit code: 0 with an answer at any point, 3 where none has one, "
        "2 for bad input.",
    ),
    "validate": (
        Judged,
        "For example:\n\n"
        "  solve.py validate --measured=runs/llama-3.1-8b.json.gz\n"
        "  solve.py validate --measured=runs --format=json\n"
        "  solve.py validate --measured=runs --plot=errors.png\n"
        "  solve.py validate --measured=result.json --plan=tp1 --model=llama-3.1-8b --cluster=1xh200-sxm\n\n"
        "Exit code: 0 where a run was predicted, 3 where none could be, 2 for bad input.",
    ),
    "calibrate": (
        General,
        "For example:\n\n"
        "  solve.py calibrate --measured=a.json --model=llama-3.1-8b --cluster=1xh200-sxm --plan=tp1 --out=m.toml\n"
        "  solve.py plan --engine=m.toml\n"
        "  solve.py calibrate --hold=conv,lmsys\n\n"
        "Takes what vllm bench serve, sglang.bench_serving, guidellm and aiperf save, one load or better several. "
        "Times that the runs cannot tell stay as they were, with the reason. Exit code: 0 with times that are nearer, "
        "3 where a fit brings nothing and nothing is written, 2 for bad input.",
    ),
    "profile show": (
        General,
        "For example:\n\n"
        "  solve.py profile show\n"
        "  solve.py profile show --gpu=h200-sxm\n\n"
        "Every table is read and checked. Exit code: 0, or 2 where one is faulty.",
    ),
    "profile distill": (
        General,
        "For example:\n\n"
        "  pip install 'apex-opt[distill]'\n"
        "  solve.py profile distill --target=profiles\n\n"
        "Rows that cannot be believed are dropped, those that follow from their neighbours left out; both are counted, "
        "with the error that makes. Equal input gives equal files. Exit code: 0, or 2 without the package or pyarrow.",
    ),
    "profile import": (
        General,
        "For example:\n\n"
        "  solve.py profile import --kind=apex --source=apex_plus --gpu=h100-sxm\n"
        "  solve.py profile import --kind=vidur --source=vidur/data/profiling --gpu=a100-sxm\n"
        "  solve.py plan --profiles=profiles --cluster=8xa100-sxm\n\n"
        "Exit code: 0 with a folder written, 2 for files that are no such tables.",
    ),
    "profile collect": (
        General,
        "For example:\n\n"
        "  solve.py profile collect --quick\n"
        "  solve.py profile collect --ops=gemm,attention --target=profiles\n"
        "  solve.py plan --profiles=profiles\n\n"
        "Needs torch with CUDA; takes vLLM's kernels where vllm is installed, else torch's own, and reads the energy "
        "counter where pynvml is. Estimated to take half an hour, with --quick two minutes. Exit code: 0 with a folder "
        "written, 2 without a GPU or torch.",
    ),
    "profile fit": (
        General,
        "For example:\n\n"
        "  solve.py profile fit --measured=runs\n"
        "  solve.py profile fit --measured=runs/sglang.csv --engine=sglang --format=json\n\n"
        "Prints the engine's own time for its file with the errors before and after, and the power table for the card "
        "of each GPU whose runs have energies. Writes no file. Every run is simulated some sixty times. "
        "Exit code: 0, or 2 where no run of the engine can be predicted.",
    ),
    "cluster show": (
        Drawn,
        "For example:\n\n"
        "  solve.py cluster show --cluster=2xdgx-h100\n"
        '  solve.py cluster show --cluster=mine.toml --busy="node0:0-3,node2:1" --down=node1\n'
        "  solve.py cluster show --cluster=server-8xl40s --plot=wiring.svg\n\n"
        "Presets: cloud-8xa100, cloud-8xh100, cloud-8xl40s, dgx-a100, dgx-b200, dgx-b300, dgx-h100, dgx-h200, "
        "nvl72-gb200, server-4xv100, server-8xl40s. Exit code: 0, or 2 for bad input.",
    ),
    "cluster import": (
        General,
        "For example:\n\n"
        "  nvidia-smi topo -m > topo.txt\n"
        "  solve.py cluster import --source=topo.txt --gpu=h100-sxm --target=mine.toml\n"
        "  solve.py cluster show --cluster=mine.toml\n\n"
        "A list has a line NAME GPUS TYPE for every node, as in 'worker-1 8 dgx-h100'; the type is a GPU or a preset. "
        "Exit code: 0, or 2 for bad input.",
    ),
    "models": (
        General,
        "For example:\n\n"
        "  solve.py models\n"
        "  solve.py models --supports=checkpoints/mine/config.json\n\n"
        "Exit code: 0, or 3 for a configuration that is not read.",
    ),
    "clusters": (General, ""),
    "traces": (General, ""),
}
"""Of every command how its answer is shown, and what its help says with examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: what it does in a line, more on it with examples, its arguments and how its answer is shown."""

    summary: str
    text: str
    asks: type[Arguments]
    shown: type[General]

    @property
    def options(self) -> tuple[Option, ...]:
        """All that may be given."""
        return *options_of(self.asks), *options_of(self.shown)

    @property
    def place(self) -> str | None:
        """The option whose value may be given alone, as in `study study.toml`."""
        return "study" if self.asks is StudyAsk else None

    def option(self, name: str) -> Option:
        """The option of this name."""
        return next(option for option in self.options if option.name == name)


COMMANDS: Final[Mapping[str, Command]] = {
    name: Command(
        summary=(getattr(api, name.replace(" ", "_")).__doc__ or "").partition("\n")[0],
        text=text,
        asks=commands.COMMANDS[name].asks,
        shown=shown,
    )
    for name, (shown, text) in _TEXTS.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Commands that share their first word: what they are about in a line, more on it with examples."""

    summary: str
    text: str


GROUPS: Final[Mapping[str, Group]] = {
    "cluster": Group(
        summary="Single GPUs of a cluster and their wiring: show, import.",
        text="A cluster is more than so many GPUs: what a transfer crosses depends\n"
        "on which two they are, and some may be taken. These commands show it:\n\n"
        "  solve.py cluster show --cluster=2xdgx-h100\n"
        "  solve.py cluster import --source=topo.txt --gpu=h100-sxm\n\n"
        "Every command has its own help: solve.py cluster show --help",
    ),
    "profile": Group(
        summary="Measured tables of accelerators: show, distill, import, collect, fit.",
        text="Times come from tables of single operations measured on an\n"
        "accelerator. These commands list those that ship and make more:\n\n"
        "  solve.py profile show\n"
        "  solve.py profile collect --target=profiles\n"
        "  solve.py plan --profiles=profiles\n\n"
        "Every command has its own help: solve.py profile show --help",
    ),
}
"""First words of the commands of two words."""


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
    finally:
        # An answer that cannot be shown is no reason to lose the files, nor the other way round.
        with progress:
            result.write(**{name: path for name, path in files.items() if name in result.written})
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
    if request.saved is not None:
        from apex_opt.launch.saved import check_new

        check_new(request.saved)
        if "," in str(getattr(request.arguments, "cluster", "")):
            raise UsageError("--save: is of one cluster, and --cluster names several; give one of them")
    outputs, inputs = files_of(request)
    plans = getattr(request.arguments, "plan", None)
    if isinstance(plans, tuple) and (asked := [name for name in ("requests", "timeline") if name in outputs]):
        raise UsageError(f"--{asked[0]}: is for one plan, and {len(plans)} are given; leave it out, or give one --plan")
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
