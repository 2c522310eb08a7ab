"""Engine settings: what a serving engine is told about batching."""

from __future__ import annotations

from dataclasses import dataclass

from apex_opt.errors import UsageError

_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Batching limits of one engine, named as vLLM names them.

    Parameters
    ----------
    max_num_seqs : int                     sequences running at once, >= 1
    max_num_batched_tokens : int           tokens in one batch, >= max_num_seqs
    max_model_len : int                    prompt + output of one request, >= 2
    chunked_prefill : bool                 a prompt may be split over batches
    long_prefill_token_threshold : int     most tokens of one prompt in one batch; 0 = no such limit
    block_size : int                       tokens in one KV block
    prefix_caching : bool                  blocks whose content is known are found again by their prefix
    async_scheduling : bool                the next batch is formed while the last one runs
    gpu_memory_utilization : float         share of a GPU's memory the engine may fill, above 0 and at most 1

    The defaults are those of vLLM 0.20 on a large GPU.

    Raises
    ------
    UsageError    a value out of its range, or limits that contradict each other
    """

    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    block_size: int = 16
    prefix_caching: bool = False
    async_scheduling: bool = True
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("long_prefill_token_threshold", 0),
            ("block_size", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
                raise UsageError(f"{name}: {value!r} is not a whole number from {least} to {_LARGEST - 1}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization: {share!r} is not a number above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "every running sequence may want a token in one batch; raise the one or lower the other"
            )
        if not self.chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise UsageError(
                f"without chunked prefill max_num_batched_tokens {self.max_num_batched_tokens} must reach "
                f"max_model_len {self.max_model_len}: a longer prompt would never be scheduled"
            )
