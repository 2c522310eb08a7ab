"""apex_opt.plans.speculation: what an engine is told of drafts, and what it cannot be told."""

from __future__ import annotations

from typing import Any

import pytest

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.plans.speculation import METHODS, Speculation


def test_drafters_with_kv_take_blocks_ahead_and_eagle_computes_a_block_again() -> None:
    of = {name: Speculation(method=name, draft_tokens=3, accepted=((1,),)) for name in METHODS}
    assert {name: its.ahead for name, its in of.items()} == {"eagle": 3, "mtp": 3, "draft": 3, "ngram": 0}
    assert {name for name, its in of.items() if its.rules.recomputes} == {"eagle", "mtp"}
    assert {name for name, its in of.items() if not its.rules.forms_ahead} == {"ngram"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "eagel"}, UnknownNameError, "way to make drafts 'eagel'.*did you mean eagle"),
        ({"draft_tokens": 0}, UsageError, "0 drafts; a whole number from 1 to 8"),
        ({"draft_tokens": True}, UsageError, "true drafts; a whole number from 1 to 8"),
        ({"accepted": ()}, UsageError, "accepted has no list"),
        ({"accepted": ((),)}, UsageError, r"accepted holds \(\)"),
        ({"proposed": ((1, -1),)}, UsageError, r"proposed holds \(1, -1\)"),
    ],
)
def test_what_no_engine_is_told_is_refused_in_one_line(
    change: dict[str, Any], error: type[ApexError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Speculation(**{"method": "eagle", "draft_tokens": 3, "accepted": ((1,),), **change})
    assert "\n" not in str(caught.value)
