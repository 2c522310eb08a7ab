"""Windows and states as `profile collect` measures them: what is called on which shapes, and tables read back.

No GPU and no torch are needed: arrays of numpy stand in for tensors, and functions that write down their arguments for
vLLM's kernels. Where vLLM is installed, or unpacked, they are held against the signatures of its source.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_profiles_collect import H200, Fake

import apex_opt
from apex_opt.errors import InputError
from apex_opt.profiles import load_profile
from apex_opt.profiles.collect import collect, command
from apex_opt.profiles.collect.points import Point, points
from apex_opt.profiles.collect.timing import CallError, Result
from apex_opt.profiles.collect.torch_machine import TorchMachine
from apex_opt.profiles.collect.torch_states import state_calls
from apex_opt.profiles.physics import convolution_work, recurrence_work
from apex_opt.profiles.shapes import STATE_CHUNKS

if TYPE_CHECKING:
    from collections.abc import Callable

FLA = "vllm.model_executor.layers.fla.ops"
MAMBA = "vllm.model_executor.layers.mamba"
KERNELS = {
    (f"{FLA}", "fused_recurrent_gated_delta_rule_packed_decode"): f"{FLA}.fused_recurrent",
    (f"{FLA}", "chunk_gated_delta_rule"): f"{FLA}.chunk",
    (f"{FLA}", "fused_post_conv_prep"): f"{FLA}.fused_gdn_prefill_post_conv",
    (f"{FLA}.index", "prepare_chunk_indices"): f"{FLA}.index",
    (f"{FLA}.index", "prepare_chunk_offsets"): f"{FLA}.index",
    (f"{FLA}.kda", "fused_recurrent_kda"): f"{FLA}.kda",
    (f"{FLA}.kda", "chunk_kda"): f"{FLA}.kda",
    (f"{FLA}.kda", "fused_kda_gate"): f"{FLA}.kda",
    (f"{MAMBA}.gdn_linear_attn", "fi_chunk_gated_delta_rule"): f"{MAMBA}.gdn_linear_attn",
    (f"{MAMBA}.ops.mamba_ssm", "selective_state_update"): f"{MAMBA}.ops.mamba_ssm",
    (f"{MAMBA}.ops.ssd_combined", "mamba_chunk_scan_combined_varlen"): f"{MAMBA}.ops.ssd_combined",
    (f"{MAMBA}.ops.causal_conv1d", "causal_conv1d_update"): f"{MAMBA}.ops.causal_conv1d",
    (f"{MAMBA}.ops.causal_conv1d", "causal_conv1d_fn"): f"{MAMBA}.ops.causal_conv1d",
    (f"{MAMBA}.linear_attn", "jit_linear_forward_prefix"): f"{MAMBA}.linear_attn",
    ("vllm.model_executor.layers.lightning_attn", "linear_decode_forward_triton"): (
        "vllm.model_executor.layers.lightning_attn"
    ),
    ("vllm.v1.attention.backends.utils", "compute_causal_conv1d_metadata"): "vllm.v1.attention.backends.utils",
    ("vllm.vllm_flash_attn", "flash_attn_varlen_func"): "vllm.vllm_flash_attn.flash_attn_interface",
    ("vllm.vllm_flash_attn", "get_scheduler_metadata"): "vllm.vllm_flash_attn.flash_attn_interface",
    ("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version"): "vllm.v1.attention.backends.fa_utils",
}
"""Functions that are called, by where they are imported from: where they are defined."""


class Tensor:
    """An array that counts as a tensor."""

    def __init__(self, values: Any, dtype: str) -> None:
        self.values, self.dtype = values, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def to(self, dtype: str) -> Tensor:
        return self if dtype == "cpu" else Tensor(self.values, dtype)

    def view(self, *shape: int) -> Tensor:
        return Tensor(self.values.reshape(shape), self.dtype)

    def expand(self, *shape: int) -> Tensor:
        wanted = [own if new < 0 else new for new, own in zip(shape, self.shape, strict=True)]
        return Tensor(np.broadcast_to(self.values, wanted), self.dtype)

    def transpose(self, first: int, second: int) -> Tensor:
        return Tensor(self.values.swapaxes(first, second), self.dtype)

    def unsqueeze(self, axis: int) -> Tensor:
        return Tensor(np.expand_dims(self.values, axis), self.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.values[index], self.dtype)

    def __setitem__(self, index: Any, other: Tensor) -> None:
        self.values[index] = other.values

    def __add__(self, other: float) -> Tensor:
        return Tensor(self.values + other, self.dtype)

    def __sub__(self, other: float) -> Tensor:
        return Tensor(self.values - other, self.dtype)


def torch_of(capability: tuple[int, int]) -> Any:
    """As much of torch as the calls are made with."""

    def zeros(*shape: int, device: str, dtype: str) -> Tensor:
        return Tensor(np.zeros(shape, dtype=np.int32 if dtype == "int32" else np.float32), dtype)

    names = ("bfloat16", "float16", "float32", "int32", "bool")
    return SimpleNamespace(
        **{name: name for name in names},
        zeros=zeros,
        randn=zeros,
        empty_like=lambda other: other,
        randperm=lambda size, device: Tensor(np.random.default_rng(0).permutation(size), "int64"),
        as_tensor=lambda values, device, dtype: Tensor(np.array(values), dtype),
        cuda=SimpleNamespace(get_device_capability=lambda device: capability, OutOfMemoryError=MemoryError),
    )


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Signature | None, tuple[Any, ...], dict[str, Any]]]:
    """What is called of vLLM, whose modules are all made up."""
    found: list[Any] = []
    made: dict[str, ModuleType] = {}
    for module in {name for name, _ in KERNELS}:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in made:
                made[name] = ModuleType(name)
                made[name].__path__ = []  # type: ignore[attr-defined]
                if depth > 1:
                    setattr(made[".".join(parts[: depth - 1])], parts[depth - 1], made[name])
    for (module, name), defined in KERNELS.items():
        signature = signature_of(defined, name)

        def kernel(*args: Any, name: str = name, signature: Signature | None = signature, **more: Any) -> Any:
            found.append((name, signature, args, more))
            return answer_of(name, args, more)

        holder: Any = made[module]
        if name == "jit_linear_forward_prefix":
            holder.MiniMaxText01LinearKernel = SimpleNamespace(jit_linear_forward_prefix=kernel)
        else:
            setattr(holder, name, kernel)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    return found


def answer_of(name: str, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
    """What a kernel gives, where something is done with it."""
    if name == "fused_post_conv_prep":
        length, heads = more["a"].shape
        shapes = [(length, more["num_k_heads"], more["head_k_dim"])] * 2
        shapes += [(length, heads, more["head_v_dim"]), (length, heads), (length, heads)]
        return [Tensor(np.zeros(shape), "made") for shape in shapes]
    if name == "fused_kda_gate":
        tokens, width = args[0].shape
        return Tensor(np.zeros((tokens, width // args[2], args[2])), "float32")
    return {"compute_causal_conv1d_metadata": ({}, None, None), "get_flash_attn_version": 3}.get(name)


def signature_of(module: str, name: str) -> Signature | None:
    """The parameters of a function, read from vLLM's source without importing it; None where it is not at hand."""
    spec = find_spec("vllm") if "vllm" not in sys.modules else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    required = len(plain) - len(args.defaults)
    found = [
        Parameter(arg.arg, Parameter.POSITIONAL_OR_KEYWORD, default=Parameter.empty if index < required else None)
        for index, arg in enumerate(plain)
    ]
    found += [
        Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None)
        for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    if args.kwarg:
        found.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def state_points(quick: bool = True) -> tuple[Point, ...]:
    return points(("state",), H200, 1, quick=quick)


def made(point: Point, copies: int = 2, capability: tuple[int, int] = (10, 0)) -> Any:
    return state_calls(torch_of(capability), "cuda", dict(point.key), copies)


# --- what is called


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_every_row_of_states_is_one_call_that_vllm_understands(called: list[Any], capability: tuple[int, int]) -> None:
    for point in state_points():
        calls = made(point, capability=capability)
        assert len(calls) == (2 if point.kind == "state_decode" else 1)
        before = len(called)
        for call in calls:
            call()
        assert len(called) > before
    for _, signature, args, more in called:
        if signature is not None:
            signature.bind(*args, **more)
    ran = {name for name, *_ in called}
    assert ("fi_chunk_gated_delta_rule" in ran) == (capability == (9, 0))
    assert ("chunk_gated_delta_rule" in ran) == (capability != (9, 0))


@pytest.mark.skipif(find_spec("vllm") is None, reason="the source of vLLM is not at hand")
def test_the_signatures_are_read_from_the_source_of_vllm() -> None:
    for (_, name), defined in KERNELS.items():
        found = signature_of(defined, name)
        assert found is not None
        assert found.parameters or name == "get_flash_attn_version"


def one(called: list[Any], op: str, kind: str) -> dict[str, Any]:
    """Arguments of the last kernel that the first row of an operation calls."""
    called.clear()
    point = next(point for point in state_points() if point.kind == kind and ("op", op) in point.key)
    if kind == "state_decode":
        point = replace(point, key=(*point.key[:-1], ("batch", 16)))
    else:
        point = replace(point, key=(*point.key[:-1], ("length", 300)))
    made(point)[0]()
    _, _, args, more = called[-1]
    shapes = {index: value for index, value in enumerate(args)} | more
    return {str(name): value.shape if isinstance(value, Tensor) else value for name, value in shapes.items()}


def test_states_lie_as_the_kernels_of_a_new_token_take_them(called: list[Any]) -> None:
    delta = one(called, "gated_delta", "state_decode")
    assert delta["initial_state"] == (33, 32, 128, 128)  # two calls of 16 sequences, and the null block
    assert delta["mixed_qkv"] == (16, 2 * 16 * 128 + 32 * 128)
    assert (delta["out"], delta["ssm_state_indices"]) == ((16, 1, 32, 128), (16,))
    kda = one(called, "kda", "state_decode")
    assert kda["q"] == kda["v"] == kda["g"] == (1, 16, 32, 128)
    assert (kda["beta"], kda["cu_seqlens"], kda["ssm_state_indices"]) == ((1, 16, 32), (17,), (16,))
    mamba = one(called, "mamba2", "state_decode")
    assert mamba["0"] == (33, 64, 64, 128)  # matrices, columns, rows
    assert mamba["1"] == mamba["2"] == mamba["out"] == (16, 64, 64)
    assert (mamba["3"], mamba["4"], mamba["5"], mamba["6"], mamba["7"]) == (
        (64, 64, 128),
        (16, 8, 128),
        (16, 8, 128),
        (64, 64),
        (64, 64),
    )
    lightning = one(called, "lightning", "state_decode")
    assert lightning["0"] == (16, 64, 1, 128)
    assert lightning["3"] == (33, 64, 128, 128)
    convolution = one(called, "convolution", "state_decode")
    assert (convolution["0"], convolution["1"], convolution["2"]) == ((16, 8192), (33, 8192, 3), (8192, 4))


def test_prompts_are_laid_out_as_the_kernels_take_them(called: list[Any]) -> None:
    delta = one(called, "gated_delta", "state_prefill")
    assert (delta["q"], delta["v"], delta["g"]) == ((1, 300, 16, 128), (1, 300, 32, 128), (1, 300, 32))
    assert (delta["initial_state"], delta["cu_seqlens"]) == ((1, 32, 128, 128), (2,))
    kda = one(called, "kda", "state_prefill")
    assert (kda["q"], kda["initial_state"], kda["output_final_state"]) == ((1, 300, 32, 128), (1, 32, 128, 128), True)
    mamba = one(called, "mamba2", "state_prefill")
    assert (mamba["0"], mamba["1"], mamba["3"]) == ((300, 64, 64), (300, 64), (300, 8, 128))
    # Three chunks of 128 tokens at the most, all of the one sequence.
    assert (mamba["chunk_size"], mamba["cu_chunk_seqlens"], mamba["seq_idx"]) == (128, (4,), (3,))
    assert (mamba["last_chunk_indices"], mamba["out"], mamba["state_dtype"]) == ((1,), (300, 64, 64), "float32")
    lightning = one(called, "lightning", "state_prefill")
    assert (lightning["0"], lightning["3"], lightning["block_size"]) == ((64, 300, 128), (64, 128, 128), 256)
    convolution = one(called, "convolution", "state_prefill")
    assert (convolution["0"], convolution["conv_states"]) == ((8192, 300), (2, 8192, 3))
    assert convolution["metadata"].nums_dict == {}


def test_no_call_has_the_states_of_another_or_the_null_block(called: list[Any]) -> None:
    point = next(point for point in state_points() if ("op", "gated_delta") in point.key and ("batch", 16) in point.key)
    for call in made(point, copies=3):
        call()
    slots = [more["ssm_state_indices"].values for *_, more in called]
    assert sorted(np.concatenate(slots).tolist()) == list(range(1, 49))


def machine(vllm: str = "0.20.2") -> TorchMachine:
    """A machine without a GPU, for the calls that it would make."""
    made = TorchMachine.__new__(TorchMachine)
    vars(made).update(_torch=torch_of((9, 0)), _device="cuda", _vllm=vllm, gpus=1)
    return made


def window_points() -> tuple[Point, ...]:
    return points(("window",), H200, 1, quick=True)


def test_windows_hold_the_blocks_that_are_seen_and_no_others(called: list[Any]) -> None:
    for point in window_points():
        key = dict(point.key)
        called.clear()
        for call in machine().calls(point, 2):
            call()
        *_, (name, signature, args, more) = called
        assert name == "flash_attn_varlen_func"
        if signature is not None:
            signature.bind(*args, **more)
        assert more["window_size"] == [127, 0]
        assert more["scheduler_metadata"] is None
        table = more["block_table"].values
        context = key.get("context", key.get("length"))
        assert table.shape == (key["batch"], context // 16)
        seen = 128 // 16 if "context" in key else context // 16
        assert (table[:, : table.shape[1] - seen] == 0).all(), "null blocks"
        held = table[:, table.shape[1] - seen :]
        assert sorted(held.ravel().tolist()) == list(range(1, key["batch"] * seen + 1))
        assert more["k"].shape == (key["batch"] * seen + 1, 16, key["kv_heads"], 64)
        if "context" in key:
            read = 2 * 2 * key["batch"] * 128 * key["kv_heads"] * 64
            assert point.cold_bytes == (read if read >= 2**16 else 0)
    # Without a window the schedule is made once a step.
    plain = points(("attention",), H200, 1, quick=True)[0]
    called.clear()
    machine().calls(plain, 1)[0]()
    assert "get_scheduler_metadata" in {name for name, *_ in called}
    assert called[-1][3]["window_size"] == [-1, -1]


def test_what_needs_vllm_says_so() -> None:
    alone = machine(vllm="")
    for kind in ("state_decode", "state_prefill"):
        assert alone.lacks(kind) == "torch has no recurrences over states; install vllm"
        assert machine().lacks(kind) == ""
    with pytest.raises(CallError, match="computes what a window leaves out as well; install vllm"):
        alone.calls(window_points()[0], 1)


def test_operations_that_are_not_to_be_had_are_named_in_the_answer(tmp_path: Path) -> None:
    said = "torch's own attention computes what a window leaves out as well; install vllm"
    lacking = dict.fromkeys(("state_decode", "state_prefill"), "torch has no recurrences over states; install vllm")
    fake = Fake(lacking=lacking, fails=lambda point: said if dict(point.key).get("window") else "")
    found = collect(fake, H200, tmp_path, ("attention", "window", "state"), "2026-11-29", quick=True)
    assert dict(found.passed_over) == lacking
    assert {report.kind: dict(report.dropped) for report in found.reports} == {
        "attention_decode": {said: 18},
        "attention_prefill": {said: 8},
    }
    with pytest.raises(InputError, match=r"attention_decode: torch's own .*install vllm \(18 points\)"):
        collect(fake, H200, tmp_path, ("window", "state"), "2026-11-29", quick=True)


# --- what becomes of it


def law_s(point: Point) -> float:
    """Twice the roofline, and ten microseconds."""
    key: dict[str, Any] = dict(point.key)
    if point.kind.startswith("state"):
        shape = (key["heads"], key["key"], key["value"], key["key_heads"])
        if key["op"] == "convolution":
            work = convolution_work(*shape[:2])
        else:
            work = recurrence_work(key["op"], *shape, 4.0, STATE_CHUNKS[key["op"]])
        flops, moved = work.of_step(key["batch"]) if "batch" in key else work.of_prompt(key["length"])
    else:
        tokens = key.get("context", key.get("length"))
        seen = min(tokens, key["window"]) if key["window"] else tokens
        pairs = key["batch"] * (seen if "context" in key else tokens * seen - seen * (seen - 1) / 2)
        flops = 4.0 * key["heads"] * key["head_dim"] * pairs
        moved = 4.0 * key["kv_heads"] * key["head_dim"] * key["batch"] * seen
    return 10e-6 + 2 * max(float(flops) / dict(H200.flops_per_s)["bf16"], float(moved) / H200.memory_bytes_per_s)


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...]], str]:
    """Collects all rows of operations as the law has them, and gives the folder."""

    def measured(machine: Any, point: Point, effort: Any) -> Result:
        return Result(time_s=law_s(point))

    def make(ops: tuple[str, ...]) -> str:
        monkeypatch.setattr(command, "_measured", measured)
        collect(Fake(), H200, tmp_path, ops, "2026-11-29")
        return str(tmp_path)

    return make


def test_states_are_read_back_as_they_were_measured(collected: Callable[[tuple[str, ...]], str]) -> None:
    profile = load_profile(H200, profiles=collected(("state",)))
    for point in state_points(quick=False):
        key: dict[str, Any] = dict(point.key)
        shape = (key["heads"], key["key"], key["value"], key["key_heads"])
        if key["op"] == "convolution":
            work = convolution_work(*shape[:2])
        else:
            work = recurrence_work(key["op"], *shape, 4.0, STATE_CHUNKS[key["op"]])
        if "batch" in key:
            found = float(profile.state_decode(key["op"], shape, work, np.array([key["batch"]]))[0])
        else:
            launch, chunks = profile.state_prefill(key["op"], shape, work, np.array([key["length"]]))
            found = launch + float(chunks[0])
        assert found == pytest.approx(law_s(point), rel=2e-3)
    told = profile.provenance
    for op in ("gated_delta", "kda", "mamba2", "lightning", "convolution"):
        assert "collected" in told[f"{op} decode"]
        assert told[f"{op} decode"].startswith("measured")
        assert told[f"{op} prefill"].startswith("measured")


def told_of(model: str, plan: str, gpus: int, folder: str) -> dict[str, str]:
    """Where the figures of a simulated plan come from."""
    answer = apex_opt.simulate(
        model=model,
        plan=plan,
        cluster=f"{gpus}xh200-sxm",
        trace="poisson:rate=1,n=4,prompt=64,output=8",
        profiles=folder,
    )
    return dict(answer.document.provenance)


def test_a_plan_of_a_hybrid_model_says_that_its_states_were_measured(
    collected: Callable[[tuple[str, ...]], str],
) -> None:
    told = told_of("qwen3-next-80b-a3b", "attn(tp2) ffn(tp2) bf16", 2, collected(("state",)))
    for name in ("gated_delta decode", "gated_delta prefill", "convolution decode", "convolution prefill"):
        assert told[name].startswith("measured"), told
        assert "collected" in told[name]


def test_a_plan_of_a_windowed_model_says_that_its_attention_was_measured(
    collected: Callable[[tuple[str, ...]], str],
) -> None:
    told = told_of("gpt-oss-120b", "attn(tp1) ffn(tp1) mxfp4", 1, collected(("attention", "window")))
    for name in ("attention decode", "attention prefill"):
        assert told[name].startswith("measured"), told
        assert "derived" not in told[name]
        assert "collected" in told[name]
