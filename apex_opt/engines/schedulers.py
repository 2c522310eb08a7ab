"""Schedulers as facts, and the settings that only one of them has.

What a scheduler decides is in the class of the same name in `apex_opt.simulator.reference`. Settings that all engines
have, under one name or another, are those of `apex_opt.plans.engine.EngineSettings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final

from apex_opt.errors import UsageError, shown
from apex_opt.units import NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST: Final = 1 << 31
"""What no number among the settings of an engine reaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """How batches are formed: facts of a scheduler, and as fields the settings that only it has.

    Facts
    -----
    name : str
    splits_prompts : bool     a prompt may be computed in several batches; else in one or not at all
    preempts : bool           running requests give way where KV blocks run out; else blocks are reserved beforehand
    finds_prefixes : bool     goes with prefix caching
    forms_ahead : bool        a batch can be formed while others run
    """

    name: ClassVar[str]
    splits_prompts: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    finds_prefixes: ClassVar[bool] = True
    forms_ahead: ClassVar[bool] = True

    @property
    def prompt_threshold(self) -> int:
        """Most tokens of one prompt in one batch, whatever there is room for; 0 = no such limit."""
        return 0

    @property
    def idle_sleep_ns(self) -> int:
        """How long the engine's loop sleeps after a turn that scheduled nothing while requests are unfinished."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmScheduling(Scheduling):
    """Iteration by iteration, prompts in chunks, preemption where blocks run out (vLLM V1).

    Parameters
    ----------
    long_prefill_token_threshold : int    most tokens of one prompt in one batch; 0 = no such limit
    idle_sleep_us : int                   the engine's loop sleeps so long after a turn that scheduled nothing while
                                          requests are unfinished
    """

    name = "vllm"
    long_prefill_token_threshold: int = 0
    idle_sleep_us: int = 0

    def __post_init__(self) -> None:
        for name in ("long_prefill_token_threshold", "idle_sleep_us"):
            whole(name, getattr(self, name), 0)

    @property
    def prompt_threshold(self) -> int:
        return self.long_prefill_token_threshold

    @property
    def idle_sleep_ns(self) -> int:
        return self.idle_sleep_us * NS_PER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangScheduling(Scheduling):
    """SGLang's; for now batches are formed as vLLM's scheduler forms them."""

    name = "sglang"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmScheduling(Scheduling):
    """TensorRT-LLM's; for now batches are formed as vLLM's scheduler forms them."""

    name = "trtllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrcaScheduling(Scheduling):
    """Iteration by iteration, whole prompts, blocks of prompt and output reserved at admission: nobody is preempted.

    Source: Yu et al., "Orca", OSDI 2022, algorithm 1; what APEX assumes.
    """

    name = "orca"
    splits_prompts = False
    preempts = False
    finds_prefixes = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticScheduling(OrcaScheduling):
    """Whole requests: a batch is formed when none runs and answered when its longest request is done.

    Requests that are done before keep computing. Source: the baseline of the same paper, section 2.
    """

    name = "static"
    forms_ahead = False


_ALL: Final = (
    VllmScheduling,
    SglangScheduling,
    TrtllmScheduling,
    OrcaScheduling,
    StaticScheduling,
)
SCHEDULINGS: Final[Mapping[str, type[Scheduling]]] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every scheduler by its name."""


def whole(name: str, value: object, least: int) -> None:
    """Refuse a setting that is not a whole number in its range.

    Parameters
    ----------
    name : str        of the setting
    value : object    as it is given
    least : int       that it may be

    Raises
    ------
    UsageError
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
        raise UsageError(f"{name}: {shown(value)} is not a whole number from {least} to {LARGEST - 1}")
