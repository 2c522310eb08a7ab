"""Plans in vLLM's words, as its 0.20 takes them.

Sources: vllm 0.20.2, `engine/arg_utils.py` (options, ranks over nodes), `distributed/utils.py` (layers of stages),
`layers/fused_moe/config.py` (experts are cut over all attention copies, by shards or by experts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.launch.commands import per_copy, uneven

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.launch.commands import Asked, Replica

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}


class Vllm:
    """See `Engine`."""

    name = "vllm"
    release = "vLLM 0.20"
    layers = "VLLM_PP_LAYER_PARTITION"

    def refusals(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        attention, ffn = asked.plan.attention, asked.plan.ffn
        found = []
        if asked.whole_copies and asked.moe:
            found.append(f"ffn(dp{ffn.dp}): vLLM cuts the experts over all attention copies of an engine")
        elif ffn.dp > 1 and not asked.whole_copies:
            found.append(f"attn({attention}) ffn({ffn}): vLLM has no copies of the FFN but those of whole engines")
        elif attention.dp > 1 and not asked.moe and not asked.whole_copies:
            found.append(
                f"attn({attention}) ffn({ffn}): vLLM has no flag for attention copies before one dense FFN cut over all"
            )
        elif asked.moe and ffn.ep > 1 and ffn.tp > 1:
            found.append(f"ffn({ffn}): vLLM cuts experts either by ep or by tp, over all GPUs of a stage")
        several = [replica for replica in replicas if len(replica.nodes) > 1]
        if not several:
            return found
        if (counts := uneven(several)) is not None:
            found.append(f"{counts}; vLLM's multiprocessing needs as many on each")
        elif attention.dp > 1:
            on_node = len(several[0].by_stage) // len(several[0].nodes)
            if asked.plan.stages > 1:
                found.append(
                    f"attn({attention}) in {asked.plan.stages} stages over several nodes: vLLM places copy by copy, "
                    "the plan stage by stage"
                )
            elif on_node % attention.tp and attention.tp % on_node:
                found.append(f"attn({attention}): copies do not divide evenly over nodes with {on_node} GPUs each")
        return found

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        attention = asked.plan.attention
        found = []
        if attention.dp > 1:
            found.append(
                f"vLLM's limits are per attention copy: --max-num-seqs and --max-num-batched-tokens are the plan's "
                f"shared out over {attention.dp}"
            )
        if attention.dp > 1 and asked.dense_beside_experts:
            found.append(
                f"dense FFNs and shared experts: vLLM holds them in each attention copy, cut over its {attention.tp} "
                f"GPU(s), the plan cuts them over {asked.plan.stage_devices}; they take more memory: check"
            )
        if any(len(replica.nodes) > 1 for replica in replicas):
            found.append(
                "several nodes are joined by vLLM's own multiprocessing (--nnodes, --node-rank, --master-addr), not by "
                "Ray, which would choose the GPUs itself"
            )
        return found

    def ranks(self, asked: Asked, replica: Replica) -> tuple[str, ...]:
        return replica.by_copy(asked.plan.attention.dp)

    def words(self, asked: Asked, port: int) -> list[str]:
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
        if asked.quantised_when_loaded:
            words += ["--quantization", "fp8"]
        words += ["--dtype", _DTYPES[asked.half], "--kv-cache-dtype", self._cache(asked)]
        words += ["--max-num-seqs", str(per_copy(settings.max_num_seqs, asked))]
        words += ["--max-num-batched-tokens", str(tokens), "--max-model-len", str(settings.max_model_len)]
        words += ["--block-size", str(settings.block_size)]
        words += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:.6g}"]
        if settings.long_prefill_token_threshold:
            words += ["--long-prefill-token-threshold", str(settings.long_prefill_token_threshold)]
        for flag, on in (
            ("enable-chunked-prefill", settings.chunked_prefill),
            ("enable-prefix-caching", settings.prefix_caching),
            ("async-scheduling", settings.async_scheduling),
        ):
            words.append(f"--{flag}" if on else f"--no-{flag}")
        if attention.tp * plan.stages > 1:
            words += ["--distributed-executor-backend", "mp"]
        return [*words, "--port", str(port)]

    def joined(self, nodes: int, rank: int, head: int) -> list[str]:
        words = ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", f"NODE{head}"]
        return [*words, "--headless"] if rank else words

    def _cache(self, asked: Asked) -> str:
        if asked.kv_in_fp8:
            return "fp8"
        return _DTYPES[asked.half] if asked.kv_published_in_fp8 else "auto"
