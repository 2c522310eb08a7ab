"""How many drafts turn out to be right: as it is asked for, or as it was published for a model and a method.

A mean is spread over the output without chance: whether a draft is right is fixed for each position, such that the
shares of rows with so many right drafts come out as exactly as can be, and rows are as even as can be.
"""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError, UsageError
from apex_opt.files import read_json, read_text
from apex_opt.ir.checks import shown
from apex_opt.plans.speculation import MOST_DRAFTS, Drafter, Speculation, parse_drafter
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.ir.model import Model

ANY_MODEL: Final = "*"
"""In place of models: what hangs on the text and not on the model, as n-grams do."""
_ROWS: Final = 200
"""Rows after which the right drafts of an output repeat."""
_RANGE: Final = re.compile(r"(.+):(\d)-(\d)", re.ASCII)
_RATE: Final = re.compile(r"\d{1,2}(\.\d{1,9})?", re.ASCII)
_LARGEST: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published mean of the tokens that a row brings, the free one included."""

    models: tuple[str, ...]
    method: str
    draft_tokens: int
    mean_tokens: Fraction
    measured_on: str
    source: str


@cache
def published() -> tuple[Published, ...]:
    """All that are known."""
    text = read_text(DATA_ROOT / "profiles" / "acceptance.csv", limit=_LARGEST)
    return tuple(
        Published(
            models=tuple(row["models"].split(";")),
            method=row["method"],
            draft_tokens=int(row["draft_tokens"]),
            mean_tokens=Fraction(row["mean_tokens"]),
            measured_on=row["measured_on"],
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def parse_speculation(text: str) -> tuple[Drafter | None, ...]:
    """Ways to make drafts to choose from: ``none``, ``eagle:3``, ``eagle:0-5``, ``draft:MODEL:3``, several with commas.

    Raises
    ------
    UsageError, UnknownNameError    anything else
    """
    found: list[Drafter | None] = []
    for part in text.split(","):
        if part.strip() == "none":
            found.append(None)
        elif match := _RANGE.fullmatch(part.strip()):
            first, last = int(match[2]), int(match[3])
            if first > last:
                raise UsageError(
                    f"--speculation: {shown(part)} goes from {first} down to {last}; put the smaller first"
                )
            found += [parse_drafter(f"{match[1]}:{n}") if n else None for n in range(first, last + 1)]
        else:
            found.append(parse_drafter(part))
    if len(set(found)) < len(found):
        raise UsageError(f"--speculation: {shown(text)} names a choice twice")
    return tuple(sorted(found, key=lambda drafter: drafter is not None))


def speculations(
    model: Model, drafters: Sequence[Drafter | None], acceptance: str | None
) -> tuple[tuple[Speculation, ...], tuple[str, ...]]:
    """What comes of the drafts of each choice, and what has to be told of it.

    Parameters
    ----------
    model
    drafters : of which none makes none
    acceptance : str or None    mean tokens of a row with the most drafts among the choices, the free one included;
                                shares of rows in which at least so many drafts are right, 0.8/0.6/0.4; or a JSON file;
                                None: what was published

    Returns
    -------
    tuple of Speculation, tuple of str

    Raises
    ------
    UsageError, InputError    what cannot be read, where nothing was published, or layers that the model lacks
    """
    chosen = [drafter for drafter in drafters if drafter is not None]
    if not chosen:
        return (), ()
    if not model.mtp_layers and (mtp := [drafter for drafter in chosen if drafter.method == "mtp"]):
        raise UsageError(
            f"--speculation={mtp[0]}: the config of {model.name} states no layers of multi-token prediction "
            "(num_nextn_predict_layers and the like), which make these drafts; use eagle, draft or ngram"
        )
    notes: dict[tuple[str, str], list[str]] = {}
    proposed: tuple[int, ...] = ()
    told, most = 0, max(drafter.draft_tokens for drafter in chosen)
    if acceptance is None:
        lists = [_right(_of_published(model, drafter, notes), drafter.draft_tokens) for drafter in chosen]
    elif acceptance.lower().endswith(".json"):
        accepted, proposed = _read(acceptance)
        told, lists = max(*accepted, *proposed, 0), [accepted for _ in chosen]
    else:
        told = len(acceptance.split("/"))
        lists = [_right(_rates(acceptance, most), drafter.draft_tokens) for drafter in chosen]
    unused = (
        f"--acceptance: {shown(acceptance)} tells of up to {told} drafts a row, and at most {most} are made here: the "
        f"first {most} count",
    )
    return tuple(
        Speculation(
            method=drafter.method,
            draft_tokens=drafter.draft_tokens,
            accepted=(accepted,),
            proposed=(proposed,) if proposed else (),
            model=drafter.model,
        )
        for drafter, accepted in zip(chosen, lists, strict=True)
    ), (unused if told > most else ()) + tuple(
        f"{method}: {means[0].replace(' ', ' tokens a row ', 1)}{''.join(f', {mean}' for mean in means[1:])} {told}"
        for (method, told), means in notes.items()
    )


def check_acceptance(text: str) -> None:
    """Refuse what cannot be read, where no drafts are made that it could be of.

    Raises
    ------
    UsageError, InputError    as `speculations`
    """
    if text.lower().endswith(".json"):
        _read(text)
    elif (mean := _values(text)[0]) >= 1:
        _one_rate(mean, MOST_DRAFTS)


def _rates(text: str, most: int) -> tuple[Fraction, ...]:
    """Shares of rows in which at least one draft is right, at least two, and so on."""
    values = _values(text)
    if values[0] >= 1 and len(values) == 1:
        return _one_rate(values[0], most)
    if len(values) < most:
        raise UsageError(
            f"--acceptance: {shown(text)} is of {len(values)} drafts, up to {most} are made; give {most} shares"
        )
    return values


def _values(text: str) -> tuple[Fraction, ...]:
    """A mean from 1, or shares of which none is above the one before it."""
    parts = text.strip().split("/")
    if not all(_RATE.fullmatch(part) for part in parts):
        raise UsageError(
            f"--acceptance: cannot read {shown(text)}; give the tokens of a row from 1, shares of rows from 0 "
            "to 1, or a file; examples: 2.9, 0.8/0.6/0.4, counts.json"
        )
    values = tuple(map(Fraction, parts))
    if len(values) == 1 and values[0] >= 1:
        return values
    if any(later > before for before, later in zip((Fraction(1), *values), values, strict=False)):
        raise UsageError(f"--acceptance: {shown(text)} must be shares of at most 1, none above the one before it")
    return values


def _one_rate(mean: Fraction, most: int) -> tuple[Fraction, ...]:
    """The shares where every draft is right at the same rate if those before it are, for a mean with so many drafts."""
    if not 1 <= mean <= 1 + most:
        raise UsageError(
            f"--acceptance: a row of {most} drafts brings 1 to {1 + most} tokens in the mean, not {float(mean):g}"
        )
    low, high = Fraction(0), Fraction(1)
    for _ in range(30):
        rate = (low + high) / 2
        low, high = (rate, high) if sum(rate**i for i in range(most + 1)) < mean else (low, rate)
    return tuple(high**i for i in range(1, MOST_DRAFTS + 1))


def _of_published(model: Model, drafter: Drafter, notes: dict[tuple[str, str], list[str]]) -> tuple[Fraction, ...]:
    """The shares that were published, or follow from a mean for one number of drafts.

    Parameters
    ----------
    model, drafter
    notes : dict    means taken, by the method and what is told of them; filled here
    """
    known = [p for p in published() if p.method == drafter.method]
    mine = [p for p in known if model.name in p.models] or [p for p in known if p.models == (ANY_MODEL,)]
    if not mine or drafter.method == "draft":
        makes = f"the draft model {drafter.model}" if drafter.method == "draft" else drafter.method
        raise UsageError(
            f"--speculation={drafter}: how many drafts by {makes} are right for {model.name} was not published; give "
            "--acceptance, the mean tokens of a row such as 2.5"
        )
    told = "; ".join(dict.fromkeys(f"{p.measured_on}; {p.source}" for p in mine))
    if any("coding" in p.measured_on for p in mine):
        told += "; of coding prompts: give --acceptance where yours are others"
    means = {p.draft_tokens: p.mean_tokens for p in sorted(mine, key=lambda p: p.draft_tokens)}
    if len(means) == 1:
        ((drafts, mean),) = means.items()
        shares = _one_rate(mean, drafts)
        told = f"({told}); no other number was measured, others are by one rate for every draft"
    else:
        shares, drafts, told = _differences([Fraction(1), *means.values()]), drafter.draft_tokens, f"({told})"
        mean = 1 + sum(shares[:drafts], Fraction(0))
    taken = notes.setdefault((drafter.method, told), [])
    if (text := f"{float(mean):g} with {drafts} draft{'s' * (drafts > 1)}") not in taken:
        taken.append(text)
    return shares


def _differences(means: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Shares of rows in which at least so many drafts are right, for means with 0, 1, 2 drafts and so on."""
    shares: list[Fraction] = []
    for before, mean in itertools.pairwise(means):
        shares.append(max(Fraction(0), min(mean - before, shares[-1] if shares else Fraction(1))))
    return tuple(shares)


def _right(rates: Sequence[Fraction], drafts: int) -> tuple[int, ...]:
    """Drafts that are right by position in the output, for the shares of rows in which at least so many are."""
    tested, passed = [0] * drafts, [0] * drafts
    rows: list[int] = []
    for _ in range(_ROWS):
        right = 0
        while right < drafts:
            before = rates[right - 1] if right else Fraction(1)
            share = rates[right] / before if before else Fraction(0)
            tested[right] += 1
            if (2 * tested[right] * share + 1) // 2 <= passed[right]:
                break
            passed[right] += 1
            right += 1
        rows.append(right)
    # A row that begins amid the drafts of another one finds the rest of these right.
    positions = [rest for right in rows for rest in range(right, -1, -1)]
    return (positions[-1], *positions[:-1])  # the first token comes with the prompt


def _read(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Drafts accepted and, where they are given, proposed, of the row at each position in the output."""
    content = read_json(Path(path), where=f"--acceptance: {path}", limit=_LARGEST)
    content = {"accepted": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or "accepted" not in content:
        raise InputError(
            f"--acceptance: {path} must hold a list of the drafts accepted of each row, such as [2, 0, 1], or "
            '{"accepted": [2, 0, 1], "proposed": [3, 3, 3]}'
        )
    if unknown := [key for key in content if key not in ("accepted", "proposed")]:
        raise InputError(f"--acceptance: {path} holds {shown(unknown[0])}; known: accepted, proposed")
    accepted, proposed = tuple(_counts(path, "accepted", content)), tuple(_counts(path, "proposed", content))
    if proposed and len(proposed) != len(accepted):
        raise InputError(
            f"--acceptance: {path} has {len(accepted)} accepted and {len(proposed)} proposed; give one of each a row"
        )
    for place, (right, made) in enumerate(zip(accepted, proposed, strict=False), 1):
        if right > made:
            raise InputError(
                f"--acceptance: {path}: row {place} has {right} accepted of {made} proposed; at most those proposed "
                "can be accepted"
            )
    return accepted, proposed


def _counts(path: str, name: str, content: dict[str, object]) -> Iterator[int]:
    """One list of a file."""
    values = content.get(name, [])
    if not isinstance(values, list) or (name == "accepted" and not values):
        raise InputError(f"--acceptance: {name} of {path} must be a list of the drafts of each row, such as [2, 0, 1]")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_DRAFTS:
            raise InputError(
                f"--acceptance: {name} of {path} holds {shown(value)}, not a count of drafts from 0 to {MOST_DRAFTS}"
            )
        yield value
