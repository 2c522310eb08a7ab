"""How batches are formed, as it is asked for: the engine's settings, their limits, and what has to be told of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.arguments import LARGEST_BATCH
from apex_opt.engines import ANY, load_rules
from apex_opt.engines.kinds import COMMON
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.offering import runs_asked
from apex_opt.plans.engine import EngineSettings, check_snapshots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.arguments import Ask
    from apex_opt.cluster.types import Gpu
    from apex_opt.engines import EngineKind, EngineRules
    from apex_opt.ir import Model
    from apex_opt.workload import Trace

_SPLITTING: Final = ("chunked_prefill", "prefix_caching")
"""What engines switch off where an encoder has to see all of a prompt."""
_USUAL_BLOCK: Final = 16
"""Tokens of a block whose multiples the usual attention of vLLM takes."""


def settings_asked(
    ask: Ask, kind: EngineKind, model: Model, trace: Trace, gpus: Sequence[Gpu]
) -> tuple[EngineSettings, list[tuple[int, int]]]:
    """Settings of the engine, the widest limits of a batch among them, and the limits to choose from.

    Parameters
    ----------
    ask, kind, model, trace
    gpus : sequence of Gpu    those that there are
    """
    asked = {name: getattr(ask, name) for name in COMMON if getattr(ask, name) is not None}
    common, scheduler = kind.common(min(gpu.memory_bytes for gpu in gpus)) | asked, kind.scheduling(ask.engine_settings)
    if model.sees_whole_prompts:
        for name in _SPLITTING:
            if asked.get(name):
                raise UsageError(f"--{name}=true: {model.name} is an encoder, or has one, which sees all of a prompt")
        common |= dict.fromkeys(_SPLITTING, False)
    if model.encoder is not None and model.images is None and not isinstance(scheduler, VllmScheduling):
        raise UsageError(f"--engine={kind.name}: encoder-decoders such as {model.name} are planned for vllm")
    if model.pools and trace.output.max() > 1:
        raise UsageError(
            f"--trace: {trace.name:.60} asks for up to {trace.output.max()} tokens, but {model.name} answers with a "
            "vector; give an output of 1, which stands for it"
        )
    whole = not scheduler.splits_prompts or not common["chunked_prefill"]
    by_length = whole and scheduler.whole_length
    check_snapshots(scheduler, model)
    longest = ask.max_model_len
    if longest is None:
        # A batch must take the longest prompt whole: no longer than the trace needs, as its time is tabulated.
        longest = min(model.max_position, max(trace.longest, 2)) if by_length else model.max_position
    if longest > model.max_position:
        raise UsageError(
            f"--max_model_len: {longest} is beyond the {model.max_position} positions {model.name} is made for"
        )
    if by_length or not whole:
        least = longest if whole else 0
    else:
        # What gave way comes back with what it has generated.
        least = trace.longest if scheduler.may_preempt else int(trace.prompt.max())
    if isinstance(scheduler, SglangScheduling) and "max_num_seqs" in asked:
        scheduler = replace(scheduler, drafting_seats=0)
    runnable = _rules(ask, kind)
    if runnable is not None and "block_size" not in asked:
        common["block_size"] = runnable.block_size(model, common["block_size"], runs_asked(ask, model, gpus))
    _check_least(ask, least, splits=scheduler.splits_prompts and not model.sees_whole_prompts)
    limits = _batch_limits(common.pop("max_num_seqs"), common.pop("max_num_batched_tokens"), least)
    _check_own(limits[0], asked, kind)
    settings = EngineSettings(
        **common,
        max_num_seqs=max(seqs for seqs, _ in limits),
        max_num_batched_tokens=max(tokens for _, tokens in limits),
        max_model_len=longest,
        scheduler=scheduler,
        runnable=runnable,
    )
    return settings, limits


def _rules(ask: Ask, kind: EngineKind) -> EngineRules | None:
    """What plans are to keep to so that an engine can run them; None where none need be able to."""
    return kind.rules if ask.runnable is None else load_rules(ask.runnable)


def _batch_limits(
    seqs: int | tuple[int, ...], tokens: int | tuple[int, ...], least_tokens: int
) -> list[tuple[int, int]]:
    """Pairs of limits of a batch to choose from, those without room for a token of every sequence left out.

    Where prompts are not split a batch must take the longest one, so the engine's own limit on tokens is no less.

    Parameters
    ----------
    seqs, tokens : one limit or several
    least_tokens : int    that a batch must take
    """
    if least_tokens > LARGEST_BATCH:
        raise UsageError(
            f"--chunked_prefill=false: a batch would have to take a prompt of {least_tokens} tokens whole, the limit "
            f"is {LARGEST_BATCH}; pass --max_model_len={LARGEST_BATCH} or less, or chunk"
        )
    all_seqs = _several(seqs)
    all_tokens = tuple(dict.fromkeys(max(limit, least_tokens) for limit in _several(tokens)))
    pairs = [(one, limit) for one in all_seqs for limit in all_tokens]
    # With no pair left the settings say what is wrong with the widest.
    return [pair for pair in pairs if pair[0] <= pair[1]] or [(min(all_seqs), max(all_tokens))]


def _check_least(ask: Ask, least: int, *, splits: bool) -> None:
    """Refuse limits on the tokens of a batch that were asked for and have no room for a whole prompt.

    Parameters
    ----------
    ask
    least : int      tokens that a batch must take; more than 0 where prompts are not split
    splits : bool    whether prompts could be split
    """
    asked = () if ask.max_num_batched_tokens is None else _several(ask.max_num_batched_tokens)
    for limit in asked:
        if limit < min(least, LARGEST_BATCH):
            typed = "leave --chunked_prefill=false out" if ask.chunked_prefill is False else "--chunked_prefill=true"
            more = f", or {typed}" if splits else ""
            raise UsageError(
                f"--max_num_batched_tokens: {limit} has no room for the {least} tokens that a batch must take here, as "
                f"prompts are not split; give {least} or more{more}"
            )


def _check_own(limits: tuple[int, int], asked: Mapping[str, object], kind: EngineKind) -> None:
    """Refuse limits of a batch that contradict each other where one of them is the engine's own.

    Parameters
    ----------
    limits : of sequences and of tokens
    asked : by name, what was given
    kind
    """
    seqs, tokens = limits
    if seqs <= tokens or ("max_num_seqs" in asked) == ("max_num_batched_tokens" in asked):
        return
    own = f", the default of {kind.name},"
    first, second = ("", own) if "max_num_batched_tokens" in asked else (own, "")
    way_out = f"--max_num_seqs={tokens} or less" if second else f"--max_num_batched_tokens={seqs} or more"
    raise UsageError(
        f"max_num_batched_tokens {tokens}{first} is below max_num_seqs {seqs}{second.removesuffix(',')}: every running "
        f"sequence may want a token in one batch; give {way_out}"
    )


def choices(limits: list[tuple[int, int]]) -> tuple[tuple[int | None, int | None], ...]:
    """Limits as plans name them: only where there is a choice."""
    some_seqs, some_tokens = (len(set(column)) > 1 for column in zip(*limits, strict=True))
    return tuple((seqs if some_seqs else None, tokens if some_tokens else None) for seqs, tokens in limits)


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def about_engines(ask: Ask, kind: EngineKind, model: Model) -> tuple[str, ...]:
    """That no engine need be able to run a plan, or that this one's release does not know the model.

    Parameters
    ----------
    ask, kind, model
    """
    if ask.runnable == ANY:
        return (f"--runnable={ANY}: plans are told that no engine need be able to start",)
    rules = _rules(ask, kind)
    text = rules.lacking(model.family) if rules is not None else ""
    return (f"runnable: {text}",) if text else ()


def about_chunks(ask: Ask, kind: EngineKind) -> tuple[str, ...]:
    """That an engine splits no prompts, where it was asked to."""
    if not ask.chunked_prefill or kind.scheduler.splits_prompts:
        return ()
    return (f"--chunked_prefill=true: {kind.name} computes prompts whole all the same",)


def about_blocks(ask: Ask, kind: EngineKind, model: Model, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """That blocks of unusual sizes are computed by another kernel than the one whose times are known.

    Parameters
    ----------
    ask, kind, model
    gpus : sequence of Gpu    those that there are
    """
    if ask.block_size is None:
        return ()
    fast = 1 if (rules := _rules(ask, kind)) is None else rules.kernel_block(model, runs_asked(ask, model, gpus))
    if ask.block_size % fast:
        return (
            f"--block_size={ask.block_size}: the fastest kernels of this attention on these GPUs take multiples of "
            f"{fast} tokens; of others {kind.name} takes slower kernels than the times here are of, or rounds them up",
        )
    # What an engine starts no blocks of is refused plan by plan.
    usual = issubclass(kind.scheduler, VllmScheduling) and "latent" not in model.traits
    if ask.block_size % _USUAL_BLOCK == 0 or not usual:
        return ()
    return (
        f"--block_size={ask.block_size}: vLLM's usual attention takes multiples of {_USUAL_BLOCK} tokens; of others it "
        "falls back to FlexAttention, which is slower than the times here",
    )
