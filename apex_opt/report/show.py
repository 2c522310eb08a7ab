"""A document on stdout, in the form asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.process import put

if TYPE_CHECKING:
    from apex_opt.report.document import Document


def show(document: Document, form: str, limit: int = 0, *, sources: bool = False) -> None:
    """Print a document, whole, as "json" or as a "table".

    Parameters
    ----------
    document, form
    limit : int       runs in the table of `validate`
    sources : bool    whether tables tell where every figure comes from, rather than in groups; json does in any case

    Raises
    ------
    InputError         stdout cannot be written
    """
    if form != "json" and "provenance" in document and not sources:
        from apex_opt.report.sources import in_groups

        document = document | {"provenance": in_groups(document["provenance"])}
    if form == "json":
        import json

        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    elif "fastest" in document:
        from apex_opt.report.clusters import clusters_page

        text = clusters_page(document)
    elif "plans" in document:
        from apex_opt.report.side_by_side import compared_page

        text = compared_page(document)
    elif document.get("command") == "validate":
        from apex_opt.report.validation_tables import validation_page

        text = validation_page(document, limit)
    elif document.get("command") == "capacity":
        from apex_opt.report.capacity import capacity_page

        text = capacity_page(document)
    elif document.get("command") == "pareto":
        from apex_opt.report.pareto import pareto_page

        text = pareto_page(document)
    elif document.get("command") == "explain":
        from apex_opt.report.explain import explanation_page

        text = explanation_page(document)
    elif "certificates" in document:
        from apex_opt.report.mixed import mixed_page

        text = mixed_page(document)
    elif document.get("command") == "place":
        from apex_opt.report.placement import place_page

        text = place_page(document)
    elif document.get("command", "").startswith("cluster "):
        from apex_opt.report.topology import cluster_page

        text = cluster_page(document)
    elif document.get("command", "").startswith("profile "):
        from apex_opt.report.profile_tables import profile_page

        text = profile_page(document)
    else:
        from apex_opt.report.tables import rendered

        text = rendered(document)
    put(text)
