"""What is asked: everything an answer depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.evaluate import Instance
from apex_opt.plan.engine import limited
from apex_opt.profiles import SHIPPED

if TYPE_CHECKING:
    from apex_opt.cluster.types import Cluster
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.ir.model import Model
    from apex_opt.plan.engine import EngineSettings
    from apex_opt.plan.plan import Plan
    from apex_opt.search.objective import Objective
    from apex_opt.simulator.outcome import Routing
    from apex_opt.workload.slo import Slo
    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything an answer depends on.

    Parameters
    ----------
    model, cluster, trace, settings, overhead
    objective : Objective
    slos : tuple of Slo              all must hold
    weight_formats, kv_formats       formats to choose from, paired
    max_devices : int                GPUs a plan may take
    routing : how requests are dealt to replicas
    clocks : tuple of int or None    GPU clocks in MHz to choose from; None is the highest
    batch_limits : tuple of (max_num_seqs, max_num_batched_tokens)
                                     limits of a batch to choose from; None leaves one to the settings
    expert_routing : str             how tokens fall on experts: "uniform" or "skewed"
    profiles : str                   measured tables, as `load_profile` takes them
    """

    model: Model
    cluster: Cluster
    trace: Trace
    settings: EngineSettings
    overhead: EngineOverhead
    objective: Objective
    slos: tuple[Slo, ...]
    weight_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    max_devices: int
    routing: Routing = "round_robin"
    clocks: tuple[int | None, ...] = (None,)
    batch_limits: tuple[tuple[int | None, int | None], ...] = ((None, None),)
    expert_routing: str = "uniform"
    profiles: str = SHIPPED

    def settings_for(self, plan: Plan) -> EngineSettings:
        """Engine settings of a plan: its limits; on several stages sequences fill the pipeline, not async batches.

        Raises
        ------
        UsageError    limits that do not go with the other settings
        """
        settings = limited(self.settings, plan)
        return settings if plan.stages == 1 else replace(settings, async_scheduling=False)

    def instance(self) -> Instance:
        """The constraints' view of the question."""
        # The last token of a request is never computed, so it needs no room in the cache.
        held = int(np.minimum(self.trace.prompt + self.trace.output, self.settings.max_model_len).max()) - 1
        limits = [slo.limit for slo in self.slos if slo.metric == "tpot"]
        decodes = bool((self.trace.generated(self.settings.max_model_len) > 1).any())
        return Instance(
            model=self.model,
            cluster=self.cluster,
            settings=self.settings,
            longest_tokens=max(held, 1),
            tpot_limit_ns=round(min(limits) * 1e9) if limits and decodes else None,
            weight_formats=self.weight_formats,
            kv_formats=self.kv_formats,
            max_devices=self.max_devices,
            batch_limits=self.batch_limits,
        )
