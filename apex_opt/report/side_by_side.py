"""Runs side by side: a column each with the same figures, and what differs between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from apex_opt.figures.goals import parse_goals
from apex_opt.figures.units import percent
from apex_opt.report import studied, types
from apex_opt.report.explain import terms_table
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import amount, notes_lines, page, provenance_table, seconds, table
from apex_opt.report.load import said_of
from apex_opt.report.sources import in_full
from apex_opt.report.tables import in_order, question_line
from apex_opt.schema import of, to_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from apex_opt.report.sources import Provenance
    from apex_opt.schema import Document
    from apex_opt.studies.explain import Term


def compared_document(
    plans: Sequence[str], answers: Sequence[types.Answer | types.MixedAnswer], terms: Sequence[Term]
) -> studied.PlansAnswer:
    """Several given plans, each with its whole answer, and what differs between those that can run.

    Parameters
    ----------
    plans : by their texts
    answers : the document of each; `best` is the number of the best of them, from 1
    terms : with a value for each plan that can run, in their order
    """
    told = [to_plain(answer) for answer in answers]
    able = [index for index, answer in enumerate(told) if answer["best"] is not None]
    return studied.PlansAnswer(
        command="simulate",
        status="feasible" if able else "infeasible",
        best=_best(told, able),
        plans=tuple(_named(answer, plan) for answer, plan in zip(answers, plans, strict=True)),
        differences=studied.Differences(
            plans=tuple(index + 1 for index in able), terms=tuple(of(studied.Term, term) for term in terms)
        ),
        question=answers[0].question,
        provenance=merged([answer["provenance"] for answer in told]),
        transient=said_of((f"plan {number}", answer) for number, answer in enumerate(told, 1)),
        notes=tuple(dict.fromkeys(note for answer in answers for note in answer.notes)),
    )


def _named(answer: types.Answer | types.MixedAnswer, plan: str) -> studied.ScoredPlan | studied.ScoredMixed:
    """The answer of a plan that is one of several."""
    if isinstance(answer, types.MixedAnswer):
        return of(studied.ScoredMixed, answer, plan=plan)
    return of(studied.ScoredPlan, answer, plan=plan)


def merged(provenances: Sequence[Provenance]) -> dict[str, str]:
    """Where the figures of all answers come from, every source told once."""
    clauses: dict[str, dict[str, None]] = {}
    for provenance in provenances:
        for figure, text in in_full(provenance).items():
            clauses.setdefault(figure, {}).update(dict.fromkeys(text.split("; ")))
    return {figure: "; ".join(found) for figure, found in clauses.items()}


def _best(answers: Sequence[Document], able: Sequence[int]) -> int | None:
    """The number of the plan that is best by the objective, of those within all goals where there are any; from 1."""
    meeting = [index for index in able if not _missed(answers[index]["best"])]
    known = [index for index in meeting or able if answers[index]["best"]["value"] is not None]
    if not known:
        return None
    sign = -1 if answers[0]["objective"]["direction"] == "maximise" else 1
    return 1 + min(known, key=lambda index: [sign * answers[index]["best"]["value"], *_then(answers[index])])


def _then(answer: Document) -> Iterator[float]:
    """What a plan reaches by the further objectives, less being better."""
    for part, value in zip(answer["then"], answer["best"]["then"], strict=True):
        sign = -1 if part["direction"] == "maximise" else 1
        yield float("inf") if value is None else sign * value


def compared_page(document: Document) -> str:
    """The same for people."""
    return page(lambda console: _page(console, document))


def _page(console: Console, document: Document) -> None:
    plans, objective = document["plans"], document["plans"][0]["objective"]
    question_line(console, document["question"])
    notes_lines(console, document)
    able = {f"#{rank}": plan["best"] for rank, plan in enumerate(plans, 1) if plan["best"] is not None}
    if document["best"] is not None:
        best = plans[document["best"] - 1]["best"]
        told = f", {objective['name']} = {amount(best['value'], objective['unit'])}"
        told += f", though it misses {', '.join(missed)}\n" if (missed := _missed(best)) else "\n"
        console.print(Text.assemble(f"best of {len(plans)} plans: ", (best["plan"], "bold green"), told))
    rows = [
        (f"#{rank}", plan["plan"], _word(plan, rank == document["best"], document))
        for rank, plan in enumerate(plans, 1)
    ]
    if not able:
        console.print()
    table(console, "Plans", ("", "plan", objective["name"]), rows, left={0, 1, 2})
    if able:
        side_by_side(console, "Side by side", able)
    if len(able) > 1:
        terms_table(console, list(able), document["differences"]["terms"])
    if able:
        provenance_table(console, document["provenance"])
    for rank, plan in enumerate(plans, 1):
        if "launch" in plan:
            console.print(Text(f"#{rank}: {plan['plan']}", "bold"))
            launch_section(console, plan["launch"])


def _word(plan: Document, is_best: bool, document: Document) -> str:
    """What became of a plan: its value and how far it is from the best, or why it cannot run."""
    if plan["best"] is None:
        return f"{plan['status']}: {plan['reason']}"
    value, unit = plan["best"]["value"], plan["objective"]["unit"]
    text = amount(value, unit)
    if is_best and len(document["plans"]) > 1:
        text += ", the best"
    elif document["best"] is not None:
        least = document["plans"][document["best"] - 1]["best"]["value"]
        if value is not None and least:
            text += f" ({value / least - 1:+z.1%})"
    return text + (f", misses {', '.join(missed)}" if (missed := _missed(plan["best"])) else "")


def _missed(run: Document) -> list[str]:
    """Goals that a run misses."""
    return [text for text, slo in run["metrics"]["slo"].items() if not slo["met"]]


def side_by_side(console: Console, title: str, runs: dict[str, Document]) -> None:
    """Figures of several runs, a row each with a column for each run.

    Parameters
    ----------
    runs : candidates as `candidate_document` gives them, by the head of their column
    """
    rows = [(name, *cells) for name, *cells in _figures(list(runs.values()))]
    table(console, title, ("", *runs), rows, left={0})


def _figures(runs: Sequence[Document]) -> Iterator[tuple[str, ...]]:
    """A name and a cell for each run, row by row."""
    metrics = [run["metrics"] for run in runs]

    def told(key: str) -> bool:
        return all(one.get(key) is not None for one in metrics)

    yield "GPUs", *(str(run["gpus"]) for run in runs)
    for text in metrics[0]["slo"]:
        yield text, *(_judged(text, one["slo"][text]) for one in metrics)
    for about in in_order():
        if all(about.key in one for one in metrics):
            for which in ("mean", "p95"):
                reached = (amount(one[about.key][which], about.unit.name) for one in metrics)
                yield f"{about.title} {which}", *reached
    yield "requests/s", *(f"{one['throughput_rps']:.3f}" for one in metrics)
    if told("goodput_rps"):
        yield "goodput, requests/s", *(f"{one['goodput_rps']:.3f}" for one in metrics)
    yield "output tokens/s", *(f"{one['output_tokens_per_s']:,.0f}" for one in metrics)
    yield "makespan", *(seconds(one["makespan_s"]) for one in metrics)
    yield "energy", *(amount(one["energy_j"], "J") for one in metrics)
    yield "J per output token", *(f"{one['energy_per_output_token_j']:.2f}" for one in metrics)
    yield "mean power", *(f"{one['mean_power_w']:,.0f} W" for one in metrics)
    if told("cost_usd_per_h"):
        yield "$/h", *(f"{one['cost_usd_per_h']:,.2f}" for one in metrics)
        yield "$ per million output tokens", *(f"{one['cost_usd_per_mtoken']:,.3f}" for one in metrics)
    for key in ("mfu", "mbu"):
        if told(key):
            yield key.upper(), *(f"{one[key]:.1%}" for one in metrics)
    if told("cached_tokens"):
        yield "prompt tokens found in the cache", *(f"{one['cache_hit_rate']:.1%}" for one in metrics)
    yield "batches", *(f"{one['batches']:,}" for one in metrics)
    yield "preemptions", *(f"{one['preemptions']:,}" for one in metrics)
    if all("memory" in run for run in runs):
        weights = [max(stage["weights_bytes"] for stage in run["memory"]) for run in runs]
        caches = [min(stage["kv_blocks"] * stage["kv_block_bytes"] for stage in run["memory"]) for run in runs]
        yield "weights per GPU, at most", *(amount(size, "B") for size in weights)
        yield "KV cache per GPU, at least", *(amount(size, "B") for size in caches)


def _judged(text: str, slo: Document) -> str:
    (goal,) = parse_goals(text)
    share = slo["unit"] == "share"
    reached = percent(slo["reached"], goal.fraction) if share else amount(slo["reached"], slo["unit"], goal.limit)
    return f"{'met' if slo['met'] else 'MISSED'}, {reached}"
