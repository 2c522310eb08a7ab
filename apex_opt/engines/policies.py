"""Batching policies as facts: the scheduler of the same name in `simulator.reference` decides who is in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How batches are formed, in what the rest has to know of it.

    Parameters
    ----------
    name : str
    splits_prompts : bool     a prompt may be computed in several batches; else in one or not at all
    preempts : bool           running requests give way where KV blocks run out; else blocks are reserved beforehand
    finds_prefixes : bool     goes with prefix caching
    forms_ahead : bool        a batch can be formed while others run
    deployed : bool           serving engines form batches like this, or are taken to
    """

    name: str
    splits_prompts: bool = False
    preempts: bool = False
    finds_prefixes: bool = False
    forms_ahead: bool = True
    deployed: bool = False


POLICIES: Final = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy(name="vllm", splits_prompts=True, preempts=True, finds_prefixes=True, deployed=True),
            Policy(name="orca"),
            Policy(name="static", forms_ahead=False),
        )
    }
)
"""Every policy by its name; the order is that of their numbers in compiled code."""
