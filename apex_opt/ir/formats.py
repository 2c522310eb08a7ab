"""Number formats of weights and KV cache, and what they cost in bytes.

A weight format covers the matrices of the blocks only (QKV and output projections, FFN and expert matrices), less those
that a checkpoint leaves out. Embedding, LM head, norms, biases and the MoE router stay 16 bit in every format, as the
engines leave them. Where a checkpoint holds some matrices in one format and some in another, its format is named after
all of them, that of the most weights first, as `w4a16+w8a16g32`; the matrices say which of them is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ACTIVATIONS: Final = ("bf16", "fp16", "fp8", "fp4", "int8")
GROUP_WEIGHTS: Final = 128
"""Weights that share one 16-bit scale in w8a16 and w4a16: the usual GPTQ and AWQ group."""
SMALL_GROUPS: Final = (64, 32)
"""Weights that share one 16-bit scale in the formats named after them, such as w4a16g32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberFormat:
    """How the block matrices are stored and with what their products are computed.

    Parameters
    ----------
    name : str              key in `FORMATS`
    weight_bits : Fraction  bits per weight, group scales included
    activation : str        one of `ACTIVATIONS`: the type the matrix units see; a weight-only format
                            expands its weights first, to bf16 or to fp16, which run at the same rate
    description : str       one line for tables
    group : int or None     weights along the inputs that share one scale; None where a scale is for more than that
    expanded : str or None  weight-only format that a matrix costs as where a GPU expands it to 16 bit, for want of
                            arithmetic in it
    mixed : tuple           formats of a checkpoint that holds its matrices in several; this one is then as the first
    """

    name: str
    weight_bits: Fraction
    activation: str
    description: str
    group: int | None = None
    expanded: str | None = None
    mixed: tuple[NumberFormat, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.weight_bits, Fraction) or not 0 < self.weight_bits <= 64:
            raise InputError(
                f"number format {self.name!r}: weight_bits must be a Fraction above 0 and at most 64, "
                f"not {self.weight_bits!r}"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"number format {self.name!r}: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"not {self.activation!r}"
            )

    @property
    def hardware_dtype(self) -> str | None:
        """The type a GPU must multiply in; None for a weight-only format, which expands to its 16-bit type."""
        return None if self.weight_bits < 16 and self.activation in ("bf16", "fp16") else self.activation

    def computed(self, supports: Callable[[str], bool]) -> NumberFormat | None:
        """The format whose products stand for those of this one on a GPU: where it has no such arithmetic, `expanded`.

        None where it can do neither. Of a mixed format it is that of the first part that decides.

        Parameters
        ----------
        supports : callable    whether the GPU multiplies matrices in a type
        """
        found = [form if _native(form, supports) else _expanded(form) for form in self.mixed or (self,)]
        return None if None in found else found[0]

    def part(self, quantised: int) -> NumberFormat:
        """The format of a matrix that is in the `quantised`-th of a mixed one, counted from 1.

        A plan in one format has them all in that.
        """
        return self.mixed[min(quantised, len(self.mixed)) - 1] if self.mixed else self

    def weight_bytes(self, parameters: int) -> int:
        """Bytes that `parameters` weights take in this format, rounded up.

        Raises
        ------
        InputError      a negative count, or one that is no integer
        """
        if isinstance(parameters, bool) or not isinstance(parameters, int) or parameters < 0:
            raise InputError(
                f"number format {self.name!r}: parameters must be a whole number from 0, not {parameters!r}"
            )
        return -(-parameters * self.weight_bits.numerator // (8 * self.weight_bits.denominator))


def _native(form: NumberFormat, supports: Callable[[str], bool]) -> bool:
    return form.hardware_dtype is None or supports(form.hardware_dtype)


def _expanded(form: NumberFormat) -> NumberFormat | None:
    return None if form.expanded is None else FORMATS[form.expanded]


def _weight_only(bits: int, group: int) -> NumberFormat:
    """Integer weights behind 16-bit activations."""
    return NumberFormat(
        name=f"w{bits}a16" + (f"g{group}" if group != GROUP_WEIGHTS else ""),
        weight_bits=bits + Fraction(16, group),
        activation="bf16",
        group=group,
        description=f"{bits}-bit weights, 16-bit activations; one 16-bit scale per {group} weights",
    )


FORMATS: Final[Mapping[str, NumberFormat]] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            NumberFormat(
                name="bf16", weight_bits=Fraction(16), activation="bf16", description="bfloat16 weights and activations"
            ),
            NumberFormat(
                name="fp16", weight_bits=Fraction(16), activation="fp16", description="float16 weights and activations"
            ),
            NumberFormat(
                name="fp8",
                weight_bits=Fraction(8),
                activation="fp8",
                expanded="w8a16",
                description="8-bit float weights and activations (W8A8); scales, per channel or block, are negligible",
            ),
            NumberFormat(
                name="w8a8",
                weight_bits=Fraction(8),
                activation="int8",
                description="8-bit integer weights and activations (W8A8); scales, per channel, are negligible",
            ),
            *(_weight_only(bits, group) for bits in (8, 4) for group in (GROUP_WEIGHTS, *SMALL_GROUPS)),
            # OCP Microscaling Formats (MX) specification 1.0, 2023. Weight-only: GPUs before Blackwell expand it.
            NumberFormat(
                name="mxfp4",
                weight_bits=4 + Fraction(8, 32),
                activation="bf16",
                group=32,
                description="4-bit float weights, 16-bit activations; one 8-bit scale per 32 weights",
            ),
            # Of the same specification: the scales are part of the product on Blackwell, other GPUs expand the weights.
            NumberFormat(
                name="mxfp8",
                weight_bits=8 + Fraction(8, 32),
                activation="fp8",
                group=32,
                expanded="w8a16g32",
                description="8-bit float weights and activations; one 8-bit scale per 32 of either",
            ),
            # NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference", 2025.
            NumberFormat(
                name="nvfp4",
                weight_bits=4 + Fraction(8, 16),
                activation="fp4",
                group=16,
                expanded="w4a16g32",
                description="4-bit float weights and activations (W4A4); one 8-bit scale per 16 weights",
            ),
        )
    }
)

KV_BYTES: Final[Mapping[str, int]] = MappingProxyType({"bf16": 2, "fp16": 2, "fp8": 1})
"""Bytes of one key or value element in the KV cache."""


_WIDTHS: Final = {
    "int4": "w4a16 is 4-bit integer weights with 16-bit activations",
    "int8": "w8a8 is 8-bit integer weights and activations, w8a16 such weights with 16-bit activations",
}
"""What names that state a width alone may mean."""


def get_format(name: str) -> NumberFormat:
    """Weight format by name, in any case; a mixed one by the names of its formats, joined by `+`.

    Raises
    ------
    UnknownNameError    not in `FORMATS`, or no mix of several of them
    """
    found = _find_format(name.lower())
    if found is None:
        hint = _WIDTHS.get(name.lower(), "")
        raise UnknownNameError("number format", name, FORMATS, hint, alike=not hint)
    return found


def is_format(name: str) -> bool:
    """Whether `get_format` knows the name as it is."""
    return _find_format(name) is not None


@lru_cache(maxsize=1 << 8)
def _find_format(name: str) -> NumberFormat | None:
    if "+" not in name:
        return FORMATS.get(name)
    names = name.split("+", len(FORMATS))
    if len(set(names)) < len(names) or not all(part in FORMATS for part in names):
        return None
    first, *others = (FORMATS[part] for part in names)
    return NumberFormat(
        name=name,
        weight_bits=first.weight_bits,
        activation=first.activation,
        description=f"{first.description}; some matrices in {' and '.join(part.name for part in others)}",
        mixed=(first, *others),
    )
