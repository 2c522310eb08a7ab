"""Distances between shapes."""

from __future__ import annotations

import numpy as np
import pytest

from apex_opt.profiles.shapes import (
    Shapes,
    attention_feature,
    encoder_feature,
    gemm_feature,
    moe_feature,
    state_feature,
)


def test_the_nearest_of_the_measured_shapes_of_heads_is_found_with_its_rows() -> None:
    table = {
        "heads": np.array([32, 32, 8, 64]),
        "kv_heads": np.array([8, 8, 8, 8]),
        "head_dim": np.array([128, 128, 128, 64]),
    }
    shapes = Shapes.of(table, np.array([True, True, True, False]))
    assert len(shapes.shapes) == 2
    for heads, rows in ((32, [0, 1]), (28, [0, 1]), (8, [2]), (9, [2])):
        found, away = shapes.nearest(heads, 8, 128)
        assert shapes.rows[found].tolist() == rows
        assert (away == 0) == (heads in (32, 8))


def test_a_table_of_latent_attention_has_one_cached_vector() -> None:
    shapes = Shapes.of({"heads": np.array([16, 128])}, np.array([True, True]))
    assert shapes.shapes.tolist() == [[16, 1, 576], [128, 1, 576]]


@pytest.mark.parametrize("feature", [gemm_feature, encoder_feature])
def test_a_shape_twice_as_large_lies_as_far_from_any(feature: object) -> None:
    assert callable(feature)
    one, two, four = (np.array(feature(n, 128)) for n in (1024, 2048, 4096))
    assert four - two == pytest.approx(two - one)


def test_every_size_of_a_shape_counts() -> None:
    for feature, sizes in (
        (attention_feature, (32, 8, 128)),
        (moe_feature, (4096, 1536, 128, 16, 8)),
        (state_feature, (32, 128, 128, 16)),
    ):
        plain = feature(*sizes)
        for place in range(len(sizes)):
            other = [size * (2 if at == place else 1) for at, size in enumerate(sizes)]
            assert feature(*other) != pytest.approx(plain)
