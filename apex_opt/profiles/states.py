"""Times of operations beside products and attention over a cache: states, indexers, encoders, residual streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.profiles.laws import STATE_FLOOR_S
from apex_opt.profiles.lookup import Lookup, count_of, sizes
from apex_opt.profiles.physics import (
    encoder_work,
    hyper_work,
    sparse_work,
)
from apex_opt.profiles.shapes import encoder_feature, state_feature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from apex_opt.profiles.physics import StateWork

    Floats = NDArray[np.float64]


_LEAST_HEADS: Final = 64
"""Heads that kernels of sparse attention compute with at the least: those of FlashMLA."""


class StateTimes(Lookup):
    """Those times on one accelerator."""

    def score_decode(
        self, heads: int, width: int, entry_bytes: float, sequences: ArrayLike, queries: int = 1
    ) -> tuple[Floats, Floats]:
        """Decode of an indexer: base by sequences, and seconds per entry of its cache.

        Entries are read at the rate of memory-bound kernels, and no faster than they are multiplied with.

        Parameters
        ----------
        heads, width : int       heads of the indexer and elements of each
        entry_bytes : float      read per entry
        sequences : int64[...]   of the batch
        queries : int            tokens of each: one, and its drafts
        """
        count = sizes("sequences", sequences)
        reading = float(self.memory_time_s(np.array([entry_bytes]), launched=False)[0])
        every = count_of("heads", heads) * count_of("width", width)
        scoring = float(self._bound(self.kernel(self.indexer_dtype), *sparse_work("scores", every)))
        per_entry = max(reading, queries * scoring) + queries * self._scored_s("choice", every, count)
        return 2 * self._launch_s(count), np.where(count > 0, per_entry, 0.0)

    def score_prefill(self, heads: int, width: int, chunk: ArrayLike) -> Floats:
        """Prompts of an indexer: seconds per query and entry, by the tokens of a chunk; launches are left out.

        Parameters
        ----------
        heads, width : int     heads of the indexer and elements of each
        chunk : int64[...]     tokens of a prompt
        """
        count = sizes("chunk", chunk)
        every = count_of("heads", heads) * count_of("width", width)
        per_pair = self._scored_s("scores", every, count) + self._scored_s("choice", every, count)
        return np.asarray(np.where(count > 0, per_pair, 0.0))

    @property
    def indexer_dtype(self) -> str:
        """What indexers compute in: 8 bits where the accelerator has them."""
        return "fp8" if "fp8" in dict(self.gpu.flops_per_s) else self.gpu.half_dtype

    def sparse_prefill(self, heads: int, key_dim: int, value_dim: int, chunk: ArrayLike) -> Floats:
        """Prompts of attention over chosen entries of a latent cache: seconds per query and entry; no launches.

        Kernels compute with 64 heads at the least, and shards with fewer leave the others idle.

        Parameters
        ----------
        heads : int            query heads
        key_dim : int          elements of a key, as the kernel multiplies it
        value_dim : int        elements of a value
        chunk : int64[...]     tokens of a prompt
        """
        count = sizes("chunk", chunk)
        width = count_of("key_dim", key_dim) + count_of("value_dim", value_dim)
        every = max(count_of("heads", heads), _LEAST_HEADS) * width
        return np.asarray(np.where(count > 0, self._scored_s("attention", every, count), 0.0))

    def _scored_s(self, op: str, width: int, count: Floats) -> Floats:
        """Seconds per query and entry of a kernel of sparse attention, by the queries of a call."""
        dtype = self.gpu.half_dtype if op == "attention" else self.indexer_dtype
        bound = self._bound(self.kernel(dtype), *sparse_work(op, width))
        feature = (float(np.log(width)),)
        picks, _ = self._best("sparse", op, feature, lambda source, name, _: source.sparse(name))
        name = "sparse attention" if op == "attention" else f"indexer {op}"
        return np.asarray(bound / self._ratio(name, picks, feature, np.log(np.maximum(count, 1.0))))

    def state_decode(
        self, op: str, shape: tuple[int, int, int, int], work: StateWork, sequences: ArrayLike, queries: int = 1
    ) -> Floats:
        """Decode of an operation that keeps a state, by sequences; launches included.

        Parameters
        ----------
        op : str                  of `STATE_OPS`
        shape : four int          as `state_feature` takes them
        work : StateWork          of one shard
        sequences : int64[...]    of the batch
        queries : int             tokens of each: one, and its drafts, after each of which the state is kept
        """
        count = sizes("sequences", sequences)
        return self._state_s("state_decode", op, shape, count, work.of_step(count, queries))

    def state_prefill(
        self, op: str, shape: tuple[int, int, int, int], work: StateWork, chunk: ArrayLike
    ) -> tuple[float, Floats]:
        """Prompts of an operation that keeps a state: launches that a batch shares, and seconds of each chunk.

        Several prompts in one batch are charged one after another, though they take less where one alone leaves most of
        the accelerator without work.

        Parameters
        ----------
        op : str              of `STATE_OPS`
        shape : four int      as `state_feature` takes them
        work : StateWork      of one shard
        chunk : int64[...]    tokens of a prompt
        """
        count = sizes("chunk", chunk)
        seconds = self._state_s("state_prefill", op, shape, count, work.of_prompt(count))
        launch = float(self._state_s("state_prefill", op, shape, np.ones(1), work.of_prompt(np.ones(1)))[0])
        return launch, np.maximum(seconds - launch, 0.0)

    def _state_s(
        self, kind: str, op: str, shape: tuple[int, int, int, int], count: Floats, work: tuple[Floats, Floats]
    ) -> Floats:
        """As `gemm_time_s`, over sequences or over tokens of a prompt."""
        bound = self._bound(self.kernel(self.gpu.half_dtype), *work)
        feature = state_feature(*shape)
        picks, _ = self._best(kind, op, feature, lambda source, name, _: source.state(kind, name))
        ratio = self._ratio(f"{op} {kind.removeprefix('state_')}", picks, feature, np.log(np.maximum(count, 1.0)))
        floor = STATE_FLOOR_S / self.clock.share
        return np.asarray(np.where(count > 0, np.maximum((floor + bound) / ratio, bound), 0.0))

    def encoder_attention(
        self, heads: int, kv_heads: int, width: int, tokens: ArrayLike, window: int | None = None
    ) -> Floats:
        """Attention of one input whose tokens all see each other, launch included.

        Parameters
        ----------
        heads, kv_heads : int    query heads, and heads of keys and values
        width : int              elements of a head
        tokens : int64[...]      of the input
        window : int or None     tokens that see each other
        """
        count = sizes("tokens", tokens)
        bound = self._bound(
            self.kernel(self.gpu.half_dtype), *encoder_work(count_of("heads", heads), kv_heads, width, count, window)
        )
        feature = encoder_feature(heads, width)
        picks, _ = self._best("attention_encoder", "bf16", feature, lambda source, *_: source.encoder())
        seen = count if window is None else np.minimum(count, window)
        ratio = self._ratio("encoder attention", picks, feature, np.log(np.maximum(seen, 1.0)))
        floor = STATE_FLOOR_S / self.clock.share
        return np.asarray(np.where(count > 0, np.maximum((floor + bound) / ratio, bound), 0.0))

    def hyper_time_s(self, hidden: int, streams: int, tokens: ArrayLike) -> Floats:
        """Time of mixing residual streams before and after a cell, in two kernels that only read and write memory.

        Parameters
        ----------
        hidden : int           elements of a stream
        streams : int          how many
        tokens : int64[...]
        """
        count = sizes("tokens", tokens)
        _, moved = hyper_work(count, count_of("hidden", hidden), count_of("streams", streams))
        self._note("hyper connections", "derived: traffic at the rate of memory-bound kernels")
        return np.asarray(self.memory_time_s(moved) + self._launch_s(count))
