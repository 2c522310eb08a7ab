"""Number formats: bits per weight, rounding, look-up."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import FORMATS, KV_BYTES, NumberFormat, get_format
from apex_opt.ir.formats import is_format


@pytest.mark.parametrize(
    ("name", "bits", "activation"),
    [
        ("bf16", 16, "bf16"),
        ("fp16", 16, "fp16"),
        ("fp8", 8, "fp8"),
        ("w8a16", Fraction(65, 8), "bf16"),
        ("w4a16", Fraction(33, 8), "bf16"),
        ("w8a16g64", Fraction(33, 4), "bf16"),
        ("w8a16g32", Fraction(17, 2), "bf16"),
        ("w4a16g64", Fraction(17, 4), "bf16"),
        ("w4a16g32", Fraction(9, 2), "bf16"),
        ("w8a8", 8, "int8"),
        ("mxfp4", Fraction(17, 4), "bf16"),
        ("mxfp8", Fraction(33, 4), "fp8"),
        ("nvfp4", Fraction(9, 2), "fp4"),
    ],
)
def test_each_format_has_its_bits_and_its_matrix_type(name: str, bits: Fraction, activation: str) -> None:
    found = get_format(name)
    assert (found.name, found.weight_bits, found.activation) == (name, bits, activation)
    assert found.description


def test_there_are_no_other_formats() -> None:
    of_weights = {f"w{bits}a16{group}" for bits in (4, 8) for group in ("", "g32", "g64")}
    assert set(FORMATS) == {"bf16", "fp16", "fp8", "w8a8", "mxfp4", "mxfp8", "nvfp4"} | of_weights
    assert dict(KV_BYTES) == {"bf16": 2, "fp16": 2, "fp8": 1}


@pytest.mark.parametrize(
    ("name", "parameters", "weight_bytes"),
    [
        ("bf16", 7, 14),
        ("fp8", 7, 7),
        ("w4a16", 128, 66),
        ("w4a16", 1, 1),
        ("w4a16", 0, 0),
        ("w8a16", 128, 130),
        ("w4a16g32", 32, 18),
        ("mxfp4", 32, 17),
        ("mxfp8", 32, 33),
        ("nvfp4", 16, 9),
    ],
)
def test_bytes_include_group_scales_and_round_up(name: str, parameters: int, weight_bytes: int) -> None:
    assert get_format(name).weight_bytes(parameters) == weight_bytes


@pytest.mark.parametrize(
    ("name", "needed"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "fp8"), ("w8a8", "int8"), ("nvfp4", "fp4")]
)
def test_a_format_with_its_own_arithmetic_needs_hardware_for_it(name: str, needed: str) -> None:
    assert get_format(name).hardware_dtype == needed


def test_formats_of_weights_alone_need_no_hardware_of_their_own() -> None:
    of_weights = {name for name in FORMATS if FORMATS[name].hardware_dtype is None}
    assert of_weights == {"mxfp4", *(name for name in FORMATS if "a16" in name)}


def test_a_mixed_format_has_those_it_names_and_needs_hardware_for_them_all() -> None:
    mixed = get_format("w4a16+FP8+nvfp4")
    assert mixed.name == "w4a16+fp8+nvfp4"
    assert [mixed.part(n).name for n in (1, 2, 3, 4)] == ["w4a16", "fp8", "nvfp4", "nvfp4"]
    assert mixed.hardware_dtype is None
    assert mixed.computed(lambda dtype: dtype in ("fp8", "fp4")) is FORMATS["w4a16"]
    # What a GPU has no arithmetic for it expands, where engines have kernels that do; 8-bit integers they do not.
    assert mixed.computed(lambda _: False) is FORMATS["w4a16"]
    assert get_format("w4a16+w8a8").computed(lambda _: False) is None
    assert get_format("fp8").part(2) is FORMATS["fp8"]


@pytest.mark.parametrize("name", ["fp8+", "+fp8", "fp8+fp8", "fp8+fp7", "+", "fp8+" * 5000])
def test_a_mix_is_of_several_known_formats(name: str) -> None:
    assert not is_format(name)
    with pytest.raises(UnknownNameError, match="unknown number format"):
        get_format(name)


@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**15))
def test_bytes_are_the_least_integer_that_holds_the_bits(name: str, parameters: int) -> None:
    entry = FORMATS[name]
    assert 0 <= entry.weight_bytes(parameters) - parameters * entry.weight_bits / 8 < 1


@pytest.mark.parametrize("parameters", [-1, True, 1.5])
def test_a_count_that_is_none_is_refused(parameters: object) -> None:
    with pytest.raises(InputError, match="parameters must be a whole number from 0"):
        get_format("bf16").weight_bytes(parameters)  # type: ignore[arg-type]


def test_names_are_found_in_any_case() -> None:
    assert get_format("W4A16") is FORMATS["w4a16"]


def test_unknown_names_come_with_suggestions() -> None:
    with pytest.raises(UnknownNameError, match="unknown number format 'fp9'; did you mean fp8"):
        get_format("fp9")


@pytest.mark.parametrize(("name", "meant"), [("int4", "w4a16"), ("INT8", "w8a8")])
def test_a_width_alone_is_answered_with_the_formats_there_are_and_the_one_that_is_meant(name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=f"known: bf16, .*; {meant} is "):
        get_format(name)


def test_a_format_checks_itself() -> None:
    with pytest.raises(InputError, match="weight_bits must be a Fraction above 0"):
        NumberFormat(name="x", weight_bits=Fraction(0), activation="bf16", description="")
    with pytest.raises(InputError, match="activation must be one of bf16, fp16, fp8, fp4, int8, not 'int4'"):
        NumberFormat(name="x", weight_bits=Fraction(8), activation="int4", description="")


def test_the_tables_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FORMATS["x"] = FORMATS["bf16"]  # type: ignore[index]
