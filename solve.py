"""Command line of apex_opt: parse, then run. Everything it does lives in `apex_opt` and `formulations`.

fire runs a command before it has looked at all its words, so commands only note what was asked. `apex_opt.options`
holds the commands with their options and checks the words first; fire then dispatches and renders the help; `main`
runs the request afterwards.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_opt.errors import ApexError
from apex_opt.options import COMMANDS, LARGEST_SEARCH, Request, arranged, method, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from apex_opt.plan.plan import Plan
    from apex_opt.report import Progress
    from apex_opt.search import Answer, Question

EXIT_INFEASIBLE = 3
EXIT_INTERRUPTED = 130
LONGEST_ERROR = 1000


class Commands:
    """Find the provably best parallel execution plan for serving a large language model.

    Given a model, the GPUs, the traffic and the goals: how to split the
    model over the GPUs, what that gives, and the proof that no other plan of
    the space is better. An answer takes seconds.

      solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat

    Every command has its own help: solve.py plan --help
    """


for _name in COMMANDS:
    setattr(Commands, _name, method(_name))


def _run_plan(options: dict[str, Any]) -> int:
    from apex_opt.ask import Options, ask
    from apex_opt.report import Progress
    from apex_opt.search import search
    from formulations.plan_space import PlanSpace

    question = ask(Options.of(options), most_gpus=LARGEST_SEARCH)
    with Progress() as progress:
        answer = search(question, PlanSpace(), progress, options["top"])
    return _show_answer("plan", question, answer, options)


def _run_simulate(options: dict[str, Any]) -> int:
    from apex_opt.ask import Options, ask_plan
    from apex_opt.report import Progress
    from apex_opt.search import judge

    question, plan = ask_plan(options["plan"], Options.of(options))
    with Progress() as progress:
        answer = judge(question, plan, progress)
        if answer.best is not None:
            _write_files(question, plan, options, progress)
    return _show_answer("simulate", question, answer, options)


def _write_files(question: Question, plan: Plan, options: dict[str, Any], progress: Progress) -> None:
    """Every request and every batch of a plan's run, where asked for."""
    if options["requests"] is None and options["timeline"] is None:
        return
    from pathlib import Path

    from apex_opt.report.requests import write_requests
    from apex_opt.report.timeline import write_timeline
    from apex_opt.search import Evaluator

    progress("writing files", 0, 0)
    outcome, cost = Evaluator(question).batches(plan)
    settings = question.settings
    if options["requests"] is not None:
        write_requests(Path(options["requests"]), outcome, question.trace, settings.max_model_len, cost.request_ns)
    if options["timeline"] is not None:
        write_timeline(Path(options["timeline"]), outcome, cost.laws, settings.block_size)


def _show_answer(command: str, question: Question, answer: Answer, options: dict[str, Any]) -> int:
    from apex_opt.report import answer_document, show
    from apex_opt.search import Evaluator

    provenance = Evaluator(question).provenance
    show(answer_document(command, question, answer, provenance, options.get("top", 1)), options["format"])
    return EXIT_INFEASIBLE if answer.best is None else 0


def _run_models(options: dict[str, Any]) -> int:
    from apex_opt.ir import list_models
    from apex_opt.report import listing_document, model_row, show

    show(listing_document("models", [model_row(model) for model in list_models()]), options["format"])
    return 0


def _run_clusters(options: dict[str, Any]) -> int:
    from apex_opt.cluster import list_clusters, load_cluster
    from apex_opt.report import cluster_row, listing_document, show

    clusters = [load_cluster(name) for name in list_clusters()]
    nodes = {cluster.gpu.name: cluster for cluster in clusters if cluster.nodes == 1}
    show(listing_document("clusters", [cluster_row(node) for node in nodes.values()]), options["format"])
    return 0


def _run_traces(options: dict[str, Any]) -> int:
    from apex_opt.report import listing_document, show, trace_row
    from apex_opt.workload import list_traces, load_trace

    rows = [trace_row(load_trace(name), title) for name, title in list_traces()]
    show(listing_document("traces", rows), options["format"])
    return 0


RUNNERS: dict[str, Callable[[dict[str, Any]], int]] = {
    "plan": _run_plan,
    "simulate": _run_simulate,
    "models": _run_models,
    "clusters": _run_clusters,
    "traces": _run_traces,
}


def main(words: list[str] | None = None) -> None:
    """Parse and run; exit with 0 (answer), 2 (usage or input), 3 (infeasible) or 1 (a fault of ours)."""
    words = sys.argv[1:] if words is None else words
    _open_streams()
    try:
        code = _main(words)
    except ApexError as error:
        code = error.exit_code
        if "--debug" in words or "--debug=true" in words:
            import traceback

            traceback.print_exc()
        # What was typed may hold line breaks and be long; an error is one line.
        line = " ".join(str(error).split())
        print(f"error: {line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + ' ...'}", file=sys.stderr)
    except BrokenPipeError:
        code = 0  # the reader has seen enough
    except MemoryError:
        print("error: out of memory; offer fewer GPUs (--gpus), smaller batches or a shorter trace", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    _drop_unwritten()
    sys.exit(code)


def _main(words: list[str]) -> int:
    import fire

    fire.core.Display = _show_help
    name = "apex-opt" if Path(sys.argv[0]).stem == "apex-opt" else "solve.py"
    request = fire.Fire(Commands(), command=arranged(words), name=name, serialize=_hidden)
    assert isinstance(request, Request), "fire calls a method of Commands or shows help and exits"
    return RUNNERS[request.command](request.options)


def _show_help(lines: Iterable[str], out: object) -> None:
    """Help goes to stdout as it is: fire would start a pager, or print to stderr."""
    print(wrapped("\n".join(lines)), flush=True)


def _hidden(_: object) -> None:
    """Keep fire from printing the request."""


def _open_streams() -> None:
    """Make stdout and stderr fit to print to, closed ones included, whatever characters a file name holds."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """Where stdout cannot be written, keep Python from trying again at exit, and from complaining."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
