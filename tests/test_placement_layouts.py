"""The best layouts of plans: numbers of replicas that are said to lie alike do."""

from __future__ import annotations

import pytest

from apex_opt.cluster import Tree, load_wiring
from apex_opt.placement import Layouts
from apex_opt.plans.plan import Plan, Template

TAKEN = {"4xdgx-h100": ("node0:3", "node2:0"), "server-8xl40s": ("node0:1",)}


@pytest.mark.parametrize("spec", ["16x8xh200-sxm", "4xdgx-h100", "nvl72-gb200", "server-8xl40s"])
def test_numbers_of_replicas_said_to_lie_alike_have_the_layout_that_each_has_on_its_own(spec: str) -> None:
    for taken in ((), TAKEN.get(spec, ())):
        tree = Tree.of(load_wiring(spec), set(taken))
        grouped, single = (Layouts(tree, lambda plan, layout: (len(layout.tiers), repr(layout))) for _ in range(2))
        for tp, pp in ((1, 1), (2, 3), (3, 2), (8, 2), (16, 1)):
            if tp * pp > tree.size:
                continue
            cut = Template(tp=tp)
            plan = Plan(replicas=1, layers=(1,) * pp, attention=cut, ffn=cut, weight_format="bf16", kv_format="bf16")
            counts = range(1, tree.size // plan.devices + 1)
            found = {count: layout for layout, some in grouped.alike(plan, counts) for count in some}
            assert found == {count: single.best(plan.times(count)) for count in counts}
