"""apex_opt.workload.trace: order, range checks, statistics and derived traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import InputError, UsageError
from apex_opt.workload import Trace, make_trace
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_TOKENS
from apex_opt.workload.steady import at_rate


def trace(**changes: Any) -> Trace:
    columns: dict[str, Any] = {"name": "t", "arrival_ns": [0, 10, 40], "prompt": [5, 6, 7], "output": [1, 2, 3]}
    return make_trace(**(columns | changes))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=60))
def test_sorting_is_by_arrival_and_stable(rows: list[tuple[int, int]]) -> None:
    n = len(rows)
    made = make_trace(name="t", arrival_ns=[a for a, _ in rows], prompt=list(range(1, n + 1)), output=[1] * n)
    expected = sorted(range(n), key=lambda row: rows[row][0])
    assert made.prompt.tolist() == [row + 1 for row in expected]
    assert made.arrival_ns.tolist() == sorted(a for a, _ in rows)


def test_sorting_keeps_a_request_together() -> None:
    made = trace(arrival_ns=[40, 0, 10])
    assert (made.arrival_ns.tolist(), made.prompt.tolist(), made.output.tolist()) == ([0, 10, 40], [6, 7, 5], [2, 3, 1])


def test_arrays_are_copies_int64_contiguous_and_read_only() -> None:
    source = np.arange(1, 7, dtype=np.int32)[::2]
    made = trace(prompt=source)
    source[0] = 99
    assert made.prompt.tolist() == [1, 3, 5]
    for column in (made.arrival_ns, made.prompt, made.output):
        assert column.dtype == np.int64 and column.flags.c_contiguous and not column.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        made.prompt[0] = 3


def test_what_clients_state_goes_with_its_request_and_is_the_output_where_they_do_not() -> None:
    made = trace(arrival_ns=[40, 0, 10], max_new_tokens=[4, 5, 6])
    assert made.max_new_tokens is not None and made.max_new_tokens.tolist() == [5, 6, 4]
    assert made.stated(11).tolist() == [5, 4, 4]  # prompts of 6, 7 and 5 tokens
    assert trace().stated(99).tolist() == [1, 2, 3]
    for other, expected in (
        (made.head(2), [5, 6]),
        (made.picked(np.array([0, 2])), [5, 4]),
        (made.stretched(2), [5, 6, 4]),
    ):
        assert other.max_new_tokens is not None and other.max_new_tokens.tolist() == expected


@pytest.mark.parametrize(
    ("stated", "fault"),
    [
        ([1, 1, 3], "row 2: output 2 is above max_new_tokens 1; a request ends there"),
        ([1, 2, MAX_TOKENS + 1], "row 3: max_new_tokens 10000001 is outside"),
        ([1, 2], "columns differ in length .*2 max_new_tokens"),
        ([1, 2, 3.5], "row 3: max_new_tokens 3.5 is not a whole number"),
    ],
)
def test_what_clients_cannot_state_is_refused_with_its_row(stated: list[Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        trace(max_new_tokens=stated)


def test_extremes_are_accepted() -> None:
    made = trace(arrival_ns=[0, 1, MAX_ARRIVAL_NS], prompt=[1, 1, MAX_TOKENS], output=[1, 1, MAX_TOKENS])
    assert made.longest == 2 * MAX_TOKENS
    assert made.duration_s == pytest.approx(MAX_ARRIVAL_NS / 1e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_ns": [0, -1, 4]}, r"row 2: arrival_ns -1 is outside 0\.\."),
        ({"arrival_ns": [0, 1, MAX_ARRIVAL_NS + 1]}, f"row 3: arrival_ns {MAX_ARRIVAL_NS + 1} is outside"),
        ({"arrival_ns": [0, 1, 2**64]}, "row 3: arrival_ns 18446744073709551616 is not a whole number below"),
        ({"arrival_ns": np.array([0, 1, 2**63], dtype=np.uint64)}, "row 3: arrival_ns 9223372036854775808 is not"),
        ({"arrival_ns": [0, 1, float("nan")]}, "row 3: arrival_ns nan is not a whole number"),
        ({"arrival_ns": np.array([0.0, 1.5, 2.0])}, "row 1: arrival_ns 0.0 is not .*row 2: arrival_ns 1.5"),
        ({"prompt": [5, 0, 7]}, "row 2: prompt 0 is outside 1..10,000,000; drop the request"),
        ({"prompt": [5, MAX_TOKENS + 1, 7]}, "row 2: prompt 10000001 is outside"),
        ({"prompt": [5, 10**5000, 7]}, "row 2: prompt an int of thousands of digits is not"),
        ({"prompt": [5, True, 7]}, "row 2: prompt True is not"),
        ({"prompt": np.array([True, True, True])}, "row 1: prompt True is not"),
        ({"prompt": [5, "6", 7]}, "row 2: prompt '6' is not"),
        ({"prompt": "567"}, "must be a list of whole numbers"),
        ({"prompt": None}, "must be a list of whole numbers"),
        ({"prompt": np.ones((3, 1), dtype=np.int64)}, "prompt must have one dimension, got 2"),
        ({"output": [1, 2, 0]}, "row 3: output 0 is outside"),
        ({"output": [1, 2]}, r"columns differ in length \(3 arrival_ns, 3 prompt, 2 output\)"),
        ({"arrival_ns": [], "prompt": [], "output": []}, "0 requests; give 1 to 5,000,000"),
        ({"concurrency": 0}, "concurrency must be a whole number from 1"),
        ({"concurrency": True}, "concurrency must be a whole number from 1"),
        ({"concurrency": 2.0}, "concurrency must be a whole number from 1"),
        ({"concurrency": 10**5000}, "concurrency must be a whole number from 1"),
        ({"name": ""}, "needs a name"),
    ],
)
def test_bad_columns_are_refused_with_their_row(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(**changes)


def test_all_faults_are_reported_at_once_in_order_of_rows() -> None:
    with pytest.raises(InputError) as caught:
        make_trace(name="t", arrival_ns=[-1] * 4, prompt=[0, 1, 1, 0], output=[1] * 4)
    text = str(caught.value)
    assert text.index("row 1: arrival_ns") < text.index("row 1: prompt") < text.index("row 2") < text.index("row 4")
    assert text.endswith("and 1 more")


def test_a_trace_made_by_hand_checks_itself() -> None:
    good = trace()
    backwards = good.arrival_ns[::-1].copy()
    backwards.flags.writeable = False
    writable = good.prompt.copy()
    for changes, message in (
        ({"arrival_ns": backwards}, "row 2 arrives before row 1; use make_trace"),
        ({"prompt": writable}, "prompt must be contiguous and read-only"),
        ({"output": good.output.astype(np.int32)}, "output must be a one-dimensional int64 array"),
        ({"output": [1, 2, 3]}, "output must be a one-dimensional int64 array"),
        ({"concurrency": 2}, "a closed loop has arrival times of 0"),
    ):
        with pytest.raises(InputError, match=message):
            replace(good, **changes)


def test_closed_loop_keeps_order_and_zeroes_arrivals() -> None:
    made = trace(arrival_ns=[40, 0, 10], concurrency=2)
    assert made.arrival_ns.tolist() == [0, 0, 0]
    assert made.prompt.tolist() == [5, 6, 7]
    assert made.rate_per_s is None and made.burstiness is None and made.duration_s == 0


def test_statistics_by_hand() -> None:
    made = make_trace(
        name="t", arrival_ns=[10**9, 2 * 10**9, 5 * 10**9], prompt=[10, 20, 60], output=[1, 2, 3], source="by hand"
    )
    assert len(made) == 3
    assert made.summary() == {
        "name": "t",
        "source": "by hand",
        "requests": 3,
        "concurrency": None,
        "prompt_tokens": 90,
        "output_tokens": 6,
        "prompt_mean": 30.0,
        "prompt_p50": 20,
        "prompt_p95": 60,
        "prompt_max": 60,
        "output_mean": 2.0,
        "output_p50": 2,
        "output_p95": 3,
        "output_max": 3,
        "longest": 63,
        "duration_s": 4.0,
        "rate_per_s": 0.5,
        "burstiness": 0.5,  # gaps 1 and 3: mean 2, deviation 1
    }


def test_one_request_has_no_rate() -> None:
    single = trace().head(1)
    assert single.rate_per_s is None and single.burstiness is None


def test_stretching_scales_arrivals_only() -> None:
    made = trace(source="s")
    slow = made.stretched(2.5)
    assert slow.arrival_ns.tolist() == [0, 25, 100]
    assert slow.prompt.tolist() == made.prompt.tolist() and slow.output.tolist() == made.output.tolist()
    assert slow.name == "t*2.5" and slow.source == "s; arrivals times 2.5"
    assert made.stretched(0.5).arrival_ns.tolist() == [0, 5, 20]


@given(st.lists(st.integers(0, 2**53), min_size=1, max_size=20))
def test_stretching_by_one_changes_nothing(arrivals: list[int]) -> None:
    made = make_trace(name="t", arrival_ns=arrivals, prompt=[1] * len(arrivals), output=[1] * len(arrivals))
    assert made.stretched(1).arrival_ns.tolist() == made.arrival_ns.tolist()


@pytest.mark.parametrize(
    "factor",
    [0, -1, float("nan"), float("inf"), True, "2", None, 10**400, pytest.param(10**5000, id="huge"), 1e308, 2**62],
)
@pytest.mark.filterwarnings("error")
def test_bad_stretch_factors_are_refused(factor: Any) -> None:
    with pytest.raises(UsageError, match="factor"):
        trace().stretched(factor)


def test_a_closed_loop_cannot_be_stretched() -> None:
    with pytest.raises(UsageError, match="closed loop has no arrival times"):
        trace(concurrency=1).stretched(2)


def test_head_takes_the_first_and_keeps_the_loop() -> None:
    assert trace().head(2).prompt.tolist() == [5, 6]
    assert trace(concurrency=4).head(2).concurrency == 4
    assert trace(source="s").head(2).source == "s; first 2 of 3"


@pytest.mark.parametrize("n", [0, -1, 4, True, 1.0, "1", None, pytest.param(10**5000, id="huge")])
def test_bad_heads_are_refused(n: Any) -> None:
    with pytest.raises(UsageError, match="has 3 requests; cannot take the first"):
        trace().head(n)


def test_notes_stay_with_the_requests() -> None:
    made = trace(notes=("2 rows were left out",))
    for other in (made, made.head(2), made.stretched(2), made.picked(np.array([0, 2]))):
        assert other.notes == ("2 rows were left out",)


def test_priorities_stay_with_their_requests() -> None:
    made = trace(arrival_ns=[40, 0, 10], priority=[1, 0, 1])
    told = [one.priority for one in (made, made.stretched(2.0), made.head(2), at_rate(made, 5.0, 2))]
    assert [levels.tolist() for levels in told if levels is not None] == [[0, 1, 1], [0, 1, 1], [0, 1], [0, 1, 1] * 2]
    with pytest.raises(InputError, match="priorities are 0"):
        trace(priority=[0, 2, 0])
    with pytest.raises(InputError, match="2 priority values for 3 requests"):
        trace(priority=[0, 1])
