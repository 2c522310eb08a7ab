"""The command of a benchmark client that sends the traffic a plan was made for, and in words what it cannot send.

Requests that are all alike are made by a client's options. Others are replayed from a file, a line for each, by the
client of vLLM 0.23 or later, which measures any server with OpenAI's API: lengths, arrivals, and what prompts have in
common.

Sources: vLLM `benchmarks/serve.py` (rates, burstiness as the shape of a gamma law, what `--self-timed` means) and
`benchmarks/datasets` (`random`, whose lengths are fixed at a range ratio of 0, `timed_trace`: timestamp, input_length,
output_length and hash_ids, each id so many tokens); SGLang `bench_serving` (`random-ids`, whose lengths are fixed at a
range ratio of 1, and which has Poisson arrivals alone).
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.launch.commands import NGINX, brings_code
from apex_opt.units import NS_PER_S
from apex_opt.workload.steady import at_rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.launch.commands import Command, Launch
    from apex_opt.search.problem import Problem
    from apex_opt.workload.trace import Trace

CLIENT: Final = "0.23"
"""First release of vLLM whose client replays a file."""
DATASET: Final = "traffic.jsonl"
RESULTS: Final = {"vllm": "bench.json", "sglang": "bench.jsonl"}
"""What each client writes."""
ROUTER_PORT: Final = 8080
LASTING_S: Final = 120.0
MOST_REQUESTS: Final = 20_000
"""Seconds for which a rate is measured, and requests that are enough for it."""
PIECE: Final = 512
"""Tokens of a piece of a prompt that shares nothing; it only sets how many ids a line has."""

_HERE: Final = "127.0.0.1"
_DRAWN: Final = ("poisson", "gamma", "unknown")
"""Arrivals that a client draws as the trace did; a trace of lengths alone has Poisson ones at a rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What measures a deployment.

    Parameters
    ----------
    argv : tuple of str       its words; none where no client sends this traffic
    dataset : str or None     file that it reads, which `--save` writes
    result : str or None      file that it writes
    notes : tuple of str      what it sends otherwise than was planned for
    """

    argv: tuple[str, ...]
    dataset: str | None = None
    result: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As a line for a shell."""
        return shlex.join(self.argv)


def bench(problem: Problem, trace: Trace, launch: Launch, seed: int, *, pools: int = 1) -> Bench:
    """What sends a trace to servers.

    Parameters
    ----------
    problem : Problem
    trace : Trace          that is sent
    launch : Launch        what starts the servers
    seed : int             of what the client draws
    pools : int            of the deployment that is started
    """
    if why := _silent(problem, trace):
        return Bench(argv=(), notes=(f"measuring: no client sends this traffic; {why}",))
    engine, served = launch.engine, launch.served
    url, notes = _address(launch.commands, launch.routing)
    outputs = trace.generated(problem.settings.max_model_len)
    alike = trace.content is None and len(set(trace.prompt.tolist())) == len(set(outputs.tolist())) == 1
    notes += [*_notes(problem, trace)]
    if alike and (_at_once(trace) or trace.concurrency or trace.arrivals.kind in _DRAWN):
        load = _load(trace)
        own = engine == "sglang" and "--burstiness" not in load
        client = _sglang if own else _vllm
        if load and trace.concurrency is None:
            notes.append("arrivals: drawn by the client at this rate, by the law of the trace; not those simulated")
        result = RESULTS["sglang" if own else "vllm"]
        if not own and engine != "vllm":
            notes.append("client: that of vLLM, which measures any server with OpenAI's API; it takes the package vllm")
        words = client(url, served, (int(trace.prompt[0]), int(outputs[0])), load, len(trace), seed)
        # SGLang's client trusts code without being told, and has no such option.
        words += [] if own else _trusted(problem)
        return Bench(argv=tuple(words), result=result, notes=(*notes, _result(result, problem, pools)))
    notes.append(
        f"client: vllm bench serve of vLLM {CLIENT} or later, for any of the engines; --save writes {DATASET}, with "
        "the lengths of every request"
    )
    words = [*_client(url, served), "--dataset-name", "timed_trace", "--dataset-path", DATASET]
    words += ["--timed-trace-chunk-hash-size", str(trace.content_tokens or PIECE), "--num-prompts", str(len(trace))]
    if trace.concurrency is not None:
        words += ["--max-concurrency", str(trace.concurrency)]
    elif not _at_once(trace):
        words.append("--self-timed")
    words += ["--seed", str(seed), "--ignore-eos", *_saved(), *_trusted(problem)]
    result = RESULTS["vllm"]
    notes.append(_result(result, problem, pools))
    return Bench(argv=tuple(words), dataset=DATASET, result=result, notes=tuple(notes))


def lasting(trace: Trace, rate_per_s: float) -> Trace:
    """A trace at a rate, for as long as it takes to see whether that lasts; drawn or recorded as it was.

    Parameters
    ----------
    trace
    rate_per_s : float    requests per second
    """
    requests = min(LASTING_S * rate_per_s, MOST_REQUESTS)
    found = at_rate(trace, rate_per_s, max(1, math.ceil(requests / len(trace))))
    return replace(found, arrivals=trace.arrivals)


def dataset(trace: Trace, max_model_len: int) -> Iterator[str]:
    """Lines of the file that is replayed: of each request when it comes, its lengths, and ids of pieces of its prompt.

    Prompts that say nothing of what they contain get pieces of their own.

    Parameters
    ----------
    trace
    max_model_len : int    longest prompt and output together
    """
    outputs, first = trace.generated(max_model_len), int(trace.arrival_ns[0])
    own = np.concatenate(([0], np.cumsum(-(-trace.prompt // PIECE)))).tolist()
    for place, (arrival, prompt, output) in enumerate(zip(trace.arrival_ns, trace.prompt, outputs, strict=True)):
        if trace.content is not None and trace.content_starts is not None:
            ids = trace.content[trace.content_starts[place] : trace.content_starts[place + 1]].tolist()
        else:
            ids = list(range(own[place], own[place + 1]))
        row = {
            "timestamp": (int(arrival) - first) / NS_PER_S,
            "input_length": int(prompt),
            "output_length": int(output),
            "hash_ids": ids,
        }
        yield f"{json.dumps(row)}\n"


def _silent(problem: Problem, trace: Trace) -> str:
    """Why no client sends a trace; empty where one does."""
    if problem.model.pools:
        return f"{problem.model.name} answers with a vector, and latencies of such answers are not compared"
    if trace.media.audio_s:
        return "it has recordings, which a trace does not hold"
    return ""


def _address(commands: Sequence[Command], routing: str) -> tuple[str, list[str]]:
    """Where requests go, and what there is to know of it: to the only server, to a proxy, or to a router."""
    proxies = [command for command in commands if command.replica is None and "--port" in command.argv]
    servers: dict[int, Command] = {}
    for command in commands:
        if command.replica is not None and "--port" in command.argv:
            servers.setdefault(command.replica, command)
    if len(proxies) != 1 and len(servers) > 1:
        told = f"requests go to the router, here at port {ROUTER_PORT} of this machine, where nginx of --save listens"
        spread = sum(command.replica is not None for command in commands) > len(servers)
        if spread or routing not in NGINX:
            lacking = "replicas over several nodes" if routing in NGINX else routing
            lacking += " but in dynamo.yaml" * (routing == "dynamo")
            told = f"router: yours to provide at port {ROUTER_PORT}; --save writes none for {lacking}"
        return f"http://{_HERE}:{ROUTER_PORT}", [told]
    (command, *_) = proxies or servers.values()
    alone = {other.node for other in commands} == {0}
    port = command.argv[command.argv.index("--port") + 1]
    return f"http://{_HERE if alone else f'NODE{command.node}'}:{port}", []


def _at_once(trace: Trace) -> bool:
    return bool(trace.arrival_ns[0] == trace.arrival_ns[-1]) and trace.concurrency is None and trace.timed


def _load(trace: Trace) -> list[str]:
    """How requests come: from so many clients, at a rate, or all at once, which clients do unless they are told."""
    if trace.concurrency is not None:
        return ["--max-concurrency", str(trace.concurrency)]
    if _at_once(trace):
        return []
    words = ["--request-rate", f"{trace.rate_per_s:.6g}"]
    if trace.arrivals.kind == "gamma":
        words += ["--burstiness", f"{trace.arrivals.cv**-2:.6g}"]
    return words


def _vllm(url: str, served: str, lengths: tuple[int, int], load: Sequence[str], requests: int, seed: int) -> list[str]:
    """vLLM's client, for requests of one length.

    Parameters
    ----------
    url, served : str
    lengths : of prompt and answer
    load : options that say how requests come
    requests, seed : int
    """
    words = [*_client(url, served), "--dataset-name", "random", "--random-range-ratio", "0"]
    words += ["--random-input-len", str(lengths[0]), "--random-output-len", str(lengths[1])]
    return [*words, "--num-prompts", str(requests), *load, "--seed", str(seed), "--ignore-eos", *_saved()]


def _client(url: str, served: str) -> list[str]:
    return ["vllm", "bench", "serve", "--backend", "openai", "--base-url", url, "--model", served]


def _trusted(problem: Problem) -> list[str]:
    """What lets vLLM's client read the tokenizer of a checkpoint that brings code."""
    return ["--trust-remote-code"] if brings_code(problem.model) else []


def _saved() -> list[str]:
    return ["--save-result", "--save-detailed", "--result-filename", RESULTS["vllm"]]


def _sglang(
    url: str, served: str, lengths: tuple[int, int], load: Sequence[str], requests: int, seed: int
) -> list[str]:
    """SGLang's client, for requests of one length; it ignores ends of answers by itself.

    Parameters
    ----------
    url, served : str
    lengths : of prompt and answer
    load : options that say how requests come
    requests, seed : int
    """
    words = ["python", "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url, "--model", served]
    words += ["--dataset-name", "random-ids", "--random-range-ratio", "1"]
    words += ["--random-input-len", str(lengths[0]), "--random-output-len", str(lengths[1])]
    words += ["--num-prompts", str(requests), *load, "--seed", str(seed)]
    return [*words, "--output-file", RESULTS["sglang"], "--output-details"]


def _notes(problem: Problem, trace: Trace) -> Iterator[str]:
    """What no client sends."""
    if trace.pause_ns:
        yield f"clients: the pause of {trace.pause_ns / 1e6:g} ms before a next request is not sent"
    if trace.max_new_tokens is not None and bool(np.any(trace.max_new_tokens > trace.output)):
        yield "max_new_tokens: the client states the tokens of each answer, not the most that the trace has"
    if trace.session is not None:
        yield "sessions: which conversation a request is of is not sent"
    if trace.media.image_share:
        yield "images: sent as so many tokens of text"
    if any(problem.drafters):
        yield "drafts: of random tokens other shares are right than of text; measure these with prompts of your own"


def _result(name: str, problem: Problem, pools: int) -> str:
    """What the file is good for."""
    if problem.mixed or (problem.several and pools > 1):
        return f"result: {name}; solve.py calibrate and validate take one of a plan on its own, not of several pools"
    return f"result: {name}, which solve.py calibrate and validate take as --measured, with the plan that ran"
