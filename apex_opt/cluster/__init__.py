"""Accelerators, links and clusters: domain types, the built-in catalogue and the reader of cluster files."""

from apex_opt.cluster.catalogue import list_clusters, list_gpus, load_cluster
from apex_opt.cluster.types import DTYPES, LINK_KINDS, MAX_GPUS, Cluster, Gpu, Link

__all__ = ["DTYPES", "LINK_KINDS", "MAX_GPUS", "Cluster", "Gpu", "Link", "list_clusters", "list_gpus", "load_cluster"]
