"""Expressions of untrusted files: the same matches as Python's own, in bounded work."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.ir.patterns import Effort, PatternError, expression, glob


def matches(source: str, letters: str) -> tuple[bool, bool]:
    """Whether an expression matches at the start of a text, and whether it matches the whole."""
    effort = Effort()
    ends = expression(source, effort)(effort.text(letters), 1)
    return bool(ends), bool(ends >> len(letters) & 1)


ATOMS = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", "\\.", "\\d", "\\w", "\\S", "[0-9]", "\\b", "\\B", "^", "$", "-"]
)
REPEATS = st.sampled_from(["*", "+", "?", "{1,2}", "{2}", "{,2}", "{1,}", "*?", "+?", "??"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, REPEATS).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
        st.sampled_from(["(?<=a)", "(?<!ab)", "(?<=[ab])"]),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, st.text("ab.1-", min_size=1, max_size=7))
def test_expressions_match_where_those_of_python_do(source: str, letters: str) -> None:
    compiled = re.compile(source)
    assert matches(source, letters) == (bool(compiled.match(letters)), bool(compiled.fullmatch(letters)))


@pytest.mark.parametrize(
    ("source", "letters", "expected"),
    [
        (r".*layers\.[0-9]+\.self_attn.*", "model.layers.12.self_attn.q_proj", True),
        (r".*mlp\.(gate|up|gate_up|down)_proj$", "model.layers.0.mlp.gate_up_proj", True),
        (r"^(?!.*experts).*proj$", "model.layers.0.mlp.experts.0.up_proj", False),
        (r"model\.layers\.(?:[0-9]|1[0-5])\..*", "model.layers.16.mlp", False),
        (r"(?P<part>self_attn|mlp)\.", "mlp.up", True),
        (r"a{2,3}b{", "aab{", True),
        (r"[]a-]+\Z", "a]-", True),
        (r"\x", "x", None),
    ],
)
def test_expressions_of_real_files_are_understood(source: str, letters: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(PatternError, match="not supported"):
            matches(source, letters)
    else:
        assert matches(source, letters)[0] is expected


@pytest.mark.parametrize(
    "source",
    [
        "(a+)+$",
        "(a|a)*b",
        "((((a*)*)*)*)*b",
        "(?:a?){60}a{60}",
        "(.*)*x",
        "(((a?b?)*c?)*d?)*z",
        ".*" * 500 + "x",
        "(?=(?=(?=.*a).*a).*a)b",
    ],
)
def test_expressions_that_backtracking_never_ends_on_take_few_steps(source: str) -> None:
    effort = Effort()
    text = effort.text("a" * 100 + "!")
    expression(source, effort)(text, 1)
    assert Effort().left - effort.left < 100_000


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("(", r"missing \)"),
        (")", r"unbalanced \)"),
        ("[a", "missing ]"),
        ("*a", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("a{3,2}", "repeats must be from 0 to 1000"),
        ("a{1001}", "repeats must be from 0 to 1000"),
        (r"(a)\1", r"\\1 is not supported"),
        ("(?P=a)", r"\(\?P is not supported"),
        ("(?i)a", r"\(\?i is not supported"),
        ("(?>a)", r"\(\?> is not supported"),
        ("a++", "possessive repeats are not supported"),
        ("[z-a]", "bad character range"),
        ("(?P<1>a)", "bad group name"),
        ("a\\", r"\\ is not supported"),
        ("(" * 50 + "a" + ")" * 50, "groups lie more than 40 deep"),
    ],
)
def test_what_is_no_expression_or_cannot_be_matched_is_refused_by_name(source: str, text: str) -> None:
    with pytest.raises(PatternError, match=text):
        expression(source, Effort())


@pytest.mark.parametrize("source", ["a" * 5_000_000, "(?:(?:(?:(?:a?){1000}){1000}){1000}){1000}"])
def test_work_beyond_what_a_file_may_cost_is_refused(source: str) -> None:
    effort = Effort()
    with pytest.raises(PatternError, match="takes too long"):
        expression(source, effort)(effort.text("a" * 50), 1)


@pytest.mark.parametrize(
    ("source", "letters", "expected"),
    [
        ("a*c", "abbc", True),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("l[0-2].x", "l1.x", True),
        ("l[!0-2].x", "l1.x", False),
        ("a.b", "axb", False),
        ("[", "[", True),
        ("**" * 100 + "z", "a" * 100, False),
    ],
)
def test_globs_match_whole_names(source: str, letters: str, expected: bool) -> None:
    effort = Effort()
    ends = glob(source, effort)(effort.text(letters), 1)
    assert bool(ends >> len(letters) & 1) is expected
