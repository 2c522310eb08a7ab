"""Commands that start a plan on a serving engine, and in words what they cannot say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apex_opt.engines import SGLANG, TRTLLM
from apex_opt.launch.commands import Asked, Command, Launch, Replica, on_nodes
from apex_opt.launch.sglang import ABOUT_ROUTER, Sglang, pd_router, unmatched
from apex_opt.launch.trtllm import Trtllm
from apex_opt.launch.vllm import ABOUT_PROXY, Vllm, proxy
from apex_opt.plans.refusals import refusals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from apex_opt.launch.commands import Engine
    from apex_opt.placement import Assignment
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.routing import Routing
    from apex_opt.search.problem import Problem

__all__ = ["ENGINES", "Command", "Launch", "handing_over", "launch", "together"]

ENGINES: Final[Mapping[str, Engine]] = {engine.rules.name: engine for engine in (Vllm(), Sglang(), Trtllm())}


def launch(
    problem: Problem,
    plan: Plan,
    engine: str,
    checkpoint: str,
    assignment: Assignment,
    taken: dict[int, int] | None = None,
) -> Launch:
    """Commands that start a plan on its GPUs.

    Parameters
    ----------
    problem, plan
    engine : str         key of `ENGINES`
    checkpoint : str     where the engine finds the weights: a folder or a Hugging Face id
    assignment : Assignment    GPUs by replica, stage and rank
    taken : of each node the servers that are there already, which those of the plan are added to; None where there are
        none
    """
    spoken = ENGINES[engine]
    asked = Asked(problem=problem, plan=plan, checkpoint=checkpoint, rules=spoken.rules)
    replicas = tuple(Replica(index=index, stages=stages) for index, stages in enumerate(assignment))
    refused = [*refusals(spoken.rules, problem.model, problem.cluster, plan, asked.settings)]
    if refused:
        notes = [f"no command: {spoken.rules.release} cannot run this plan", *dict.fromkeys(refused)]
        return Launch(engine=engine, commands=(), notes=tuple(notes))
    servers = [*_servers(asked, spoken, replicas, {} if taken is None else taken)]
    commands = (*_clocks(asked, replicas), *servers, *_router(asked, servers))
    told = tuple(_notes(asked, spoken, replicas))
    dealt = problem.routing_of(plan)
    return Launch(engine=engine, commands=commands, notes=told, served=asked.weights, routing=dealt)


def together(launches: Sequence[Launch], replicas: Sequence[int], shares: Sequence[float]) -> Launch:
    """Commands that start several plans side by side, their replicas numbered through.

    Parameters
    ----------
    launches : of each plan, on nodes of its own; none where an engine cannot run one of them
    replicas : of each plan
    shares : of the requests that each plan gets
    """
    if len(launches) == 1:
        return launches[0]
    commands: list[Command] = []
    told, first = [], 0
    for own, count, share in zip(launches, replicas, shares, strict=True):
        commands += [
            command if command.replica is None else replace(command, replica=command.replica + first)
            for command in own.commands
        ]
        told.append(f"{share:.1%} to replica{f's {first} to {first + count - 1}' if count > 1 else f' {first}'}")
        first += count
    notes = list(dict.fromkeys(note for own in launches for note in own.notes))
    if not all(own.commands for own in launches):
        return Launch(engine=launches[0].engine, commands=(), notes=tuple(notes))
    notes.append(f"requests: of all, deal {', '.join(told)}: weights of the router")
    return replace(launches[0], commands=tuple(commands), notes=tuple(notes))


def handing_over(prefill: Launch, decode: Launch, replicas: int) -> Launch:
    """Commands that start a prefill and a decode pool and what takes requests before them; replicas numbered through.

    Parameters
    ----------
    prefill, decode : Launch    of each pool; none where an engine cannot run one of them
    replicas : int              of the prefill pool
    """
    engine, notes = prefill.engine, list(dict.fromkeys((*prefill.notes, *decode.notes)))
    notes = [note for note in notes if not note.startswith("requests: put a router")]
    if not prefill.commands or not decode.commands:
        return Launch(engine=engine, commands=(), notes=tuple(notes))
    later = (
        command if command.replica is None else replace(command, replica=command.replica + replicas)
        for command in decode.commands
    )
    dealt, servers = (prefill.routing, decode.routing), [_served(one.commands) for one in (prefill, decode)]
    if engine == SGLANG.name:
        before, about = pd_router(servers, dealt), ABOUT_ROUTER
        notes += unmatched(servers, dealt)
    else:
        before, about = proxy(servers), ABOUT_PROXY
        if dealt != ("round_robin", "round_robin"):
            notes.append(f"requests: the figures are of {'/'.join(dealt)}, which it does not do: put a router there")
    several = any(note.startswith("NODE0") for note in notes)
    notes += [note for note in about if not (several and note.startswith("NODE0"))]
    return replace(prefill, commands=(*prefill.commands, *later, before), notes=tuple(notes))


def _served(commands: Sequence[Command]) -> list[tuple[int, str]]:
    """Node and port of every server that answers requests."""
    found: dict[int | None, tuple[int, str]] = {}
    for command in commands:
        if command.replica is not None and "--port" in command.argv:
            port = command.argv[command.argv.index("--port") + 1]
            found.setdefault(command.replica, (command.node, port))
    return list(found.values())


def _clocks(asked: Asked, replicas: Sequence[Replica]) -> Iterator[Command]:
    """Hold the GPUs of each node at the plan's clock; none for GPUs that nvidia-smi does not know."""
    if asked.plan.clock_mhz is None or not asked.problem.cluster.gpu.cuda:
        return
    gpus = (gpu for replica in replicas for gpu in replica.by_stage)
    for node, slots in on_nodes(gpus):
        words = ("nvidia-smi", "-i", ",".join(map(str, slots)), "-lgc", str(asked.plan.clock_mhz))
        yield Command(node=node, replica=None, argv=words)


def _servers(asked: Asked, engine: Engine, replicas: Sequence[Replica], taken: dict[int, int]) -> Iterator[Command]:
    """One command per replica and node; what answers requests listens on the first node of the replica.

    Parameters
    ----------
    asked, engine, replicas
    taken : of each node the servers that are there already; these are added
    """
    for replica in replicas:
        # The other nodes of a replica listen too, to be asked whether they are alive.
        place = max(taken.get(node, 0) for node in replica.nodes)
        commands = [*engine.servers(asked, replica, place)]
        on = Counter(command.node for command in commands)
        taken.update((node, place + max(on[node], 1)) for node in replica.nodes)
        yield from commands


def _router(asked: Asked, servers: Sequence[Command]) -> Iterator[Command]:
    """The router in front of several replicas where there is one that a command starts, on the first node."""
    alone = asked.plan.replicas == 1 or asked.settings.role is not None
    if alone or asked.problem.routing_of(asked.plan) != "cache_aware":
        return
    words = ["python", "-m", "sglang_router.launch_router", "--policy", "cache_aware", "--port", _ROUTER_PORT]
    words += ["--worker-urls", *(f"http://NODE{node}:{port}" for node, port in _served(servers))]
    yield Command(node=servers[0].node, replica=None, argv=tuple(words))


_ROUTER_PORT: Final = "30000"
_ROUTERS: Final[dict[Routing, str]] = {
    "round_robin": "the default of nginx",
    "least_loaded": "least_conn of nginx",
    "vllm_dp": "with one node, --data-parallel-size of vllm serve in place of the servers",
    "power_of_two": "random two least_conn of nginx, which draws otherwise",
    "cache_aware": "sglang_router, the command without a replica",
    "dynamo": "--router-mode kv of dynamo.frontend",
    "llm_d": "the prefix-cache and queue scorers of llm-d's endpoint picker, with weights 3 and 2",
    "llm_d_kv": "the prefix-cache, queue and KV-cache scorers of llm-d's endpoint picker, with weights 3, 2 and 2",
    "session": "hash of nginx by what names the session, which deals otherwise",
    "pull": "one that holds requests until a server has a seat, such as max_conns and queue of nginx plus",
}
"""What deals requests in this way."""


def _notes(asked: Asked, engine: Engine, replicas: Sequence[Replica]) -> Iterator[str]:
    plan, problem, name = asked.plan, asked.problem, engine.rules.name
    yield f"options as {engine.rules.release} has them"
    if problem.overhead.name != name:
        yield f"the figures are of {problem.overhead.name}; for those of {name} ask with --engine={name}"
    if not problem.cluster.gpu.cuda:
        yield f"GPUs: {problem.cluster.gpu.name} takes a build for ROCm, against which none of these rules was held"
    if problem.rescheduling is not None:
        yield (
            f"rescheduling: no command here moves requests; these servers deal {problem.routing_of(plan)}, and the "
            "figures above do not hold for them"
        )
    longest = problem.settings.max_model_len
    if asked.settings.max_model_len < longest:
        yield (
            f"requests: of at most {asked.settings.max_model_len:,} tokens, what the KV cache of the plan holds with "
            f"a little to spare; {problem.model.name} is made for {longest:,}"
        )
    elif longest < problem.model.max_position and not problem.holds_longest:
        yield (
            f"requests: of at most {longest:,} tokens, as the longest of the trace has; longer ones are refused, "
            "and --max_model_len sets another limit"
        )
    if text := engine.rules.lacking(problem.model.family):
        yield f"model: {text}"
    for what, checkpoint, model in asked.named:
        if Path(checkpoint).is_absolute():
            yield f"{what}: your folder {checkpoint}; it must hold weights and tokenizer on every node"
        elif "/" not in checkpoint and "/snapshots/" not in model.source:  # ids of the hub cache may have no owner
            yield f"{what}: put the folder or the Hugging Face id of its weights in place of {checkpoint}"
    for family in asked.code_of:
        flag = "--trust_remote_code" if name == TRTLLM.name else "--trust-remote-code"
        yield f"{flag}: {family} models bring Python code of their own, which it runs: read it first"
    if asked.quantised_when_loaded:
        yield f"weights: {asked.checkpoint} is turned into fp8 while it is loaded; one in fp8 needs no --quantization"
    elif not asked.as_published:
        yield (
            f"weights: needs a checkpoint in this format, {plan.weight_format}: put it in place of {asked.weights}; "
            f"{asked.checkpoint} is in {problem.model.weight_format}"
        )
    if len(replicas) > 1:
        yield (
            f"requests: put a router before the {len(replicas)} servers that deals them {problem.routing_of(plan)} "
            f"({_ROUTERS[problem.routing_of(plan)]})"
        )
    if len(replicas) > 1 and problem.routing_of(plan) == "cache_aware":
        yield "NODE0, NODE1, ...: put the nodes' addresses in their place"
    elif any(len(replica.nodes) > 1 for replica in replicas):
        yield "NODE0, NODE1, ...: put the nodes' addresses in their place; a replica runs once all its commands do"
    gpu = problem.cluster.gpu
    if not gpu.cuda:
        yield (
            f"GPUs: what {engine.rules.release} runs on {gpu.name}, which does not run CUDA, was not looked up: check "
            "formats and options with its documentation"
        )
    if plan.clock_mhz is not None and gpu.cuda:
        yield "clock: nvidia-smi -lgc needs root; nvidia-smi -rgc takes it back"
    elif plan.clock_mhz is not None:
        yield f"clock: hold the GPUs at {plan.clock_mhz:,} MHz with the tool of their maker, not nvidia-smi"
    yield from engine.notes(asked, replicas)
