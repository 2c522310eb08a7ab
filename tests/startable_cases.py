"""Verdicts of vLLM on a model and the arguments of `vllm serve`, and the plans that the arguments ask for."""

from __future__ import annotations

import csv
import importlib.util
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from apex_opt.cluster import load_cluster
from apex_opt.engines import VLLM
from apex_opt.errors import ApexError
from apex_opt.ir import Model, load_model
from apex_opt.oracle.instance import Instance
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import StageMemory, stage_memory
from apex_opt.plans.plan import Plan, Template, parse_plan
from apex_opt.units import GIB

HERE = Path(__file__).resolve().parent
FAMILIES = HERE / "golden" / "startable_families.csv"
THIN = HERE / "golden" / "startable_vllm.csv"
SHARED = HERE.parents[1] / "shared"
GPUS = {"8.0": "a100-sxm-80gb", "8.9": "l40s-48gb", "9.0": "h100-sxm-80gb", "10.0": "b200-sxm-180gb"}
"""GPUs that stand for the pretended ones, by compute capability."""

UNSAID = (
    "--speculative-config",
    "--attention-backend",
    "--decode-context-parallel-size",
    "--kv-transfer-config",
    "--enable-eplb",
    "--disable-hybrid-kv-cache-manager",
    "--hf-overrides",
    "--enable-dbo",
    "--all2all-backend",
    "--kv-offloading-size",
)
"""Options of vLLM that no plan has words for."""

Row = dict[str, str]


@dataclass(frozen=True)
class Asked:
    """What a row asks for: a plan of a model, and the engine's settings."""

    model: Model
    plan: Plan
    settings: EngineSettings
    gpu: str

    @property
    def instance(self) -> Instance:
        """What the plan is judged on; the cache is to hold a request of the whole length, as vLLM wants it."""
        nodes = -(-self.plan.devices // 8)
        cluster = load_cluster(f"{nodes}x8x{self.gpu}")
        return Instance(
            model=self.model,
            cluster=cluster,
            settings=self.settings,
            longest_tokens=self.settings.max_model_len,
            weight_formats=(self.plan.weight_format,),
            kv_formats=(self.plan.kv_format,),
            max_devices=cluster.size,
        )

    @property
    def memory(self) -> tuple[StageMemory, ...]:
        return stage_memory(self.model, load_cluster(f"1x{self.gpu}").gpu, self.plan, self.settings)


class UnsaidError(Exception):
    """Arguments that no plan has words for, or that say more than a plan does."""


def rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def find_config(name: str) -> Path | None:
    """The file of a model: of the registry, of the cases here, or of the package that carries the published ones."""
    case = HERE / "cases" / "configs" / f"{name.partition('/')[0]}.json"
    registry = HERE.parent / "apex_opt" / "ir" / "configs" / name
    package = importlib.util.find_spec("aiconfigurator_core")
    published = Path(package.submodule_search_locations[0]) / "model_configs" / name if package else registry
    found = [path for path in (case, registry, published) if path.is_file()]
    return found[0] if found else None


@cache
def read(name: str) -> Model | str | None:
    """The model of a row; why it is not read; None where its file is not here."""
    path = find_config(name)
    if path is None or (
        path.with_name(path.name.replace("_config.json", "_hf_quant_config.json")) not in (path,)
        and (path.with_name(path.name.replace("_config.json", "_hf_quant_config.json")).is_file())
    ):
        return None  # quantisation beside it under another name than we read
    try:
        return load_model(str(path))
    except ApexError as error:
        return str(error)


def asked(row: Row) -> Asked:
    """What a row asks for.

    Raises
    ------
    UnsaidError    a model that is not read or not here, or arguments that say what plans do not
    """
    model = read(row["config"])
    if not isinstance(model, Model):
        raise UnsaidError("model")
    env, given = _parsed(row["arguments"])
    said = [name for name in UNSAID if name in given]
    if said:
        raise UnsaidError(said[0])
    tp, pp, dp = (int(given.get(f"--{n}-parallel-size", 1)) for n in ("tensor", "pipeline", "data"))
    nodes = int(given.get("--nnodes", 1))
    if min(tp, pp, dp) < 1 or tp * pp * dp > 8 * nodes or (tp * pp * dp) % nodes:
        raise UnsaidError("nodes")  # plans are placed by us
    try:
        plan = _plan(env, given, model, tp, pp, dp)
        settings = _settings(given, model, float(row["capability"]), plan.kv_format)
        return Asked(model, plan, settings, GPUS[row["capability"]])
    except ApexError as error:
        raise UnsaidError(str(error)) from None


def _parsed(arguments: str) -> tuple[dict[str, str], dict[str, str]]:
    words, env, given = shlex.split(arguments), {}, {}
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            name, _, value = word.partition("=")
            env[name] = value
        else:
            given[word] = words.pop(0) if words and not words[0].startswith("--") else ""
    return env, given


def _plan(env: dict[str, str], given: dict[str, str], model: Model, tp: int, pp: int, dp: int) -> Plan:
    weights = model.weight_format
    if (method := given.get("--quantization")) is not None:
        if method != "fp8" or weights not in ("bf16", "fp16"):
            raise UnsaidError("--quantization")
        weights = "fp8"
    dtype = given.get("--dtype", "auto")
    halves = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "auto": model.dtype}
    if dtype not in halves:
        raise UnsaidError("--dtype")
    if weights in ("bf16", "fp16"):
        weights = halves[dtype]
    cache = given.get("--kv-cache-dtype", "auto")
    kv = "fp8" if cache.startswith("fp8") else "fp16" if weights == "fp16" else "bf16"
    if cache == "auto" and model.kv_format:
        kv = model.kv_format
    experts = "--enable-expert-parallel" in given
    if experts and not model.is_moe:
        raise UnsaidError("--enable-expert-parallel")
    ffn = Template(ep=tp * dp) if experts else Template(tp=tp * dp)
    return Plan(
        replicas=1 if model.is_moe else dp,
        layers=_layers(env, model, pp),
        attention=Template(dp=dp, tp=tp) if model.is_moe else Template(tp=tp),
        ffn=ffn if model.is_moe else Template(tp=tp),
        weight_format=weights,
        kv_format=kv,
    )


def _layers(env: dict[str, str], model: Model, stages: int) -> tuple[int, ...]:
    """Layers of the stages as stated, or as vLLM deals them: what does not divide goes to those before the last."""
    if "VLLM_PP_LAYER_PARTITION" in env:
        layers = tuple(map(int, env["VLLM_PP_LAYER_PARTITION"].split(",")))
        if sum(layers) != model.layers or len(layers) != stages:
            raise UnsaidError("VLLM_PP_LAYER_PARTITION")
        return layers
    base, more = divmod(model.layers // model.together, stages)
    found = [base] * stages
    for index in range(2, more + 2):
        found[-index] += 1
    return tuple(model.together * count for count in found)


def _settings(given: dict[str, str], model: Model, capability: float, kv: str) -> EngineSettings:
    length = given.get("--max-model-len")
    fields: dict[str, Any] = {
        "max_num_seqs": int(given.get("--max-num-seqs", 1024)),
        "max_num_batched_tokens": int(given.get("--max-num-batched-tokens", 8192)),
        "max_model_len": int(length) if length not in (None, "-1", "auto") else model.max_position,
        "block_size": int(given.get("--block-size") or VLLM.block_size(model, 16, {(capability, kv)})),
        "gpu_memory_utilization": float(given.get("--gpu-memory-utilization", 0.9)),
        "chunked_prefill": "--no-enable-chunked-prefill" not in given,
        "runnable": VLLM,
    }
    if fields["max_model_len"] > model.max_position:
        raise UnsaidError("--max-model-len")  # refused before any plan is looked at
    return EngineSettings(**fields)


def of_family(row: Row) -> Asked:
    """What a row of `FAMILIES` asks for: a plan of a configuration of the cases, for requests of 4,096 tokens."""
    model = load_model(str(HERE / "cases" / "models" / f"{row['model']}.json"))
    plan = parse_plan(row["plan"], model)
    length = {"--max-model-len": str(min(4096, model.max_position))}
    settings = _settings(length, model, float(row["capability"]), plan.kv_format)
    return Asked(model, plan, settings, GPUS[row["capability"]])


def free_bytes(row: Row) -> float:
    """Pretended memory for the KV cache."""
    return float(row["kv_free_gib"]) * GIB
