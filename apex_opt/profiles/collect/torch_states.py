"""Recurrences and convolutions over states, as vLLM 0.20 calls their kernels in the layers that keep them.

States lie in one pool for all calls, in 32 bits, and every call has its own of them; block 0 is vLLM's null block,
whose sequences kernels pass over. A prompt has no state before it. None of this has run on a GPU yet: names and
parameters are held against the source of vLLM 0.20.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from apex_opt.profiles.shapes import STATE_CHUNKS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apex_opt.profiles.collect.timing import Call

_HOPPER = (9, 0)
_BLACKWELL = 10
_LEAST_BF16 = (8, 0)


def state_calls(torch: Any, device: Any, key: Mapping[str, Any], copies: int) -> list[Call]:
    """The calls of a row of `state_decode` or `state_prefill`, over so many states in turn.

    Parameters
    ----------
    torch : module
    device : torch.device
    key : mapping           columns of the row
    copies : int            of the operands of decoding; a prompt starts without a state

    Raises
    ------
    ImportError    a kernel that the vLLM that is installed lacks
    """
    heads, rows, columns, key_heads = (int(key[name]) for name in ("heads", "key", "value", "key_heads"))
    made = _States(
        torch=torch,
        device=device,
        capability=torch.cuda.get_device_capability(device),
        heads=heads,
        key=rows,
        value=columns,
        key_heads=key_heads,
    )
    if "batch" in key:
        steps: dict[str, Callable[[int, int], list[Call]]] = {
            "gated_delta": made.gated_delta_step,
            "kda": made.kda_step,
            "mamba2": made.mamba2_step,
            "lightning": made.lightning_step,
            "convolution": made.convolution_step,
        }
        return steps[key["op"]](int(key["batch"]), copies)
    prompts: dict[str, Callable[[int], Call]] = {
        "gated_delta": made.gated_delta_prompt,
        "kda": made.kda_prompt,
        "mamba2": made.mamba2_prompt,
        "lightning": made.lightning_prompt,
        "convolution": made.convolution_prompt,
    }
    return [prompts[key["op"]](int(key["length"]))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _States:
    """The shape of a state, and what operands are made with; of a convolution channels are heads, and its width key."""

    torch: Any
    device: Any
    capability: tuple[int, int]
    heads: int
    key: int
    value: int
    key_heads: int

    def gated_delta_step(self, batch: int, copies: int) -> list[Call]:
        """The gated delta rule of a new token of each sequence, its gates within the kernel."""
        from vllm.model_executor.layers.fla.ops import fused_recurrent_gated_delta_rule_packed_decode

        pool, slots = self._pool(batch, copies, (self.heads, self.value, self.key))
        step = partial(
            fused_recurrent_gated_delta_rule_packed_decode,
            mixed_qkv=self._half(batch, 2 * self.key_heads * self.key + self.heads * self.value),
            a=self._half(batch, self.heads),
            b=self._half(batch, self.heads),
            A_log=self._zeros(self.heads),
            dt_bias=self._zeros(self.heads),
            scale=self.key**-0.5,
            initial_state=pool,
            out=self._half(batch, 1, self.heads, self.value),
            use_qk_l2norm_in_kernel=True,
        )
        return [partial(step, ssm_state_indices=own) for own in slots]

    def gated_delta_prompt(self, length: int) -> Call:
        """Gates and norms, then the rule in chunks: FlashInfer's kernel on Hopper, as vLLM chooses, else its own."""
        from vllm.model_executor.layers.fla.ops import chunk_gated_delta_rule, fused_post_conv_prep

        mixed = self._half(length, 2 * self.key_heads * self.key + self.heads * self.value)
        a, b = self._half(length, self.heads), self._half(length, self.heads)
        decay, bias = self._zeros(self.heads), self._zeros(self.heads)
        starts = self._whole([0, length])
        if self.capability == _HOPPER:
            from vllm.model_executor.layers.mamba.gdn_linear_attn import fi_chunk_gated_delta_rule

            rule = fi_chunk_gated_delta_rule
        else:
            from vllm.model_executor.layers.fla.ops.index import prepare_chunk_indices, prepare_chunk_offsets

            chunk = STATE_CHUNKS["gated_delta"]
            rule = partial(
                chunk_gated_delta_rule,
                chunk_indices=prepare_chunk_indices(starts, chunk),
                chunk_offsets=prepare_chunk_offsets(starts, chunk),
            )
        state = self._zeros(1, self.heads, self.value, self.key)

        def prompt() -> object:
            q, k, v, g, beta = fused_post_conv_prep(
                conv_output=mixed,
                a=a,
                b=b,
                A_log=decay,
                dt_bias=bias,
                num_k_heads=self.key_heads,
                head_k_dim=self.key,
                head_v_dim=self.value,
                apply_l2norm=True,
                output_g_exp=False,
            )
            return rule(
                q=q.unsqueeze(0),
                k=k.unsqueeze(0),
                v=v.unsqueeze(0),
                g=g.unsqueeze(0),
                beta=beta.unsqueeze(0),
                initial_state=state,
                output_final_state=True,
                cu_seqlens=starts,
                use_qk_l2norm_in_kernel=False,
            )

        return prompt

    def kda_step(self, batch: int, copies: int) -> list[Call]:
        """KDA of a new token of each sequence."""
        pool, slots = self._pool(batch, copies, (self.heads, self.value, self.key))
        step = self._kda("fused_recurrent_kda", batch, pool, list(range(batch + 1)))
        return [partial(step, ssm_state_indices=own) for own in slots]

    def kda_prompt(self, length: int) -> Call:
        """KDA over a prompt, in chunks."""
        state = self._zeros(1, self.heads, self.value, self.key)
        return partial(self._kda("chunk_kda", length, state, [0, length]), output_final_state=True)

    def _kda(self, name: str, tokens: int, state: Any, starts: list[int]) -> Callable[..., object]:
        """The kernel of KDA's gates, then one of its rule."""
        from vllm.model_executor.layers.fla.ops import kda

        rule, gates = getattr(kda, name), kda.fused_kda_gate
        q, k, v = (self._half(1, tokens, self.heads, width) for width in (self.key, self.key, self.value))
        raw, decay, bias = (
            self._half(tokens, self.heads * self.key),
            self._zeros(self.heads),
            self._zeros(self.heads * self.key),
        )
        beta, sequences = self._zeros(1, tokens, self.heads), self._whole(starts)

        def run(**more: Any) -> object:
            g = gates(raw, decay, self.key, g_bias=bias).unsqueeze(0)
            return rule(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                initial_state=state,
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=sequences,
                **more,
            )

        return run

    def mamba2_step(self, batch: int, copies: int) -> list[Call]:
        """Mamba2 of a new token of each sequence, by vLLM's own kernel, its default."""
        from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

        heads, width, rows = self.heads, self.value, self.key
        pool, slots = self._pool(batch, copies, (heads, width, rows))
        # What is one for a head is laid over all its elements without being copied, by which the kernel knows it.
        step = partial(
            selective_state_update,
            pool,
            self._half(batch, heads, width),
            self._half(batch, heads)[:, :, None].expand(-1, -1, width),
            (self._zeros(heads) - 1.0)[:, None, None].expand(-1, width, rows),
            self._half(batch, self.key_heads, rows),
            self._half(batch, self.key_heads, rows),
            self._zeros(heads)[:, None].expand(-1, width),
            self._zeros(heads)[:, None].expand(-1, width),
            dt_softplus=True,
            out=self._half(batch, heads, width),
            is_blackwell=self.capability[0] == _BLACKWELL,
        )
        return [partial(step, state_batch_indices=own) for own in slots]

    def mamba2_prompt(self, length: int) -> Call:
        """Mamba2 over a prompt, in chunks."""
        from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

        heads, width, chunk = self.heads, self.value, STATE_CHUNKS["mamba2"]
        bounds = [*range(0, length, chunk), length]
        return partial(
            mamba_chunk_scan_combined_varlen,
            self._half(length, heads, width),
            self._half(length, heads),
            self._zeros(heads) - 1.0,
            self._half(length, self.key_heads, self.key),
            self._half(length, self.key_heads, self.key),
            chunk_size=chunk,
            cu_seqlens=self._whole([0, length]),
            cu_chunk_seqlens=self._whole(bounds),
            last_chunk_indices=self._whole([len(bounds) - 2]),
            seq_idx=self._whole([0] * (len(bounds) - 1)),
            out=self._half(length, heads, width),
            D=self._zeros(heads),
            dt_bias=self._zeros(heads),
            dt_softplus=True,
            state_dtype=self.torch.float32,
        )

    def lightning_step(self, batch: int, copies: int) -> list[Call]:
        """Lightning attention of a new token of each sequence."""
        from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton

        pool, slots = self._pool(batch, copies, (self.heads, self.key, self.value))
        q, k, v = (self._half(batch, self.heads, 1, self.key) for _ in range(3))
        slope = self._zeros(self.heads, 1, 1) + 0.5
        return [partial(linear_decode_forward_triton, q, k, v, pool, slope, own) for own in slots]

    def lightning_prompt(self, length: int) -> Call:
        """Lightning attention over a prompt, in blocks."""
        from vllm.model_executor.layers.mamba.linear_attn import MiniMaxText01LinearKernel

        return partial(
            MiniMaxText01LinearKernel.jit_linear_forward_prefix,
            *(self._half(self.heads, length, self.key) for _ in range(3)),
            self._zeros(self.heads, self.key, self.value),
            self._zeros(self.heads, 1, 1) + 0.5,
            block_size=STATE_CHUNKS["lightning"],
        )

    def convolution_step(self, batch: int, copies: int) -> list[Call]:
        """The convolution of a new token of each sequence, in place."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update

        states, slots = self._tails(batch, copies)
        step = partial(
            causal_conv1d_update,
            self._half(batch, self.heads),
            states,
            self._half(self.heads, self.key),
            activation="silu",
        )
        return [partial(step, conv_state_indices=own) for own in slots]

    def convolution_prompt(self, length: int) -> Call:
        """The convolution of a prompt."""
        from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

        starts = self._whole([0, length])
        # Without it the call reads the lengths from the device, which no graph can hold.
        names = ("nums_dict", "batch_ptr", "token_chunk_offset_ptr")
        found = compute_causal_conv1d_metadata(starts.to("cpu"), device=self.device)
        states, slots = self._tails(1, 1)
        return partial(
            causal_conv1d_fn,
            self._half(length, self.heads).transpose(0, 1),
            self._half(self.heads, self.key),
            None,
            conv_states=states,
            query_start_loc=starts,
            cache_indices=slots[0],
            has_initial_state=self.torch.zeros(1, device=self.device, dtype=self.torch.bool),
            activation="silu",
            metadata=SimpleNamespace(**dict(zip(names, found, strict=True))),
        )

    def _pool(self, batch: int, copies: int, shape: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """States of all calls, and where in the pool those of each are."""
        pool = self._zeros(1 + copies * batch, *shape)
        return pool, self._slots(batch, copies)

    def _tails(self, batch: int, copies: int) -> tuple[Any, list[Any]]:
        """The same of convolutions: the last inputs, channels beside each other."""
        pool = self._half(1 + copies * batch, self.key - 1, self.heads).transpose(-1, -2)
        return pool, self._slots(batch, copies)

    def _slots(self, batch: int, copies: int) -> list[Any]:
        """Blocks of each call's sequences, in no order; 0 is none of them."""
        order = self.torch.randperm(copies * batch, device=self.device) + 1
        return list(order.to(self.torch.int32).view(copies, batch))

    def _half(self, *shape: int) -> Any:
        """Activations, drawn at random."""
        dtype = self.torch.bfloat16 if self.capability >= _LEAST_BF16 else self.torch.float16
        return self.torch.randn(*shape, device=self.device, dtype=dtype)

    def _zeros(self, *shape: int) -> Any:
        """States and parameters in 32 bits."""
        return self.torch.zeros(*shape, device=self.device, dtype=self.torch.float32)

    def _whole(self, values: list[int]) -> Any:
        """Starts of sequences and chunks."""
        return self.torch.as_tensor(values, device=self.device, dtype=self.torch.int32)
