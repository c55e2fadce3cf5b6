"""Diagnosis, views, peaks and boxes of raw maps, on cases with known answers."""

import numpy as np
import pytest

from grounding.core.geometry import Geometry
from grounding.explanation import maps

NAN = np.nan
ALL = np.ones((2, 2), bool)


@pytest.mark.parametrize(
    ("raw", "signed", "reason"),
    [
        ([[0, 0], [0, 0]], True, "zero everywhere"),
        ([[3, 3], [3, 3]], False, "flat"),
        ([[3, 3], [3, 3 + 1e-7]], False, "flat"),
        ([[-1, -2], [-3, 0]], True, "all negative"),
        ([[-1, -2], [-3, 0.1]], True, None),
        ([[0.2, 0.1], [0.3, 0.1]], False, None),
    ],
)
def test_blank_maps_are_diagnosed(raw, signed, reason):
    status = maps.diagnose(np.array(raw, np.float64), ALL, signed=signed)
    assert bool(status) == (reason is None)
    assert reason is None or reason in status.reason


def test_only_seen_patches_count():
    raw = np.array([[9.0, 1.0], [2.0, 1.0]])
    seen = np.array([[False, True], [True, True]])
    assert maps.peak_cell(raw, seen) == (1, 0)
    assert maps.diagnose(np.where(seen, 1.0, 5.0), seen, signed=False).reason.startswith("flat")
    assert maps.peak_cell(raw, np.zeros((2, 2), bool)) is None
    assert not maps.diagnose(raw, np.zeros((2, 2), bool), signed=False)


def test_peak_is_the_centre_of_the_strongest_patch_and_the_first_of_equals():
    geometry = Geometry.from_steps(40, 20, resized=(40, 20)).with_grid(2, 4)
    raw = np.zeros((2, 4))
    raw[1, 2] = raw[1, 3] = 1
    assert maps.peak(raw, geometry) == (25.0, 15.0)


def test_view_is_relu_or_threshold_of_the_maximum():
    raw = np.array([-2.0, 0.3, 1.0, NAN])
    assert np.array_equal(maps.view(raw, signed=True), [0, 0.3, 1, NAN], equal_nan=True)
    assert np.array_equal(maps.view(raw, signed=True, threshold=0.5), [0, 0, 1, NAN], equal_nan=True)
    assert maps.view(raw, signed=False) is raw


def test_rescale_never_divides_by_zero():
    assert np.array_equal(maps.rescale(np.array([1.0, 2.0, 3.0, NAN]), 1.0, 3.0), [0, 0.5, 1, NAN], equal_nan=True)
    assert np.array_equal(maps.rescale(np.array([2.0, NAN]), 2.0, 2.0), [0, NAN], equal_nan=True)
    assert maps.limits([np.array([NAN])], "entry", None) == (0, 0)


def test_limits_of_each_scale():
    pair = [np.array([1.0, 4.0]), np.array([-2.0, NAN])]
    assert maps.limits(pair, "caption", None) == (-2, 4)
    assert maps.limits(pair[:1], "entry", None) == (1, 4)
    assert maps.limits(pair, "fixed", (0.0, 1.0)) == (0, 1)
    with pytest.raises(ValueError, match="low < high"):
        maps.limits(pair, "fixed", (1.0, 1.0))


def test_box_is_the_largest_region_above_half_of_the_range():
    heat = np.zeros((10, 20), np.float32)
    heat[1:3, 1:3] = 1.0  # stronger, but small
    heat[4:8, 10:16] = 0.6
    assert maps.box(heat) == (10, 4, 16, 8)
    assert maps.box(heat, 0.7) == (1, 1, 3, 3)
    assert maps.box(heat, "otsu") == (10, 4, 16, 8)
    heat[:, :12] = NAN
    assert maps.box(heat) == (12, 4, 16, 8)


@pytest.mark.parametrize("heat", [np.zeros((4, 4)), np.full((4, 4), 2.0), np.full((4, 4), NAN)])
def test_no_box_from_an_empty_or_flat_map(heat):
    assert maps.box(heat) is None
