"""Speculative decoding: what an engine is told of it, and how many drafts turn out to be right."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir.checks import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_DRAFTS: Final = 8
"""Drafts that may follow a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What the scheduler has to know of a way to make drafts.

    Parameters
    ----------
    keeps_kv : bool       the drafter has KV of its own for the tokens it drafts, so that blocks are taken ahead
    recomputes : bool     the last block found by its prefix is computed again, as the drafter needs its hidden states
    forms_ahead : bool    goes with asynchronous scheduling
    """

    keeps_kv: bool
    recomputes: bool
    forms_ahead: bool


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "eagle": Method(keeps_kv=True, recomputes=True, forms_ahead=True),
        "mtp": Method(keeps_kv=True, recomputes=True, forms_ahead=True),
        "draft": Method(keeps_kv=True, recomputes=False, forms_ahead=True),
        "ngram": Method(keeps_kv=False, recomputes=False, forms_ahead=False),
    }
)
"""Ways to make drafts, as vLLM 0.20.2 has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Drafts that an engine makes, and what comes of them as data keyed by the position in the output.

    Of the drafts in a row of request i, taken in when it has generated p tokens, ``min(drafts, A[p mod len A])`` are
    accepted, where A is the list ``accepted[i mod len(accepted)]``. After a synchronous batch that leaves it with p
    tokens ``min(draft_tokens, B[p mod len B])`` drafts are proposed, with B of `proposed` in the same way.

    Parameters
    ----------
    method : str                  one of `METHODS`
    draft_tokens : int            drafts that may follow a token, 1 to 8
    accepted : tuple of tuples    lists of counts from 0, one for each request in turn
    proposed : tuple of tuples    lists of counts from 0 in the same way; none: always as many as may follow

    Raises
    ------
    UsageError, UnknownNameError    a value out of its range
    """

    method: str
    draft_tokens: int
    accepted: tuple[tuple[int, ...], ...]
    proposed: tuple[tuple[int, ...], ...] = ()

    @property
    def rules(self) -> Method:
        """What the scheduler has to know of the method."""
        return METHODS[self.method]

    @property
    def ahead(self) -> int:
        """Tokens beyond a row's own whose blocks it needs."""
        return self.draft_tokens if self.rules.keeps_kv else 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError("way to make drafts", str(self.method)[:60], METHODS)
        check_draft_tokens(self.draft_tokens)
        for name in ("accepted", "proposed"):
            lists = getattr(self, name)
            if name == "accepted" and not lists:
                raise UsageError("speculation: accepted has no list of accepted drafts; give at least one count")
            for counts in lists:
                if not counts or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in counts):
                    raise UsageError(f"speculation: {name} holds {shown(counts)}, not counts of drafts from 0")


def check_draft_tokens(value: object) -> int:
    """A number of drafts that may follow a token.

    Raises
    ------
    UsageError    not a whole number from 1 to 8
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_DRAFTS:
        raise UsageError(
            f"speculation: {shown(value)} drafts; a whole number from 1 to {MOST_DRAFTS} may follow a token"
        )
    return value
