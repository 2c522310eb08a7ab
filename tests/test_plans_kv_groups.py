"""Layers that keep different things are put into groups over one pool as vLLM puts them."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import InputError, UsageError
from apex_opt.plans.kv_groups import KvGroup, KvLayer, Limits, share_pool
from apex_opt.simulator import replay_case

if TYPE_CHECKING:
    from pathlib import Path

FULL = KvLayer(kind="full", block_size=16, page_bytes=16 * 2048)
WINDOW = KvLayer(kind="window", block_size=16, page_bytes=16 * 2048, window=128)
STATE = KvLayer(kind="state", block_size=4096, page_bytes=544 * 2048)
GIB = 1 << 30


def test_gpt_oss_has_two_groups_of_twelve_layers_and_54613_blocks_in_20_gib() -> None:
    found = share_pool([WINDOW, FULL] * 12, 20 * GIB)
    assert (len(found.groups), [len(group) for group in found.groups], found.blocks) == (2, [12, 12], 54613)


def test_a_kind_that_has_more_layers_is_dealt_to_several_groups_in_turn() -> None:
    found = share_pool([WINDOW] * 5 + [FULL] * 2, GIB)
    assert found.groups == ((0, 3), (1, 4), (2,), (5, 6))
    assert found.blocks == GIB // (16 * 2048) // 2


def test_kinds_of_nearly_as_many_layers_make_a_group_each_as_large_as_the_larger() -> None:
    assert share_pool([WINDOW] * 12 + [FULL] * 13, GIB).blocks == GIB // (16 * 2048) // 13


def test_layers_that_all_see_all_tokens_share_one_group_whatever_their_sizes() -> None:
    large = KvLayer(kind="full", block_size=16, page_bytes=16 * 4096)
    found = share_pool([FULL, large], GIB)
    assert (found.groups, found.block_size, found.blocks) == (((0, 1),), (16,), GIB // (16 * 6144))


def test_windows_that_are_not_kept_apart_count_as_full() -> None:
    assert share_pool([WINDOW, FULL] * 12, 20 * GIB, hybrid=False) == share_pool([FULL] * 24, 20 * GIB)


def test_smaller_pages_get_blocks_of_more_tokens() -> None:
    assert share_pool([STATE, STATE, FULL], GIB).block_size == (4096, 4096, 544)


@pytest.mark.parametrize(
    ("layers", "hybrid", "message"),
    [
        ([FULL, KvLayer(kind="window", block_size=16, page_bytes=16 * 3072, window=8)], True, "do not divide"),
        ([FULL, KvLayer(kind="state", block_size=16, page_bytes=1024)], True, "a state of 1024 bytes does not fill"),
        ([FULL, WINDOW, KvLayer(kind="window", block_size=16, page_bytes=16, window=9)], False, "windows of 9 and 128"),
        ([WINDOW, KvLayer(kind="window", block_size=16, page_bytes=16, window=9)], False, "windows of 9 and 128"),
        ([], True, "needs a layer"),
    ],
)
def test_layers_that_have_no_common_pool_are_refused(layers: list[KvLayer], hybrid: bool, message: str) -> None:
    with pytest.raises(InputError, match=message):
        share_pool(layers, GIB, hybrid=hybrid)


@given(st.lists(st.sampled_from([FULL, WINDOW, STATE]), min_size=1, max_size=40), st.integers(0, 1 << 36))
def test_every_layer_is_in_one_group_and_a_pool_never_exceeds_its_memory(layers: list[KvLayer], memory: int) -> None:
    found = share_pool(layers, memory)
    assert sorted(place for group in found.groups for place in group) == list(range(len(layers)))
    size = max(map(len, found.groups))
    page = FULL.page_bytes if set(layers) <= {FULL, WINDOW} else STATE.page_bytes
    assert found.blocks * size * page <= memory < (found.blocks + 1) * size * page


@pytest.mark.parametrize(
    "group",
    [
        KvGroup(kind="full", block_size=16),
        *(KvGroup(kind="window", block_size=size, window=window) for size in (4, 16) for window in (1, 7, 16, 50)),
        *(KvGroup(kind="chunk", block_size=8, window=window) for window in (8, 32)),
        KvGroup(kind="state", block_size=256),
    ],
    ids=lambda group: f"{group.kind}-{group.block_size}-{group.window}",
)
def test_what_is_held_at_least_is_no_more_than_at_any_later_token(group: KvGroup) -> None:
    limits = Limits(max_num_batched_tokens=64, max_model_len=512, drafts=0)
    tokens = np.arange(1, 400)
    held = group.held(tokens + 1, tokens, limits)
    later = np.minimum.accumulate(held[::-1])[::-1]
    least = group.least(tokens, limits)
    assert (least <= later)[:300].all()
    assert (least > 0).all()


def test_a_case_that_cannot_be_read_is_refused_by_its_layer() -> None:
    good = {"kind": "full", "block_size": 16, "token_bytes": 2048}
    for wrong, message in (
        ({"kind": "ful"}, "layer 1: kind must be full, window or state, got ful"),
        ({"block_size": 0}, "layer 1: block_size and token_bytes must be from 1"),
        ({"token_bytes": None}, "layer 1: block_size, token_bytes must be 2 whole"),
    ):
        with pytest.raises(UsageError, match=message):
            replay_case("pool_sizes", {"layers": [good, good | wrong], "hybrid": True, "available_bytes": GIB})


@pytest.mark.data
def test_groups_and_pools_are_those_that_vllm_made(shared: Path) -> None:
    recorded = json.loads(gzip.decompress((shared / "scheduler-golden/hybrid/pool_sizes.json.gz").read_bytes()))
    assert len(recorded) == 150
    for case in recorded:
        found = replay_case("pool_sizes", {key: case[key] for key in ("layers", "hybrid", "available_bytes")})
        assert found == {key: case[key] for key in found}
