"""Decision variables of the plan space, and the way back from a solution to a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from apex_opt.errors import UsageError
from apex_opt.plans.plan import Plan, Template, even_split

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

    from apex_opt.oracle.instance import Instance


class Values(Protocol):
    """A solver or a solution callback: anything that tells the value of a variable."""

    def value(self, expression: cp_model.IntVar, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Variables:
    """One integer per choice; see `program.py` for the symbols."""

    stages: cp_model.IntVar
    devices: cp_model.IntVar
    attention_dp: cp_model.IntVar
    attention_tp: cp_model.IntVar
    ffn_dp: cp_model.IntVar
    ffn_tp: cp_model.IntVar
    ffn_ep: cp_model.IntVar
    formats: cp_model.IntVar
    limits: cp_model.IntVar
    drafts: cp_model.IntVar

    @classmethod
    def create(cls, model: cp_model.CpModel, instance: Instance) -> Variables:
        """All variables with the bounds that the number of GPUs and layers gives."""
        gpus = instance.max_devices
        return cls(
            stages=model.new_int_var(1, min(gpus, instance.model.layers), "stages"),
            devices=model.new_int_var(1, gpus, "devices"),
            attention_dp=model.new_int_var(1, gpus, "attention_dp"),
            attention_tp=model.new_int_var(1, gpus, "attention_tp"),
            ffn_dp=model.new_int_var(1, gpus, "ffn_dp"),
            ffn_tp=model.new_int_var(1, gpus, "ffn_tp"),
            ffn_ep=model.new_int_var(1, gpus, "ffn_ep"),
            formats=model.new_int_var(0, len(instance.weight_formats) - 1, "format"),
            limits=model.new_int_var(0, len(instance.batch_limits) - 1, "limits"),
            drafts=model.new_int_var(0, len(instance.drafters) - 1, "drafts"),
        )

    def extract(self, values: Values, instance: Instance) -> Plan:
        """The plan of one replica that a solution stands for."""
        chosen = values.value(self.formats)
        seqs, tokens = instance.batch_limits[values.value(self.limits)]
        return Plan(
            replicas=1,
            layers=even_split(instance.model.layers, values.value(self.stages)),
            attention=Template(dp=values.value(self.attention_dp), tp=values.value(self.attention_tp)),
            ffn=Template(dp=values.value(self.ffn_dp), tp=values.value(self.ffn_tp), ep=values.value(self.ffn_ep)),
            weight_format=instance.weight_formats[chosen],
            kv_format=instance.kv_formats[chosen],
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            speculation=instance.drafters[values.value(self.drafts)],
            shares=instance.shares,
            overlap=instance.overlap,
        )

    def fix(self, model: cp_model.CpModel, plan: Plan, instance: Instance) -> None:
        """Pin every choice to a given plan; its replicas must find room.

        Parameters
        ----------
        model : CpModel    the program
        plan, instance

        Raises
        ------
        UsageError    layers split unevenly, or formats, limits or drafts that are not among those to choose from
        """
        pairs = list(zip(instance.weight_formats, instance.kv_formats, strict=True))
        formats = (plan.weight_format, plan.kv_format)
        if formats not in pairs:
            raise UsageError(f"{plan}: its weight and KV formats are not among the choices {pairs}")
        limits = (plan.max_num_seqs, plan.max_num_batched_tokens)
        if limits not in instance.batch_limits:
            raise UsageError(f"{plan}: its limits of a batch are not among the choices {list(instance.batch_limits)}")
        if plan.speculation not in instance.drafters:
            raise UsageError(f"{plan}: its drafts are not among the choices {[str(d) for d in instance.drafters]}")
        if plan.shares != instance.shares:
            raise UsageError(f"{plan}: plans of the space have share={instance.shares or 'none'}")
        if plan.overlap != instance.overlap:
            raise UsageError(f"{plan}: plans of the space have overlap={instance.overlap or 'none'}")
        if not plan.even:
            raise UsageError(f"{plan}: the plan space splits layers evenly, not as {list(plan.layers)}")
        model.add(plan.replicas * plan.stages * self.devices <= instance.max_devices)
        for variable, value in (
            (self.stages, plan.stages),
            (self.attention_dp, plan.attention.dp),
            (self.attention_tp, plan.attention.tp),
            (self.ffn_dp, plan.ffn.dp),
            (self.ffn_tp, plan.ffn.tp),
            (self.ffn_ep, plan.ffn.ep),
            (self.formats, pairs.index(formats)),
            (self.limits, instance.batch_limits.index(limits)),
            (self.drafts, instance.drafters.index(plan.speculation)),
        ):
            model.add(variable == value)
