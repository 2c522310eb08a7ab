"""apex_opt.workload.readers: layouts, exact times, faults with lines, and what a name can stand for."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apex_opt import units
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.workload import describe_trace, list_traces, load_trace, make_trace, trace_jsonl
from apex_opt.workload.columns import MAX_ARRIVAL_NS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces"
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(folder: Path, data: str | bytes, name: str = "t.any") -> str:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def rows(spec: str) -> list[tuple[int, int, int]]:
    trace = load_trace(spec)
    return list(zip(trace.arrival_ns.tolist(), trace.prompt.tolist(), trace.output.tolist(), strict=True))


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,9\n"
)
EXPECTED = [(1, 374, 44), (4_314_579_001, 396, 9)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE, [(0, 374, 44), (4_314_579_000, 396, 9)]),
        ("arrival_s,prompt,output\n4.314579001,396,9\n1e-9,374,44\n", EXPECTED),
        ("output,ignored,prompt,arrival_s\n44,x,374,0.000000001\n9,,396,4.314579001\n", EXPECTED),
        ("StartTimeOffset,ContextTokens,GeneratedTokens\n1,374,44\n4314579001,396,9", EXPECTED),
        (
            '{"StartTimeOffset": 1, "ContextTokens": 374, "GeneratedTokens": 44}\n'
            '{"GeneratedTokens": 9, "StartTimeOffset": 4314579001, "ContextTokens": 396}\n',
            EXPECTED,
        ),
        (
            '{"timestamp": 0.000001, "input_length": 374, "output_length": 44, "hash_ids": [0, 1]}\n'
            '{"timestamp": 4314.579001, "input_length": 396, "output_length": 9, "hash_ids": []}',
            EXPECTED,
        ),
        (
            '{"TIMESTAMP": "2024-05-10T00:00:00.000000001+00:00", "ContextTokens": 374, "GeneratedTokens": 44}\n'
            '{"TIMESTAMP": "2024-05-10T02:00:04.314579+02:00", "ContextTokens": 396, "GeneratedTokens": 9}\n',
            [(0, 374, 44), (4_314_578_999, 396, 9)],
        ),
    ],
)
def test_the_columns_decide_how_a_file_is_read(tmp_path: Path, text: str, expected: list[tuple[int, int, int]]) -> None:
    assert rows(write(tmp_path, text)) == expected


def test_the_file_name_does_not_matter(tmp_path: Path) -> None:
    assert rows(write(tmp_path, AZURE, "azure.jsonl")) == [(0, 374, 44), (4_314_579_000, 396, 9)]
    trace = load_trace(write(tmp_path, "arrival_s,prompt,output\n1,2,3\n", "mine.jsonl"))
    assert trace.name == "mine" and trace.source == f"file {tmp_path / 'mine.jsonl'}" and trace.concurrency is None


@pytest.mark.parametrize("text", [AZURE, '{"arrival_s": 0, "prompt": 374, "output": 44}\n'])
def test_byte_order_mark_crlf_and_blank_lines_do_no_harm(tmp_path: Path, text: str) -> None:
    plain = rows(write(tmp_path, text))
    dressed = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n  \r\n\r\n"
    assert rows(write(tmp_path, dressed)) == plain
    assert rows(write(tmp_path, text.rstrip("\n"))) == plain
    assert rows(write(tmp_path, "\n\n" + text.replace("\n", "\n\n"))) == plain


def test_unsorted_files_are_sorted_and_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    text = "arrival_s,prompt,output\n2,1,1\n1,2,1\n2,3,1\n1,4,1\n"
    assert [prompt for _, prompt, _ in rows(write(tmp_path, text))] == [2, 4, 1, 3]


instants = st.tuples(st.datetimes(datetime(1970, 1, 1), datetime(2040, 1, 1)), st.integers(0, 9), st.integers(0, 7))


@in_tmp
@given(st.lists(instants, min_size=1, max_size=8))
def test_azure_times_agree_with_datetime_and_decimal(tmp_path: Path, stamps: list[tuple[datetime, int, int]]) -> None:
    lines, exact = ["TIMESTAMP,ContextTokens,GeneratedTokens"], []
    for moment, seventh, places in stamps:
        decimals = f"{moment.microsecond:06d}{seventh}"[:places]
        text = moment.strftime("%H:%M:%S") + (f".{decimals}" if decimals else "")
        lines.append(f"{moment.date().isoformat()} {text},1,1")
        since = moment.replace(microsecond=0, tzinfo=UTC) - datetime(2000, 1, 1, tzinfo=UTC)
        exact.append(since // timedelta(seconds=1) * 10**9 + int(Decimal(f"0.{decimals or 0}") * 10**9))
    expected = sorted(value - min(exact) for value in exact)
    assert [arrival for arrival, _, _ in rows(write(tmp_path, "\n".join(lines)))] == expected


@in_tmp
@given(st.datetimes(datetime(1975, 1, 1), datetime(2035, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_utc_offsets_agree_with_datetime(tmp_path: Path, moment: datetime, minutes: int) -> None:
    there = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    base = datetime(1970, 1, 1, tzinfo=UTC)
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n1970-01-01 00:00:00Z,1,1\n" + there.isoformat(" ") + ",1,1\n"
    assert rows(write(tmp_path, text))[1][0] == (there - base) // timedelta(microseconds=1) * 1000


@in_tmp
@given(st.decimals(0, 10**9, allow_nan=False, allow_infinity=False, places=9), st.booleans())
def test_decimal_seconds_are_exact_to_the_nanosecond(tmp_path: Path, seconds: Decimal, as_json: bool) -> None:
    text = (
        f'{{"arrival_s": {seconds:f}, "prompt": 1, "output": 1}}'
        if as_json
        else f"arrival_s,prompt,output\n{seconds},1,1"
    )
    assert rows(write(tmp_path, text)) == [(int(seconds * 10**9), 1, 1)]


@in_tmp
@given(
    st.lists(
        st.tuples(st.integers(0, MAX_ARRIVAL_NS), st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=9
    )
)
def test_written_traces_come_back(tmp_path: Path, given_rows: list[tuple[int, int, int]]) -> None:
    arrival, prompt, output = zip(*given_rows, strict=True)
    text = trace_jsonl(make_trace(name="t", arrival_ns=arrival, prompt=prompt, output=output))
    assert rows(write(tmp_path, text)) == sorted(given_rows, key=lambda row: row[0])


def test_a_closed_loop_is_not_written_as_a_list_of_arrivals() -> None:
    with pytest.raises(UsageError, match="closed loop has no arrivals to write"):
        trace_jsonl(describe_trace("closed:concurrency=2,n=3"))


PLAIN = "arrival_s,prompt,output\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; accepted columns: StartTimeOffset"),
        (" \r\n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"\x00\x01\x02", "is a binary file"),
        (PLAIN.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (PLAIN.encode() + b"1,2,3\n1,\xff,3\n", "line 3 is not UTF-8 text"),
        (PLAIN, "columns but no requests"),
        (
            "TIMESTAMP,ContextTokens\n",
            "missing GeneratedTokens; found TIMESTAMP, ContextTokens; accepted columns: Start",
        ),
        ("when,prompt\n0,1\n", r"missing arrival_s, output; .* \| arrival_s \(s\), prompt, output"),
        ("0.5,100,20\n", "missing .*; found 0.5, 100, 20"),
        ("arrival_s/prompt/output\n0/1/1\n", "missing .*; found arrival_s/prompt/output"),
        ("prompt,arrival_s,prompt,output\n", "column 'prompt' appears twice"),
        ("TIMESTAMP,StartTimeOffset,ContextTokens,GeneratedTokens\n", "given twice, as StartTimeOffset and TIMESTAMP"),
        (PLAIN + "0,5\n", "line 2: 2 cells under 3 columns"),
        (PLAIN + "0,5,1,\n", "line 2: 4 cells under 3 columns"),
        (PLAIN + "0,5,0\n", r"line 2: output 0 is outside 1\.\.10,000,000; drop the request or count it as 1"),
        (PLAIN + "0,-5,1\n", "line 2: prompt -5 is outside"),
        (PLAIN + "0,12.5,1\n", "line 2: prompt 12.5 is not a whole number of tokens"),
        (PLAIN + "0,1e3,1\n", "line 2: prompt 1e3 is not a whole number"),
        (PLAIN + "0,1_000,1\n", "line 2: prompt 1_000 is not a whole number"),
        (PLAIN + "0,٣,1\n", "line 2: prompt ٣ is not a whole number"),
        (PLAIN + "0,,1\n", "line 2: prompt '' is not a whole number"),
        (PLAIN + "0,nan,1\n", "line 2: prompt nan is not a whole number"),
        (PLAIN + "0,10000001,1\n", "line 2: prompt 10000001 is outside"),
        (PLAIN + f"0,{'9' * 300},1\n", r"line 2: prompt 9+\.\.\. is outside"),
        (PLAIN + f"0,{'9' * 9000},1\n", r"line 2: prompt 9+\.\.\. is not"),
        (PLAIN + "-1,5,1\n", "line 2: arrival_s -1 is outside"),
        (PLAIN + "-1e-9,5,1\n", "line 2: arrival_s -1e-9 is outside"),
        (PLAIN + "NaN,5,1\n", "line 2: arrival_s NaN is not a finite number"),
        (PLAIN + "inf,5,1\n", "line 2: arrival_s inf is not a finite number"),
        (PLAIN + "1e999,5,1\n", "line 2: arrival_s 1e999 is outside"),
        (PLAIN + "5e9,5,1\n", "line 2: arrival_s 5e9 is outside"),
        (PLAIN + "soon,5,1\n", "line 2: arrival_s soon is not a finite number"),
        (PLAIN + '0,"5,1\n' + "9" * 140_000, "is not CSV"),
        (AZURE + "2023-11-16 18:15,1,1\n", "line 4: TIMESTAMP 2023-11-16 18:15 is not a time like"),
        (AZURE + "2023-02-29 18:15:00,1,1\n", "line 4: TIMESTAMP 2023-02-29 18:15:00 is not a time that exists"),
        (AZURE + "2023-11-16 18:15:00+25:00,1,1\n", "line 4: .* is not a time that exists"),
        (AZURE + "2023-11-16 18:15:00-05:60,1,1\n", "line 4: .* is not a time that exists"),
        (AZURE + "2023-11-16 25:15:00,1,1\n", "line 4: .* is not a time that exists"),
        (AZURE + "2023-11-16 18:15:46.0123456789,1,1\n", "line 4: .* is not a time like"),
        (AZURE + "9999-11-16 18:15:46,1,1\n", "line 4: TIMESTAMP 9999-11-16 18:15:46 is outside .* after the earliest"),
        (AZURE + "NaT,1,1\n", "line 4: TIMESTAMP NaT is not a time like"),
        ('{"arrival_s": 0, "prompt": 5}', "missing output; found arrival_s, prompt; accepted columns"),
        ('{"arrival_s": 0, "prompt": 5, "output": 1}\n{"arrival_s": 0}\n', "line 2: missing prompt, output"),
        ('{"arrival_s": 0, "prompt": 5, "output": 1}\n[1]\n', r"line 2: \[1\] is not a JSON object"),
        ('{"arrival_s": 0, "prompt": 5, "output": 1\n', "line 1: .* is not a JSON object"),
        ('{"arrival_s": NaN, "prompt": 5, "output": 1}', "line 1: arrival_s NaN is not a finite number"),
        ('{"arrival_s": Infinity, "prompt": 5, "output": 1}', "line 1: arrival_s Infinity is not a finite number"),
        ('{"arrival_s": null, "prompt": 5, "output": 1}', "line 1: arrival_s null is not a finite number"),
        ('{"arrival_s": 0, "prompt": true, "output": 1}', "line 1: prompt true is not a whole number"),
        ('{"arrival_s": 0, "prompt": [5], "output": 1}', "line 1: prompt list is not a whole number"),
        ('{"arrival_s": 0, "prompt": 12.5, "output": 1}', "line 1: prompt 12.5 is not a whole number"),
        ('{"arrival_s": 0, "prompt": 5, "output": ' + "9" * 9000 + "}", r"line 1: output 9+\.\.\. is not"),
        ('{"a": ' + "[" * 100_000, r"line 1: .*\.\.\. is not a JSON object"),
        ('{"TIMESTAMP": 5, "ContextTokens": 5, "GeneratedTokens": 1}', "line 1: TIMESTAMP 5 is not a time like"),
        ("{}", "missing .*; found none"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_trace(write(tmp_path, text))
    assert "\n" not in str(caught.value) and "t.any" in str(caught.value)


@pytest.mark.parametrize("target", ["gone", "t.csv"])
def test_a_link_that_leads_nowhere_is_told_as_one(tmp_path: Path, target: str) -> None:
    (tmp_path / "t.csv").symlink_to(target)
    with pytest.raises(InputError, match=rf"t\.csv: a link to {target}, which leads to no file; name the file itself"):
        load_trace(str(tmp_path / "t.csv"))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_all_faults_come_at_once_with_the_first_five_in_order_of_lines(tmp_path: Path, kind: str) -> None:
    bad = [(0, 0, 1), ("x", 1, 1), (0, 1, 1), (-1, 1, 1), (0, 2.5, 0), (0, 1, -1), (0, 1, 0)]
    if kind == "csv":
        text = "arrival_s,prompt,output\n" + "".join(f"{a},{p},{o}\n" for a, p, o in bad)
        lines = [2, 3, 5, 6, 6]
    else:
        text = "".join(json.dumps({"arrival_s": a, "prompt": p, "output": o}) + "\n" for a, p, o in bad)
        lines = [1, 2, 4, 5, 5]
    with pytest.raises(InputError) as caught:
        load_trace(write(tmp_path, text))
    shown = str(caught.value)
    found = [int(part.split(":")[0]) for part in shown.split("line ")[1:]]
    assert found == lines and shown.endswith("and 2 more")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a regular file but a folder; a trace is CSV"):
        load_trace(str(tmp_path))


def test_a_device_is_refused_rather_than_read_for_ever() -> None:
    with pytest.raises(InputError, match="not a regular file"):
        load_trace("/dev/zero")


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, PLAIN)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        load_trace(spec)


@pytest.mark.parametrize("spec", ["nowhere/t.csv", "x" * 5000, "a\0b", "~/no_such_trace_here.csv", "chatt"])
def test_a_missing_file_names_the_shipped_traces(spec: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown trace .*chat, code, creation, summarization") as caught:
        load_trace(spec)
    assert len(str(caught.value)) < 500


def test_a_misspelt_name_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean chat\?"):
        load_trace("chta")


def test_a_misspelt_kind_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown trace description 'possion'; did you mean poisson\?"):
        load_trace("possion:rate=2")


@pytest.mark.parametrize("spec", ["", "  ", None, 5, pytest.param(10**5000, id="huge"), Path("x")])
def test_something_other_than_text_is_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="expected a name, a description or a path"):
        load_trace(spec)


def test_a_description_is_drawn_with_the_seed() -> None:
    spec = "poisson:rate=2,n=50,prompt=exponential(100)"
    assert load_trace(spec, 3).prompt.tolist() == describe_trace(spec, 3).prompt.tolist()
    assert load_trace(spec, 3).prompt.tolist() != load_trace(spec, 4).prompt.tolist()


def test_shipped_names_load_and_are_listed_with_their_titles() -> None:
    listed = dict(list_traces())
    assert set(listed) == {"chat", "code", "creation", "summarization"}
    for name, title in listed.items():
        trace = load_trace(name)
        assert (trace.name, trace.source, len(trace)) == (name, f"file traces/{name}.jsonl", 1000)
        assert title


@pytest.mark.parametrize(
    ("card", "message"), [("title = ", "is not TOML"), ("n = 1", "has no title"), (None, "no such file")]
)
def test_a_damaged_card_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None, message: str
) -> None:
    monkeypatch.setattr(units, "DATA_ROOT", tmp_path)
    (tmp_path / "traces").mkdir()
    write(tmp_path / "traces", PLAIN + "0,1,1\n", "mine.jsonl")
    if card is not None:
        write(tmp_path / "traces", card, "mine.toml")
    assert len(load_trace("mine")) == 1
    with pytest.raises(InputError, match=f"card of trace mine:? {message}"):
        list_traces()


PUBLIC = {
    "azure/AzureLLMInferenceTrace_conv.csv": (19_366, 14_050, 1_000),
    "azure/AzureLLMInferenceTrace_code.csv": (8_819, 7_437, 1_899),
    "mooncake/conversation_trace.jsonl": (12_031, 126_195, 2_000),
    "apex/llama_creation_05.jsonl": (512, 1_232, 3_501),
    "apex/llama_lmsys_05.jsonl": (1_024, 1_037, 761),
    "apex/mistral_creation_05.jsonl": (725, 1_023, 1_716),
    "apex/mistral_lmsys_05.jsonl": (1_024, 1_494, 1_051),
}


def public(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"public trace {name} is not beside the checkout")
    return str(SHARED / name)


@pytest.mark.data
@pytest.mark.parametrize("name", PUBLIC)
def test_public_traces_load_whole(name: str) -> None:
    trace = load_trace(public(name))
    assert (len(trace), int(trace.prompt.max()), int(trace.output.max())) == PUBLIC[name]


@pytest.mark.data
def test_the_public_azure_trace_is_exact_in_every_arrival() -> None:
    spec = public("azure/AzureLLMInferenceTrace_conv.csv")
    stamps = [line.split(",")[0] for line in Path(spec).read_text().splitlines()[1:]]
    exact = []
    for stamp in stamps:
        whole, decimals = stamp.split(".")
        since = datetime.fromisoformat(whole) - datetime(2023, 1, 1)
        exact.append(int((Decimal(since // timedelta(seconds=1)) + Decimal(f"0.{decimals}")) * 10**9))
    first = min(exact)
    assert load_trace(spec).arrival_ns.tolist() == sorted(value - first for value in exact)


def test_what_clients_state_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "stated.csv"
    path.write_text("arrival_s,prompt,output,max_tokens\n1,3,9,5\n0,3,4,\n2,3,4,100\n")
    trace = load_trace(str(path))
    assert trace.max_new_tokens is not None and trace.max_new_tokens.tolist() == [4, 9, 100]
    assert trace.notes == ("1 of 3 requests have more output than their max_tokens, which is taken to be the output",)
    (tmp_path / "again.jsonl").write_text(trace_jsonl(trace))
    again = load_trace(str(tmp_path / "again.jsonl"))
    assert again.max_new_tokens is not None and again.max_new_tokens.tolist() == [4, 9, 100]
    for bad, fault in (("x", "max_tokens x is not a whole number"), ("-1", "max_tokens -1 is outside")):
        path.write_text(f"arrival_s,prompt,output,max_tokens\n1,3,9,{bad}\n")
        with pytest.raises(InputError, match=fault):
            load_trace(str(path))
    path.write_text("arrival_s,prompt,output,max_tokens,max_new_tokens\n1,3,9,9,9\n")
    with pytest.raises(InputError, match="max_tokens or max_new_tokens; keep one"):
        load_trace(str(path))


def test_priorities_are_read_by_name_or_number_and_written(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt,output,Priority\n3,1,1,high\n1,1,1,\n2,1,1,1\n0,1,1,normal\n")
    trace = load_trace(str(path))
    assert trace.priority is not None and trace.priority.tolist() == [0, 0, 1, 1]
    written = tmp_path / "t.jsonl"
    written.write_text(trace_jsonl(trace))
    again = load_trace(str(written))
    assert again.priority is not None and again.priority.tolist() == [0, 0, 1, 1]
    path.write_text("arrival_s,prompt,output,priority\n1,1,1,urgent\n")
    with pytest.raises(InputError, match=r"line 2: priority 'urgent' is none of normal, high \(0, 1\)"):
        load_trace(str(path))


def test_a_file_that_is_not_there_has_the_shipped_traces_told_once() -> None:
    with pytest.raises(UnknownNameError, match="there is no such file") as caught:
        load_trace("zzz/qqq.csv")
    assert [str(caught.value).count(name) for name, _ in list_traces()] == [1] * len(list_traces())
