"""Plans in SGLang's words, as its 0.5 takes them.

Sources: sglang 0.5.23, `srt/arg_groups/fields` (options), `srt/arg_groups/validation_hook.py` (what goes together),
`srt/managers/data_parallel_controller.py` (ranks over nodes), `srt/distributed/utils.py` (layers of stages),
`srt/runtime_context.py` (experts are cut by ep, what is left of a stage by tp), `srt/multiplex/pdmux_context.py`
(divisions of a GPU).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from apex_opt.engines import SGLANG
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.launch.commands import FIRST_PORT, HEAD, PORT_STEP, Command, hosts, ports, stage_chunks
from apex_opt.plans.engine import limited, limits_shared, of_each

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.launch.commands import Asked, Host, Replica
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.shares import Shares
    from apex_opt.plans.speculation import Drafter

_ALGORITHMS: Final = {"eagle": "EAGLE3", "mtp": "NEXTN", "draft": "STANDALONE", "ngram": "NGRAM"}
"""What SGLang calls the ways to make drafts."""
PD_POLICIES: Final = {"round_robin": "round_robin", "power_of_two": "power_of_two", "cache_aware": "cache_aware"}
"""Routers as its router calls them that it has before prefill and decode servers."""
_PD_DEFAULT: Final = "cache_aware"
"""Its `--policy`, which a side without a policy of its own has."""
ABOUT_ROUTER: Final = (
    "requests: go to sglang_router, which sends each to a prefill and a decode server at once",
    "router: takes the package sglang-router; the compose files start none",
    "transfers: by mooncake, the default of --disaggregation-transfer-backend, which takes the package "
    "mooncake-transfer-engine",
    "NODE0, NODE1, ...: put the nodes' addresses in their place",
)
_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}
_DISPATCHED: Final = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
_ROOM: Final = 128
"""Its default in sglang 0.5.23, `srt/environ.py`: tokens of a rank that kernels for low latency have room for."""
_JOIN_PORT: Final = 20000
_ROUTER_PORT: Final = 30000
_BOOTSTRAP_PORT: Final = 8998
"""Where the first prefill server of a node tells decode servers how it keeps its cache; sglang 0.5.23's default."""


def _division(shares: Shares) -> str:
    """The file of one division, which there is however many requests are answered."""
    return f"{{sm_group_num: 3, manual_divisions: [[{shares.prefill}, {shares.decode}, 0]]}}"


class Sglang:
    """See `Engine`."""

    rules = SGLANG

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        plan = asked.plan
        found = ["--mem-fraction-static is the share of memory that weights and KV cache take in the plan: check"]
        if plan.attention.dp > 1:
            found.append(
                f"later releases spell --dp-size {plan.attention.dp} --enable-dp-attention as --attn-dp-size "
                f"{plan.attention.dp}: check"
            )
        if plan.speculation is not None and plan.speculation.method == "eagle":
            found.append(
                "--speculative-draft-model-path: put the EAGLE-3 head that was trained for the model in place of "
                f"{HEAD}"
            )
        if plan.overlap is not None:
            found.append("--enable-two-batch-overlap: takes the kernels of DeepEP")
            if (seats := _dispatched(asked)) > _ROOM:
                found.append(
                    f"{_DISPATCHED}: a rank may answer {seats} sequences at once, its default is {_ROOM}; "
                    "DeepEP's buffer for low latency grows with it, and of all buffers the plan counts 2 GiB: check"
                )
        if plan.shares is not None:
            found.append("--enable-pdmux is marked in SGLang's sources as a temporary demo: check")
        return found

    def servers(self, asked: Asked, replica: Replica, place: int) -> Iterator[Command]:
        plan = asked.plan
        parts = hosts(replica.by_stage, stage_chunks(plan))
        for rank, (host, port) in enumerate(zip(parts, ports(parts, place), strict=True)):
            env = [host.visible]
            if len(set(asked.layers)) > 1:  # SGLang gives what does not divide evenly to the last stages
                env.append(("SGLANG_PP_LAYER_PARTITION", ",".join(map(str, asked.layers))))
            if plan.overlap is not None and (seats := _dispatched(asked)) > _ROOM:
                env.append((_DISPATCHED, str(seats)))
            more = self._joined(parts, rank, place) if len(parts) > 1 else []
            words = self._words(asked, port)
            words, file = [*words, *more], None
            if plan.shares is not None:
                words.append("--enable-pdmux")
                if plan.shares.prefill:
                    file = f"pdmux-{replica.index}.yaml", _division(plan.shares)
                    words += ["--pdmux-config-path", file[0]]
            yield Command(node=host.node, replica=replica.index, env=tuple(env), argv=tuple(words), file=file)

    def _words(self, asked: Asked, port: int) -> list[str]:
        plan, settings = asked.plan, asked.settings
        copies, width, given = plan.attention.dp, plan.stage_devices, limited(asked.problem.settings, plan)
        each = copies // limits_shared(settings, plan)  # SGLang shares limits out itself
        seqs, tokens = each * given.max_num_seqs, each * given.max_num_batched_tokens
        words = ["python", "-m", "sglang.launch_server", "--model-path", asked.weights]
        words += ["--tp-size", str(width), "--pp-size", str(plan.stages)]
        if copies > 1:
            words += ["--dp-size", str(copies), "--enable-dp-attention"]
        if asked.moe and plan.ffn.ep > 1:
            words += ["--ep-size", str(plan.ffn.ep)]
        if plan.overlap is not None:
            words += ["--moe-a2a-backend", "deepep", "--deepep-mode", "auto", "--enable-two-batch-overlap"]
            if plan.weight_format == "bf16":  # its default has no prompts of experts in 16 bit
                words += ["--moe-runner-backend", "deep_gemm"]
        if asked.quantised_when_loaded:
            words += ["--quantization", "fp8"]
        if asked.code_of:
            words.append("--trust-remote-code")
        words += ["--dtype", _DTYPES[asked.half], "--kv-cache-dtype", self._cache(asked)]
        words += ["--mem-fraction-static", self._static_share(asked), "--max-running-requests", str(seqs)]
        if settings.chunked_prefill:
            words += ["--chunked-prefill-size", str(tokens)]
        else:
            words += ["--chunked-prefill-size", "-1"]
        words += self._own(settings)
        if plan.speculation is not None:
            words += self._drafting(plan.speculation, asked.draft_checkpoint)
        words += ["--context-length", str(settings.max_model_len), "--page-size", str(settings.block_size)]
        if not settings.prefix_caching:
            words.append("--disable-radix-cache")
        if not settings.async_scheduling:
            words.append("--disable-overlap-schedule")
        if settings.role is not None:
            words += ["--disaggregation-mode", settings.role]
        if settings.role == "prefill":
            words += ["--disaggregation-bootstrap-port", str(_bootstrap(port))]
        # Others than processes of its node ask it: routers and clients on other nodes, and probes of a pod.
        return [*words, "--host", "0.0.0.0", "--port", str(port)]

    def _own(self, settings: EngineSettings) -> list[str]:
        """Settings that only this engine has, those that are not its defaults; `ignore_eos` is up to clients."""
        usual = SglangScheduling()
        own = settings.scheduler if isinstance(settings.scheduler, SglangScheduling) else usual
        most, chunks = own.max_prefill_tokens, settings.chunked_prefill
        if not chunks:
            most = min(most, settings.max_num_batched_tokens)
        words = ["--max-prefill-tokens", str(most)] if (most, True) != (usual.max_prefill_tokens, chunks) else []
        if own.schedule_policy != usual.schedule_policy:
            words += ["--schedule-policy", own.schedule_policy]
        if own.schedule_conservativeness != usual.schedule_conservativeness:
            words += ["--schedule-conservativeness", f"{own.schedule_conservativeness:g}"]
        if own.load_balance_method != usual.load_balance_method:
            words += ["--load-balance-method", own.load_balance_method]
        if own.scheduler_recv_interval != usual.scheduler_recv_interval:
            words += ["--scheduler-recv-interval", str(own.scheduler_recv_interval)]
        return [*words, "--enable-mixed-chunk"] if own.mixed_chunk else words

    def _drafting(self, drafter: Drafter, checkpoint: str) -> list[str]:
        """Chains of drafts; SGLang counts the token that they follow among those it verifies."""
        words, drafts = ["--speculative-algorithm", _ALGORITHMS[drafter.method]], drafter.draft_tokens
        if drafter.method == "ngram":
            words += ["--speculative-ngram-max-bfs-breadth", "1"]
        else:
            words += ["--speculative-num-steps", str(drafts), "--speculative-eagle-topk", "1"]
        words += ["--speculative-num-draft-tokens", str(drafts + 1)]
        if drafter.method in ("eagle", "draft"):
            words += ["--speculative-draft-model-path", checkpoint]
        return words

    def _joined(self, parts: Sequence[Host], rank: int, place: int) -> list[str]:
        """What joins the processes on several hosts."""
        head = f"NODE{parts[0].node}:{_JOIN_PORT + PORT_STEP * place}"
        return ["--nnodes", str(len(parts)), "--node-rank", str(rank), "--dist-init-addr", head]

    def _cache(self, asked: Asked) -> str:
        if asked.kv_in_fp8:
            return "fp8_e4m3"
        return "bf16" if asked.kv_published_in_fp8 else "auto"

    def _static_share(self, asked: Asked) -> str:
        """Share of a GPU's memory that weights and KV cache take on the stage where they take least."""
        held = min(
            stage.weights_bytes + stage.states_bytes + stage.kv_blocks * stage.kv_block_bytes for stage in asked.memory
        )
        return f"{math.floor(1000 * held / asked.problem.cluster.gpu.memory_bytes) / 1000:.3g}"


def _dispatched(asked: Asked) -> int:
    """Tokens that a rank may send to experts at once where it only decodes: one of each of its sequences."""
    return of_each(asked.problem.settings, asked.plan).max_num_seqs


def _bootstrap(port: int) -> int:
    """The bootstrap port of a prefill server that answers at a port."""
    return _BOOTSTRAP_PORT + port - FIRST_PORT


def pd_router(pools: Sequence[Sequence[tuple[int, str]]], dealt: tuple[str, str]) -> Command:
    """What takes requests before prefill and decode servers, on the first node.

    Parameters
    ----------
    pools : of each pool, node and port of its servers
    dealt : routers before either; one that it does not have is left at its default
    """
    words = ["python", "-m", "sglang_router.launch_router", "--pd-disaggregation", "--port", str(_ROUTER_PORT)]
    prefill, decode = pools
    for node, port in prefill:
        words += ["--prefill", f"http://NODE{node}:{port}", str(_bootstrap(int(port)))]
    for node, port in decode:
        words += ["--decode", f"http://NODE{node}:{port}"]
    for side, name in zip(("prefill", "decode"), dealt, strict=True):
        if name in PD_POLICIES:
            words += [f"--{side}-policy", PD_POLICIES[name]]
    return Command(node=prefill[0][0], replica=None, argv=tuple(words))


def unmatched(pools: Sequence[Sequence[tuple[int, str]]], dealt: tuple[str, str]) -> tuple[str, ...]:
    """What SGLang's router does before a side of several servers whose router it does not have.

    Parameters
    ----------
    pools : of each pool, node and port of its servers
    dealt : routers before either
    """
    return tuple(
        f"router: it has no {name}, which the figures are of before {side} servers, and deals to these by its default, "
        f"{_PD_DEFAULT}; --routing with one of {', '.join(PD_POLICIES)} there gives the figures of what it does"
        for side, servers, name in zip(("prefill", "decode"), pools, dealt, strict=True)
        if name not in PD_POLICIES and len(servers) > 1
    )
