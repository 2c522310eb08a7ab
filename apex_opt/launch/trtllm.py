"""Plans in TensorRT-LLM's words, as its 1.x takes them with the PyTorch backend.

Sources: the documentation of 1.0 to 1.2: `commands/trtllm-serve` (options, several nodes through mpirun and
trtllm-llmapi-launch), `features/parallel-strategy`, `features/kvcache`, `features/speculative-decoding`,
`llm-api/reference` (the options file).
"""

from __future__ import annotations

import json
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from apex_opt.engines import TRTLLM
from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.launch.commands import HEAD, Command, hosts, per_copy, ports, stage_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from apex_opt.launch.commands import Asked, Replica
    from apex_opt.plans.speculation import Drafter

_DRAFTING: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "eagle": ("Eagle", "max_draft_len"),
        "mtp": ("MTP", "num_nextn_predict_layers"),
        "ngram": ("NGram", "max_draft_len"),
        "draft": ("DraftTarget", "max_draft_len"),
    }
)
"""How it names a way to make drafts, and their number."""
_CACHES: Final = {"bf16": "auto", "fp16": "auto", "fp8": "fp8"}


class Trtllm:
    """See `Engine`."""

    rules = TRTLLM

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        found = [
            "the options file is written by the command itself, beside where it is started",
            "how TensorRT-LLM forms batches was read in its sources, and not held against a run: check",
        ]
        if asked.settings.prefix_caching:
            found.append(
                "kv_cache_config: enable_partial_reuse is false, as whole blocks alone are simulated as reused"
            )
        if asked.plan.attention.dp > 1:
            found.append(
                "with enable_attention_dp max_batch_size and max_num_tokens are per attention copy: the plan's shared "
                f"out over {asked.plan.attention.dp}"
            )
        if asked.plan.speculation is not None and asked.plan.speculation.method == "eagle":
            found.append(f"speculative_config: put the EAGLE-3 head that was trained for the model in place of {HEAD}")
        if any(len(replica.nodes) > 1 for replica in replicas):
            found.append("several nodes are joined by mpirun: start the command on the first one")
        return found

    def servers(self, asked: Asked, replica: Replica, place: int) -> Iterator[Command]:
        parts = hosts(replica.by_stage, stage_chunks(asked.plan))
        file = f"trtllm-replica{replica.index}.yaml"
        words = self._words(asked, ports(parts, place)[0], file)
        options = (file, json.dumps(self._file(asked)))  # JSON is YAML
        if len(parts) == 1:
            yield Command(
                node=parts[0].node, replica=replica.index, env=(parts[0].visible,), argv=tuple(words), file=options
            )
            return
        ranks = len(parts[0].slots)
        argv = ["mpirun"]
        for index, host in enumerate(parts):
            name, gpus = host.visible
            argv += [":"] * (index > 0) + ["-n", str(ranks), "-host", f"NODE{host.node}:{ranks}"]
            argv += ["-x", f"{name}={gpus}", "trtllm-llmapi-launch", *words]
        yield Command(node=parts[0].node, replica=replica.index, argv=tuple(argv), file=options)

    def _words(self, asked: Asked, port: int, file: str) -> list[str]:
        plan, settings = asked.plan, asked.settings
        tokens = per_copy(settings.max_num_batched_tokens, asked)
        if not settings.chunked_prefill:
            tokens = settings.max_num_batched_tokens  # a prompt goes whole to one copy
        words = ["trtllm-serve", asked.weights, "--backend", "pytorch", "--tp_size", str(plan.stage_devices)]
        words += ["--pp_size", str(plan.stages)]
        if asked.moe:
            words += ["--ep_size", str(plan.ffn.ep)]
        words += ["--max_batch_size", str(per_copy(settings.max_num_seqs, asked)), "--max_num_tokens", str(tokens)]
        words += ["--max_seq_len", str(settings.max_model_len)]
        words += ["--kv_cache_free_gpu_memory_fraction", self._free_share(asked)]
        if asked.code_of:
            words.append("--trust_remote_code")
        return [*words, "--extra_llm_api_options", file, "--port", str(port)]

    def _file(self, asked: Asked) -> dict[str, Any]:
        """What has no flag of its own."""
        plan, settings = asked.plan, asked.settings
        cache: dict[str, Any] = {
            "enable_block_reuse": settings.prefix_caching,
            "tokens_per_block": settings.block_size,
            "dtype": _CACHES[plan.kv_format],
        }
        own = settings.scheduler
        if settings.prefix_caching:
            cache["enable_partial_reuse"] = False
            if isinstance(own, TrtllmScheduling) and own.snapshot_interval:
                cache["mamba_state_config"] = {"periodic_snapshot_interval": own.snapshot_interval}
        found: dict[str, Any] = {
            "kv_cache_config": cache,
            "enable_attention_dp": plan.attention.dp > 1,
            "enable_chunked_prefill": settings.chunked_prefill,
            "disable_overlap_scheduler": not settings.async_scheduling,
            "cuda_graph_config": {"enable_padding": True, "max_batch_size": min(settings.max_num_seqs, 1024)},
        }
        if isinstance(own, TrtllmScheduling):
            found["scheduler_config"] = {
                "capacity_scheduler_policy": own.capacity_policy,
                "context_chunking_policy": own.context_chunking_policy,
            }
            found["batch_wait_timeout_ms"] = own.batch_wait_timeout_ms
            found["batch_wait_timeout_iters"] = own.batch_wait_timeout_iters
            found["batch_wait_max_tokens_ratio"] = own.batch_wait_max_tokens_ratio
        if plan.speculation is not None:
            found["speculative_config"] = self._drafting(plan.speculation, asked.draft_checkpoint)
        if len(set(asked.layers)) > 1:
            found["pp_partition"] = list(asked.layers)
        return found

    def _drafting(self, drafter: Drafter, checkpoint: str) -> dict[str, Any]:
        """How drafts are made."""
        kind, number = _DRAFTING[drafter.method]
        found: dict[str, Any] = {"decoding_type": kind, number: drafter.draft_tokens}
        if drafter.method == "ngram":
            found["max_matching_ngram_size"] = drafter.draft_tokens
        if drafter.method in ("eagle", "draft"):
            found["speculative_model_dir"] = checkpoint
        return found

    def _free_share(self, asked: Asked) -> str:
        """Share of the memory free after the weights that the KV cache takes, on the stage where it takes least."""
        total = asked.problem.cluster.gpu.memory_bytes
        shares = [
            stage.kv_blocks * stage.kv_block_bytes / (total - stage.weights_bytes - stage.workspace_bytes)
            for stage in asked.memory
        ]
        return f"{math.floor(1000 * min(shares)) / 1000:.3g}"
