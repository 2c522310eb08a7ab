"""apex_opt.workload.generators: laws, seeds, and every way to write a description wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.workload import Trace, describe_trace
from apex_opt.workload.generators import EXAMPLES


def columns(trace: Trace) -> tuple[list[int], list[int], list[int]]:
    return trace.arrival_ns.tolist(), trace.prompt.tolist(), trace.output.tolist()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_example_works_and_says_what_it_is(kind: str) -> None:
    trace = describe_trace(EXAMPLES[kind], 5)
    assert len(trace) == 500
    assert trace.source == f"generated: {EXAMPLES[kind]}, seed 5"
    assert trace.concurrency == (16 if kind == "closed" else None)


def test_defaults_are_1000_requests_of_512_and_128_tokens() -> None:
    trace = describe_trace("poisson:rate=1")
    assert len(trace) == 1000 and set(trace.prompt) == {512} and set(trace.output) == {128}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_same_description_and_seed_give_the_same_trace(kind: str) -> None:
    assert columns(describe_trace(EXAMPLES[kind], 7)) == columns(describe_trace(EXAMPLES[kind], 7))


def test_another_seed_gives_another_trace_and_the_key_overrides_the_argument() -> None:
    spec = "poisson:rate=2,n=50,prompt=exponential(100)"
    one, two, keyed = describe_trace(spec, 1), describe_trace(spec, 2), describe_trace(spec + ",seed=2", 1)
    assert one.arrival_ns.tolist() != two.arrival_ns.tolist() and one.prompt.tolist() != two.prompt.tolist()
    assert columns(keyed) == columns(two) and keyed.source.endswith("seed 2")


def test_another_rate_keeps_the_requests_and_scales_their_arrivals() -> None:
    law = "n=200,prompt=exponential(100),output=lognormal(50,1)"
    slow, fast = describe_trace(f"poisson:rate=1,{law}", 3), describe_trace(f"poisson:rate=4,{law}", 3)
    assert columns(slow)[1:] == columns(fast)[1:]
    assert np.abs(slow.arrival_ns - 4 * fast.arrival_ns).max() <= 3 * len(slow)  # rounding to whole nanoseconds


def test_prompts_and_outputs_are_drawn_apart() -> None:
    trace = describe_trace("static:n=5000,prompt=exponential(1000),output=exponential(1000)", 1)
    # 4 standard deviations of a correlation of 5,000 independent pairs.
    assert abs(np.corrcoef(trace.prompt, trace.output)[0, 1]) < 4 / np.sqrt(5000)


# Tolerances are five standard errors of the mean of n draws: std / sqrt(n).
N = 100_000


@pytest.mark.parametrize(
    ("law", "mean", "std"),
    [
        ("uniform(100,300)", 200.0, np.sqrt((201**2 - 1) / 12)),
        ("uniform(lo=100,hi=300)", 200.0, np.sqrt((201**2 - 1) / 12)),
        ("lognormal(512,0.5)", 512.0, 512 * np.sqrt(np.expm1(0.25))),
        ("lognormal(sigma=1,mean=512)", 512.0, 512 * np.sqrt(np.expm1(1))),
        ("normal(1000,100)", 1000.0, 100.0),
        ("exponential(mean=2000)", 2000.0, 2000.0),
    ],
)
def test_laws_have_their_mean_and_deviation(law: str, mean: float, std: float) -> None:
    lengths = describe_trace(f"static:n={N},prompt={law}", 11).prompt
    # A draw below half a token becomes 1: at most +0.5 tokens on these means.
    assert lengths.mean() == pytest.approx(mean, abs=5 * std / np.sqrt(N) + 0.5)
    assert lengths.std() == pytest.approx(std, rel=0.05)


def test_uniform_lengths_reach_both_ends_and_no_further() -> None:
    lengths = describe_trace("static:n=2000,prompt=uniform(3,5)").prompt
    assert set(lengths.tolist()) == {3, 4, 5}


def test_lognormal_median_follows_from_its_mean() -> None:
    lengths = describe_trace(f"static:n={N},prompt=lognormal(1000,1)", 2).prompt
    # exp(mu) with mu = ln(mean) - 1/2; the relative error of a median is about 1.25 sigma / sqrt(n).
    assert np.median(lengths) == pytest.approx(1000 * np.exp(-0.5), rel=5 * 1.25 / np.sqrt(N))


@pytest.mark.parametrize("law", ["lognormal(100,3,max=120)", "normal(100,90,120)", "exponential(100,max=120)"])
def test_lengths_are_cut_to_one_and_max(law: str) -> None:
    lengths = describe_trace(f"static:n=5000,prompt={law}").prompt
    assert (lengths.min(), lengths.max()) == (1, 120)


def test_lengths_without_max_stay_within_what_a_trace_holds() -> None:
    assert describe_trace("static:n=5000,prompt=normal(10000000,10000000)").prompt.max() == 10_000_000


@pytest.mark.parametrize(
    ("spec", "burstiness"), [("poisson:rate=4", 1.0), ("gamma:rate=4,cv=0.3", 0.3), ("gamma:rate=4,cv=3", 3)]
)
def test_random_arrivals_have_their_rate_and_burstiness(spec: str, burstiness: float) -> None:
    trace = describe_trace(f"{spec},n={N}", 13)
    assert trace.rate_per_s == pytest.approx(4, rel=5 * burstiness / np.sqrt(N))
    assert trace.burstiness == pytest.approx(burstiness, rel=0.05)


def test_gamma_of_one_is_a_poisson_process() -> None:
    gaps = np.diff(describe_trace(f"gamma:rate=1,cv=1,n={N}", 17).arrival_ns) / 1e9
    for quantile in (0.1, 0.5, 0.9):
        share = float(np.mean(gaps <= -np.log1p(-quantile)))
        assert share == pytest.approx(quantile, abs=5 * np.sqrt(quantile * (1 - quantile) / N))


def test_uniform_arrivals_do_not_drift() -> None:
    trace = describe_trace("uniform:rate=3,n=300001")
    assert trace.arrival_ns[0] == 0 and trace.arrival_ns[-1] == 100_000 * 10**9
    assert np.abs(trace.arrival_ns * 3 - np.arange(300_001) * 10**9).max() <= 2


def test_static_and_closed_arrive_at_zero() -> None:
    assert (
        not describe_trace("static:n=9").arrival_ns.any()
        and not describe_trace("closed:concurrency=3").arrival_ns.any()
    )


def test_spaces_do_no_harm() -> None:
    spaced = describe_trace(
        " poisson: rate = 2 , n=9, prompt = lognormal( mean = 100 , 1 ) ".replace(", 1 )", ", sigma=1 )")
    )
    assert columns(spaced) == columns(describe_trace("poisson:rate=2,n=9,prompt=lognormal(100,1)"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("poisson", "a colon must follow the kind"),
        ("poisson:", "rate= is missing"),
        ("gamma:rate=2", "cv= is missing"),
        ("closed:n=5", "concurrency= is missing"),
        ("poisson:2", "'2' is not of the form key=value"),
        ("poisson:rate", "'rate' is not of the form key=value"),
        ("poisson:rate=", "rate has no value"),
        ("poisson:rate=0", "rate must be a number from 1e-09 to 1e"),
        ("poisson:rate=-1", "rate must be a number .*, got -1"),
        ("poisson:rate=nan", "rate must be a number .*, got nan"),
        ("poisson:rate=inf", "rate must be a number .*, got inf"),
        ("poisson:rate=1e999", "rate must be a number .*, got 1e999"),
        ("poisson:rate=2/s", "rate must be a number .*, got 2/s"),
        ("poisson:rate=2,rate=3", "rate is given twice"),
        ("poisson:rate=2,n=0", "n must be a whole number from 1 to 5,000,000, got 0"),
        ("poisson:rate=2,n=5000001", "n must be a whole number from 1 to 5,000,000, got 5000001"),
        ("poisson:rate=2,n=1e3", "n must be a whole number .*, got 1e3"),
        ("poisson:rate=2,n=1_000", "n must be a whole number .*, got 1_000"),
        ("poisson:rate=2,n=" + "9" * 5000, "n must be a whole number .*, got 9+"),
        ("poisson:rate=2,seed=-1", "seed must be a whole number"),
        ("poisson:rate=2,seed=x", "seed must be a whole number"),
        ("poisson:rate=2,,n=5", "nothing stands between two commas"),
        ("poisson:rate=2,", "nothing stands between two commas"),
        ("poisson:rate=2,prompt=lognormal(5,1", "a parenthesis is not closed"),
        ("poisson:rate=2,prompt=lognormal 5,1)", "a parenthesis closes that was not opened"),
        ("poisson:rate=2,prompt=lognormal(5,1)x", r"prompt=lognormal\(5,1\)x is not of the form law\(parameters\)"),
        ("poisson:rate=2,prompt=lognormal((5),1)", "is not of the form law"),
        ("poisson:rate=2,prompt=lognormal", r"needs parameters in parentheses: lognormal\(mean,sigma\[,max\]\)"),
        ("poisson:rate=2,prompt=lognormal()", r"lacks mean: lognormal\(mean,sigma"),
        ("poisson:rate=2,prompt=lognormal(5)", "lacks sigma"),
        ("poisson:rate=2,prompt=lognormal(5,1,9,9)", "more than 3 parameters"),
        ("poisson:rate=2,prompt=lognormal(mean=5,1)", "'1' is not of the form parameter=value"),
        ("poisson:rate=2,prompt=lognormal(5,mean=5)", "mean is given twice"),
        ("poisson:rate=2,prompt=lognormal(0,1)", "prompt mean must be a number from 1 to 1e"),
        ("poisson:rate=2,prompt=lognormal(5,-1)", "prompt sigma must be a number from 0 to 10, got -1"),
        ("poisson:rate=2,prompt=lognormal(5,nan)", "prompt sigma must be"),
        ("poisson:rate=2,prompt=lognormal(5,1,4)", "lo must not exceed hi, nor mean max"),
        ("poisson:rate=2,prompt=lognormal(5,1,max=9.5)", "prompt max must be a whole number"),
        ("poisson:rate=2,prompt=lognormal(5,1,max=10000001)", "prompt max must be a whole number"),
        ("poisson:rate=2,output=uniform(9,5)", "lo must not exceed hi"),
        ("poisson:rate=2,output=uniform(0,5)", "output lo must be a whole number from 1"),
        ("poisson:rate=2,output=0", "output must be a whole number from 1 to 10,000,000, got 0"),
        ("poisson:rate=2,output=12.5", "output must be a whole number .*, got 12.5"),
        ("gamma:rate=2,cv=0", "cv must be a number from 0.01 to 100, got 0"),
        ("closed:concurrency=0", "concurrency must be a whole number from 1"),
        ("uniform:rate=1e-9,n=10", r"would arrive after 9e\+09 s .*: raise rate or lower n"),
        ("poisson:rate=1e-9,n=10", "would arrive after .*: raise rate or lower n"),
    ],
)
def test_bad_descriptions_are_refused_with_one_that_works(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        describe_trace(spec)
    text = str(caught.value)
    example = EXAMPLES[spec.split(":")[0]]
    assert text.endswith(f"e.g. {example}") and len(text) < 500 and "\n" not in text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("poison:rate=2", r"unknown trace description 'poison'; did you mean poisson\?"),
        ("poisson:rat=2", r"unknown key 'rat'; did you mean rate"),
        ("static:rate=2", "unknown key 'rate'"),
        ("poisson:rate=2,prompt=lognorm(5,1)", r"unknown law of lengths 'lognorm'; did you mean lognormal"),
        ("poisson:rate=2,prompt=lognormal(mean=5,std=1)", "unknown parameter of lognormal 'std'"),
        ("poisson:rate=2,prompt=uniform(1,5,max=3)", "unknown parameter of uniform 'max'"),
        ("", "unknown trace description ''"),
    ],
)
def test_unknown_words_are_suggested(spec: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        describe_trace(spec)


@pytest.mark.parametrize("spec", [None, 5, b"poisson:rate=2"])
def test_something_other_than_text_is_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="expected a description such as poisson:"):
        describe_trace(spec)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, None, "1", pytest.param(10**5000, id="huge")])
def test_bad_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed must be a whole number"):
        describe_trace("poisson:rate=2", seed)


@settings(deadline=None)
@given(st.text(alphabet="poisngamcled:=,().0123456789-e tuxrfh", max_size=60))
def test_no_text_escapes_with_another_error(text: str) -> None:
    for spec in (text, f"poisson:rate=2,n=5,{text}", f"static:n=5,prompt=normal({text})"):
        try:
            describe_trace(spec)
        except ApexError:
            continue


def test_stated_tokens_are_drawn_on_their_own_and_cut_outputs() -> None:
    law = "poisson:rate=2,n=200,prompt=uniform(1,90),output=uniform(2,30)"
    plain, stated = describe_trace(law), describe_trace(f"{law},max_new_tokens=uniform(10,20)")
    assert plain.max_new_tokens is None and stated.max_new_tokens is not None
    assert (stated.prompt == plain.prompt).all() and (stated.arrival_ns == plain.arrival_ns).all()
    assert stated.max_new_tokens.min() == 10 and stated.max_new_tokens.max() == 20
    assert (stated.output == np.minimum(plain.output, stated.max_new_tokens)).all()
    assert (describe_trace(f"{law},max_new_tokens=12").stated(999) == 12).all()


def test_a_share_of_the_requests_is_of_high_priority_and_nothing_else_changes() -> None:
    spec = "poisson:rate=2,n=2000,prompt=uniform(1,9),output=exponential(20)"
    plain, some = describe_trace(spec), describe_trace(f"{spec},priority=0.25")
    assert plain.priority is None and some.priority is not None
    assert 0.2 < some.priority.mean() < 0.3
    assert all((getattr(plain, name) == getattr(some, name)).all() for name in ("arrival_ns", "prompt", "output"))
    with pytest.raises(UsageError, match="priority must be a number from 0 to 1"):
        describe_trace(f"{spec},priority=2")


def test_turns_begin_with_all_that_was_said_before_and_wait_for_it() -> None:
    trace = describe_trace(
        "poisson:rate=2,n=60,prompt=uniform(1,60),output=exponential(20),turns=uniform(1,6),delay_ms=exponential(3000)"
    )
    assert len(trace) == 60
    assert trace.delay_ns is not None and trace.content is not None and trace.content_starts is not None
    before = trace.before
    waits = trace.delay_ns >= 0
    assert (waits == (before >= 0)).all() and waits.sum() > 20
    pieces = np.split(trace.content, trace.content_starts[1:-1])
    for row in np.flatnonzero(waits).tolist():
        last = int(before[row])
        new = trace.prompt[row] - trace.prompt[last] - trace.output[last]
        assert 1 <= new <= 60
        whole = trace.prompt[last] // 16
        assert (pieces[row][:whole] == pieces[last][:whole]).all()
        assert not set(pieces[row][whole:]) & set(pieces[last])
        assert trace.arrival_ns[row] == trace.arrival_ns[last] + trace.delay_ns[row]
    firsts = [set(pieces[row]) for row in np.flatnonzero(~waits).tolist()]
    assert sum(map(len, firsts)) == len(set.union(*firsts))
    for spec, told in (
        ("static:n=4,delay_ms=5", "give turns= too"),
        ("closed:concurrency=2,n=4,turns=2", "turns= goes with arrivals"),
        ("static:n=4,turns=2,prefix=(16,2)", "turns= goes with arrivals, and without prefix="),
    ):
        with pytest.raises(UsageError, match=told):
            describe_trace(spec)
