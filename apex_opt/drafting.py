"""What makes drafts, as it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.engines import load_kind
from apex_opt.errors import UsageError
from apex_opt.ir import load_model
from apex_opt.plans.acceptance import speculations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.arguments import Ask
    from apex_opt.ir import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.speculation import Drafter, Speculation


def speculation_of(
    ask: Ask, settings: EngineSettings, model: Model, drafters: Sequence[Drafter | None]
) -> tuple[tuple[Speculation, ...], tuple[str, ...]]:
    """What comes of the drafts of each way to make them, and what has to be told of that.

    Parameters
    ----------
    ask, settings, model
    drafters : of which none makes none
    """
    chosen = [drafter for drafter in drafters if drafter is not None]
    if chosen and not settings.scheduler.verifies_drafts:
        raise UsageError(
            f"--speculation={chosen[0]}: drafts are modelled for vLLM, SGLang and TensorRT-LLM, not for {ask.engine}; "
            "use --engine=vllm, --engine=sglang or --engine=trtllm"
        )
    if chosen and settings.runnable not in (None, load_kind(ask.engine).rules):
        raise UsageError(
            f"--speculation={chosen[0]}: drafts are modelled as {ask.engine} makes them, and --runnable={ask.runnable} "
            "asks for plans that another engine can run; leave one of them out"
        )
    for drafter in chosen:
        if drafter.method == "draft" and (rows := load_model(drafter.model).vocab) != model.vocab:
            raise UsageError(
                f"--speculation={drafter}: {drafter.model} has a vocabulary of {rows} tokens and {model.name} of "
                f"{model.vocab}; a draft model has that of the model"
            )
    drafting, notes = speculations(model, drafters, ask.acceptance)
    between = [of.method for of in drafting if not of.rules.forms_ahead]
    if ask.async_scheduling and between and settings.scheduler.waits_for_host:
        notes = (
            *notes,
            f"--async_scheduling=true: {between[0]} makes its drafts on the host, between two batches, so plans with "
            "them form no batch ahead",
        )
    return drafting, notes


def about_drafting_seats(ask: Ask, drafters: Sequence[Drafter | None]) -> tuple[str, ...]:
    """That SGLang's own limit where drafts are verified was asked for and does nothing."""
    if "drafting_seats" not in (ask.engine_settings or ""):
        return ()
    if not any(drafters) and "spec=" not in str(getattr(ask, "plan", "")):
        return (
            "--engine_settings: drafting_seats has no effect where no drafts are made; --speculation=eagle:3 would "
            "make some",
        )
    if ask.max_num_seqs is not None:
        return ("--engine_settings: drafting_seats has no effect beside --max_num_seqs, which holds with drafts too",)
    return ()
