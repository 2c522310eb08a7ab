"""Speculative decoding: what an engine is told of it, and how many drafts turn out to be right."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir.checks import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Drafter:
    """How a plan makes drafts: ``eagle:3``, or with the name of the draft model ``draft:llama-3.2-1b:3``.

    Parameters
    ----------
    method : str          one of `METHODS`
    draft_tokens : int    drafts that may follow a token, 1 to 8
    model : str           the draft model; "" for other methods

    Raises
    ------
    UsageError, UnknownNameError    a value out of its range, a draft model where there is none
    """

    method: str
    draft_tokens: int
    model: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UnknownNameError("way to make drafts", str(self.method)[:60], METHODS)
        check_draft_tokens(self.draft_tokens)
        if (self.method == "draft") != bool(self.model):
            raise UsageError(
                f"speculation: {shown(str(self))}; write METHOD:DRAFTS, or draft:MODEL:DRAFTS with a model"
            )

    def __str__(self) -> str:
        return ":".join(filter(None, (self.method, self.model, str(self.draft_tokens))))

    @property
    def rules(self) -> Method:
        """What the scheduler has to know of the method."""
        return METHODS[self.method]

    @property
    def ahead(self) -> int:
        """Tokens beyond a row's own whose blocks it needs."""
        return self.draft_tokens if self.rules.keeps_kv else 0


def parse_drafter(text: str) -> Drafter:
    """Read `Drafter` as it is written.

    Raises
    ------
    UsageError, UnknownNameError    anything else
    """
    method, _, rest = text.strip().partition(":")
    model, _, drafts = rest.rpartition(":")
    if not (drafts.isascii() and drafts.isdecimal()) or len(drafts) > 3:
        raise UsageError(
            f"speculation: cannot read {shown(text)}; give a method and 1 to {MOST_DRAFTS} drafts; examples: eagle:3, "
            "mtp:1, ngram:5, draft:MODEL:3"
        )
    return Drafter(method=method, draft_tokens=int(drafts), model=model)


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
    model : str                   the draft model; "" for other methods

    Raises
    ------
    UsageError, UnknownNameError    a value out of its range
    """

    method: str
    draft_tokens: int
    accepted: tuple[tuple[int, ...], ...]
    proposed: tuple[tuple[int, ...], ...] = ()
    model: str = ""

    @property
    def drafter(self) -> Drafter:
        """What plans know of it."""
        return Drafter(method=self.method, draft_tokens=self.draft_tokens, model=self.model)

    @property
    def rules(self) -> Method:
        """What the scheduler has to know of the method."""
        return METHODS[self.method]

    @property
    def ahead(self) -> int:
        """Tokens beyond a row's own whose blocks it needs."""
        return self.draft_tokens if self.rules.keeps_kv else 0

    @property
    def mean(self) -> float:
        """Tokens that a row brings in the mean over a long output, where none of its drafts is cut off."""
        long = np.full(len(self.accepted), 10_000)
        return float(np.mean(9_999 / least_steps(self, self.rules.forms_ahead, long)))

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


def least_steps(speculation: Speculation, forms_ahead: bool, generated: NDArray[np.int64]) -> NDArray[np.int64]:
    """Batches after that of the first token without which no request gets all of its tokens.

    After s of them it has at most as many tokens as the drafts that can be right after fewer would bring: drafts may
    be cut off, so any smaller number counts as well.

    Parameters
    ----------
    speculation
    forms_ahead : bool            whether scheduling is asynchronous, where as many drafts are made as may follow
    generated : int64[requests]   tokens of each

    Returns
    -------
    int64[requests]
    """
    longest, lists = int(generated.max()), _lists(speculation, forms_ahead, len(generated))
    found = np.empty_like(generated)
    for place, (accepted, proposed) in enumerate(lists):
        right = np.minimum(np.resize(accepted, longest + 1), np.resize(proposed, longest + 1))
        reached = np.maximum.accumulate(np.arange(longest + 1) + 1 + np.minimum(right, speculation.draft_tokens))
        ends = [1]
        while ends[-1] < longest:
            ends.append(int(reached[1 : ends[-1] + 1][-1]))
        found[place :: len(lists)] = np.searchsorted(ends, generated[place :: len(lists)])
    return found


def _lists(speculation: Speculation, forms_ahead: bool, requests: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Drafts that are accepted and proposed, of each request where these differ."""
    proposed = ((MOST_DRAFTS,),) if forms_ahead or not speculation.proposed else speculation.proposed
    count = 1 if len(speculation.accepted) == len(proposed) == 1 else requests
    return [(speculation.accepted[i % len(speculation.accepted)], proposed[i % len(proposed)]) for i in range(count)]


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
