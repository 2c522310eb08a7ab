"""apex_opt.workload.layouts: files as people have them, recognised whatever their columns' order, case and dress."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apex_opt.errors import ApexError, InputError, UsageError
from apex_opt.workload import Trace, load_trace, trace_jsonl
from apex_opt.workload.layouts import LAYOUTS, layout_of
from apex_opt.workload.layouts.rows import OUTPUTS, PROMPTS, Layout, plain
from apex_opt.workload.steady import at_rate

CASES = Path(__file__).parent / "cases" / "traces"
S = 10**9
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def write(folder: Path, text: str, name: str = "t.any") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(trace: Trace) -> list[tuple[int, int, int]]:
    return list(zip(trace.arrival_ns.tolist(), trace.prompt.tolist(), trace.output.tolist(), strict=True))


# The files of the field.

SPLITWISE = [(0, 374, 44), (4_500_000_000, 396, 109)]


@pytest.mark.parametrize(
    ("name", "rows", "block", "notes"),
    [
        (
            "aiperf-doc-bailian.jsonl",
            [(61_114_000_000, 521, 132), (62_500_000_000, 400, 80)],
            0,
            "1 of 2 requests are lat",
        ),
        (
            "bailian.jsonl",
            [(114_000_000, 48, 132), (61_500_000_000, 66, 32), (120 * S, 12, 20)],
            16,
            "1 of 3 requests are later turns of conversations: they arrive when the file says",
        ),
        ("aiperf-doc-mooncake.jsonl", [(0, 655, 52), (S // 2, 672, 52)], 0, ""),
        (
            "aiperf-session.jsonl",
            [(0, 300, 40), (50_000_000, 120, 60), (S // 2, 250, 20)],
            0,
            "1 of 3 requests wait for the answer before (delay); prompts are as long as the file says",
        ),
        (
            "burstgpt.csv",
            [(5 * S, 472, 18), (45 * S, 1087, 230), (118 * S, 417, 276)],
            0,
            "1 of 4 requests have no answer (0 Response tokens) and are dropped",
        ),
        ("json-array.json", [(0, 100, 10), (S, 200, 10)], 0, ""),
        ("splitwise.csv", SPLITWISE, 0, ""),
        ("llmservingsim.jsonl", [(0, 374, 44), (4_500_000_000, 96, 144)], 0, ""),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_files_of_the_field_are_read_as_their_authors_mean_them(
    tmp_path: Path, name: str, rows: list[tuple[int, int, int]], block: int, notes: str, packed: bool
) -> None:
    path = CASES / name
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((CASES / name).read_bytes()))
    trace = load_trace(str(path))
    assert read(trace) == rows
    assert (trace.content_tokens, trace.concurrency, trace.timed) == (block, None, True)
    told = [note for note in trace.notes if "shorter than the prompt" not in note]
    assert len(told) == bool(notes) and all(note.startswith(notes) for note in told)
    assert trace.name == name.partition(".")[0]


def test_bailian_turns_share_the_pieces_before() -> None:
    trace = load_trace(str(CASES / "bailian.jsonl"))
    assert trace.content is not None and trace.content.tolist() == [1089, 1090, 1091, 1089, 1090, 1091, 6327, 13148, 7]


def test_mooncake_ids_of_another_size_serve_once_it_is_given() -> None:
    path = str(CASES / "aiperf-doc-mooncake.jsonl")
    assert "line 1: hash_ids are 3 for a prompt of 655 tokens, at 512 an id 2 are due" in load_trace(path).content_fault
    trace = load_trace(path, block=256)
    assert trace.content is not None and (trace.content.tolist(), trace.content_fault) == ([0, 1, 2, 0, 1, 2], "")


def test_lengths_alone_have_no_arrivals_until_a_rate_is_given() -> None:
    trace = load_trace(str(CASES / "vidur-len.csv"))
    assert not trace.timed and read(trace) == [(0, 3018, 150), (0, 1000, 33)]
    with pytest.raises(UsageError, match="has no arrival times to stretch"):
        trace.stretched(2)
    with pytest.raises(UsageError, match="has lengths alone and no arrivals to write"):
        trace_jsonl(trace)
    assert not trace.head(1).timed
    fast = at_rate(trace, 4.0, 1000)
    assert fast.timed and fast.prompt.tolist() == [3018, 1000] * 1000
    assert fast.rate_per_s == pytest.approx(4) and fast.burstiness == pytest.approx(1, rel=0.1)


def test_conversations_take_a_tokenizer_unless_they_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="conversations as text, which take a tokenizer to count; give the counts"):
        load_trace(str(CASES / "sharegpt.json"))
    talk = [{"from": "system", "value": "x", "tokens": 9}, {"from": "human", "value": "Hi", "tokens": 12}]
    talk += [{"from": "gpt", "value": "Hello", "tokens": 7}, {"from": "human", "value": "?", "tokens": 2}]
    trace = load_trace(
        write(tmp_path, json.dumps([{"id": "a", "conversations": talk}, {"id": "b", "conversations": []}]))
    )
    assert read(trace) == [(0, 12, 7)] and not trace.timed
    assert "1 of 2 conversations have no question with an answer after it" in trace.notes[-1]
    rows = [{"conversations": [{"from": "human", "value": "Hi"}], "prompt_tokens": 4, "completion_tokens": 5}]
    assert read(load_trace(write(tmp_path, json.dumps(rows)))) == [(0, 4, 5)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why is the sky blue?", "output": "Scattering."},
        {"instruction": "Say it", "input": "", "output": "It."},
        {"timestamp": 0, "text_input": "Hello", "output_length": 50},
        {"prompt": "为什么", "output_length": 5},
    ],
)
def test_texts_take_a_tokenizer_too(tmp_path: Path, row: dict[str, Any]) -> None:
    for text in (lines([row]), json.dumps([row])):
        with pytest.raises(
            InputError, match=r"t\.any: texts, which take a tokenizer to count; give the counts instead"
        ):
            load_trace(write(tmp_path, text))


def test_turns_are_counted_by_the_chain_of_their_parents_and_none_without_a_name(tmp_path: Path) -> None:
    chats = [(5, -1, 1), (6, 5, 2), (7, 6, 3), (8, -1, 1), (9, 8, 2)]
    rows = [
        {"chat_id": chat, "parent_chat_id": parent, "turn": turn, "timestamp": 1, "input_length": 5, "output_length": 2}
        for chat, parent, turn in chats
    ]
    assert load_trace(write(tmp_path, lines(rows))).notes[0].startswith("3 of 5 requests are later turns")
    text = "Timestamp,Session ID,Request tokens,Response tokens\n1,a,1,1\n2,,1,1\n3,,1,1\n4,b,1,1\n5,,1,1\n"
    assert load_trace(write(tmp_path, text)).notes == ()
    assert load_trace(write(tmp_path, text + "6,a,1,1\n")).notes[0].startswith("1 of 6 requests are later turns")


# Results of benchmarks.


def test_a_run_of_vllm_bench_is_its_lengths_at_its_rate(tmp_path: Path) -> None:
    run = json.loads((CASES / "vllm-bench.json").read_text())
    run |= {"input_lens": [100 + i % 7 for i in range(2000)], "output_lens": [i % 5 for i in range(2000)]}
    trace = load_trace(write(tmp_path, json.dumps(run)))
    assert len(trace) == 1600 and sorted(set(trace.output.tolist())) == [1, 2, 3, 4]
    assert "400 of 2,000 requests have no answer (0 output tokens) and are dropped" in trace.notes
    assert any("drawn as a Poisson process of its 2 requests/s" in note for note in trace.notes)
    assert trace.rate_per_s == pytest.approx(2, rel=0.1) and trace.arrivals.kind == "poisson"
    bursty = load_trace(write(tmp_path, json.dumps(run | {"burstiness": 0.25})))
    assert bursty.burstiness == pytest.approx(2, rel=0.2) and bursty.arrivals.cv == 2


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("changes", "concurrency", "arrivals"),
    [
        ({"request_rate": "inf", "max_concurrency": 8}, 8, [0, 0]),
        ({"request_rate": "inf"}, None, [0, 0]),
        ({"start_times": [1000.5, 1002.0]}, None, [0, 1_500_000_000]),
        ({"start_times": [1000.5, 1002.0], "request_rate": "inf"}, None, [0, 1_500_000_000]),
        ({"start_times": [1000.5, 1002.0], "request_rate": "inf", "max_concurrency": 8}, 8, [0, 0]),
    ],
)
def test_how_a_run_of_vllm_bench_was_sent_is_kept(
    tmp_path: Path, indent: int | None, changes: dict[str, Any], concurrency: int | None, arrivals: list[int]
) -> None:
    run = json.loads((CASES / "vllm-bench.json").read_text()) | changes
    trace = load_trace(write(tmp_path, json.dumps(run, indent=indent)))
    assert (trace.concurrency, trace.arrival_ns.tolist(), trace.timed) == (concurrency, arrivals, True)
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([1024] * 2, [128] * 2)


def test_a_run_of_vllm_bench_without_details_is_its_means(tmp_path: Path) -> None:
    run = json.loads((CASES / "vllm-bench.json").read_text())
    run = {name: value for name, value in run.items() if name not in ("input_lens", "output_lens", "ttfts", "itls")}
    trace = load_trace(write(tmp_path, json.dumps(run)))
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([1024] * 2, [128] * 2)
    assert trace.notes[0].startswith(
        "the file has mean lengths only: every request has 1,024 prompt and 128 output tok"
    )


def test_a_summary_of_genai_perf_is_a_closed_loop_of_its_means(tmp_path: Path) -> None:
    run = json.loads((CASES / "genai-perf.json").read_text())
    trace = load_trace(str(CASES / "genai-perf.json"))
    assert (trace.concurrency, len(trace), set(trace.prompt.tolist()), set(trace.output.tolist())) == (
        1,
        100,
        {1024},
        {128},
    )
    assert trace.notes[1] == "the file does not say how many requests there were: 100 are assumed"
    nested = run | {
        "input_config": {"loadgen": {"concurrency": 32}},
        "request_count": {"unit": "requests", "avg": 640.0},
    }
    trace = load_trace(write(tmp_path, json.dumps(nested)))
    assert (trace.concurrency, len(trace), len(trace.notes)) == (32, 640, 1)
    trace = load_trace(write(tmp_path, json.dumps(run | {"input_config": {"loadgen": {"request_rate": 4.0}}})))
    assert trace.concurrency is None and trace.arrivals.kind == "poisson"
    assert not load_trace(write(tmp_path, json.dumps(run | {"input_config": {}}))).timed


def guidellm(strategy: dict[str, Any], requests: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "benchmarks": [{"args": {"strategy": strategy}, "requests": requests}]}


def test_a_report_of_guidellm_is_its_answered_requests(tmp_path: Path) -> None:
    answered = [{"prompt_tokens": 10 + i, "output_tokens": 5, "start_time": 1_750_000_000.25 + 2 * i} for i in range(3)]
    requests = {"successful": answered, "errored": [{}], "incomplete": [{}, {}]}
    trace = load_trace(write(tmp_path, json.dumps(guidellm({"type_": "constant", "rate": 0.5}, requests))))
    assert read(trace) == [(0, 10, 5), (2 * S, 11, 5), (4 * S, 12, 5)]
    assert trace.notes == ("3 requests that failed or were not answered in time are dropped",)
    closed = load_trace(write(tmp_path, json.dumps(guidellm({"type_": "concurrent", "streams": 2}, requests))))
    assert closed.concurrency == 2
    newer = [{"input_metrics": {"text_tokens": 7}, "output_metrics": {"text_tokens": 3}, "request_start_time": 5.0}]
    assert read(load_trace(write(tmp_path, json.dumps(guidellm({}, {"successful": newer}))))) == [(0, 7, 3)]
    several = guidellm({}, requests)
    several["benchmarks"] *= 2
    with pytest.raises(InputError, match=r"a report of 2 benchmarks; keep one, such as with jq"):
        load_trace(write(tmp_path, json.dumps(several)))


def record(at: int, tokens: int | None, **more: Any) -> dict[str, Any]:
    metrics = {"input_sequence_length": {"value": 550, "unit": "tokens"}}
    if tokens is not None:
        metrics["output_sequence_length"] = {"value": tokens, "unit": "tokens"}
    metadata = {"request_start_ns": 1_759_813_207_000_000_000 + at, "benchmark_phase": "profiling", "turn_index": 0}
    return {"metadata": metadata | more, "metrics": metrics, "error": None}


def test_records_of_aiperf_are_requests_from_the_earliest(tmp_path: Path) -> None:
    failed = record(1, None) | {"error": {"code": 499}}
    text = lines([record(7, 9), record(2, 8), failed, record(0, 9, benchmark_phase="warmup")])
    trace = load_trace(write(tmp_path, text))
    assert read(trace) == [(0, 550, 8), (5, 550, 9)]
    assert any(note.startswith("2 of 4 records are of failed, cancelled or warm-up requests") for note in trace.notes)


def test_sessions_of_llmservingsim_are_calls_after_their_tools(tmp_path: Path) -> None:
    calls = [
        {"input_toks": 10, "output_toks": 2, "tool_duration_ns": 7},
        {"input_toks": 20, "output_toks": 3, "tool_duration_ns": 0},
    ]
    rows = [
        {"session_id": "a", "arrival_time_ns": 100, "sub_requests": calls},
        {"session_id": "b", "arrival_time_ns": 50, "sub_requests": calls[1:]},
    ]
    trace = load_trace(write(tmp_path, lines(rows)))
    assert read(trace) == [(50, 20, 3), (100, 10, 2), (107, 20, 3)]
    assert trace.session is not None
    first, *others = trace.session.tolist()
    assert others == [others[0]] * 2 and first != others[0]
    assert trace.notes[0].startswith("1 of 3 requests wait for the answer before")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"benchmarks": []}, "a report of 0 benchmarks"),
        ({"benchmarks": [{"requests": {}}]}, "a report of GuideLLM without its answered requests"),
        ({"input_lens": [1, 2], "output_lens": [1]}, "2 input_lens and 1 output_lens"),
        ({"input_lens": [1, "x"], "output_lens": [1, 2]}, "request 2: prompt tokens x is not a whole number"),
        ({"input_lens": [1, -5], "output_lens": [1, 2]}, "request 2: prompt tokens -5 is outside"),
        ({"input_lens": [1, 5], "output_lens": [0, 0]}, "no request has an answer"),
        ({"input_lens": [], "output_lens": []}, "no request has an answer"),
        ({"completed": 0, "total_input_tokens": 0}, "completed is 0: no request was answered"),
        ({"input_lens": "x", "output_lens": [1]}, "input_lens is 'x'; it has to be a list"),
        ({"completed": 3, "total_input_tokens": 0}, "without input_lens and output_lens, nor completed"),
        (
            {"completed": 10**9, "total_input_tokens": 10**9, "total_output_tokens": 10**9},
            "1,000,000,000 requests, at most",
        ),
        ({"input_sequence_length": {}, "output_sequence_length": {}}, "without the mean lengths"),
        ({"experiments": []}, "take a tokenizer to count; give profile_export_genai_perf.json"),
        ({"input_lens": [1], "output_lens": [1], "request_rate": 1e-12}, "the last of 1 comes after 73 years"),
    ],
)
def test_results_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, document: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_trace(write(tmp_path, json.dumps(document)))
    assert "\n" not in str(caught.value)


def test_results_of_several_runs_are_refused(tmp_path: Path) -> None:
    run = {"input_lens": [5], "output_lens": [1]}
    for text in (lines([run, run]), json.dumps([run, run])):
        with pytest.raises(InputError, match="results of several runs, one after the other; keep one"):
            load_trace(write(tmp_path, text))


# Units.


@pytest.mark.parametrize(
    "text", ["timestamp,prompt_tokens,completion_tokens\n3,10,5\n", '{"t": 3, "isl": 10, "osl": 5}']
)
def test_a_unit_that_nothing_tells_is_asked_for(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(
        UsageError, match=r"nothing tells the unit of column t\w* \(3\); give it as --trace_unit=s\|ms\|us\|ns"
    ):
        load_trace(path)
    for unit, scale in (("s", S), ("ms", 10**6), ("us", 1000), ("ns", 1)):
        assert read(load_trace(path, unit=unit)) == [(3 * scale, 10, 5)]


def test_a_unit_against_the_layout_is_taken_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, '{"timestamp": 3, "input_length": 10, "output_length": 5}')
    assert read(load_trace(path)) == [(3_000_000, 10, 5)] and load_trace(path, unit="ms").notes == ()
    trace = load_trace(path, unit="s")
    assert read(trace) == [(3 * S, 10, 5)]
    assert trace.notes == ("arrivals are taken in s as --trace_unit says; the Mooncake layout has ms",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt,output\n1,2,3\n", "column arrival_s of .* is in s by its name, not in ms"),
        ("arrival_time_ns,input_toks,output_toks\n1,2,3\n", "is in ns by its name, not in ms"),
        ("time_us,isl,osl\n1,2,3\n", "is in us by its name, not in ms"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,2,3\n", "has dates and times; leave it out"),
        ("timestamp,isl,osl\n2023-11-16T18:15:46Z,2,3\n", "has dates and times; leave it out"),
        ("prompt,output\n2,3\n", "has no column of arrivals; leave it out$"),
        (
            "time_stamp,prompt_tokens,completion_tokens\n1,2,3\n",
            r"leave it out, or call the column that has them timestamp \(not read: time_stamp\)$",
        ),
        ('{"input_lens": [2], "output_lens": [3]}', "is the result of a benchmark, which tells its units"),
    ],
)
def test_a_unit_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--trace_unit: .*{message}"):
        load_trace(write(tmp_path, text), unit="ms")


def test_columns_that_may_be_arrivals_and_are_not_read_are_named(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "time_stamp,prompt_tokens,completion_tokens\n1,2,3\n"))
    assert (trace.timed, trace.unread) == (False, ("time_stamp",))
    assert trace.notes == ("no column is known to tell arrivals; not read: time_stamp",)
    assert load_trace(write(tmp_path, "model,prompt_tokens,completion_tokens\na,2,3\n")).notes == ()


@pytest.mark.parametrize("spec", ["chat", "static:n=2"])
def test_what_is_for_files_is_refused_elsewhere(spec: str) -> None:
    with pytest.raises(UsageError, match="--trace_unit: is for trace files, and '"):
        load_trace(spec, unit="s")
    with pytest.raises(UsageError, match="--trace_block: is for trace files, and '"):
        load_trace(spec, block=16)


@pytest.mark.parametrize("name", ["splitwise.csv", "vllm-bench.json"])
def test_the_tokens_of_a_hash_id_are_refused_where_there_are_none(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"--trace_block: .* has no hash_ids that it could be the size of; leave it out"
    ):
        load_trace(str(CASES / name), block=16)


def test_dates_and_ages_count_from_the_earliest_row(tmp_path: Path) -> None:
    text = "timestamp,isl,osl\n2023-11-16T18:15:47.5Z,2,3\n2023-11-16 20:15:46+0200,1,1\n"
    assert read(load_trace(write(tmp_path, text))) == [(0, 1, 1), (1_500_000_000, 2, 3)]
    text = "Timestamp,Request tokens,Response tokens\n1700000002.25,2,3\n1700000000,1,1\n"
    trace = load_trace(write(tmp_path, text))
    assert read(trace) == [(0, 1, 1), (2_250_000_000, 2, 3)]
    assert trace.notes == ("arrivals count from the earliest, which is 1,700,000,000 s after 0",)


# Whatever the dress.

COLUMNED = [layout for layout in LAYOUTS if layout.name != "AIPerf records"]


@st.composite
def dressed(draw: st.DrawFn) -> tuple[Layout, list[tuple[int, int, int]], str, str]:
    """A layout, rows in its unit, and a file of them: columns in any order and case, with others between."""
    layout = draw(st.sampled_from(COLUMNED))
    rows = draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1))
    marks = draw(st.sampled_from([(mark,) for mark in layout.marks] or [()]))
    names = [
        *layout.columns,
        *marks,
        *draw(st.lists(st.sampled_from(("model", "Log Type", "remark", "id")), unique=True)),
    ]
    names = draw(st.permutations(names))
    cells = {
        layout.arrival: lambda row: f"2023-01-01 00:00:00.{row[0]:09d}" if layout.unit == "date" else row[0],
        layout.prompt: lambda row: row[1],
        layout.output: lambda row: row[2],
    }
    case = draw(st.sampled_from((str, str.lower, str.upper)))
    table = [{case(name): cells.get(name, lambda _: 7)(row) for name in names} for row in rows]
    kind = draw(st.sampled_from(("csv", "tsv", "semicolons", "lines", "list", "indented", "wrapped", "objects")))
    if kind in ("csv", "tsv", "semicolons"):
        mark = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        text = "".join(
            mark.join(str(cell) for cell in cells) + "\n" for cells in [list(table[0]), *(r.values() for r in table)]
        )
    elif kind == "lines":
        text = lines(table)
    elif kind == "objects":
        text = "\n".join(json.dumps(row, indent=1) for row in table)
    else:
        text = json.dumps({"requests": table} if kind == "wrapped" else table, indent=1 if kind == "indented" else None)
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    return layout, rows, text, draw(st.sampled_from(("", "\ufeff")))


@in_tmp
@given(dressed())
def test_a_layout_is_recognised_whatever_its_dress(
    tmp_path: Path, file: tuple[Layout, list[tuple[int, int, int]], str, str]
) -> None:
    layout, rows, text, mark = file
    scale = {"s": S, "ms": 10**6, "ns": 1, "date": 1}[layout.unit]
    first = min(row[0] for row in rows) if layout.unit == "date" else 0
    expected = sorted((((a - first) * scale, p, o) for a, p, o in rows), key=lambda row: row[0])
    assert read(load_trace(write(tmp_path, mark + text))) == expected


@in_tmp
@given(
    st.sampled_from(sorted(PROMPTS)),
    st.sampled_from(sorted(OUTPUTS)),
    st.sampled_from(("", "timestamp_ms", "Timestamp (ms)", "arrival_time_ms", "start_ms")),
)
def test_usual_names_tell_what_columns_are(tmp_path: Path, prompt: str, output: str, arrival: str) -> None:
    names = [name for name in (arrival, prompt, output) if name]
    trace = load_trace(write(tmp_path, json.dumps(dict(zip(names, [5, 6, 7][3 - len(names) :], strict=True)))))
    assert read(trace) == [(5_000_000 if arrival else 0, 6, 7)] and trace.timed == bool(arrival)


def test_every_layout_is_told_from_the_others_by_its_columns() -> None:
    for layout in LAYOUTS:
        found, called = layout_of("t", (*layout.columns, *layout.marks[:1]))
        assert found is layout and called[plain(layout.prompt)] == layout.prompt
    assert not {plain(layout.prompt) for layout in LAYOUTS} & OUTPUTS
    assert not PROMPTS & OUTPUTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timestamp,prompt,input_length,output\n1,2,3,4\n", "prompts may be in prompt or input_length; keep one"),
        ("timestamp,start_time,isl,osl\n1,2,3,4\n", "arrivals may be in timestamp or start_time; keep one"),
        ('[{"arrival_s": 0, "prompt": 1, "output": 1}, 5]', "item 2: 5 is not a JSON object"),
        ('[{"arrival_s": 0, "prompt": 1, "output": 1}, {"prompt": 1}]', "item 2: missing arrival_s, output"),
        ('[{"arrival_s": 0, "prompt": 1, "output": 1}', "the JSON list ends early, or lacks a comma, after item 1"),
        ('[{"arrival_s": 0, "prompt": 1, "output": 1}] x', "there is more after the end of the JSON list"),
        ("[" * 100_000, "item 1 of the JSON list is not JSON"),
        ("[]", "no objects in it; add at least one request"),
        ("[1, 2]", "item 1: 1 is not a JSON object"),
        ('[{"a": ]', "item 1 of the JSON list is not JSON"),
        ("arrival_s,prompt,output,max_new_tokens\n0,5,5,0\n", "line 2: max_new_tokens 0 is outside 1..10,000,000"),
        ("arrival_s,prompt,output,image_tokens\n0,5,5,-50\n", "line 2: image_tokens -50 is outside 0..10,000,000"),
        (
            "arrival_s,prompt,output,session,delay_ms\n0,5,5,a,\n,5,5,a,-3\n",
            "line 3: delay_ms -3 is outside 0..2,305,843,009,213 ms",
        ),
        ("num_prefill_tokens,num_decode_tokens\n5,-1\n", "line 2: num_decode_tokens -1 is outside"),
        ("num_prefill_tokens,num_decode_tokens\n,5\n", "line 2: num_prefill_tokens '' is not a whole number"),
        ("num_prefill_tokens,num_decode_tokens\n0,5\n", "line 2: num_prefill_tokens 0 is outside"),
        ("Timestamp,Request tokens,Response tokens\n-5,1,1\n", "line 2: Timestamp -5 is outside"),
        ("Timestamp,Request tokens,Response tokens\n5,1,0\n", "no request has an answer"),
        ('{"timestamp": null, "input_length": 1, "output_length": 1}', "line 1: timestamp null is not a finite number"),
        (
            '{"session_id": 1, "timestamp": 5, "input_length": 1, "output_length": 1}\n'
            '{"session_id": 2, "delay": 5, "input_length": 1, "output_length": 1}',
            "line 2: missing timestamp of the first",
        ),
        (
            '{"session_id": 1, "timestamp": 5, "input_length": 1, "output_length": 1}\n'
            '{"session_id": 1, "delay": -5, "input_length": 1, "output_length": 1}',
            "line 2: delay -5 is outside",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ApexError, match=message) as caught:
        load_trace(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_columns_that_read_alike_are_refused_where_they_matter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="columns prompt and Prompt read alike; keep one"):
        load_trace(write(tmp_path, "arrival_s,prompt,Prompt,output\n0,1,1,1\n"))
    assert read(load_trace(write(tmp_path, "arrival_s,prompt,output,x,X,,\n0,1,2,1,1,,\n"))) == [(0, 1, 2)]


def test_logged_answers_with_their_usage_are_rows(tmp_path: Path) -> None:
    entry = {
        "created_at": "2025-03-01T00:00:00Z",
        "messages": [],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6},
    }
    assert read(load_trace(write(tmp_path, lines([entry])))) == [(0, 5, 6)]


def test_sessions_that_do_not_say_when_they_begin_are_lengths_alone(tmp_path: Path) -> None:
    rows = [{"session_id": "a", "input_length": 5, "output_length": 2, "delay": wait} for wait in (None, 7)]
    for text in (lines(rows), lines([row | {"timestamp": None} for row in rows])):
        trace = load_trace(write(tmp_path, text))
        assert not trace.timed and trace.prompt.tolist() == [5, 5]
        assert "waits after the answer before (delay) are left out of account" in trace.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",".join(f"c{i}" for i in range(2000)) + "\n", "2,000 columns, at most 1,000 are read"),
        ('{"a": [' + "{}," * 8_100_000, "more than 8,000,000 values in the first line; give an object a line"),
        ("[[" + "{}," * 8_100_000, "item 1 of the JSON list is not JSON"),
        (
            '{"t_s": 1, "isl": 1, "osl": 1}\n{"a": [' + "{}," * 2_100_000,
            "line 2: more than 2,000,000 values in one line",
        ),
    ],
    ids=["columns", "object", "list", "line"],
)
def test_files_made_to_exhaust_are_refused_before_they_are_taken_apart(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_trace(write(tmp_path, text))


def test_whole_numbers_may_be_written_as_decimals_and_as_text(tmp_path: Path) -> None:
    text = '{"timestamp": "5.5", "input_length": "12.0", "output_length": 7.00}'
    assert read(load_trace(write(tmp_path, text))) == [(5_500_000, 12, 7)]


# Files that are none.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.parquet", "a Parquet table; write it as CSV"),
        ("t.jsonl.gz.gz", "packed twice; unpack it once"),
        ("t.CSV.ZIP", "a zip archive; unpack it and name the file in it"),
        ("t.tar.gz", "an archive of files; unpack it and name one"),
        ("t.jsonl.zst", "packed by zstd; unpack it, or pack it with gzip"),
        ("t.xlsx", "a spreadsheet; save it as CSV"),
    ],
)
def test_packed_files_are_refused_with_the_way_out(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_trace(write(tmp_path, "x", name))


def test_a_bomb_and_a_file_packed_twice_are_refused(tmp_path: Path) -> None:
    bomb, twice = tmp_path / "bomb.csv.gz", tmp_path / "twice.csv.gz"
    bomb.write_bytes(gzip.compress(b"arrival_s,prompt,output\n" + b"0,1,1\n" * 1_000_000))
    with pytest.raises(InputError, match="unpacks to more than 200 times"):
        load_trace(str(bomb))
    twice.write_bytes(gzip.compress(gzip.compress(b"arrival_s,prompt,output\n0,1,1\n")))
    with pytest.raises(InputError, match="a trace is CSV or JSON in UTF-8"):
        load_trace(str(twice))


def test_long_files_are_read_a_part_at_a_time(tmp_path: Path) -> None:
    rows = [(index, index % 50 + 1, index % 9) for index in range(20_000)]
    text = "Timestamp,Request tokens,Response tokens\n" + "".join(f"{a},{p},{o}\n" for a, p, o in rows)
    trace = load_trace(write(tmp_path, text))
    assert read(trace) == [(a * S, p, o) for a, p, o in rows if o]
    hashed = lines([{"timestamp": a, "input_length": p, "output_length": 1, "hash_ids": [a]} for a, p, _ in rows])
    trace = load_trace(write(tmp_path, hashed))
    assert trace.content is not None and trace.content.tolist() == [a for a, _, _ in rows]


@pytest.mark.parametrize("column", ["session", "session_id", "conversation"])
def test_conversations_are_told_without_waits_too(column: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.csv"
    path.write_text(f"arrival_s,prompt,output,{column}\n0,5,2,a\n1,5,2,b\n2,9,2,a\n3,9,2,\n")
    trace = load_trace(str(path))
    assert trace.session is not None and trace.delay_ns is None
    first, second, again, alone = trace.session.tolist()
    assert first == again and len({first, second, alone}) == 3
    assert any("1 of 4 requests are later turns" in note for note in trace.notes)


def test_turns_with_less_in_their_prompts_than_was_said_before_are_told(tmp_path: Path) -> None:
    rows = "arrival_s,prompt,output,session\n0,5,2,a\n1,50,2,b\n2,{},2,a\n3,9,2,a\n4,4,2,\n"
    assert not any(
        "shorter" in note for note in load_trace(write(tmp_path, rows.format(7).replace("3,9", "3,90"))).notes
    )
    told = [note for note in load_trace(write(tmp_path, rows.format(6))).notes if "shorter" in note]
    assert len(told) == 1 and told[0].startswith(
        "1 of 2 later turns have prompts shorter than the prompt and the answer"
    )


def test_waits_of_requests_that_have_an_arrival_are_told_to_be_left_out(tmp_path: Path) -> None:
    text = "arrival_s,prompt,output,session,delay_ms\n0,10,5,a,\n1,20,5,a,100\n2,20,5,a,0\n"
    notes = load_trace(write(tmp_path, text)).notes
    assert "1 of 3 have an arrival and a delay_ms; they come at the arrival, and the wait is left out" in notes
    assert not any("delay_ms" in note for note in load_trace(write(tmp_path, text.replace("100", ""))).notes)
