"""Clusters of all kinds of nodes, for property tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from apex_opt.cluster import Composition, Level, Link, Network, Node, list_gpus, load_cluster

if TYPE_CHECKING:
    from pathlib import Path

GPUS = [load_cluster(name).gpu for name in list_gpus()]
RATES = st.sampled_from([10.0, 12.5, 25.0, 31.5, 64.0, 112.5, 450.0])
LATENCIES = st.sampled_from([0.0, 0.35, 1.0, 1.5, 5.0])


def links(*kinds: str) -> st.SearchStrategy[Link]:
    return st.builds(
        lambda rate, latency, kind: Link(
            bytes_per_s=rate * 1e9, latency_s=latency / 1e6, kind=kind, source='as "stated"'
        ),
        RATES,
        LATENCIES,
        st.sampled_from(kinds),
    )


def groups(gpus: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(gpus[at : at + size])) for at in range(0, len(gpus), size))


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    """One node: its GPUs in any order, cut into sockets, those into switches, and so on."""
    count = draw(st.integers(1, 6))
    order = draw(st.permutations(range(count)))
    sockets = groups(order, draw(st.integers(1, count)))
    switch = draw(st.integers(0, 3))
    switches = tuple(group for socket in sockets for group in groups(list(socket), switch)) if switch else ()
    nvlink = groups(order, draw(st.integers(1, count)))[: draw(st.integers(1, count))]
    return Node(
        gpu=draw(st.sampled_from(GPUS)),
        gpus=count,
        nvlink=Level(nvlink, draw(links("nvlink"))) if draw(st.booleans()) else None,
        pcie=Level(switches, draw(links("pcie"))),
        sockets=Level(sockets, draw(links("pcie"))),
        nics=Level(groups(order, draw(st.integers(1, count))), draw(links("infiniband", "ethernet"))),
    )


@st.composite
def compositions(draw: st.DrawFn) -> Composition:
    """Up to three kinds of nodes, on leaf switches of one or more."""
    ratio, per_leaf = draw(st.sampled_from([1.0, 2.0, 1.75])), draw(st.none() | st.integers(1, 3))
    network = Network(nodes_per_leaf=per_leaf, rails=draw(st.booleans()), oversubscription=ratio)
    entries = draw(st.lists(st.tuples(st.integers(1, 2), nodes()), min_size=1, max_size=3))
    return Composition(name="drawn", nodes=tuple(entries), network=network)


LAB = """
[[nodes]]
count = 2
preset = "dgx-h100"

[[nodes]]
preset = "server-8xl40s"
gpus = 4
nics = { gpus = 4, gb_per_s = 12.5 }

[[nodes]]
gpu = "a100-sxm"
gpus = 4
nvlink = { gpus = [[0, 3], [1, 2]], gb_per_s = 300, latency_us = 1.5 }
pcie = { gpus = 2, gb_per_s = 32, latency_us = 3 }
sockets = { gpus = 2, gb_per_s = 20, latency_us = 1 }
nics = { gpus = 4, gb_per_s = 12.5, latency_us = 5, kind = "ethernet" }

[network]
nodes_per_leaf = 2
oversubscription = 2
"""


def write_cluster(folder: Path, text: str) -> str:
    path = folder / "lab.toml"
    path.write_text(text)
    return str(path)
