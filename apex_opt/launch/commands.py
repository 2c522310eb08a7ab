"""Commands of a plan, what is common to the engines: where ranks sit, what is asked of an engine, what comes out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from apex_opt.cluster.tree import place_of
from apex_opt.ir.formats import get_format
from apex_opt.ir.model import LatentAttention, MoeFfn
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from apex_opt.plan.engine import EngineSettings
    from apex_opt.plan.plan import Plan
    from apex_opt.search.question import Question

FIRST_PORT: Final = 8000
PORT_STEP: Final = 10
"""Engines of one node listen this far apart: SGLang takes further ports near those of its inner connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command for one node.

    Parameters
    ----------
    node : int                        counted from 0
    replica : int or None             which replica of the plan it starts; None for what concerns the node
    env : tuple of (name, value)      variables of its environment
    argv : tuple of str               its words
    """

    node: int
    replica: int | None
    env: tuple[tuple[str, str], ...] = ()
    argv: tuple[str, ...]

    @property
    def text(self) -> str:
        """As a line for a shell."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.env), shlex.join(self.argv)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Commands that start a plan on an engine, none where the engine cannot run it; notes say what commands cannot."""

    engine: str
    commands: tuple[Command, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an engine is to serve: a plan of a question, and where its weights are found."""

    question: Question
    plan: Plan
    checkpoint: str

    @property
    def settings(self) -> EngineSettings:
        """Engine settings with the plan's limits."""
        return self.question.settings_for(self.plan)

    @property
    def half(self) -> str:
        """The 16-bit type of what is not quantised."""
        named, gpu = self.plan.weight_format, self.question.cluster.gpu
        wanted = named if named in ("bf16", "fp16") else self.question.model.dtype
        return wanted if gpu.supports(wanted) else gpu.half_dtype

    @property
    def as_published(self) -> bool:
        """Whether the checkpoint has the weights in the plan's format, two 16-bit types being as good as one."""
        wanted, published = (get_format(name) for name in (self.plan.weight_format, self.question.model.weight_format))
        return wanted == published or wanted.weight_bits == published.weight_bits == 16

    @property
    def quantised_when_loaded(self) -> bool:
        """Whether the engine makes the weights of the plan from those of the checkpoint: fp8 of 16 bits."""
        published = get_format(self.question.model.weight_format)
        return self.plan.weight_format == "fp8" and published.weight_bits == 16

    @property
    def weights(self) -> str:
        """What the command names as the model; a placeholder where the checkpoint has another format."""
        if self.as_published or self.quantised_when_loaded:
            return self.checkpoint
        return f"CHECKPOINT_IN_{self.plan.weight_format.upper()}"

    @property
    def kv_in_fp8(self) -> bool:
        return self.plan.kv_format == "fp8"

    @property
    def kv_published_in_fp8(self) -> bool:
        """Whether the checkpoint asks for a cache that the plan does not have."""
        return not self.kv_in_fp8 and self.question.model.kv_format == "fp8"

    @property
    def moe(self) -> bool:
        return self.question.model.is_moe

    @property
    def dense_beside_experts(self) -> bool:
        """Whether a mixture of experts has dense FFNs too: in layers of their own, or shared by all tokens."""
        cells = [run.block.ffn for run in self.question.model.runs]
        dense = (not isinstance(cell, MoeFfn) or cell.shared_intermediate > 0 for cell in cells)
        return self.moe and any(dense)

    @property
    def latent(self) -> bool:
        return any(isinstance(run.block.attention, LatentAttention) for run in self.question.model.runs)

    @property
    def whole_copies(self) -> bool:
        """Whether each attention copy has an FFN copy of its own: copies then share nothing."""
        attention, ffn = self.plan.attention, self.plan.ffn
        return attention.dp == ffn.dp > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Where one replica sits: the GPUs of each stage, by name."""

    index: int
    stages: tuple[tuple[str, ...], ...]

    @property
    def by_stage(self) -> tuple[str, ...]:
        """GPUs stage by stage."""
        return tuple(gpu for stage in self.stages for gpu in stage)

    def by_copy(self, copies: int) -> tuple[str, ...]:
        """GPUs copy by copy, each through all stages."""
        width = len(self.stages[0]) // copies
        parts = range(0, width * copies, width)
        return tuple(gpu for part in parts for stage in self.stages for gpu in stage[part : part + width])

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(node for node, _ in on_nodes(self.by_stage))


def on_nodes(gpus: Iterable[str]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """GPUs by node, numbered within it, in the order in which they and their nodes come."""
    found: dict[int, list[int]] = {}
    for node, local in map(place_of, gpus):
        found.setdefault(node, []).append(local)
    return tuple((node, tuple(slots)) for node, slots in found.items())


class Engine(Protocol):
    """What is said in an engine's own words.

    `layers` is the variable with the layers of each stage, `release` the one whose options these are.
    """

    name: str
    release: str
    layers: str

    def refusals(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        """Why the engine cannot run the plan; nothing where it can."""

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        """What its commands do otherwise than the plan, and what to check."""

    def ranks(self, asked: Asked, replica: Replica) -> tuple[str, ...]:
        """GPUs of a replica in the order in which the engine deals its ranks."""

    def words(self, asked: Asked, port: int) -> list[str]:
        """The command on one node."""

    def joined(self, nodes: int, rank: int, head: int) -> list[str]:
        """What is added on each of several nodes."""


def uneven(replicas: Sequence[Replica]) -> str | None:
    """The first replica with more GPUs on one node than on another, in words."""
    for replica in replicas:
        counts = [len(gpus) for _, gpus in on_nodes(replica.by_stage)]
        if len(set(counts)) > 1:
            return f"replica {replica.index} has {' and '.join(map(str, counts))} GPUs on its nodes"
    return None


def per_copy(limit: int, asked: Asked) -> int:
    """The share of each attention copy in a limit of the replica."""
    return ceil_div(limit, asked.plan.attention.dp)
