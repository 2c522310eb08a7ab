"""Random ways to make drafts, and what comes of them, for tests of plans that have these among their choices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.plans.speculation import METHODS, Drafter, Speculation

if TYPE_CHECKING:
    from apex_opt.plans.engine import EngineSettings

MODELS = ("llama-3.1-8b", "qwen3-30b-a3b")
"""Draft models, the second of experts."""


def drafters(seed: int) -> tuple[Drafter | None, ...]:
    """Ways to make drafts, none among them or not."""
    rng = np.random.default_rng(seed + 7000)
    found: list[Drafter | None] = [None] if rng.random() < 0.7 else []
    for method in rng.permutation(list(METHODS))[: rng.integers(1, 4)]:
        model = str(rng.choice(MODELS)) if method == "draft" else ""
        found.append(Drafter(method=str(method), draft_tokens=int(rng.integers(1, 9)), model=model))
    return tuple(found)


def knowing(settings: EngineSettings, some: tuple[Drafter | None, ...], seed: int) -> EngineSettings:
    """Settings that know of each way to make drafts what comes of them, without any order."""
    rng = np.random.default_rng(seed + 8000)
    return replace(
        settings,
        drafting=tuple(
            Speculation(
                method=drafter.method,
                draft_tokens=drafter.draft_tokens,
                model=drafter.model,
                accepted=(tuple(map(int, rng.integers(0, drafter.draft_tokens + 1, rng.integers(1, 12)))),),
                proposed=((1, 3, 2),) if drafter.method == "ngram" and rng.random() < 0.5 else (),
            )
            for drafter in some
            if drafter is not None
        ),
    )
