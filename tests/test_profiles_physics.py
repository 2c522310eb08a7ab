"""Work of kernels, counted by hand."""

from __future__ import annotations

import pytest

from apex_opt.profiles.physics import experts_work, gemm_work


def test_work_of_a_product_and_of_experts_is_counted_by_hand() -> None:
    flops, moved = gemm_work(3, 5, 7, 2.0, 1.0)
    assert (flops, moved) == (2 * 3 * 5 * 7, 5 * 7 * 1 + 3 * 7 * 2 + 3 * 5 * 2)
    # One token picks 2 of 4 experts, all on this rank: two experts of 3 x 8 x 16 weights.
    flops, moved = experts_work(1, 8, 16, 4, 4, 2, weight_bytes=2.0)
    assert flops == 2 * 2 * 3 * 8 * 16
    assert moved == pytest.approx(2 * 3 * 8 * 16 * 2 + 2 * 2 * (2 * 8 + 3 * 16))
    # At random many tokens touch all experts, and a few tokens the same expert twice; in balance as many as they can.
    random, even = (experts_work(2, 8, 16, 4, 4, 2, weight_bytes=2.0, balanced=flag)[1] for flag in (False, True))
    assert even - random == pytest.approx(3 * 8 * 16 * 2 * (4 - 3))
