"""Accelerators, links and clusters: domain types, the built-in catalogue, cluster files and single GPUs' wiring."""

from apex_opt.cluster.catalogue import (
    assumed_network,
    cluster_names,
    list_clusters,
    load_cluster,
    load_pools,
    load_topology,
    load_wiring,
)
from apex_opt.cluster.composition import Composition, Level, Network, Node
from apex_opt.cluster.node_files import list_presets
from apex_opt.cluster.topology import Device, Switch, Topology
from apex_opt.cluster.tree import Tree, free_types
from apex_opt.cluster.types import DTYPES, LINK_KINDS, MAX_GPUS, Cluster, Gpu, Link
from apex_opt.cluster.uniform import gpu_name, is_named, list_gpus

__all__ = [
    "DTYPES",
    "LINK_KINDS",
    "MAX_GPUS",
    "Cluster",
    "Composition",
    "Device",
    "Gpu",
    "Level",
    "Link",
    "Network",
    "Node",
    "Switch",
    "Topology",
    "Tree",
    "assumed_network",
    "cluster_names",
    "free_types",
    "gpu_name",
    "is_named",
    "list_clusters",
    "list_gpus",
    "list_presets",
    "load_cluster",
    "load_pools",
    "load_topology",
    "load_wiring",
]
