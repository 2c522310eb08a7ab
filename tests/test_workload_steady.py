"""A trace that goes on: the same requests in their order, over and over, coming as they come in the trace."""

from __future__ import annotations

import numpy as np
import pytest

from apex_opt.errors import UsageError
from apex_opt.workload import describe_trace, load_trace, make_trace
from apex_opt.workload.steady import LENGTH, another, at_rate, loops_of, rate_of

POISSON = describe_trace("poisson:rate=2,n=300,prompt=lognormal(512,1),output=exponential(128)", 3)
RECORDED = make_trace(name="log", arrival_ns=[5, 10, 40, 100], prompt=[1, 2, 3, 4], output=[5, 6, 7, 8])


@pytest.mark.parametrize("trace", [POISSON, RECORDED, describe_trace("uniform:rate=3,n=50")])
@pytest.mark.parametrize("rate", [0.3, 40.0])
def test_lengths_repeat_in_their_order_at_exactly_the_rate(trace: object, rate: float) -> None:
    assert hasattr(trace, "prompt")
    found = at_rate(trace, rate, 7)  # type: ignore[arg-type]
    assert found.prompt.tolist() == trace.prompt.tolist() * 7
    assert found.output.tolist() == trace.output.tolist() * 7  # type: ignore[attr-defined]
    assert rate_of(found) == pytest.approx(rate, rel=1e-6)
    assert found.arrival_ns[0] == 0


def test_conversations_are_others_in_every_repetition() -> None:
    trace = make_trace(name="turns", arrival_ns=[0, 5, 9], prompt=[1, 2, 3], output=[1, 1, 1], session=[8, 4, 8])
    found = at_rate(trace, 1e3, 6)
    assert found.session is not None
    first, second = found.session[:3].tolist(), found.session[3:6].tolist()
    assert first[0] == first[2] != first[1] and second[0] == second[2] != second[1]
    assert not set(first) & set(second)


def test_recorded_arrivals_are_looped_a_mean_gap_apart() -> None:
    found = at_rate(RECORDED, 1e3, 3)
    inside = [5 / 95 * 3e6, 30 / 95 * 3e6, 60 / 95 * 3e6]
    assert np.diff(found.arrival_ns) == pytest.approx([*inside, 1e6, *inside, 1e6, *inside], abs=1)


def test_other_draws_of_recorded_arrivals_begin_at_other_requests() -> None:
    found = at_rate(RECORDED, 1e3, 2, draw=1)
    first = found.prompt.tolist()[:4]
    assert sorted(first) == [1, 2, 3, 4]
    assert first != [1, 2, 3, 4]
    gaps = {
        (a, b): gap for a, b, gap in zip(found.prompt[:-1], found.prompt[1:], np.diff(found.arrival_ns), strict=True)
    }
    assert gaps[2, 3] == pytest.approx(30 / 95 * 3e6, abs=1)
    assert gaps[4, 1] == pytest.approx(1e6, abs=1)


@pytest.mark.parametrize(("kind", "cv"), [("poisson:", 1.0), ("gamma:cv=3,", 3.0), ("uniform:", 0.0)])
def test_drawn_arrivals_are_fresh_and_of_the_same_kind(kind: str, cv: float) -> None:
    trace = describe_trace(f"{kind}rate=2,n=400")
    one, same, other = at_rate(trace, 10, 50), at_rate(trace, 10, 50), at_rate(trace, 10, 50, draw=1)
    assert one.arrival_ns.tolist() == same.arrival_ns.tolist()
    assert one.burstiness == pytest.approx(cv, abs=0.15 * cv + 1e-6)
    if cv:
        assert one.arrival_ns.tolist() != other.arrival_ns.tolist()
        assert rate_of(other) == pytest.approx(10, rel=0.1)
        gaps = np.diff(one.arrival_ns)
        assert not np.array_equal(gaps[:399], gaps[400:799])
    seed = describe_trace(f"{kind}rate=2,n=400", 1)
    assert (at_rate(seed, 10, 50).arrival_ns.tolist() == one.arrival_ns.tolist()) == (cv == 0)


def test_shipped_traces_come_by_their_law() -> None:
    chat = load_trace("chat")
    assert (chat.arrivals.kind, chat.arrivals.seed) == ("poisson", 1001)
    more = another(chat, 43.0, 20_000, 1)
    assert more is not None
    assert more.rate_per_s == pytest.approx(43, rel=0.03)
    assert more.prompt.mean() == pytest.approx(chat.prompt.mean(), rel=0.05)
    assert more.prompt.max() <= chat.prompt.max()
    assert (more.prompt + more.output).max() <= chat.longest
    assert another(RECORDED, 43.0, 20_000, 1) is None


def test_what_prompts_say_is_shared_within_a_repetition_only() -> None:
    trace = describe_trace("poisson:rate=2,n=30,prompt=64,output=4,prefix=(32,3)")
    found = at_rate(trace, 5.0, 3)
    assert found.content is not None
    assert trace.content is not None
    size = trace.content.size
    parts = [found.content[i * size : (i + 1) * size] for i in range(3)]
    _, shape = np.unique(trace.content, return_inverse=True)
    for part in parts:
        assert np.array_equal(np.unique(part, return_inverse=True)[1], shape)
    assert not set(parts[0].tolist()) & set(parts[1].tolist())
    assert not set(parts[1].tolist()) & set(parts[2].tolist())


def test_so_many_loops_as_a_rate_is_judged_by() -> None:
    assert loops_of(POISSON) * len(POISSON) >= LENGTH > (loops_of(POISSON) - 1) * len(POISSON)
    assert loops_of(make_trace(name="long", arrival_ns=range(30_000), prompt=[1] * 30_000, output=[1] * 30_000)) == 2


@pytest.mark.parametrize(
    ("trace", "rate", "loops", "said"),
    [
        (describe_trace("closed:concurrency=4,n=9"), 1.0, 2, "is a closed loop, so there is no rate"),
        (describe_trace("static:n=9"), 1.0, 2, "has all its requests arrive at once"),
        (POISSON, 1.0, 20_000, "has 6,000,000 requests, at most 5,000,000"),
        (POISSON, 1e-6, 10, "would arrive beyond 2\\*\\*61 ns"),
    ],
)
def test_what_has_no_rate_or_does_not_fit_is_refused(trace: object, rate: float, loops: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        at_rate(trace, rate, loops)  # type: ignore[arg-type]
