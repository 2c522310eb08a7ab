"""What is offered of a type of GPU, as it is asked for: formats of weights and of the KV cache, and clocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir import KV_BYTES, get_format
from apex_opt.plans.plan import default_kv_format, foreign_mix
from apex_opt.profiles.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.arguments import Ask
    from apex_opt.cluster.types import Gpu
    from apex_opt.ir import Model

_CLOCK_SHARES: Final = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the highest, with which `all` stands for six
_CLOCK_STEP: Final = 15  # MHz: GPUs step their clock so


def clocks_asked(ask: Ask, gpu: Gpu) -> tuple[int | None, ...]:
    """Clocks to choose from; the highest is None, which needs no law."""
    if ask.clock is None:
        return (None,)
    if ask.clock.strip().lower() == "all":
        if gpu.clock_mhz is None:
            raise UsageError(f"--clock: the highest clock of {gpu.name} is not stated; give gpu.clock_mhz")
        return (None, *(round(gpu.clock_mhz * share / _CLOCK_STEP) * _CLOCK_STEP for share in _CLOCK_SHARES))
    clocks: list[int | None] = []
    for text in ask.clock.split(","):
        if not re.fullmatch(r"[0-9]{1,5}", text.strip()):
            raise UsageError(
                f"--clock: {text.strip()[:20]!r} is no clock in MHz; e.g. --clock=1200,1600 or --clock=all"
            )
        mhz = int(text)
        Clock.of(gpu, mhz)
        clocks.append(None if mhz == gpu.clock_mhz else mhz)
    if len(set(clocks)) < len(clocks):
        raise UsageError(f"--clock: {ask.clock!r:.60} names a clock twice")
    return tuple(clocks)


def formats_asked(ask: Ask, model: Model, gpu: Gpu) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weight formats to choose from, each with its KV format.

    Parameters
    ----------
    ask, model, gpu

    Raises
    ------
    UsageError, UnknownNameError    formats that there are not, or that are named twice
    """
    if ask.weights is None:
        # A 16-bit model runs in whichever 16-bit type the GPU has.
        own = model.weight_format
        names: tuple[str, ...] = (own if own not in ("bf16", "fp16") or gpu.supports(own) else gpu.half_dtype,)
    else:
        names = tuple(get_format(name.strip()[:60]).name for name in ask.weights.split(","))
        if len(set(names)) < len(names):
            raise UsageError(f"--weights: {ask.weights!r:.60} names a format twice")
        for fault in filter(None, (foreign_mix(name, model) for name in names)):
            raise UsageError(f"--weights: {fault}")
    if ask.kv is None:
        return names, tuple(model.kv_format or default_kv_format(name) for name in names)
    kv = ask.kv.strip().lower()
    if "," in kv:
        raise UsageError(
            f"--kv: {ask.kv!r:.60} names several formats, and it takes one of {', '.join(KV_BYTES)}; ask once for each"
        )
    if kv not in KV_BYTES:
        raise UnknownNameError("KV format", ask.kv[:60], KV_BYTES)
    return names, (kv,) * len(names)


def runs_asked(ask: Ask, model: Model, gpus: Sequence[Gpu]) -> set[tuple[float | None, str]]:
    """The compute capabilities and formats of a KV cache that a question offers.

    Parameters
    ----------
    ask, model
    gpus : sequence of Gpu    those that there are
    """
    return {(gpu.capability, kv) for gpu in gpus for kv in formats_asked(ask, model, gpu)[1]}


def expanded(names: tuple[str, ...], gpu: Gpu) -> Iterator[str]:
    """Formats that a GPU has no arithmetic for, and so reads narrow and multiplies in 16 bits."""
    for name in names:
        whole = get_format(name)
        for form in whole.mixed or (whole,):
            used = form.computed(gpu.supports)
            if used is not None and used is not form:
                yield (
                    f"{gpu.name} has no {form.hardware_dtype} arithmetic: weights in {form.name} are expanded to "
                    f"{gpu.half_dtype}, and cost as {used.name}"
                )
