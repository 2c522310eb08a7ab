"""apex_opt.plans.acceptance: how many drafts are right, as asked for or as published."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError
from apex_opt.ir import load_model
from apex_opt.plans.acceptance import ANY_MODEL, parse_speculation, published, speculations
from apex_opt.plans.speculation import METHODS, Drafter, Speculation, least_steps

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = load_model("llama-3.3-70b")
EAGLE = tuple(Drafter(method="eagle", draft_tokens=n) for n in range(1, 8))


def batches(speculation: Speculation, tokens: int) -> int:
    """Batches after the first token until there are so many, one by one."""
    (accepted,), p, count = speculation.accepted, 1, 0
    while p < tokens:
        p += 1 + min(speculation.draft_tokens, accepted[p % len(accepted)])
        count += 1
    return count


@given(thousandths=st.integers(1000, 6000), more=st.integers(0, 2))
def test_a_mean_comes_out_as_tokens_by_batches(thousandths: int, more: int) -> None:
    mean = Fraction(thousandths, 1000)
    drafts = min(-(-thousandths // 1000) - 1 + more, 8) or 1
    (found,), _ = speculations(LLAMA, (Drafter(method="eagle", draft_tokens=drafts),), f"{float(mean):.3f}")
    assert 40_000 / batches(found, 40_001) == pytest.approx(float(mean), rel=0.01)
    assert found.mean == pytest.approx(float(mean), rel=0.01)


def test_shares_are_those_of_rows_with_at_least_so_many_right_drafts() -> None:
    drafter = Drafter(method="eagle", draft_tokens=3)
    (found,), _ = speculations(LLAMA, (drafter,), "0.8/0.6/0.4")
    (accepted,), p, rights = found.accepted, 1, []
    for _ in range(1000):
        rights.append(accepted[p % len(accepted)])
        p += 1 + rights[-1]
    assert [np.mean([right >= n for right in rights]) for n in (1, 2, 3)] == pytest.approx([0.8, 0.6, 0.4], abs=0.005)
    # As even as can be: no five rows in a row are all right or all wrong.
    assert all(0 < sum(rights[i : i + 5]) < 15 for i in range(995))


def test_a_mean_is_that_of_the_most_drafts_to_choose_from() -> None:
    found, _ = speculations(LLAMA, EAGLE[:3], "2.5")
    means = [its.mean for its in found]
    assert means[2] == pytest.approx(2.5, rel=0.01)
    assert 1 < means[0] < means[1] < means[2]


def test_a_row_that_begins_amid_right_drafts_finds_the_rest_of_them_right() -> None:
    """So cutting drafts off never saves a batch, and bounds are exact."""
    (found,), _ = speculations(LLAMA, EAGLE[4:5], None)
    for tokens in (2, 3, 17, 400):
        least = least_steps(found, True, np.array([tokens]))
        assert least.tolist() == [batches(found, tokens)]


def test_what_was_published_names_its_source_and_only_known_models() -> None:
    for entry in published():
        assert entry.source and entry.measured_on
        assert entry.method in METHODS
        assert 1 <= entry.mean_tokens <= 1 + entry.draft_tokens
        for name in entry.models:
            assert name == ANY_MODEL or load_model(name).name == name


def test_published_means_are_taken_with_a_note() -> None:
    found, notes = speculations(LLAMA, (None, *EAGLE), None)
    assert found[-1].mean == pytest.approx(2.88, rel=0.01)
    assert len(notes) == 1 and "2.88 tokens a row with 7 drafts (" in notes[0] and "no other number" in notes[0]
    kimi = load_model("kimi-k2.5")
    found, (note,) = speculations(kimi, EAGLE[:3], None)
    assert note.startswith("eagle: 1.8 tokens a row with 1 draft, 2.33 with 2 drafts, 2.75 with 3 drafts (SPEED-Bench")
    assert "of coding prompts: give --acceptance" in note
    assert [its.mean for its in found] == pytest.approx([1.8, 2.33, 2.75], rel=0.01)
    for model in (LLAMA, kimi):  # what hangs on the text is taken for every model
        (found,), notes = speculations(model, (Drafter(method="ngram", draft_tokens=5),), None)
        assert found.mean == pytest.approx(1.4, rel=0.01)
        assert "Llama-4-Scout" in notes[0] and "for all models" in notes[0]


def test_drafts_that_are_told_of_and_not_made_are_named(tmp_path: Path) -> None:
    model, path = load_model("llama-3.1-8b"), tmp_path / "counts.json"
    path.write_text('{"accepted": [2, 0], "proposed": [4, 4]}')
    for text, told, drafts in (("0.8/0.6/0.4/0.2", 4, 2), (str(path), 4, 3), ("0.8/0.6", 2, 1)):
        _, (note,) = speculations(model, parse_speculation(f"eagle:{drafts}"), text)
        assert (
            f"tells of up to {told} drafts a row, and at most {drafts} are made here: the first {drafts} count" in note
        )
        assert speculations(model, parse_speculation(f"eagle:{drafts},eagle:{told}"), text)[1] == ()
    assert speculations(model, parse_speculation("eagle:2"), "2.5")[1] == ()


def test_a_file_gives_counts_by_position(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"accepted": [3, 0, 1], "proposed": [3, 5, 1]}))
    (found,), _ = speculations(LLAMA, (Drafter(method="ngram", draft_tokens=5),), str(path))
    assert (found.accepted, found.proposed) == (((3, 0, 1),), ((3, 5, 1),))
    path.write_text("[2, 1]")
    (found,), _ = speculations(LLAMA, EAGLE[:1], str(path))
    assert (found.accepted, found.proposed) == (((2, 1),), ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", ["None"]),
        ("eagle:3", ["eagle:3"]),
        ("eagle:0-2", ["None", "eagle:1", "eagle:2"]),
        ("mtp:1, none", ["None", "mtp:1"]),
        ("draft:llama-3.1-8b:3,ngram:5", ["draft:llama-3.1-8b:3", "ngram:5"]),
    ],
)
def test_choices_are_read(text: str, found: list[str]) -> None:
    assert [str(drafter) for drafter in parse_speculation(text)] == found


@pytest.mark.parametrize(
    ("speculation", "acceptance", "error", "message"),
    [
        ("eagle", None, UsageError, "cannot read 'eagle'; give a method and 1 to 8 drafts; examples: eagle:3"),
        ("eagle:0", None, UsageError, "0 drafts; a whole number from 1 to 8"),
        ("eagle:9", None, UsageError, "9 drafts; a whole number from 1 to 8"),
        ("medusa:3", None, UnknownNameError, "way to make drafts 'medusa'"),
        ("eagle:x:3", None, UsageError, "draft:MODEL:DRAFTS"),
        ("eagle:3-1", None, UsageError, "from 3 down to 1"),
        ("eagle:1,eagle:0-2", None, UsageError, "names a choice twice"),
        (
            "draft:llama-3.1-8b:3",
            None,
            UsageError,
            "drafts by the draft model llama-3.1-8b are right for llama-3.3-70b was not published; give --acceptance",
        ),
        ("eagle:3", "4.5", UsageError, "brings 1 to 4 tokens in the mean, not 4.5"),
        ("eagle:3", "0.5/0.6/0.1", UsageError, "none above the one before"),
        ("eagle:3", "0.5/0.4", UsageError, "of 2 drafts, up to 3 are made; give 3 shares"),
        ("eagle:3", "much", UsageError, "cannot read 'much'; give the tokens of a row from 1, shares .* examples: 2.9"),
        ("eagle:3", "nowhere.json", InputError, "nowhere.json"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    speculation: str, acceptance: str | None, error: type[ApexError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        speculations(LLAMA, parse_speculation(speculation), acceptance)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"accepted": [1], "propose": [1]}, "holds 'propose'; known: accepted, proposed"),
        ([1, 9], "holds 9, not a count of drafts from 0 to 8"),
        ({"proposed": [1]}, "must hold a list of the drafts accepted of each row"),
        ({"accepted": [3], "proposed": [0]}, "row 1 has 3 accepted of 0 proposed"),
        ({"accepted": [1, 5], "proposed": [1, 3]}, "row 2 has 5 accepted of 3 proposed"),
        ({"accepted": [1], "proposed": [1, 2]}, "has 1 accepted and 2 proposed; give one of each a row"),
    ],
)
def test_a_file_of_counts_with_what_it_cannot_hold_is_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        speculations(LLAMA, parse_speculation("eagle:3"), str(path))
