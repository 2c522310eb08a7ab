"""One planning problem, as the oracle and the programs take it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.rules import Held
from apex_opt.errors import UsageError
from apex_opt.ir.formats import FORMATS, KV_BYTES, is_format
from apex_opt.plans.memory import settings_of
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from apex_opt.cluster.types import Cluster
    from apex_opt.engines.overlap import Overlap
    from apex_opt.ir.model import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares
    from apex_opt.plans.speculation import Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One planning problem, without its traffic.

    Parameters
    ----------
    model, cluster, settings
    longest_tokens : int          tokens the longest request holds in the KV cache, >= 1
    longest : str                 what that is, in words
    tpot_limit_ns : int or None   tightest limit any SLO sets on time per output token
    weight_formats, kv_formats : tuple of str
                                  formats to choose from, names of formats, each with its KV format
    max_devices : int             GPUs a plan may take, at most the cluster's
    batch_limits : tuple of (max_num_seqs, max_num_batched_tokens)
                                  limits of a batch to choose from; None leaves one to the settings
    drafters : tuple of Drafter or None    ways to make drafts to choose from; None makes none
    routings : tuple of str       routers to choose from in front of several replicas; none where there is no choice
    shares : Shares or None       what prompts and answers have of each GPU in all of the plans; None: batches hold both
    overlap : str or None         what one GPU does at a time in all of them; None: one thing after the other
    """

    model: Model
    cluster: Cluster
    settings: EngineSettings
    longest_tokens: int
    longest: str = "the longest request"
    tpot_limit_ns: int | None = None
    weight_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    max_devices: int
    batch_limits: tuple[tuple[int | None, int | None], ...] = ((None, None),)
    drafters: tuple[Drafter | None, ...] = (None,)
    routings: tuple[Routing, ...] = ()
    shares: Shares | None = None
    overlap: Overlap | None = None
    held: Held = field(init=False, repr=False, compare=False)
    """How the engine holds the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", Held.of(self.settings.runnable, self.model, self.cluster.gpu))
        if not self.batch_limits:
            raise UsageError("an instance needs limits of a batch, if only those of the settings")
        if not self.drafters:
            raise UsageError("an instance needs ways to make drafts, if only to make none")
        if not self.weight_formats or len(self.weight_formats) != len(self.kv_formats):
            raise UsageError("an instance needs weight formats, each with its KV format")
        for name in self.weight_formats:
            if not is_format(name):
                raise UsageError(f"unknown weight format {name!r}; known: {', '.join(FORMATS)}")
        for name in self.kv_formats:
            if name not in KV_BYTES:
                raise UsageError(f"unknown KV format {name!r}; known: {', '.join(KV_BYTES)}")
        if not 1 <= self.max_devices <= self.cluster.size:
            raise UsageError(
                f"gpus: {self.max_devices} is not between 1 and the {self.cluster.size} GPUs of {self.cluster.name}"
            )

    def blocks_needed(self, plan: Plan) -> int:
        """KV blocks that a plan must have for the longest request, with those for drafts to come."""
        settings, tokens = settings_of(self.model, self.settings, plan), self.longest_tokens
        if plan.speculation is not None:
            return int(settings.most_blocks(settings.with_drafts(np.array(tokens), plan.speculation)))
        return int(settings.most_blocks(np.array(tokens)))

    @property
    def decode_bytes_limit(self) -> int | None:
        """Bytes a GPU can read from its memory within the tightest TPOT limit; None without such a limit."""
        if self.tpot_limit_ns is None:
            return None
        return int(self.cluster.gpu.memory_bytes_per_s * self.tpot_limit_ns / NS_PER_S)

    def bytes_limit(self, plan: Plan) -> int | None:
        """The same for one pass of a plan, of which as many tokens may come as it has drafts, and one more."""
        limit = self.decode_bytes_limit
        return limit if limit is None or plan.speculation is None else limit * (1 + plan.speculation.draft_tokens)
