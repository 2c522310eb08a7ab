"""Record batches of vLLM's own scheduler with prefix caching on, in virtual time, on a CPU.

Needs the PyPI package vllm 0.20.2 and torch (no GPU); the project itself does not. A prompt is described by content
ids of `hash_block_tokens` tokens each: equal ids are equal tokens, so requests whose ids start alike share a prefix.
Every request generates tokens of its own, so that a block with a generated token can only be found again by the request
that made it. A batch takes, on stage s, stage_weight[s] * (a + b * tokens + c * context) microseconds.

usage: record_prefix_caching.py OUT.json.gz [CASES]
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import os
import random
import sys
import tempfile

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 200000,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
}
GENERATED = 100000  # token values from here on are generated, one value per request


def build(config, folder):
    """vLLM's scheduler under the settings of one case."""
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    block_size, blocks = config["block_size"], config["num_gpu_blocks"]
    cache = CacheConfig(
        block_size=block_size, gpu_memory_utilization=0.9, cache_dtype="auto", enable_prefix_caching=True
    )
    vllm = VllmConfig(
        scheduler_config=SchedulerConfig(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            enable_chunked_prefill=config["chunked_prefill"],
            is_encoder_decoder=False,
            async_scheduling=config["async_scheduling"],
            long_prefill_token_threshold=config["long_prefill_token_threshold"],
        ),
        model_config=ModelConfig(
            model=folder, skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=config["max_model_len"]
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    cache.num_gpu_blocks = blocks
    if config["stages"] > 1:
        vllm.parallel_config.pipeline_parallel_size = config["stages"]
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return (AsyncScheduler if config["async_scheduling"] else Scheduler)(
        vllm_config=vllm,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(vllm),
        block_size=block_size,
        log_stats=False,
    )


def prompt_tokens(config, prompt, ids):
    """The tokens that content ids stand for."""
    size = config["hash_block_tokens"]
    tokens = [(i * size + j) % GENERATED for i in ids for j in range(size)]
    assert len(tokens) >= prompt
    return tokens[:prompt]


def run(config, trace, folder):
    """Drive the scheduler through a trace; batches, first tokens, finishes and preemptions."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(config["block_size"], sha256)
    scheduler = build(config, folder)
    base, per_token, per_context = config["law_us"]
    weights = config["stage_weight"]
    depth = len(weights) if len(weights) > 1 else 1 + config["async_scheduling"]

    def output(rows):
        sampled = [[GENERATED + int(i)] if yields else [] for i, _, _, yields in rows]
        return ModelRunnerOutput(
            req_ids=[row[0] for row in rows],
            req_id_to_index={row[0]: k for k, row in enumerate(rows)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    order = sorted(range(len(trace)), key=lambda i: (trace[i][0], i))
    stage_free = [0] * len(weights)
    queue = collections.deque()
    live, first, finish, steps = {}, {}, {}, []
    now = preempted = 0
    while len(finish) < len(trace):
        while order and trace[order[0]][0] <= now:
            i = order.pop(0)
            arrival, prompt, tokens, ids = trace[i]
            live[str(i)] = Request(
                request_id=str(i),
                prompt_token_ids=prompt_tokens(config, prompt, ids),
                sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0),
                pooling_params=None,
                arrival_time=arrival * 1e-6,
                block_hasher=hasher,
            )
            scheduler.add_request(live[str(i)])
        if not queue and not scheduler.has_requests():
            now = max(now, trace[order[0]][0])
            continue
        if scheduler.has_requests():
            out = scheduler.schedule()
            ran = out.total_num_scheduled_tokens > 0
            preempted += len(out.preempted_req_ids or ())
            rows = [
                (i, n, live[i].num_computed_tokens, not live[i].is_prefill_chunk)
                for i, n in out.num_scheduled_tokens.items()
            ]
            end = now
            if ran:
                work = base + per_token * sum(r[1] for r in rows) + per_context * sum(r[2] for r in rows)
                for stage, weight in enumerate(weights):
                    end = stage_free[stage] = max(end, stage_free[stage]) + weight * work
                lost = sorted(int(i) for i in out.preempted_req_ids or ())
                steps.append((now, end, [(int(i), n, c) for i, n, c, _ in rows], lost))
            elif not queue and order:
                scheduler.update_from_output(out, output([]))
                now = max(now, trace[order[0]][0])
                continue
            queue.append((end, out, rows))
            if ran and len(queue) < depth and queue[0][0] > now:
                continue
        end, out, rows = queue.popleft()
        now = max(now, end)
        for i, _, _, yields in rows:
            if yields:
                first.setdefault(i, now)
        for engine in scheduler.update_from_output(out, output(rows)).values():
            for item in engine.outputs:
                if item.finish_reason is not None:
                    finish[item.request_id] = now
                    live.pop(item.request_id)
    ids = [str(i) for i in range(len(trace))]
    return steps, [first[i] for i in ids], [finish[i] for i in ids], preempted


def random_case(seed):
    """A small trace of conversations and shared system prompts under random settings."""
    r = random.Random(seed)
    block_size = r.choice([1, 4, 16])
    size = block_size * r.choice([1, 2, 4])
    stages = r.choice([1, 1, 1, 1, 2, 3])
    longest = r.choice([128, 512, 1024])
    chunked = r.random() < 0.8
    budget = r.choice([16, 64, 256, 2048])
    config = {
        "max_num_seqs": min(budget, r.choice([1, 3, 16, 128])),
        "max_num_batched_tokens": budget if chunked else max(budget, longest),
        "max_model_len": longest,
        "chunked_prefill": chunked,
        "async_scheduling": r.random() < 0.5,
        "long_prefill_token_threshold": r.choice([0, 0, 0, 40]),
        "prefix_caching": True,
        "hash_block_tokens": size,
        "block_size": block_size,
        "num_gpu_blocks": -(-longest // block_size) + 1 + r.choice([0, 5, 20, 60, 2000]),
        "stages": stages,
        "stage_weight": [r.choice([1, 1, 2, 3]) for _ in range(stages)],
        "law_us": [r.choice([100, 1000]), r.choice([0, 3, 10]), r.choice([0, 0, 1])],
    }
    rate = r.choice([0, 5, 50, 500])
    now, trace, histories, fresh = 0.0, [], [], iter(range(1 << 30))
    for _ in range(r.choice([5, 20, 50])):
        now += r.expovariate(rate) if rate else 0
        room = longest - 3
        history = r.choice(histories) if histories and r.random() < 0.7 else []
        history = history[: r.randint(0, len(history))] if r.random() < 0.4 else history
        prompt = min(room, len(history) * size + r.randint(1, max(2, room // 4)))
        ids = [*history, *(next(fresh) for _ in range(1 + prompt // size))][: -(-prompt // size)]
        histories.append(ids[: prompt // size])
        trace.append([int(now * 1e6), prompt, r.randint(1, max(1, min(r.choice([3, 60]), room - prompt + 1))), ids])
    return config, trace


def main(path, cases):
    recorded = []
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(MODEL, file)
        for seed in range(cases):
            config, trace = random_case(seed)
            steps, first, finish, preempted = run(config, trace, folder)
            text = json.dumps(steps, separators=(",", ":"))
            recorded.append(
                {
                    "config": config,
                    "trace": trace,
                    "first_token_us": first,
                    "finish_us": finish,
                    "preemptions": preempted,
                    "batches": len(steps),
                    "batches_sha256": hashlib.sha256(text.encode()).hexdigest(),
                }
            )
    with gzip.GzipFile(path, "wb", 9, mtime=0) as file:
        file.write(json.dumps(recorded, separators=(",", ":")).encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 150)
