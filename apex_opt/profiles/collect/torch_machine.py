"""The accelerator that torch sees, with vLLM's kernels where it is installed, else torch's own.

torch, vLLM and pynvml are no dependencies: all are imported when a machine is opened.
"""

from __future__ import annotations

import contextlib
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError
from apex_opt.profiles.collect.timing import CallError
from apex_opt.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.profiles.collect.points import Point
    from apex_opt.profiles.collect.timing import Call, Effort, Result

_PAGE: Final = 16
"""Tokens of one block of a paged cache, vLLM's default."""

_WARM_CALLS: Final = 3
_LARGEST_CACHE_BYTES: Final = 128 * MIB


def open_machine() -> TorchMachine:
    """The first accelerator of this machine.

    Raises
    ------
    InputError      no torch, or none of its builds and no accelerator that it could use
    """
    if find_spec("torch") is None:
        raise InputError(
            "measuring needs torch, which is not installed; install it with CUDA, and vllm for its kernels"
        )
    import torch

    if not torch.cuda.is_available():
        what = "built without CUDA" if torch.version.cuda is None else "finds no CUDA GPU; check the driver: nvidia-smi"
        raise InputError(f"measuring needs a CUDA GPU: torch {torch.__version__} is here but {what}")
    return TorchMachine()


class TorchMachine:
    """A `Machine` of `apex_opt.profiles.collect.timing`; make it with `open_machine`."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", 0)
        torch.cuda.set_device(self._device)
        properties = torch.cuda.get_device_properties(self._device)
        self._counter = _Counter(str(getattr(properties, "uuid", "")))
        self._vllm = _vllm_version()
        self.name: str = properties.name
        self.gpus: int = torch.cuda.device_count()
        self.memory_bytes: int = properties.total_memory
        self.cache_bytes: int = getattr(properties, "L2_cache_size", _LARGEST_CACHE_BYTES)
        self.hardware = ", ".join(filter(None, (self.name, self._counter.about)))
        kernels = (
            f"kernels as vLLM {self._vllm} calls them: cuBLAS (16 bit), CUTLASS (fp8), Triton fused experts, "
            f"FlashAttention, recurrences and convolutions over states; all-reduce and the other collectives by NCCL"
            if self._vllm
            else "torch's own kernels: cuBLAS, scaled_dot_product_attention, torch.compile; collectives by NCCL"
        )
        self.software = f"torch {torch.__version__}, CUDA {torch.version.cuda}; {kernels}"

    def lacks(self, kind: str) -> str:
        """Why a kind of table cannot be measured, empty where it can."""
        if kind == "moe" and not self._vllm:
            return "torch has no fused experts; install vllm"
        if kind.startswith("state_") and not self._vllm:
            return "torch has no recurrences over states; install vllm"
        if kind == "collective" and self.gpus < 2:
            return "needs two GPUs"
        return ""

    def free_bytes(self) -> int:
        """Device memory that is free."""
        return int(self._torch.cuda.mem_get_info(self._device)[0])

    def release(self) -> None:
        """Give operands and graphs no longer in use back."""
        self._torch.cuda.empty_cache()

    def energy_j(self) -> float | None:
        """Reading of the board's energy counter, None where there is none."""
        return self._counter.energy_j()

    def record(self, calls: Sequence[Call]) -> Any:
        """A CUDA graph of the calls; each was made before, as what is compiled or loaded on first use must be."""
        torch = self._torch
        with self._named():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in calls[:_WARM_CALLS]:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            return graph

    def replay_s(self, graph: Any, times: int) -> float:
        """Device time of so many replays."""
        torch = self._torch
        with self._named():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3

    def calls(self, point: Point, copies: int) -> Sequence[Call]:
        """The call of a point over so many operands."""
        key = dict(point.key)
        builder: dict[str, Callable[[dict[str, Any], int], list[Call]]] = {
            "gemm": self._gemm,
            "moe": self._moe,
            "memory": self._memory,
            "attention_decode": self._attention,
            "attention_prefill": self._attention,
            "state_decode": self._states,
            "state_prefill": self._states,
        }
        with self._named():
            return builder[point.kind](key, copies)

    def collectives(self, ranks: int, points: Sequence[Point], effort: Effort) -> Sequence[Result]:
        """Collectives in a process per GPU."""
        from apex_opt.profiles.collect.torch_group import measure_group

        with self._named():
            return measure_group(ranks, points, effort)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Whatever fails inside as a CallError of a few words: kernels fail in many ways."""
        try:
            yield
        except self._torch.cuda.OutOfMemoryError:
            raise CallError("out of memory") from None
        except (RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError) as error:
            words = " ".join(str(error).split())[:80]
            raise CallError(f"{type(error).__name__}{': ' if words else ''}{words}") from error

    def _random(self, *shape: int, dtype: Any) -> Any:
        """Operands like a model's: the draw of the multipliers depends on the bits that change."""
        values = self._torch.randn(*shape, device=self._device, dtype=self._torch.bfloat16)
        return values.to(dtype)

    def _half(self, key: dict[str, Any]) -> Any:
        return {"bf16": self._torch.bfloat16, "fp16": self._torch.float16}[key["dtype"]]

    def _gemm(self, key: dict[str, Any], copies: int) -> list[Call]:
        """out[m,n] = in[m,k] W[n,k]^T; the input is shared, as the kernel before has just written it."""
        torch, (m, n, k) = self._torch, (key[name] for name in ("m", "n", "k"))
        if key["dtype"] != "fp8":
            rows = self._random(m, k, dtype=self._half(key))
            weights = [self._random(n, k, dtype=rows.dtype) for _ in range(copies)]
            return [partial(torch.nn.functional.linear, rows, w) for w in weights]
        narrow = torch.float8_e4m3fn
        rows = self._random(m, k, dtype=narrow)
        weights = [self._random(n, k, dtype=narrow).t() for _ in range(copies)]
        row_scale, column_scale = (torch.ones(shape, device=self._device) for shape in ((m, 1), (1, n)))
        if self._vllm:
            from vllm import _custom_ops

            product = _custom_ops.cutlass_scaled_mm
        else:
            product = torch._scaled_mm  # noqa: SLF001
        return [
            partial(product, rows, w, scale_a=row_scale, scale_b=column_scale, out_dtype=torch.bfloat16)
            for w in weights
        ]

    def _moe(self, key: dict[str, Any], copies: int) -> list[Call]:
        """Fused experts; as many routings as make a graph, so that no two calls in a row touch the same experts."""
        from vllm.model_executor.layers.fused_moe import fused_experts

        torch, dtype = self._torch, self._half(key)
        tokens, hidden, ffn = (key[name] for name in ("tokens", "hidden", "expert_ffn"))
        experts, held, topk = (key[name] for name in ("experts", "held", "topk"))
        gate_up = self._random(held, 2 * ffn, hidden, dtype=dtype)
        down = self._random(held, hidden, ffn, dtype=dtype)
        rows = self._random(tokens, hidden, dtype=dtype)
        share = torch.full((tokens, topk), 1 / topk, device=self._device, dtype=torch.float32)
        here = None
        if held < experts:
            here = torch.full((experts,), -1, device=self._device, dtype=torch.int32)
            here[:held] = torch.arange(held, device=self._device, dtype=torch.int32)
        generator = torch.Generator(device=self._device).manual_seed(0)
        routings = [
            torch.rand(tokens, experts, device=self._device, generator=generator).topk(topk).indices.to(torch.int32)
            for _ in range(20)
        ]
        run = partial(fused_experts, rows, gate_up, down, share, global_num_experts=experts, expert_map=here)
        return [partial(run, ids) for ids in routings]

    def _memory(self, key: dict[str, Any], copies: int) -> list[Call]:
        """Copies, norms with their sum, gated activations."""
        torch = self._torch
        name, *rest = str(key["op"]).rsplit("_", 1)
        if key["op"] == "copy":
            source, sink = (torch.ones(key["bytes"] // 2, device=self._device, dtype=torch.uint8) for _ in range(2))
            return [partial(sink.copy_, source)]
        width = int(rest[0])
        if name == "silu_and_mul":
            both = self._random(key["bytes"] // (6 * width), 2 * width, dtype=torch.bfloat16)
            out = torch.empty(both.shape[0], width, device=self._device, dtype=both.dtype)
            if self._vllm:
                import vllm._custom_ops  # noqa: F401 (the import registers the kernels)

                return [partial(torch.ops._C.silu_and_mul, out, both)]  # noqa: SLF001
            return [partial(torch.compile(_silu_and_mul), both)]
        rows = self._random(key["bytes"] // (8 * width), width, dtype=torch.bfloat16)
        carried, weight = torch.zeros_like(rows), torch.ones(width, device=self._device, dtype=rows.dtype)
        if self._vllm:
            from vllm import _custom_ops

            return [partial(_custom_ops.fused_add_rms_norm, rows, carried, weight, 1e-6)]
        return [partial(torch.compile(_add_rms_norm), rows, carried, weight)]

    def _attention(self, key: dict[str, Any], copies: int) -> list[Call]:
        """One layer: a new token per sequence, or a whole prompt."""
        batch, heads, kv_heads, width = (key[name] for name in ("batch", "heads", "kv_heads", "head_dim"))
        new, context = (1, key["context"]) if "context" in key else (key["length"], key["length"])
        shape, window, dtype = (batch, heads, kv_heads, width), key["window"], self._half(key)
        if self._vllm:
            return self._paged(shape, new, context, window, copies, dtype)
        if window:
            raise CallError("torch's own attention computes what a window leaves out as well; install vllm")
        return self._contiguous(shape, new, context, copies, dtype)

    def _states(self, key: dict[str, Any], copies: int) -> list[Call]:
        """Recurrences and convolutions by vLLM's kernels."""
        from apex_opt.profiles.collect.torch_states import state_calls

        return state_calls(self._torch, self._device, key, copies)

    def _contiguous(
        self, shape: tuple[int, int, int, int], new: int, context: int, copies: int, dtype: Any
    ) -> list[Call]:
        """torch's own attention, over caches that lie in one piece."""
        batch, heads, kv_heads, width = shape
        attend = self._torch.nn.functional.scaled_dot_product_attention
        query = self._random(batch, heads, new, width, dtype=dtype)
        caches = [
            tuple(self._random(batch, kv_heads, context, width, dtype=dtype) for _ in range(2)) for _ in range(copies)
        ]
        call = partial(attend, query, is_causal=new > 1, enable_gqa=heads != kv_heads)
        return [partial(call, keys, values) for keys, values in caches]

    def _paged(
        self, shape: tuple[int, int, int, int], new: int, context: int, window: int, copies: int, dtype: Any
    ) -> list[Call]:
        """FlashAttention as vLLM calls it, over a paged cache; of what a window leaves behind no block is held."""
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        torch, (batch, heads, kv_heads, width) = self._torch, shape
        pages = -(-context // _PAGE)
        behind = max(context - new + 1 - window, 0) // _PAGE if window else 0
        held = pages - behind

        def whole(values: Any) -> Any:
            return torch.as_tensor(values, device=self._device, dtype=torch.int32)

        query = self._random(batch * new, heads, width, dtype=dtype)
        out = torch.empty_like(query)
        starts = whole(range(0, (batch + 1) * new, new))
        lengths = whole([context] * batch)
        version = get_flash_attn_version()
        schedule = None
        if version == 3 and not window:
            # vLLM computes it once a step, for all layers, and not at all where they differ in their windows.
            schedule = get_scheduler_metadata(
                batch_size=batch,
                max_seqlen_q=new,
                max_seqlen_k=context,
                num_heads_q=heads,
                num_heads_kv=kv_heads,
                headdim=width,
                cache_seqlens=lengths,
                qkv_dtype=dtype,
                cu_seqlens_q=starts,
                page_size=_PAGE,
                causal=True,
            )
        call = partial(
            flash_attn_varlen_func,
            query,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=new,
            seqused_k=lengths,
            max_seqlen_k=context,
            causal=True,
            window_size=[window - 1, 0] if window else [-1, -1],
            scheduler_metadata=schedule,
            fa_version=version,
        )
        calls: list[Call] = []
        for _ in range(copies):
            keys, values = (self._random(batch * held + 1, _PAGE, kv_heads, width, dtype=dtype) for _ in range(2))
            table = torch.zeros(batch, pages, device=self._device, dtype=torch.int32)  # block 0 is the null block
            table[:, behind:] = torch.randperm(batch * held, device=self._device).view(batch, held) + 1
            calls.append(partial(call, k=keys, v=values, block_table=table))
        return calls


def _silu_and_mul(both: Any) -> Any:
    from torch.nn.functional import silu

    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


def _add_rms_norm(rows: Any, carried: Any, weight: Any) -> Any:
    summed = rows + carried
    wide = summed.float()
    normed = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return normed.to(summed.dtype) * weight, summed


def _vllm_version() -> str:
    """The release of vLLM, empty where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vllm")
    except PackageNotFoundError:
        return ""


class _Counter:
    """The energy counter of the board that torch sees, where pynvml is installed and the board has one."""

    def __init__(self, uuid: str) -> None:
        self.about = ""
        self._nvml: Any = None
        if find_spec("pynvml") is None or not uuid:
            return
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            # Not by number: CUDA may number the visible boards in another way.
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1e3
            self.about = f"power limit {limit_w:g} W, driver {pynvml.nvmlSystemGetDriverVersion()}"
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._nvml is None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3
