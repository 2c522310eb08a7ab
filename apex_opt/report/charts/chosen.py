"""Which charts an answer has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.report.charts import runs, wiring
from apex_opt.report.charts.front import candidates_chart, errors_charts, front_charts, rates_chart
from apex_opt.report.charts.grid import study_charts
from apex_opt.report.charts.sides import clusters_chart, curve_charts, differences_chart
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.report.charts import Chart
    from apex_opt.report.detail import Detail
    from apex_opt.schema import Document


def charts_of(document: Document, details: Sequence[Detail] = ()) -> Iterator[tuple[str, Chart]]:
    """The charts of an answer, each with the heading of the section that it belongs to.

    Parameters
    ----------
    document : as plain data
    details : of the deployments whose runs are told
    """
    best = document.get("best")
    best = best if isinstance(best, dict) else None
    yield from (("Where it goes", chart) for chart in _places(document, details))
    if best is not None and ("memory" in best or "parts" in best):
        yield from (("Where it goes", chart) for chart in runs.memory_chart(best))
    yield from (("What requests see", chart) for chart in runs.latency_charts(details))
    yield from (("Load over time", chart) for chart in runs.load_charts(details))
    yield from (("Compared", chart) for chart in _compared(document))
    yield from (("Capacity", chart) for chart in curve_charts(details))
    if best is not None and "metrics" in best:
        yield from (("Where the time goes", chart) for chart in runs.operations_chart(best))
    if document.get("command") != "simulate":
        yield from (("Proof", chart) for chart in runs.certificate_chart(document))


def _places(document: Document, details: Sequence[Detail]) -> Iterator[Chart]:
    """Wiring, and the GPUs that plans take."""
    if "links" in document and "switches" in document and len(document["gpus"]) <= wiring.MOST_GPUS:
        yield wiring.topology_chart(document)
    if "devices" in document:
        placement = document["loss"]["placement"] if document["loss"] else document["placement"]
        yield wiring.placement_chart(placement["replicas"])
    for detail in details:
        for place, pool in enumerate(detail.replicas):
            of = detail.pools[place]
            yield wiring.placement_chart(to_plain(pool), f"Where it goes: {of}")


def _compared(document: Document) -> Iterator[Chart]:
    """Plans, clusters or runs beside each other."""
    if "objectives" in document and document["candidates"]:
        yield from front_charts(document)
    elif document.get("command") == "capacity" and "asked" in document:
        yield from rates_chart(document)
    elif "objective" in document and document.get("candidates"):
        yield from candidates_chart(document)
    if "rows" in document and "units" in document:
        yield from errors_charts(document)
    if "points" in document and "asked" in document:
        yield from study_charts(document)
    if "differences" in document:
        yield from differences_chart(document)
    if isinstance(document.get("clusters"), list) and "fastest_by" in document:
        yield from clusters_chart(document)
