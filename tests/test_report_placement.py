"""What `place` shows: its figures are those of the layouts, the tables and the document agree, moves add up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.arguments import PlaceAsk
from apex_opt.cluster import Tree, load_wiring
from apex_opt.placement import Shape, layout_of, rank_order
from apex_opt.placement.assignment import arranged
from apex_opt.planned import resolve_place
from apex_opt.report.placement import Found, Loss, Site, labels, place_document, refused_document
from apex_opt.report.placement_tables import place_page
from apex_opt.schema import to_plain
from apex_opt.search.facts import Facts
from formulations.placement import move, place_plan

if TYPE_CHECKING:
    from apex_opt.placement import Assignment

BUSY = "node0:0-3,node1:5"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def site_of(plan: str, cluster: str, **given: Any) -> Site:
    ((problem, parsed),) = resolve_place(PlaceAsk(plan, cluster=cluster, **given))
    return Site(problem=problem, plan=parsed, wiring=load_wiring(cluster), facts=Facts(problem))


def found_on(site: Site) -> Found:
    return place_plan(site.facts.layouts, site.plan)


def lost_from(site: Site, lost: tuple[str, ...], before: Assignment) -> Loss:
    """What becomes of a placement, with as many replicas as still fit."""
    tree = Tree.of(site.wiring, {*Tree.of(site.wiring).gpus} - ({*site.tree.gpus} - {*lost}))
    plan = replace(site.plan, replicas=min(site.plan.replicas, tree.size // site.shape.replica))
    measure = partial(site.facts.layouts.measured, plan)
    moved = move(tree, Shape.of(plan), measure, before, site.weights)
    assert moved is not None
    return Loss(
        gpus=lost,
        before=before,
        after=moved.assignment,
        tree=tree,
        plan=plan,
        replicas=moved.replicas,
        moved=moved.moved,
        moved_bytes=moved.moved_bytes,
        optimal=moved.optimal,
    )


def rows_of(text: str) -> set[str]:
    return {" ".join(line.split()) for line in text.splitlines()}


def test_the_figures_are_those_of_the_layouts_and_the_tables_have_them() -> None:
    site = site_of("dp2 tp8", "4xdgx-h100", busy=BUSY)
    found = found_on(site)
    document = to_plain(place_document(site, found))
    assert json.loads(json.dumps(document)) == document
    costs, shape = site.costs, Shape.of(site.plan)
    ordered = rank_order(site.tree, shape)
    for key, assignment in (("placement", found.assignment), ("rank_order", ordered)):
        layout = layout_of(site.tree, shape, assignment)
        row = document[key]
        assert row["collectives_s"] == costs.exchanged(site.plan, layout).seconds
        assert [(tier["kind"], tier["ranks"], tier["bytes_per_s"]) for tier in row["tiers"]] == [
            (tier.kind, tier.chunk, tier.link.bytes_per_s) for tier in layout.tiers
        ]
        assert sum(tier["sent_bytes"] for tier in row["tiers"]) == sum(costs.exchanged(site.plan, layout).sent)
        assert tuple(tuple(map(tuple, one["stages"])) for one in row["replicas"]) == assignment
    best, other = document["placement"], document["rank_order"]
    assert other["collectives_loss"] == other["collectives_s"] / best["collectives_s"] - 1 > 8
    assert other["step_s"] - best["step_s"] == pytest.approx(other["collectives_s"] - best["collectives_s"])
    assert document["status"] == "optimal"
    assert document["gpus"] == {"free": 27, "replica": 8, "plan": 16}
    assert {"all_reduce/intra", "all_reduce/inter"} <= set(document["provenance"])
    text = place_page(document)
    assert text.startswith(
        "llama-3.1-70b on 4xdgx-h100: dp2 attn(tp8) ffn(tp8) bf16 takes 16 GPUs, 27 h100-sxm-80gb are free\n"
    )
    rows = rows_of(text)
    loss = f"+{100 * other['collectives_loss']:.1f}%"
    assert any(row.startswith("rank order") and loss in row for row in rows)
    assert {"0 0 node2:0-7", "1 0 node3:0-7", "node2 0 CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"} <= rows
    assert "Left free: 11 GPUs, in groups inside nodes: 5 of 2, 2 of 4" in rows
    assert {"one node 7 0", "one leaf 11 1", "anywhere 11 1"} <= rows
    assert text.endswith(
        "Proof: no way to lay the plan out is better; no placement as good leaves more GPUs free together.\n"
    )


def test_what_a_batch_computes_is_the_same_wherever_it_lies() -> None:
    near, far = site_of("tp8", "8xh100-sxm"), site_of("tp8", "2x4xh100-sxm")
    steps = []
    for site in (near, far):
        best = to_plain(place_document(site, found_on(site)))["placement"]
        assert best["step_s"] == pytest.approx(site.computed_s + best["collectives_s"])
        steps.append(best["step_s"])
    there = far.layout(far.tree, rank_order(far.tree, far.shape))
    assert near.computed_s + near.collectives_s(there) == pytest.approx(steps[1], rel=1e-6)
    assert steps[1] > steps[0]


def test_a_batch_is_that_of_the_plan() -> None:
    site = site_of("tp4 seqs=3 tokens=10", "8xh100-sxm")
    assert site.batch == (10, 3)
    assert site.computed_s > 0
    assert to_plain(place_document(site, found_on(site)))["batch"] == {"tokens": 10, "sequences": 3}


def test_one_gpu_talks_to_nobody() -> None:
    site = site_of("dp2 tp1", "4xh100-sxm", model="llama-3.1-8b")
    document = to_plain(place_document(site, found_on(site)))
    assert document["placement"]["collectives_s"] == 0
    assert document["rank_order"]["collectives_loss"] is None
    assert document["rank_order"]["step_loss"] == 0
    text = place_page(document)
    assert "What the collectives cross" not in text
    assert any(row.startswith("rank order 0.0 us - ") for row in rows_of(text))


def test_a_given_placement_stands_beside_the_best() -> None:
    site = site_of("dp2 tp2", "server-8xl40s", model="llama-3.1-8b")
    given = arranged([f"node0:{local}" for local in (0, 4, 1, 5)], site.shape)
    document = to_plain(place_document(site, found_on(site), given))
    assert document["given"]["collectives_loss"] > 1
    assert any(row.startswith("as given ") and " socket " not in row for row in rows_of(place_page(document)))
    assert document["rank_order"]["collectives_loss"] == 0


def test_domains_with_room_are_listed_with_their_gpus() -> None:
    site = site_of("dp2 tp2", "server-8xl40s", model="llama-3.1-8b", busy="node0:1", down="node0:7")
    within = to_plain(place_document(site, found_on(site), within="socket"))["within"]
    assert within == {
        "kind": "socket",
        "domains": [
            {"name": "node0:socket0", "gpus": ["node0:0", "node0:2", "node0:3"], "replicas": 1},
            {"name": "node0:socket1", "gpus": ["node0:4", "node0:5", "node0:6"], "replicas": 1},
        ],
        "others": 0,
    }
    text = place_page(to_plain(place_document(site, found_on(site), within="switch")))
    assert {"node0:switch1 node0:2-3 1", "node0:switch2 node0:4-5 1", "2 others with free GPUs, but too few"} <= (
        rows_of(text)
    )


@pytest.mark.parametrize(
    ("plan", "given", "within", "kept", "reason"),
    [
        (
            "tp8",
            {"busy": "node1:0"},
            "socket",
            15,
            "needs 8 GPUs in one socket; the largest has 4 free (node0:socket0)",
        ),
        ("tp8", {"busy": "node0:0,node1:5-7"}, "node", 12, "needs 8 GPUs in one node; the largest has 7 free (node0)"),
        ("tp8", {}, None, 7, "a replica of {} needs 8 GPUs; 7 are free after the loss"),
        ("dp3 tp8", {}, None, 16, "cannot run: devices: the plan takes 24 GPUs, 16 are offered"),
        ("tp3", {}, None, 16, "cannot run: divisibility: attention tp3 does not divide 64 query heads"),
        ("tp1", {}, None, 16, "cannot run: memory: a GPU needs 144.7 GB (weights 141.1"),
        ("tp2 w8a8", {"cluster": "2xdgx-b200"}, None, 16, "cannot run: format: b200-sxm-180gb does not compute in"),
        ("tp2", {"max_model_len": 131072}, None, 16, "cannot run: memory: "),
        ("tp8", {}, "node", 16, None),
        ("pp2[70,10] tp8", {}, "leaf", 16, None),  # lopsided, but not impossible
    ],
)
def test_what_cannot_be_placed_is_refused_with_numbers(
    plan: str, given: dict[str, Any], within: str | None, kept: int, reason: str | None
) -> None:
    site = site_of(plan, **{"cluster": "2xdgx-h100", **given})
    found = site.refusal(within, kept)
    if reason is None:
        assert found is None
        return
    assert found is not None
    assert reason.format(site.plan) in found
    document = to_plain(refused_document(site, found))
    assert document["status"] == "infeasible"
    assert " ".join(found.split()) in " ".join(place_page(document).split())


def test_lost_gpus_are_made_up_for_with_the_fewest_moves() -> None:
    # Of ten GPUs that could be had two are left.
    site = site_of("dp2 pp2 tp2", "2xserver-8xl40s", model="llama-3.1-8b", busy="node1:2-7")
    found = found_on(site)
    lost = (found.assignment[0][1][0],)
    document = to_plain(place_document(site, found, loss=lost_from(site, lost, found.assignment)))
    loss = document["loss"]
    assert loss["used"] == list(lost) == loss["gpus"]
    assert loss["replicas_kept"] == [0, 1]
    assert loss["replicas_lost"] == []
    assert len(loss["moves"]) == loss["moved"] > 0
    assert sum(move["weights_bytes"] for move in loss["moves"]) == loss["moved_bytes"]
    assert {one["weights_bytes"] for one in loss["moves"]} <= set(site.weights)
    after = {gpu for one in loss["placement"]["replicas"] for stage in one["stages"] for gpu in stage}
    assert not after & set(lost)
    for one in loss["moves"]:
        old = loss["before"]["replicas"][one["before"]]["stages"][one["stage"]][one["rank"]]
        new = loss["placement"]["replicas"][one["replica"]]["stages"][one["stage"]][one["rank"]]
        assert (one["from"], one["to"]) == (old, new)
    assert loss["placement"]["collectives_s"] >= loss["before"]["collectives_s"]
    assert document["left"]["gpus"] == 1
    text = place_page(document)
    assert f"Lost: {lost[0]}; 1 of them held ranks of the plan" in rows_of(text)
    assert any(row.startswith("after 2 ") for row in rows_of(text))
    assert text.endswith("Proof: no placement after the loss is better; none as good moves less.\n")


def test_replicas_without_room_are_named() -> None:
    site = site_of("dp4 tp2", "8xh100-sxm", weights="fp8")
    found = found_on(site)
    loss = lost_from(site, ("node0:2", "node0:4", "node0:6"), found.assignment)
    document = to_plain(place_document(site, found, loss=loss))
    assert document["loss"]["plan"].startswith("dp2 ")
    assert len(document["loss"]["replicas_kept"]) == len(document["loss"]["replicas_lost"]) == 2
    assert document["left"]["gpus"] == 1
    text = " ".join(place_page(document).split())
    gone = ", ".join(map(str, document["loss"]["replicas_lost"]))
    assert f"No room for replicas {gone} any more: what is left is dp2 attn(tp2) ffn(tp2) fp8" in text


def test_gpus_that_held_nothing_change_nothing() -> None:
    site = site_of("tp4", "8xh100-sxm")
    found = found_on(site)
    spare = next(gpu for gpu in site.tree.gpus if gpu not in found.assignment[0][0])
    document = to_plain(place_document(site, found, loss=lost_from(site, (spare,), found.assignment)))
    assert (document["loss"]["moved"], document["loss"]["moves"]) == (0, [])
    assert document["loss"]["placement"]["collectives_loss"] == 0
    assert f"Lost: {spare}; none of them held ranks of the plan" in rows_of(place_page(document))


def test_what_is_left_of_a_plan_is_as_quick_as_if_it_were_placed_from_scratch() -> None:
    site = site_of("dp2 tp4", "server-8xl40s", model="llama-3.1-8b")
    before = found_on(site).assignment
    tree = Tree.of(site.wiring, ["node0:3"])
    fewer = site_of("tp4", "server-8xl40s", model="llama-3.1-8b", down="node0:3")
    layouts = fewer.facts.layouts
    moved = move(tree, fewer.shape, partial(layouts.measured, fewer.plan), before, site.weights)
    assert moved is not None
    assert moved.measure == place_plan(layouts, fewer.plan).measure


def test_long_tables_say_what_they_leave_out() -> None:
    site = site_of("dp20 tp2", "8xdgx-h100")
    text = place_page(to_plain(place_document(site, found_on(site))))
    assert text.count("and 4 more; --format=json has all") == 2


def test_the_picture_is_told_the_replica_the_stage_and_the_rank() -> None:
    assert labels(((("a", "b"), ("c", "d")), (("e", "f"), ("g", "h")))) == {
        "a": (0, "0/0"),
        "b": (0, "0/1"),
        "c": (0, "1/0"),
        "d": (0, "1/1"),
        "e": (1, "0/0"),
        "f": (1, "0/1"),
        "g": (1, "1/0"),
        "h": (1, "1/1"),
    }


def test_why_a_group_lies_in_nothing_smaller_is_said_where_it_is_so() -> None:
    site = site_of("dp3 pp2 tp2", "2xserver-8xl40s", model="llama-3.1-8b", busy="node0:0-1,node1:0-1")
    document = to_plain(place_document(site, found_on(site)))
    assert [one["group"] for one in document["placement"]["lies"]] == ["tp2", "a replica of 2 stages"]
    reason = document["placement"]["lies"][1]["reason"]
    assert "3 groups of a replica of 2 stages need 4 free GPUs in one" in reason
    assert reason in " ".join(place_page(document).split())
    whole = site_of("tp2", "server-8xl40s", model="llama-3.1-8b")
    assert "Where its groups lie" not in place_page(to_plain(place_document(whole, found_on(whole))))
