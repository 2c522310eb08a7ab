"""Plans in SGLang's words, as its 0.5 takes them.

Sources: sglang 0.5.23, `srt/arg_groups/fields` (options), `srt/arg_groups/validation_hook.py` (what goes together),
`srt/managers/data_parallel_controller.py` (ranks over nodes), `srt/distributed/utils.py` (layers of stages),
`srt/runtime_context.py` (experts are cut by ep, what is left of a stage by tp).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from apex_opt.launch.commands import per_copy, uneven
from apex_opt.plan.memory import stage_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.launch.commands import Asked, Replica

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}
_JOIN_PORT: Final = 20000


class Sglang:
    """See `Engine`."""

    name = "sglang"
    release = "SGLang 0.5"
    layers = "SGLANG_PP_LAYER_PARTITION"

    def refusals(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        plan = asked.plan
        found = []
        if plan.ffn.dp > 1 and not asked.whole_copies:
            found.append(f"attn({plan.attention}) ffn({plan.ffn}): SGLang has no copies of the FFN but whole ones")
        several = [replica for replica in replicas if len(replica.nodes) > 1]
        if not several:
            return found
        if asked.whole_copies:
            found.append(f"ffn(dp{plan.ffn.dp}): SGLang keeps whole copies of an engine on one node")
        if (counts := uneven(several)) is not None:
            found.append(f"{counts}; SGLang needs as many on each")
        for nodes in sorted({len(replica.nodes) for replica in several}):
            if plan.stages % nodes and (nodes % plan.stages or plan.stage_devices % (nodes // plan.stages)):
                found.append(
                    f"{plan.stages} stages on {nodes} nodes: SGLang wants whole stages, or whole nodes, of each"
                )
        return found

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        plan = asked.plan
        found = [
            "SGLang computes prompts and next tokens in batches of their own, the figures are of batches that mix "
            "them; --enable-mixed-chunk comes nearer: check",
            "--mem-fraction-static is the share of memory that weights and KV cache take in the plan: check",
        ]
        if plan.attention.dp > 1 and not asked.whole_copies:
            found.append(
                f"later releases spell --dp-size {plan.attention.dp} --enable-dp-attention as --attn-dp-size "
                f"{plan.attention.dp}: check"
            )
            if not asked.moe:
                found.append("not every dense model has attention copies in SGLang (--enable-dp-attention): check")
        return found

    def ranks(self, asked: Asked, replica: Replica) -> tuple[str, ...]:
        return replica.by_copy(asked.plan.attention.dp) if asked.whole_copies else replica.by_stage

    def words(self, asked: Asked, port: int) -> list[str]:
        plan, settings = asked.plan, asked.settings
        copies, seqs, tokens = plan.attention.dp, settings.max_num_seqs, settings.max_num_batched_tokens
        width = plan.stage_devices
        if asked.whole_copies:  # each has limits of its own; those of attention copies SGLang shares out itself
            width, seqs, tokens = width // copies, per_copy(seqs, asked), per_copy(tokens, asked)
        words = ["python", "-m", "sglang.launch_server", "--model-path", asked.weights]
        words += ["--tp-size", str(width), "--pp-size", str(plan.stages)]
        if copies > 1:
            words += ["--dp-size", str(copies)]
            if not asked.whole_copies:
                words.append("--enable-dp-attention")
        if asked.moe and plan.ffn.ep > 1:
            words += ["--ep-size", str(plan.ffn.ep)]
        if asked.quantised_when_loaded:
            words += ["--quantization", "fp8"]
        words += ["--dtype", _DTYPES[asked.half], "--kv-cache-dtype", self._cache(asked)]
        words += ["--mem-fraction-static", self._static_share(asked), "--max-running-requests", str(seqs)]
        if settings.chunked_prefill:
            words += ["--chunked-prefill-size", str(tokens)]
        else:
            words += ["--chunked-prefill-size", "-1", "--max-prefill-tokens", str(max(tokens, settings.max_model_len))]
        words += ["--context-length", str(settings.max_model_len), "--page-size", str(settings.block_size)]
        if not settings.prefix_caching:
            words.append("--disable-radix-cache")
        if not settings.async_scheduling:
            words.append("--disable-overlap-schedule")
        return [*words, "--port", str(port)]

    def joined(self, nodes: int, rank: int, head: int) -> list[str]:
        return ["--nnodes", str(nodes), "--node-rank", str(rank), "--dist-init-addr", f"NODE{head}:{_JOIN_PORT}"]

    def _cache(self, asked: Asked) -> str:
        if asked.kv_in_fp8:
            return "fp8_e4m3"
        return "bf16" if asked.kv_published_in_fp8 else "auto"

    def _static_share(self, asked: Asked) -> str:
        """Share of a GPU's memory that weights and KV cache take on the stage where they take least."""
        gpu = asked.question.cluster.gpu
        stages = stage_memory(asked.question.model, gpu, asked.plan, asked.settings)
        held = min(stage.weights_bytes + stage.kv_blocks * stage.kv_block_bytes for stage in stages)
        return f"{math.floor(1000 * held / gpu.memory_bytes) / 1000:.3g}"
