"""What `cluster` shows: the same GPUs, links and figures in the document, the tables and the picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from apex_opt.cluster import Topology, load_topology
from apex_opt.cluster.node_files import composition_toml, load_preset
from apex_opt.errors import InputError
from apex_opt.report.topology import cluster_page, import_document, topology_document, write_toml, write_topology
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def marked() -> Topology:
    topology = load_topology("2xserver-8xl40s")
    return topology.marked("busy", ["node0:0", "node0:1"]).marked("down", ["node1:7"])


def test_the_document_has_every_gpu_domain_and_link() -> None:
    topology = marked()
    document = to_plain(topology_document(topology))
    assert json.loads(json.dumps(document)) == document
    assert document["count"] == {"free": 13, "busy": 2, "down": 1}
    assert [gpu["name"] for gpu in document["gpus"]] == list(topology.gpus())
    assert document["gpus"][0] == {"name": "node0:0", "node": 0, "gpu": "l40s-48gb", "state": "busy"}
    assert len(document["links"]) == len(topology.wires)
    assert document["domains"]["pcie"][0] == ["node0:0", "node0:1"]
    assert document["domains"]["node"][1][-1] == "node1:7"
    for row in document["reached"]:
        assert row["bytes_per_s"] == topology.bandwidth(row["from"], row["to"])
        assert row["latency_s"] == topology.latency(row["from"], row["to"])
    assert sum(row["gpus"] for row in document["reached"]) == 15


def test_the_tables_have_nodes_ways_and_links() -> None:
    text = cluster_page(to_plain(topology_document(marked())))
    assert text.startswith("2xserver-8xl40s: 16 GPUs, 13 free, 2 busy, 1 down\n")
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "node0 8 l40s-48gb - 4 of 2 2 of 4 4 of 2 6 2 0" in rows
    assert "node1 8 l40s-48gb - 4 of 2 2 of 4 4 of 2 7 0 1" in rows
    assert "node0:0 node0:1 1 pcie 32 GB/s 10.0 us" in rows
    assert "node0:0 node1:0 8 pcie, nic, leaf, nic, pcie 25 GB/s 22.0 us" in rows
    assert any(row.startswith("nic to leaf ethernet 8 25 GB/s 1.0 us assumed: one 200 Gb/s") for row in rows)
    alike = cluster_page(to_plain(topology_document(load_topology("4xdgx-h100"))))
    assert "node0-3" in alike
    assert "node1 " not in alike


def test_gpus_that_nothing_joins_are_shown_without_a_way() -> None:
    topology = marked()
    loose = Topology(name="loose", devices=topology.devices[:2], switches=(), wires=())
    document = to_plain(topology_document(loose))
    assert document["reached"] == []
    assert "loose: 2 GPUs, 2 busy" in cluster_page(document)


@pytest.mark.parametrize(("name", "start"), [("wiring.png", b"\x89PNG"), ("wiring.svg", b"<svg")])
def test_the_picture_is_what_its_name_says_and_nothing_is_left_beside_it(
    tmp_path: Path, name: str, start: bytes
) -> None:
    pytest.importorskip("vl_convert")
    for topology in (marked(), load_topology("h100-sxm"), load_topology("2xnvl72-gb200"), load_topology("8xmi300x")):
        write_topology(tmp_path / name, to_plain(topology_document(topology)))
        assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ranks_are_drawn_on_their_gpus_and_the_key_says_whose(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    ranks = {f"node0:{gpu}": (gpu // 2, f"{gpu % 2}/0") for gpu in range(2, 8)}
    ranks |= {f"node1:{gpu}": (3 + gpu, "0/0") for gpu in range(6)}
    path = tmp_path / "placed.svg"
    write_topology(path, to_plain(topology_document(marked())), ranks)
    text = path.read_text()
    assert all(f">{label}<" in text for label in ("replica 1", "replica 3", "free", "busy", "down"))
    assert "on GPUs: stage/rank" in text
    write_topology(path, to_plain(topology_document(marked())))
    assert "replica" not in path.read_text()


def test_a_picture_too_large_to_read_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    with pytest.raises(InputError, match="264 GPUs are above the 256 that a picture can show; draw fewer nodes"):
        write_topology(tmp_path / "a.png", to_plain(topology_document(load_topology("33xdgx-h100"))))
    assert not list(tmp_path.iterdir())


def test_a_file_made_is_printed_as_it_is_or_written_whole(tmp_path: Path) -> None:
    composition = load_preset("dgx-h100", 2)
    printed = import_document(composition, ("a note",), None)
    assert cluster_page(to_plain(printed)) == composition_toml(composition, ("a note",))
    written = import_document(composition, ("a note",), str(tmp_path / "made.toml"))
    write_toml(tmp_path / "made.toml", written)
    assert (tmp_path / "made.toml").read_text() == printed.toml
    assert cluster_page(to_plain(written)).startswith("2 nodes with 16 GPUs written to ")
    assert "a note" in cluster_page(to_plain(written))
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\); name a file in a folder"):
        write_toml(tmp_path / "gone" / "made.toml", written)
    assert [path.name for path in tmp_path.iterdir()] == ["made.toml"]
