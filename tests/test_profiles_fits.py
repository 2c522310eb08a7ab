"""Lines and envelopes through the rows of a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.profiles.fits import envelope, lines_of_batches, lines_of_windows, rising_line


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 40), st.floats(1e-7, 1e-1)),
        min_size=1,
        max_size=40,
        unique_by=lambda row: row[:2],
    )
)
def test_no_time_of_a_shape_is_above_that_of_a_larger_size(rows: list[tuple[int, int, float]]) -> None:
    shape, size, seconds = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = envelope(shape[:, None], size, seconds)
    for row in range(len(rows)):
        later = (shape == shape[row]) & (size >= size[row])
        assert found[row] == pytest.approx(seconds[later].min(), rel=1e-9)


def test_a_line_through_times_of_a_batch_is_found_again_with_its_share_of_the_roofline() -> None:
    context = np.array([1_000.0, 4_000.0, 16_000.0])
    for batch in (1.0, 8.0):
        total = batch * context
        ((size, base, share),) = lines_of_batches(np.full(3, batch), context, 5e-6 + total * 4e-9, 3e-9, 0.0)
        assert (size, base, share) == pytest.approx((batch, 5e-6, 0.75))


def test_a_batch_with_one_context_has_no_share_of_its_own() -> None:
    batch, context = np.array([1.0, 1.0, 4.0]), np.array([1_000.0, 4_000.0, 2_000.0])
    found = lines_of_batches(batch, context, 5e-6 + batch * context * 4e-9, 3e-9, 0.0)
    assert [size for size, _, _ in found] == [1, 4]
    assert np.isnan(found[1][2]) and found[1][1] == pytest.approx(5e-6)


def test_a_full_window_is_read_however_long_the_context() -> None:
    batch = np.array([1.0, 1.0, 8.0])
    seconds = np.array([6e-6, 6e-6, 5e-6 + 8 * 1_000 * 2e-9])
    found = lines_of_windows(batch, np.array([2_000.0, 9_000.0, 2_000.0]), seconds, 1e-9, 1_000)
    assert found[0] == pytest.approx((1, 6e-6, 1.0))
    assert found[1] == pytest.approx((8, 6e-6, 8 * 1_000 * 1e-9 / (seconds[2] - 6e-6)))


def test_widths_that_tell_nothing_leave_the_mean() -> None:
    assert rising_line(np.array([4.0, 4.0]), np.array([1.0, 3.0])) == (2.0, 0.0)
    assert rising_line(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx((1.5, 0.5))
