"""apex_opt.profiles.tables: what is written is read again, and bad tables are refused line by line."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.errors import InputError
from apex_opt.profiles import tables
from apex_opt.profiles.schema import COLLECTIVE, GEMM, MEMORY, MOE
from apex_opt.profiles.tables import read_table, write_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def test_columns_may_come_in_any_order_and_optional_ones_may_lack(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time_us,k,n,m,dtype\n1.5,3,2,1,float8\n")
    table = read_table(tmp_path / "t.csv", GEMM)
    assert (table["dtype"][0], table["m"][0], table["k"][0], table["time_us"][0]) == ("fp8", 1, 3, 1.5)
    assert np.isnan(table["energy_uj"][0])


def test_columns_with_a_default_may_lack_and_a_default_may_be_another_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("dtype,tokens,hidden,expert_ffn,experts,topk,time_us\nmxfp4,1,2,3,64,4,5\n")
    table = read_table(tmp_path / "t.csv", MOE)
    assert (table["held"][0], table["routing"][0]) == (64, "uniform")
    write_table(tmp_path / "t.npz", MOE, table)
    assert list(read_table(tmp_path / "t.npz", MOE)) == [column.name for column in MOE.columns]


GOOD = "dtype,m,n,k,time_us,energy_uj\nbfloat16,1,2,3,4.5,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; the header must be dtype,m,n,k,time_us,energy_uj"),
        ("dtype,m,n,k,time_us,energy_uj\n", "a header and no rows"),
        (GOOD.replace("time_us", "seconds"), "column time_us is missing; column 'seconds' is not known"),
        (GOOD.replace("k,", "m,"), "column m is there 2 times"),
        (GOOD + "bfloat16,1,2\n", "line 3 has 3 fields instead of 6"),
        (GOOD + "bfloat16,1,2,3,9,\n", "line 3 repeats the key of line 2"),
        (GOOD.replace(",1,", ",1.5,"), "line 2: m = '1.5' must be a whole number above 0"),
        (GOOD.replace(",1,", ",0,"), "line 2: m = '0'"),
        (GOOD.replace(",1,", ",x,"), "line 2: m = 'x'"),
        (GOOD.replace(",1,", ",,"), "line 2: m = ''"),
        (GOOD.replace(",1,", ",1e300,"), "line 2: m = '1e300'"),
        (GOOD.replace("4.5", "nan"), "line 2: time_us = 'nan' must be a number"),
        (GOOD.replace("4.5", "inf"), "line 2: time_us = 'inf'"),
        (GOOD.replace("4.5", "-1"), "line 2: time_us = '-1'"),
        (GOOD.replace("4.5,", "4.5,nan"), "line 2: energy_uj = 'nan'"),
        (GOOD.replace("bfloat16", "int3"), "line 2: dtype = 'int3' must be one of bfloat16, float16, float8"),
        (GOOD.replace("bfloat16", '"bf'), "not CSV"),
    ],
)
def test_bad_tables_name_line_column_value_and_limit(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gemm.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_table(path, GEMM)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_first_five_faults_are_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text("op,bytes,time_us\n" + "".join(f"norm{row},-1,1\n" for row in range(9)))
    with pytest.raises(InputError, match=r"line 2: .*line 6: .*and 4 more"):
        read_table(path, MEMORY)


def test_tables_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    for path, message in (
        ("bytes.csv", "not UTF-8"),
        (".", "but a folder"),
        ("no.csv", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / path, GEMM)


def bomb(path: Path, *members: tuple[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def header_of(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": dtype})
    return stream.getvalue()


def test_an_archive_is_held_to_its_size_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST_BYTES", 1 << 20)
    path = bomb(tmp_path / "t.npz", ("a.npy", bytes(700_000)), ("b.npy", bytes(700_000)))
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to more than the limit of 1,048,576 bytes"):
        read_table(path, GEMM)


@pytest.mark.parametrize(
    "content",
    [
        header_of((1 << 40,), "<i2"),
        header_of((1 << 62, 4), "<i2"),
        header_of((3,), f"<U{1 << 28}"),
        header_of((3,), "<i2") + bytes(7),
        header_of((3,), "|O"),
        b"\x93NUMPY\x09\x00",
    ],
)
def test_an_array_that_claims_more_than_is_there_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"not an \.npz archive of plain arrays"):
        read_table(bomb(tmp_path / "t.npz", ("m.npy", content)), GEMM)


def test_an_archive_packed_in_a_way_that_costs_much_memory_is_refused(tmp_path: Path) -> None:
    path = bomb(tmp_path / "t.npz", ("m.npy", header_of((1,), "<i2") + bytes(2)), packing=zipfile.ZIP_LZMA)
    with pytest.raises(InputError, match="packed in a way that is not read here"):
        read_table(path, GEMM)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["bf16", "fp8", "mxfp4_fp8"]),
        st.integers(1, 2**31),
        st.integers(1, 70000),
        st.integers(1, 300),
        st.floats(1e-3, 1e9),
        st.one_of(st.just(float("nan")), st.floats(1e-3, 1e12)),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[:4],
)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_an_archive_gives_back_keys_exactly_and_figures_within_a_step(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]
) -> None:
    columns = list(zip(*rows, strict=True))
    table: dict[str, NDArray[Any]] = {"dtype": np.array(columns[0], dtype=object)}
    for name, values in zip(("m", "n", "k", "time_us", "energy_uj"), columns[1:], strict=True):
        table[name] = np.array(values, dtype=np.float64)
    path = tmp_path_factory.getbasetemp() / "archive.npz"
    write_table(path, GEMM, table)
    first = path.read_bytes()
    found = read_table(path, GEMM)
    for name in ("dtype", "m", "n", "k"):
        assert found[name].tolist() == table[name].tolist()
        assert found[name].dtype == table[name].dtype
    for name in ("time_us", "energy_uj"):
        np.testing.assert_allclose(found[name], table[name], rtol=1.01 / 1024)
    write_table(path, GEMM, table)
    assert path.read_bytes() == first
    write_table(path, GEMM, found)
    assert path.read_bytes() == first, "what was read is written as it was"


def archive(path: Path, **changed: Any) -> Path:
    """A good archive of two rows, some of its arrays replaced, or left out where None."""
    arrays: dict[str, Any] = {
        "dtype": np.array([0, 0], dtype=np.uint8),
        "dtype_names": np.array(["bfloat16"]),
        "m": np.array([1, 2], dtype=np.uint16),
        "n": np.array([3, 3], dtype=np.uint16),
        "k": np.array([4, 4], dtype=np.uint16),
        "time_us": np.array([1000, 2000], dtype=np.int16),
    }
    arrays |= changed
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_us": None}, "column time_us is missing"),
        ({"more": np.array([1, 2], dtype=np.uint8)}, "column 'more' is not known"),
        ({"m": np.array([1], dtype=np.uint8)}, "one-dimensional and equally long"),
        ({"m": np.array([[1, 2]], dtype=np.uint8)}, "one-dimensional and equally long"),
        ({"m": np.array([1.0, 2.0])}, "array m of float64 must be unsigned integers"),
        ({"m": np.array([1, -2])}, "array m of int64 must be unsigned integers"),
        ({"m": np.array([1, 0], dtype=np.uint8)}, "row 2: m = '0' must be a whole number above 0"),
        ({"m": np.array([1, 2**40], dtype=np.uint64)}, f"row 2: m = '{2**40}'"),
        ({"m": np.array([1, 1], dtype=np.uint8)}, "row 2 repeats the key of row 1"),
        ({"time_us": np.array([1.0, 2.0])}, "array time_us of float64 must be int16 logarithms"),
        ({"time_us": np.array([1000, -32768], dtype=np.int16)}, "row 2: time_us = '-32768' must be a number"),
        ({"time_us": np.array([1000, 32000], dtype=np.int16)}, "row 2: time_us = '32000' must be a number"),
        ({"dtype": np.array([0, 1], dtype=np.uint8)}, "array dtype has code 1 and only 1 names"),
        ({"dtype_names": None}, "must be codes with dtype_names"),
        ({"dtype_names": np.array(["int3"])}, "row 1: dtype = 'int3' must be one of"),
        ({"dtype_names": np.array([1])}, "must be codes with dtype_names"),
        ({"dtype_names": np.array(["bfloat16", {}], dtype=object)}, "not an .npz archive of plain arrays"),
    ],
)
def test_bad_archives_name_array_row_and_limit(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_table(archive(tmp_path / "t.npz", **changed), GEMM)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    whole = archive(tmp_path / "good.npz").read_bytes()
    (tmp_path / "text.npz").write_text("dtype,m\n")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.npz").write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as file:
        file.writestr("m.npy", "no array")
    for name in ("text", "cut", "bad", "other"):
        with pytest.raises(InputError, match=r"not an \.npz archive") as caught:
            read_table(tmp_path / f"{name}.npz", GEMM)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "no.npz", GEMM)


def test_repeats_are_found_however_wide_the_keys_are(tmp_path: Path) -> None:
    lines = [f"all_reduce,{2**20 - row % 3},{2**50 - row},{row + 1}" for row in range(9)]
    path = tmp_path / "collective.csv"
    path.write_text("\n".join(["op,ranks,bytes,time_us", *lines]))
    assert len(read_table(path, COLLECTIVE)["bytes"]) == 9
    path.write_text("\n".join(["op,ranks,bytes,time_us", *lines, lines[4], lines[2]]))
    with pytest.raises(InputError, match="line 11 repeats the key of line 6; line 12 repeats the key of line 4"):
        read_table(path, COLLECTIVE)
