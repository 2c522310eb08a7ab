"""Commands of a plan, what is common to the engines: where ranks sit, what is asked of an engine, what comes out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from apex_opt.cluster.tree import place_of
from apex_opt.engines import VLLM
from apex_opt.ir import checkpoint_of, load_model
from apex_opt.ir.formats import get_format
from apex_opt.plans.engine import limited, limits_shared
from apex_opt.plans.memory import kv_blocks, stage_memory
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from apex_opt.engines import EngineRules
    from apex_opt.ir import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.search.problem import Problem

FIRST_PORT: Final = 8000
KEPT_BACK: Final = 0.01
"""Share of a GPU's memory that a length of requests leaves free beyond what is counted. Assumed: KV blocks that were
measured come out within 1%, and an engine that finds a block too few does not start."""
HEAD: Final = "EAGLE3_HEAD"
"""In place of an EAGLE-3 head, which is not known here."""
CHECKPOINT: Final = "CHECKPOINT_IN_"
"""How the name begins that stands in place of a checkpoint in a format that is not the published one."""
NGINX: Final = {"round_robin": "", "least_loaded": "    least_conn;\n", "power_of_two": "    random two least_conn;\n"}
"""How nginx is told to deal requests; `--save` writes no router for other ways."""
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
    file : (name, text) or None       a file that it reads, written before it is started
    """

    node: int
    replica: int | None
    env: tuple[tuple[str, str], ...] = ()
    argv: tuple[str, ...]
    file: tuple[str, str] | None = None

    @property
    def text(self) -> str:
        """As a line for a shell."""
        line = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.env), shlex.join(self.argv)])
        if self.file is None:
            return line
        name, text = self.file
        return f"echo {shlex.quote(text)} > {shlex.quote(name)} && {line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Commands that start a plan on an engine, none where the engine cannot run it.

    Parameters
    ----------
    engine : str                    key of `ENGINES`
    commands : tuple of Command
    notes : tuple of str            what commands cannot say
    served : str                    name of the model, as requests have it
    routing : str                   how requests are dealt to its replicas
    """

    engine: str
    commands: tuple[Command, ...]
    notes: tuple[str, ...]
    served: str = ""
    routing: str = "round_robin"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What an engine is to serve: a plan of a problem, and where its weights are found."""

    problem: Problem
    plan: Plan
    checkpoint: str
    rules: EngineRules

    @cached_property
    def memory(self) -> tuple[StageMemory, ...]:
        """Memory of each stage."""
        problem = self.problem
        return stage_memory(problem.model, problem.cluster.gpu, self.plan, limited(problem.settings, self.plan))

    @cached_property
    def settings(self) -> EngineSettings:
        """Engine settings with the plan's limits; requests no longer than the KV cache that the plan leaves.

        Engines start only where one request of the greatest length fits by itself. Where that is less than the model's
        length and nobody asked for it, some memory is kept back, as far as the requests that are known allow.
        """
        settings, problem = self.problem.settings_for(self.plan), self.problem
        held = settings.longest(kv_blocks(self.memory))
        if held < settings.max_model_len and not problem.holds_longest:
            spare = int(KEPT_BACK * problem.cluster.gpu.memory_bytes)
            fewer = min(stage.kv_blocks - ceil_div(spare, max(stage.kv_block_bytes, 1)) for stage in self.memory) - 1
            needed = settings.block_size * ceil_div(problem.instance().longest_tokens + 1, settings.block_size)
            held = min(held, max(settings.longest(fewer), needed))
        return replace(settings, max_model_len=max(min(settings.max_model_len, held), 2))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of each stage as the engine counts them, of which several of ours may be one."""
        return tuple(count // self.problem.model.together for count in self.plan.layers)

    @property
    def half(self) -> str:
        """The 16-bit type of what is not quantised."""
        named, gpu = self.plan.weight_format, self.problem.cluster.gpu
        wanted = named if named in ("bf16", "fp16") else self.problem.model.dtype
        return wanted if gpu.supports(wanted) else gpu.half_dtype

    @property
    def as_published(self) -> bool:
        """Whether the checkpoint has the weights in the plan's format, two 16-bit types being as good as one."""
        wanted, published = (get_format(name) for name in (self.plan.weight_format, self.problem.model.weight_format))
        return wanted == published or wanted.weight_bits == published.weight_bits == 16

    @property
    def quantised_when_loaded(self) -> bool:
        """Whether the engine makes the weights of the plan from those of the checkpoint, of 16 bits."""
        published = get_format(self.problem.model.weight_format)
        return self.plan.weight_format in self.rules.made_on_load and published.weight_bits == 16

    @property
    def weights(self) -> str:
        """What the command names as the model; a placeholder where the checkpoint has another format."""
        if self.as_published or self.quantised_when_loaded:
            return self.checkpoint
        return f"{CHECKPOINT}{self.plan.weight_format.upper()}"

    @property
    def draft_checkpoint(self) -> str:
        """Where the engine finds what makes drafts: a draft model, or the head that was trained for the model."""
        drafter = self.plan.speculation
        return checkpoint_of(drafter.model) if drafter is not None and drafter.model else HEAD

    @property
    def named(self) -> tuple[tuple[str, str, Model], ...]:
        """What commands name, in words: where its weights are found, and the model they are of."""
        drafter = self.plan.speculation
        own = (("model", self.checkpoint, self.problem.model),) if self.weights == self.checkpoint else ()
        if drafter is None or not drafter.model:
            return own
        return (*own, ("draft model", self.draft_checkpoint, load_model(drafter.model)))

    @property
    def code_of(self) -> tuple[str, ...]:
        """Types, of the model and of what makes its drafts, whose checkpoints bring code that an engine runs."""
        drafter = self.plan.speculation
        models = (self.problem.model, *((load_model(drafter.model),) if drafter is not None and drafter.model else ()))
        names = (name for model in models for name in (model.family, model.around) if name in VLLM.brought_code)
        return tuple(dict.fromkeys(names))

    @property
    def kv_in_fp8(self) -> bool:
        return self.plan.kv_format == "fp8"

    @property
    def kv_published_in_fp8(self) -> bool:
        """Whether the checkpoint asks for a cache that the plan does not have."""
        return not self.kv_in_fp8 and self.problem.model.kv_format == "fp8"

    @property
    def reads_images(self) -> bool:
        """Whether the checkpoint has a tower that reads images, which the plan leaves out."""
        return self.problem.model.tower_heads is not None and self.problem.model.images is None

    @property
    def moe(self) -> bool:
        return self.problem.model.is_moe

    @property
    def scheme(self) -> str | None:
        """How the checkpoint that is served was quantised."""
        scheme = self.problem.model.scheme
        return scheme.method if scheme is not None and self.as_published else None


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


def brings_code(model: Model) -> bool:
    """Whether a checkpoint brings code: Transformers, which all engines and clients read it with, does not know it."""
    return bool({model.family, model.around} & VLLM.brought_code)


def on_nodes(gpus: Iterable[str]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """GPUs by node, numbered within it, in the order in which they and their nodes come."""
    found: dict[int, list[int]] = {}
    for node, local in map(place_of, gpus):
        found.setdefault(node, []).append(local)
    return tuple((node, tuple(slots)) for node, slots in found.items())


class Engine(Protocol):
    """What is said in an engine's own words; `rules` is what it can run."""

    rules: EngineRules

    def notes(self, asked: Asked, replicas: Sequence[Replica]) -> list[str]:
        """What its commands do otherwise than the plan, and what to check."""

    def servers(self, asked: Asked, replica: Replica, place: int) -> Iterator[Command]:
        """The commands that start a replica, the `place`-th on its nodes.

        Parameters
        ----------
        asked, replica
        place : int    number of the replica
        """


class Host(NamedTuple):
    """GPUs of one node, numbered within it, that one command starts an equal share of a replica on."""

    node: int
    slots: tuple[int, ...]

    @property
    def visible(self) -> tuple[str, str]:
        """The variable that shows a process these GPUs and no other."""
        return "CUDA_VISIBLE_DEVICES", ",".join(map(str, self.slots))


def hosts(ranks: Sequence[str], sizes: Iterable[int]) -> tuple[Host, ...]:
    """Ranks in the fewest equal and consecutive shares that lie in one node each.

    Engines start equally many ranks on every node they are told of. A node may be told of twice, each time with other
    GPUs, so that ranks which lie unevenly over nodes are shared out evenly all the same.

    Parameters
    ----------
    ranks : GPUs by name in the order in which the engine deals its ranks
    sizes : ranks that may be started together, 1 among them
    """
    places = [place_of(gpu) for gpu in ranks]
    for size in sorted(sizes, reverse=True):
        shares = [places[at : at + size] for at in range(0, len(places), size)]
        if all(len({node for node, _ in share}) == 1 for share in shares):
            return tuple(Host(share[0][0], tuple(slot for _, slot in share)) for share in shares)
    raise AssertionError("a GPU lies in one node")


def ports(parts: Sequence[Host], place: int) -> list[int]:
    """The port that the process on each host listens at, the `place`-th on its node and those after it."""
    nodes = [host.node for host in parts]
    return [FIRST_PORT + PORT_STEP * (place + nodes[:index].count(node)) for index, node in enumerate(nodes)]


def stage_chunks(plan: Plan) -> list[int]:
    """Ranks that may be started together where they are dealt stage by stage: parts of a stage, or whole stages."""
    return [*divisors(plan.stage_devices), *(n * plan.stage_devices for n in divisors(plan.stages))]


def divisors(number: int) -> list[int]:
    """Numbers that divide a number, rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def per_copy(limit: int, asked: Asked) -> int:
    """The limit of each attention copy: its own where limits are of each, else its share."""
    return ceil_div(limit, limits_shared(asked.settings, asked.plan))
