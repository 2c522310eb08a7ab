"""How a checkpoint was quantised, as an engine sees it: what decides into which shards its matrices may be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from apex_opt.errors import InputError

METHODS: Final = (
    "fp8",
    "fbgemm_fp8",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mixed",
    "mxfp4",
    "gptq",
    "awq",
    "auto-round",
    "quark",
    "compressed-tensors",
)
"""Methods described here, by the names vLLM has for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Method of quantisation and the extent of its scales.

    Parameters
    ----------
    method : str                    one of `METHODS`
    group : int or None             weights along the input dimension that share one scale; None where a scale is for a
                                    whole channel or matrix
    block : (int, int) or None      outputs and inputs that share one scale, where scales are for blocks
    further : tuple of Scheme       of the further formats of a mixed checkpoint, in their order
    """

    method: str
    group: int | None = None
    block: tuple[int, int] | None = None
    further: tuple[Scheme, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"scheme: method must be one of {', '.join(METHODS)}, not {self.method!r:.40}")

    def part(self, quantised: int) -> Scheme:
        """Of the matrices that are in the `quantised`-th format of a mixed checkpoint, counted from 1."""
        return (self, *self.further)[min(quantised, len(self.further) + 1) - 1]
