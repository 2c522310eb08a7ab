"""Clusters, models and traces: shown, imported, listed."""

from __future__ import annotations

from typing import Any

from apex_opt import arguments
from apex_opt.commands import Result, command
from apex_opt.files import expanded
from apex_opt.schema import to_plain


@command(arguments.ClusterShowAsk)
def cluster_show(ask: arguments.ClusterShowAsk) -> Result:
    """Show the GPUs of a cluster, how they are wired, and which are free."""
    from apex_opt.cluster import load_topology
    from apex_opt.report.topology import topology_document, write_topology

    topology = load_topology(ask.cluster)
    for state, text in (("busy", ask.busy), ("down", ask.down)):
        if text is not None:
            topology = topology.marked(state, topology.named(text, f"--{state}"))
    document = topology_document(topology)
    return Result(document=document, files={"plot": lambda path: write_topology(path, to_plain(document))})


@command(arguments.ClusterImportAsk)
def cluster_import(ask: arguments.ClusterImportAsk) -> Result:
    """Make a cluster file of what nvidia-smi topo -m printed, or of a list of nodes."""
    from apex_opt.cluster.importers import import_cluster
    from apex_opt.report.topology import import_document, write_toml

    composition, notes = import_cluster(expanded(ask.source), ask.gpu)
    document = import_document(composition, notes, ask.target)
    if ask.target is not None:
        write_toml(expanded(ask.target), document)
    return Result(document=document)


@command(arguments.ModelsAsk)
def models(ask: arguments.ModelsAsk) -> Result:
    """List the models that can be named, or tell whether a configuration is read."""
    from apex_opt.report.models import models_document

    document = models_document(ask.supports)
    return Result(document=document, found=document.reason is None)


@command(arguments.ClustersAsk)
def clusters(_: arguments.ClustersAsk) -> Result:
    """List the accelerators that can be named, and a node of each."""
    from apex_opt.cluster import list_clusters, load_cluster
    from apex_opt.report import listed
    from apex_opt.report.document import cluster_row

    found = [load_cluster(name) for name in list_clusters()]
    nodes = {cluster.gpu.name: cluster for cluster in found if cluster.nodes == 1}
    return Result(document=listed.Clusters(status="ok", clusters=tuple(map(cluster_row, nodes.values()))))


@command(arguments.TracesAsk)
def traces(_: arguments.TracesAsk) -> Result:
    """List the traces that ship with apex_opt."""
    from apex_opt.report import listed
    from apex_opt.workload import list_traces, load_trace

    shipped: list[dict[str, Any]] = [{**load_trace(name).summary(), "title": title} for name, title in list_traces()]
    return Result(document=listed.Traces(status="ok", traces=tuple(listed.ListedTrace(**row) for row in shipped)))
