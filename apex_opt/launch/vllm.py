"""Plans in vLLM's words, as its 0.20 takes them.

Sources: vllm 0.20.2, `engine/arg_utils.py` (options, ranks over nodes), `distributed/utils.py` (layers of stages),
`layers/fused_moe/config.py` (experts are cut over all attention copies, by shards or by experts).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from apex_opt.engines import VLLM
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.launch.commands import FIRST_PORT, HEAD, PORT_STEP, Command, divisors, hosts, per_copy, ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.launch.commands import Asked, Host, Replica
    from apex_opt.plans.speculation import Drafter

_MASTER_PORT: Final = 29501
_RPC_PORT: Final = 29550
_SIDE_CHANNEL: Final = 5600
_PROXY_PORT: Final = 8192
_DEPRECATED: Final = ("fbgemm_fp8",)
_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}
_SPECULATIVE: Final[dict[str, Callable[[Drafter, str], dict[str, str | int]]]] = {
    "eagle": lambda d, checkpoint: {"method": "eagle3", "model": checkpoint, "num_speculative_tokens": d.draft_tokens},
    "mtp": lambda d, _: {"method": "mtp", "num_speculative_tokens": d.draft_tokens},
    "ngram": lambda d, _: {
        "method": "ngram",
        "num_speculative_tokens": d.draft_tokens,
        "prompt_lookup_max": d.draft_tokens,
    },
    "draft": lambda d, checkpoint: {
        "method": "draft_model",
        "model": checkpoint,
        "num_speculative_tokens": d.draft_tokens,
    },
}


class Vllm:
    """See `Engine`."""

    rules = VLLM

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        attention = asked.plan.attention
        found = []
        if asked.reads_images:
            found.append(
                "images: --language-model-only leaves out the tower that reads them, as the plan does: neither its "
                "memory nor its time is counted"
            )
        if asked.plan.speculation is not None and asked.plan.speculation.method == "eagle":
            found.append(
                f"--speculative-config: put the EAGLE-3 head that was trained for the model in place of {HEAD}"
            )
        if asked.plan.overlap is not None:
            found.append(
                "--enable-dbo: takes the kernels of DeepEP, with those for high throughput vLLM runs from no CUDA graph"
            )
        if attention.dp > 1:
            found.append(
                "vLLM's limits are per attention copy, as the plan's are: each of the "
                f"{attention.dp} ranks has a scheduler and a KV cache of its own"
            )
        if any(len(replica.nodes) > 1 for replica in replicas):
            found.append(
                "several nodes are joined by vLLM's own multiprocessing (--nnodes, --node-rank, --master-addr), not by "
                "Ray, which would choose the GPUs itself"
            )
        return found

    def servers(self, asked: Asked, replica: Replica, place: int) -> Iterator[Command]:
        ranks, copies = replica.by_copy(asked.plan.attention.dp), asked.plan.attention.dp
        copy = len(ranks) // copies
        parts = hosts(ranks, (n for n in divisors(len(ranks)) if copy % n == 0 or n % copy == 0))
        layers = asked.layers
        for rank, (host, port) in enumerate(zip(parts, ports(parts, place), strict=True)):
            env = [host.visible]
            if len(set(layers)) > 1:  # vLLM gives what does not divide evenly to other stages
                env.append(("VLLM_PP_LAYER_PARTITION", ",".join(map(str, layers))))
            if asked.settings.role is not None:  # where the other pool asks for what was computed
                env.append(("VLLM_NIXL_SIDE_CHANNEL_HOST", f"NODE{host.node}"))
                env.append(("VLLM_NIXL_SIDE_CHANNEL_PORT", str(_SIDE_CHANNEL + port - FIRST_PORT)))
            more = self._joined(parts, rank, place, copies) if len(parts) > 1 else []
            words = self._words(asked, port)
            yield Command(node=host.node, replica=replica.index, env=tuple(env), argv=(*words, *more))

    def _words(self, asked: Asked, port: int) -> list[str]:
        plan, settings = asked.plan, asked.settings
        attention = plan.attention
        tokens = per_copy(settings.max_num_batched_tokens, asked)
        if not settings.chunked_prefill:
            tokens = max(tokens, settings.max_model_len)  # a prompt goes whole to one copy
        words = ["vllm", "serve", asked.weights, "--tensor-parallel-size", str(attention.tp)]
        words += ["--pipeline-parallel-size", str(plan.stages)]
        if attention.dp > 1:
            words += ["--data-parallel-size", str(attention.dp)]
        if asked.moe and plan.ffn.ep > 1:
            words.append("--enable-expert-parallel")
        if plan.overlap is not None:
            words += ["--enable-dbo", "--all2all-backend", "deepep_high_throughput"]
        if asked.quantised_when_loaded:
            words += ["--quantization", "fp8"]
        if asked.reads_images:
            words.append("--language-model-only")
        if asked.code_of:
            words.append("--trust-remote-code")
        if asked.problem.model.pools:
            words += ["--runner", "pooling"]
        if asked.scheme in _DEPRECATED:
            words.append("--allow-deprecated-quantization")
        words += ["--dtype", _DTYPES[asked.half], "--kv-cache-dtype", self._cache(asked)]
        words += ["--max-num-seqs", str(per_copy(settings.max_num_seqs, asked))]
        words += ["--max-num-batched-tokens", str(tokens), "--max-model-len", str(settings.max_model_len)]
        words += ["--block-size", str(asked.problem.settings.block_size)]  # which it enlarges for states by itself
        words += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:.6g}"]
        if plan.speculation is not None:
            told = _SPECULATIVE[plan.speculation.method](plan.speculation, asked.draft_checkpoint)
            words += ["--speculative-config", json.dumps(told)]
        if isinstance(settings.scheduler, VllmScheduling) and settings.scheduler.long_prefill_token_threshold:
            words += ["--long-prefill-token-threshold", str(settings.scheduler.long_prefill_token_threshold)]
        for flag, on in (
            ("enable-chunked-prefill", settings.chunked_prefill),
            ("enable-prefix-caching", settings.prefix_caching),
            ("async-scheduling", settings.async_scheduling),
        ):
            words.append(f"--{flag}" if on else f"--no-{flag}")
        if settings.role is not None:
            words += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})]
        if attention.tp * plan.stages > 1:
            words += ["--distributed-executor-backend", "mp"]
        return [*words, "--port", str(port)]

    def _joined(self, parts: Sequence[Host], rank: int, place: int, copies: int) -> list[str]:
        """What joins the processes on several hosts; ports are apart where engines share their first node."""
        words = ["--nnodes", str(len(parts)), "--node-rank", str(rank), "--master-addr", f"NODE{parts[0].node}"]
        words += ["--master-port", str(_MASTER_PORT + PORT_STEP * place)]
        if copies > 1:
            words += ["--data-parallel-rpc-port", str(_RPC_PORT + PORT_STEP * place)]
        return [*words, "--headless"] if rank else words

    def _cache(self, asked: Asked) -> str:
        # Of compressed tokens there is one format, whatever it is called.
        if asked.kv_in_fp8 or "compressed" in asked.problem.model.traits:
            return "fp8"
        return _DTYPES[asked.half] if asked.kv_published_in_fp8 else "auto"


ABOUT_PROXY: Final = (
    "requests: go to the proxy, toy_proxy_server.py of vLLM's sources (tests/v1/kv_connector/nixl_integration); it "
    "asks a prefill server first and then a decode server, each in turn",
    "proxy: copy toy_proxy_server.py here first, with --save into its folder; the compose files start no proxy",
    "connector: vllm serve needs the package nixl for it",
    "NODE0, NODE1, ...: put the nodes' addresses in their place",
)


def proxy(pools: Sequence[Sequence[tuple[int, str]]]) -> Command:
    """What takes requests before a prefill and a decode pool, on the first node.

    Parameters
    ----------
    pools : of each pool, node and port of its servers
    """
    words = ["python", "toy_proxy_server.py", "--port", str(_PROXY_PORT)]
    for kind, servers in zip(("prefiller", "decoder"), pools, strict=True):
        words += [f"--{kind}-hosts", *(f"NODE{node}" for node, _ in servers)]
        words += [f"--{kind}-ports", *(port for _, port in servers)]
    return Command(node=pools[0][0][0], replica=None, argv=tuple(words))
