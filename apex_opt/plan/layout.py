"""Where a plan's groups sit when they are placed one after another, as engines do by default.

Ranks are dealt to GPUs in order: replica by replica, stage by stage. A stage group stays inside a node where the nodes
have room for all groups that way; else groups follow each other without gaps and some span nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apex_opt.cluster.types import Cluster, Link
    from apex_opt.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Spans of the worst-placed groups of a plan.

    Parameters
    ----------
    nodes, gpus_per_node : int
    packed : bool               every stage group lies inside one node
    together : bool             every replica lies inside one node
    stage_devices : int
    """

    nodes: int
    gpus_per_node: int
    packed: bool
    together: bool
    stage_devices: int

    @classmethod
    def of(cls, plan: Plan, cluster: Cluster) -> Layout:
        """The default layout of a plan on a cluster."""
        per_node = cluster.gpus_per_node // plan.stage_devices
        groups = plan.replicas * plan.stages
        packed = per_node * cluster.nodes >= groups
        # Replica r takes stage groups r * stages onwards; after as many as a node has groups they lie alike again.
        together = packed and all(
            first % per_node + plan.stages <= per_node
            for first in range(0, plan.stages * min(plan.replicas, per_node), plan.stages)
        )
        return cls(
            nodes=cluster.nodes,
            gpus_per_node=cluster.gpus_per_node,
            packed=packed,
            together=together,
            stage_devices=plan.stage_devices,
        )

    def first_gpu(self, group: int) -> int:
        """GPU of the cluster with which a stage group of the plan begins."""
        if not self.packed:
            return group * self.stage_devices
        node, place = divmod(group, self.gpus_per_node // self.stage_devices)
        return node * self.gpus_per_node + place * self.stage_devices

    def nodes_spanned(self, ranks: int) -> int:
        """Nodes that a group of consecutive ranks of a stage touches, at worst."""
        if ranks == 1 or self.packed:
            return 1
        if self.gpus_per_node % ranks == 0 and self.stage_devices % ranks == 0:
            return 1  # aligned to the node
        aligned = ranks % self.gpus_per_node == 0 and self.stage_devices % self.gpus_per_node == 0
        # Unaligned, a group can begin with the last GPU of a node.
        worst = ranks // self.gpus_per_node if aligned else (ranks - 2) // self.gpus_per_node + 2
        return min(self.nodes, worst)

    def stage_link(self, cluster: Cluster) -> Link:
        """Link between consecutive stages: inside a node only where the stages of every replica share one."""
        if self.together or cluster.inter is None:
            return cluster.intra
        return cluster.inter
