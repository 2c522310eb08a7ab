"""Command line of apex_opt: parse, then run. Everything it does lives in `apex_opt` and `formulations`.

fire runs a command before it has looked at all its arguments, so commands only note what was asked; `main` checks the
names of options first, lets fire parse, and runs the request afterwards.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from apex_opt.errors import ApexError, UnknownNameError, UsageError

EXIT_INFEASIBLE = 3


@dataclass(frozen=True, slots=True)
class Request:
    """A command and its options, not yet run."""

    command: str
    options: dict[str, Any]


def _text(value: str) -> str:
    """Options reach us as they were typed: `apex_opt.options` converts them, strictly."""
    return value


class Commands:
    """apex_opt finds the provably best parallel execution plan for serving a large language model.

    plan finds the best plan for a model, a cluster and a trace; simulate scores one given plan; models, clusters and
    traces list what can be named. Every command has its own help: solve.py plan --help
    """

    def plan(
        self,
        *,
        model: str = "llama-3.1-70b",
        cluster: str = "8xh100-sxm",
        trace: str = "chat",
        objective: str = "e2e_mean",
        slo: str | None = None,
        weights: str | None = None,
        kv: str | None = None,
        gpus: int | None = None,
        routing: str = "round_robin",
        engine: str = "vllm",
        max_num_seqs: int = 1024,
        max_num_batched_tokens: int = 8192,
        max_model_len: int | None = None,
        block_size: int = 16,
        chunked_prefill: bool = True,
        async_scheduling: bool = True,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        top: int = 5,
        format: str = "table",
        debug: bool = False,
    ) -> Request:
        """Find the plan that serves a trace best, and prove it.

        Args:
            model: Name in the registry (see: models), Hugging Face id, or path of a config.json or its folder.
            cluster: GPUS x TYPE (8xh100-sxm), NODES x GPUS x TYPE (4x8xh200-sxm), or path of a TOML file.
            trace: Shipped trace (see: traces), path of a JSONL or CSV file, or a description such as
                poisson:rate=2,n=500,prompt=lognormal(512,1.0),output=lognormal(128,0.8), closed:concurrency=32,n=500 or
                static:n=100,prompt=1024,output=128.
            objective: ttft, tpot or e2e with _mean, _p50, _p90, _p95, _p99 or _max; makespan, throughput or energy.
            slo: Goals that must hold, such as "ttft_p95<=500ms,tpot_p95<=50ms" or "ttft<=1s@99%".
            weights: Weight formats to choose from: bf16, fp16, fp8, w8a16, w4a16; by default the model's own.
            kv: KV cache format: bf16, fp16 or fp8; by default that of the model.
            gpus: Most GPUs a plan may take; by default all of the cluster.
            routing: How requests are dealt to replicas: round_robin or least_loaded.
            engine: Serving engine whose own time is added: vllm.
            max_num_seqs: Sequences running at once in one replica.
            max_num_batched_tokens: Tokens in one batch.
            max_model_len: Longest prompt and output together; by default the model's limit.
            block_size: Tokens in one KV block.
            chunked_prefill: Whether a prompt may be split over batches.
            async_scheduling: Whether the next batch is formed while the last one runs (on one stage).
            gpu_memory_utilization: Share of a GPU's memory the engine may fill.
            seed: Seed of generated traces.
            top: Plans to show.
            format: table or json.
            debug: Show the traceback of an error.
        """
        return _request("plan", locals())

    def simulate(
        self,
        *,
        plan: str,
        model: str = "llama-3.1-70b",
        cluster: str = "8xh100-sxm",
        trace: str = "chat",
        objective: str = "e2e_mean",
        slo: str | None = None,
        weights: str | None = None,
        kv: str | None = None,
        routing: str = "round_robin",
        engine: str = "vllm",
        max_num_seqs: int = 1024,
        max_num_batched_tokens: int = 8192,
        max_model_len: int | None = None,
        block_size: int = 16,
        chunked_prefill: bool = True,
        async_scheduling: bool = True,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        format: str = "table",
        debug: bool = False,
    ) -> Request:
        """Score one given plan.

        Args:
            plan: Its text form, such as "dp2 pp2 attn(tp2) ffn(tp2) bf16"; tp8 alone cuts both cells.
            model: As for plan.
            cluster: As for plan.
            trace: As for plan.
            objective: Figure to show first, as for plan.
            slo: Goals to judge by, as for plan.
            weights: Weight format where the plan names none.
            kv: KV cache format where the plan names none.
            routing: How requests are dealt to replicas: round_robin or least_loaded.
            engine: Serving engine whose own time is added: vllm.
            max_num_seqs: Sequences running at once in one replica.
            max_num_batched_tokens: Tokens in one batch.
            max_model_len: Longest prompt and output together; by default the model's limit.
            block_size: Tokens in one KV block.
            chunked_prefill: Whether a prompt may be split over batches.
            async_scheduling: Whether the next batch is formed while the last one runs (on one stage).
            gpu_memory_utilization: Share of a GPU's memory the engine may fill.
            seed: Seed of generated traces.
            format: table or json.
            debug: Show the traceback of an error.
        """
        return _request("simulate", locals())

    def models(self, *, format: str = "table", debug: bool = False) -> Request:
        """List the models that can be named.

        Args:
            format: table or json.
            debug: Show the traceback of an error.
        """
        return _request("models", locals())

    def clusters(self, *, format: str = "table", debug: bool = False) -> Request:
        """List the accelerators and clusters that can be named.

        Args:
            format: table or json.
            debug: Show the traceback of an error.
        """
        return _request("clusters", locals())

    def traces(self, *, format: str = "table", debug: bool = False) -> Request:
        """List the traces that ship with apex_opt.

        Args:
            format: table or json.
            debug: Show the traceback of an error.
        """
        return _request("traces", locals())


def _request(command: str, values: dict[str, Any]) -> Request:
    """Note what was asked, each option in its declared type."""
    from apex_opt.options import typed

    method = getattr(Commands, command)
    options = typed({k: v for k, v in values.items() if k != "self"}, method.__annotations__)
    if options["format"] not in ("table", "json"):
        raise UnknownNameError("format", options["format"], ("table", "json"))
    return Request(command, options)


def _run_plan(options: dict[str, Any]) -> int:
    from apex_opt.report import Progress, answer_document
    from apex_opt.search import Evaluator, search
    from formulations.plan_space import PlanSpace

    top, output = options.pop("top"), options.pop("format")
    if not 1 <= top <= 10_000:
        raise UsageError(f"--top: {top} is not between 1 and 10000")
    question = _ask(options)
    with Progress() as progress:
        answer = search(question, PlanSpace(), progress)
    _emit(answer_document(question, answer, Evaluator(question).provenance, top), output)
    return EXIT_INFEASIBLE if answer.best is None else 0


def _run_simulate(options: dict[str, Any]) -> int:
    from apex_opt.ask import ask_plan
    from apex_opt.report import Progress, answer_document
    from apex_opt.search import Evaluator, judge

    text, output = options.pop("plan"), options.pop("format")
    question = _ask({**options, "gpus": None})
    plan = ask_plan(text, question)
    with Progress() as progress:
        answer = judge(question, plan, progress)
    _emit(answer_document(question, answer, Evaluator(question).provenance, 1), output)
    return EXIT_INFEASIBLE if answer.best is None else 0


def _run_models(options: dict[str, Any]) -> int:
    from apex_opt.ir import list_models
    from apex_opt.report import listing_document
    from apex_opt.report.document import model_row

    _emit_listing(listing_document("models", [model_row(m) for m in list_models()]), options["format"])
    return 0


def _run_clusters(options: dict[str, Any]) -> int:
    from apex_opt.cluster import list_clusters, list_gpus, load_cluster
    from apex_opt.report import listing_document
    from apex_opt.report.document import gpu_row

    nodes = {load_cluster(name).gpu.name: name for name in reversed(list_clusters()) if name.count("x") >= 1}
    rows = [{**gpu_row(load_cluster(name).gpu), "cluster": nodes.get(name, name)} for name in list_gpus()]
    _emit_listing(listing_document("clusters", rows), options["format"])
    return 0


def _run_traces(options: dict[str, Any]) -> int:
    from apex_opt.report import listing_document
    from apex_opt.workload import list_traces, load_trace

    rows = [{**load_trace(name).summary(), "title": title} for name, title in list_traces()]
    _emit_listing(listing_document("traces", rows), options["format"])
    return 0


_RUNNERS = {
    "plan": _run_plan,
    "simulate": _run_simulate,
    "models": _run_models,
    "clusters": _run_clusters,
    "traces": _run_traces,
}


def _ask(options: dict[str, Any]) -> Any:
    from apex_opt.ask import Options, ask

    return ask(Options(**options))


def _emit(document: dict[str, Any], output: str) -> None:
    from apex_opt.report import print_answer

    _print_json(document) if output == "json" else print_answer(document)


def _emit_listing(document: dict[str, Any], output: str) -> None:
    from apex_opt.report import print_listing

    _print_json(document) if output == "json" else print_listing(document)


def _print_json(document: dict[str, Any]) -> None:
    import json

    print(json.dumps(document, indent=2, allow_nan=False))


def _check_words(words: list[str]) -> list[str]:
    """Refuse unknown commands and options before anything runs; ask for help wherever `--help` stands."""
    commands = [name for name in vars(Commands) if not name.startswith("_")]
    if not words or words[0] in ("-h", "--help", "help"):
        return ["--help"]
    command = words[0]
    if command not in commands:
        raise UnknownNameError("command", command[:60], commands)
    if any(word in ("-h", "--help") for word in words[1:]):
        return [command, "--help"]
    known = [name for name in inspect.signature(getattr(Commands, command)).parameters if name != "self"]
    seen = set()
    expects_value = False
    for word in words[1:]:
        if not word.startswith("-") or _is_negative_number(word):
            if not expects_value:
                raise UsageError(f"{command}: {word[:60]!r} belongs to no option; options are given as --name=value")
            expects_value = False
            continue
        name, equals, _ = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in known:
            raise UnknownNameError(f"option of {command}", word.partition("=")[0][:60], [f"--{k}" for k in known])
        if name in seen:
            raise UsageError(f"--{name}: given twice; give it once")
        seen.add(name)
        expects_value = not equals
    required = [
        name
        for name, p in inspect.signature(getattr(Commands, command)).parameters.items()
        if name != "self" and p.default is inspect.Parameter.empty and name not in seen
    ]
    if required:
        raise UsageError(f"{command}: needs --{required[0]}; see solve.py {command} --help")
    return words


def _is_negative_number(word: str) -> bool:
    return word[1:2].isdigit() or word[1:2] == "."


def main(words: list[str] | None = None) -> None:
    """Parse and run; exit with 0 (answer), 2 (usage or input), 3 (infeasible) or 1 (a fault of ours)."""
    words = sys.argv[1:] if words is None else words
    debug = any(word.split("=")[0] == "--debug" and word.lower() != "--debug=false" for word in words)
    try:
        code = _main(words)
    except ApexError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _main(words: list[str]) -> int:
    import fire
    from fire.decorators import SetParseFn

    words = _check_words(words)
    for name in _RUNNERS:
        SetParseFn(_text)(getattr(Commands, name))
    result = fire.Fire(Commands(), command=words, name="solve.py", serialize=_hidden)
    if not isinstance(result, Request):
        return 0
    options = dict(result.options)
    options.pop("debug")
    return _RUNNERS[result.command](options)


def _hidden(_: object) -> None:
    """Keep fire from printing the request."""


if __name__ == "__main__":
    main()
