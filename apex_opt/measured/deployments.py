"""Measured rows in our words: systems, number formats, and settings of an engine from what is known of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster import load_cluster
from apex_opt.engines.kinds import load_kind
from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.ir.formats import FORMATS
from apex_opt.measured.facts import pieces
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import default_kv_format
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.measured.facts import Family, Load
    from apex_opt.measured.files import Row

_SYSTEMS: Final = {
    "a100_sxm": ("a100-sxm", 8),
    "h100_sxm": ("h100-sxm", 8),
    "h200_sxm": ("h200-sxm", 8),
    "b200_sxm": ("b200-sxm", 8),
    "b300_sxm": ("b300-sxm", 8),
    "gb200": ("gb200", 72),
    "gb300": ("gb300", 72),
    "l40s": ("l40s", 8),
}
_FORMATS: Final = {
    "": "bf16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "w4a16_mxfp4": "mxfp4",
    "int4_wo": "w4a16",
    "int8_wo": "w8a16",
}
_SAME_MODE: Final = {"nvfp4": ("mxfp4",), "w4a16": ("w4a16g32",)}

_LARGEST_BATCH: Final = 1 << 15
"""Tokens of a batch: tables of more take minutes and gigabytes, and no load here fills them."""
_MEANS: Final = {"of memory left by weights": "left", "weights and KV pool": "static"}
_SGLANG: Final = re.compile(r"sglang:v(\d+)\.(\d+)\.(\d+)")
_LAST_WITHOUT: Final = (0, 5, 9)
"""Release of SGLang up to which it forms no batch ahead where it verifies drafts.

Unless SGLANG_ENABLE_SPEC_V2 is exported, which no script at hand does; `server_args.py` of 0.5.9.
"""
_ADP_DEFAULT: Final = re.compile(r"^(?:default )?(\d+)$")


def cluster_of(system: str, gpus: int) -> str | None:
    """Spec of the whole nodes that so many GPUs of a system take; None for a system without a name here.

    A node is what shares one switch: a server, or the NVLink domain of a rack. Whole ones, so that all plans of a
    system share their tables.
    """
    if system not in _SYSTEMS:
        return None
    gpu, per_node = _SYSTEMS[system]
    nodes = ceil_div(gpus, per_node)
    return f"{per_node}x{gpu}" if nodes == 1 else f"{nodes}x{per_node}x{gpu}"


def weight_format(mode: str, own: str) -> str | None:
    """Weight format of a quantisation mode, for a model whose checkpoint has the format `own`; None if not known.

    Scales per block or per channel cost the same here. There is one mode for all 4-bit floats and one for all 4-bit
    integers: a model that comes in such a format is served in its own.
    """
    found = _FORMATS.get(mode)
    return own if own in _SAME_MODE.get(found or "", ()) else found


def kv_format(family: Family | None, weights: str) -> str:
    """Format of the KV cache: as the engine was told, else as the checkpoint asks for, else 16 bit.

    NVIDIA's own checkpoints of less than 16 bits, which all in nvfp4 are, ask for an fp8 cache, which engines heed.
    """
    said = "" if family is None else family.text("kv_cache_dtype")
    if said.startswith("fp8"):
        return "fp8"
    narrow = FORMATS[weights].weight_bits < 16
    own = family is not None and (family.text("checkpoint").startswith("nvidia/") or family.text("engine") == "trtllm")
    return "fp8" if narrow and (own or weights == "nvfp4") and said == "auto" else default_kv_format("bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """How an engine was started.

    Parameters
    ----------
    settings : EngineSettings
    share_of : str                    what `gpu_memory_utilization` is a share of: "all" memory for weights, cache and
                                      activations; "static", all memory for weights and cache alone; "left", what
                                      weights and activations leave, for the cache
    captured_tokens : int or None     most tokens of a batch with prompts that runs from captured pieces; None: as usual
    requests_per_client : int
    """

    settings: EngineSettings
    share_of: str
    captured_tokens: int | None
    requests_per_client: int


def started(family: Family | None, kind: str, cluster: str, load: Load) -> Started:
    """Settings of an engine as its family says, and its own defaults where it says nothing.

    Parameters
    ----------
    family : Family or None    of the row; None: nothing is known but the engine
    kind : str                 of the engine, as `load_kind` takes it
    cluster : str              as `load_cluster` takes it
    load : Load

    Raises
    ------
    InputError    a text of the family that cannot be read
    """
    engine = load_kind(kind)
    own = engine.common(load_cluster(cluster).gpu.memory_bytes)
    own |= {"scheduler": engine.scheduling(), "max_model_len": 1 << (load.prompt + load.output - 1).bit_length()}
    if isinstance(own["scheduler"], SglangScheduling):
        own["scheduler"] = replace(own["scheduler"], ignore_eos=True)
    captured: int | None = None
    requests, share_of = 10, "all"
    if family is not None:
        own |= _said(family, load)
        release = _SGLANG.search(family.text("image"))
        if load.drafts and release is not None and tuple(map(int, release.groups())) <= _LAST_WITHOUT:
            own["async_scheduling"] = False
        own["scheduler"] = _scheduling(own["scheduler"], family, load)
        share_of = _MEANS.get(family.text("memory_fraction_means"), "all")
        captured = _captured(family, kind, load)
        requests = _requests(family.text("requests_per_client"), load)
    own["max_num_batched_tokens"] = min(own["max_num_batched_tokens"], _LARGEST_BATCH)
    own["max_num_seqs"] = max(1, min(own["max_num_seqs"], own["max_num_batched_tokens"], load.clients))
    return Started(
        settings=EngineSettings(**own),
        share_of=share_of,
        captured_tokens=captured,
        requests_per_client=requests,
    )


def _captured(family: Family, kind: str, load: Load) -> int | None:
    """Most tokens of a batch with prompts that runs from captured pieces.

    vLLM captures pieces for the sizes that it captures whole steps for, unless it is told to capture decoding alone;
    TensorRT-LLM where it is told to, for all sizes.
    """
    mode = family.text("cuda_graph_mode")
    if "without a graph" in mode:
        return 0
    if kind.startswith("trtllm"):
        return _LARGEST_BATCH if any(_holds(row, family, load) for row in pieces()) else None
    most = family.number("cuda_graph_max_batch", load) if kind.startswith("vllm") else None
    return None if most is None else int(most)


def _holds(row: Row, family: Family, load: Load) -> bool:
    """Whether a line of `pieces` is of a load of a family."""
    cells = row.cells
    return (
        (cells["family"], int(cells["isl"]), int(cells["osl"])) == (family.name, load.prompt, load.output)
        and int(cells["clients_min"]) <= load.clients <= int(cells["clients_max"] or load.clients)
        and not (cells["attention_dp"] == "no" and load.copies > 1)
        and int(cells["experts_ep"] or load.groups) == load.groups
    )


def _said(family: Family, load: Load) -> dict[str, Any]:
    """Limits that a family names."""
    said: dict[str, Any] = {}
    for setting, column in (("max_num_batched_tokens", "max_num_batched_tokens"), ("max_num_seqs", "max_num_seqs")):
        if (value := family.number(column, load)) is not None:
            said[setting] = int(value)
    if (share := family.number("memory_fraction", load)) is not None:
        said["gpu_memory_utilization"] = share
    if chunked := family.text("chunked_prefill"):
        said["chunked_prefill"] = "off" not in chunked
    if overlap := family.text("async_scheduling"):
        said["async_scheduling"] = "off" not in overlap
    return said


def _scheduling(own: Any, family: Family, load: Load) -> Any:
    """Settings that only one engine has, as a family names them."""
    if isinstance(own, SglangScheduling):
        most = family.number("max_num_batched_tokens", load)
        mixed = "mixed chunk" in family.text("prefill_mixes_with_decode")
        seats = 0 if family.text("max_num_seqs") else own.drafting_seats
        return replace(
            own,
            max_prefill_tokens=int(most or own.max_prefill_tokens),
            mixed_chunk=mixed,
            drafting_seats=seats,
            scheduler_recv_interval=int(family.number("scheduler_recv_interval", load) or 1),
        )
    if not isinstance(own, TrtllmScheduling):
        return own
    waits = family.number("batch_wait_timeout_iters", load), family.number("batch_wait_max_tokens_ratio", load)
    said: dict[str, Any] = {}
    if None not in waits:
        said |= {"batch_wait_timeout_iters": int(waits[0] or 0), "batch_wait_max_tokens_ratio": waits[1]}
    said["adp_balance"] = family.text("adp_balance").startswith("on")
    for column in ("adp_timeout_iters", "adp_batching_wait_iters"):
        if match := _ADP_DEFAULT.match(family.text(column)):
            said[column] = int(match[1])
    return replace(own, **said)


def _requests(text: str, load: Load) -> int:
    """Requests of a run per client, such as `10` or `50 (20 at OSL 8192)`."""
    numbers = [int(number) for number in re.findall(r"\d+", text)] or [10]
    return numbers[1] if len(numbers) == 3 and load.output == numbers[2] else numbers[0]
