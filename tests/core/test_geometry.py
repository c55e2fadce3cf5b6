"""Geometry: affine maps between original and input pixels, and resampling of maps."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grounding.core.geometry import Geometry, GeometryError, grid_of, positive_int
from tests.support.tolerances import SAMPLED, close

SIDE = st.integers(1, 600)
GRID = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def geometries(draw):
    """Any resize followed by any crop or pad that leaves a part of the image."""
    resized = draw(st.tuples(SIDE, SIDE))
    window = draw(st.tuples(SIDE, SIDE))
    start = [draw(st.integers(1 - size, n - 1)) for size, n in zip(window, resized, strict=True)]
    return Geometry.from_steps(draw(SIDE), draw(SIDE), resized=resized, crop=(*start, *window), grid=draw(GRID))


def test_the_middle_of_a_wide_image():
    geometry = Geometry.from_steps(1600, 400, resized=(896, 224), crop=(336, 0, 224, 224), grid=(7, 7))
    assert geometry.seen == (600, 0, 1000, 400)
    assert geometry.seen_fraction == 0.25
    assert geometry.cell_box(0, 0) == pytest.approx((600, 0, 600 + 400 / 7, 400 / 7))
    assert geometry.cell_centre(3, 3) == pytest.approx((800, 200))
    assert geometry.cell_at(600.0, 0.0) == (0, 0)
    assert geometry.cell_at(999.9, 399.9) == (6, 6)
    assert geometry.cell_at(599.9, 200.0) is None
    assert geometry.cell_at(1000.0, 200.0) is None


def test_padding_is_no_part_of_the_image():
    # 100 x 50 in the middle of 100 x 100: the first and the last of four rows are padding.
    geometry = Geometry.from_steps(200, 100, resized=(100, 50), pad=(0, 25, 100, 100), grid=(4, 2))
    assert geometry.seen == (0, 0, 200, 100)
    assert geometry.seen_cells.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert geometry.cell_box(0, 1) is None
    assert geometry.cell_centre(3, 0) is None
    assert geometry.cell_box(1, 1) == (100, 0, 200, 50)
    maps = np.array([[np.nan] * 2, [1, 1], [2, 2], [np.nan] * 2])
    full = geometry.to_original(maps)
    assert np.isfinite(full).all()
    assert full[0, 0] == 1
    assert full[-1, -1] == 2


def test_a_grid_that_leaves_a_rest():
    # SigLIP so400m: patches of 14 on 384 pixels are 27, and the last 6 pixels are never read.
    geometry = Geometry.from_steps(384, 384, resized=(384, 384)).with_grid(27, 27, (14.0, 14.0))
    assert geometry.seen == (0, 0, 378, 378)
    assert geometry.cell_box(26, 0) == (0, 364, 14, 378)
    assert np.isnan(geometry.to_original(np.zeros((27, 27)))[378:]).all()


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**32 - 1))
def test_nan_exactly_where_unseen(geometry, seed):
    full = geometry.to_original(np.random.default_rng(seed).random((2, geometry.rows, geometry.columns)))
    assert full.shape == (2, geometry.height, geometry.width)
    assert full.dtype == np.float32
    x0, y0, x1, y1 = geometry.seen
    xs, ys = np.arange(geometry.width) + 0.5, np.arange(geometry.height) + 0.5
    seen_x, seen_y = (xs >= x0 - 1e-6) & (xs < x1 + 1e-6), (ys >= y0 - 1e-6) & (ys < y1 + 1e-6)
    if seen_x.any() and seen_y.any():
        unsure = np.isclose(xs, x0) | np.isclose(xs, x1), np.isclose(ys, y0) | np.isclose(ys, y1)
        wrong = np.isfinite(full[0]) != (seen_y[:, None] & seen_x)
        assert not wrong[np.ix_(~unsure[1], ~unsure[0])].any()
    assert np.isfinite(full).any(), "something is always seen"


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**32 - 1))
def test_points_boxes_and_cells_come_back(geometry, seed):
    points = np.random.default_rng(seed).uniform(-50, 700, (3, 5, 2))
    assert np.allclose(geometry.points_to_original(geometry.points_to_input(points)), points, rtol=1e-9, atol=1e-6)
    boxes = np.concatenate([points, points + 7], axis=-1)
    assert np.allclose(geometry.boxes_to_original(geometry.boxes_to_input(boxes)), boxes, rtol=1e-9, atol=1e-6)
    assert np.array_equal(geometry.boxes_to_input(boxes)[..., 2:], geometry.points_to_input(points + 7))
    area = 0.0
    for row in range(geometry.rows):
        for column in range(geometry.columns):
            box = geometry.cell_box(row, column)
            assert (box is not None) == geometry.seen_cells[row, column]
            if box is not None:
                area += (box[2] - box[0]) * (box[3] - box[1])
                assert geometry.cell_at(*geometry.cell_centre(row, column)) == (row, column)
    assert area == pytest.approx(geometry.seen_fraction * geometry.width * geometry.height)


@settings(max_examples=40, deadline=None)
@given(SIDE, SIDE, GRID, st.integers(0, 2**32 - 1))
def test_a_squashed_image_is_torch_interpolation(width, height, grid, seed):
    maps = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, *grid)))
    geometry = Geometry.from_steps(width, height, resized=(224, 160), grid=grid)
    for size in (None, (31, 17)):
        expected = torch.nn.functional.interpolate(maps[None], size or (height, width), mode="bilinear")[0]
        assert close(geometry.to_original(maps, size), expected, SAMPLED)


@settings(max_examples=30, deadline=None)
@given(geometries())
def test_json_and_back(geometry):
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    with_patch = geometry.with_grid(1, 1, (geometry.input_width * 1.0, geometry.input_height * 1.0))
    assert Geometry.from_dict(json.loads(json.dumps(with_patch.to_dict()))) == with_patch


def test_a_flat_map_stays_exactly_flat():
    geometry = Geometry.from_steps(641, 479, resized=(299, 224), crop=(37, 0, 224, 224), grid=(7, 7))
    full = geometry.to_original(np.full((7, 7), 0.1))
    assert set(np.unique(full[np.isfinite(full)])) == {np.float32(0.1)}


def test_a_nan_cell_spreads_to_the_pixels_that_read_it_and_no_further():
    maps = np.zeros((4, 4))
    maps[1, 1] = np.nan
    geometry = Geometry.from_steps(40, 40, resized=(4, 4), grid=(4, 4))
    expected = np.zeros((40, 40), dtype=bool)
    # Between the centres of the cells before and after, 5 and 25 pixels from the edge.
    expected[5:25, 5:25] = True
    assert np.array_equal(np.isnan(geometry.to_original(maps)), expected)


def test_torch_maps_of_any_type():
    geometry = Geometry.from_steps(8, 6, resized=(4, 4), grid=(2, 2))
    maps = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert (geometry.to_original(maps) == 1).all()


def test_a_strip_thinner_than_a_pixel_still_has_one_pixel():
    geometry = Geometry.from_steps(2, 1, resized=(512, 256), crop=(144, 16, 224, 224), grid=(7, 7))
    assert geometry.seen == (0.5625, 0.0625, 1.4375, 0.9375)
    assert np.isfinite(geometry.to_original(np.zeros((7, 7)))).tolist() == [[False, True]]
    assert geometry.seen_slices() == (slice(0, 1), slice(1, 2))


def test_a_thumbnail_is_the_same_field_of_view():
    geometry = Geometry.from_steps(1600, 400, resized=(896, 224), crop=(336, 0, 224, 224), grid=(7, 7))
    small = geometry.to_original(np.random.default_rng(0).random((7, 7)), size=(100, 400))
    assert np.isfinite(small).any(axis=0).nonzero()[0].tolist() == list(range(150, 250))


def test_composition_in_any_number_of_steps():
    once = Geometry.from_steps(300, 200, resized=(150, 50), crop=(25, 10, 100, 30))
    twice = Geometry(300, 200, 300, 200).resized(600, 400).resized(150, 50).cropped(20, 0, 110, 50)
    twice = twice.cropped(5, 10, 100, 30)
    assert twice.seen == once.seen == (50, 40, 250, 160)
    assert (twice.input_width, twice.input_height) == (100, 30)
    # A crop after padding may cut padding and image alike.
    padded = Geometry(100, 50, 100, 50).cropped(0, -25, 100, 100).cropped(10, 30, 50, 60)
    assert padded.seen == (10, 5, 60, 50)


def test_padding_after_a_crop_is_refused():
    for x0, width in ((10, 110), (0, 110)):
        with pytest.raises(GeometryError, match="not one affine map"):
            Geometry.from_steps(300, 200, resized=(150, 100), crop=(25, 0, 100, 100), pad=(x0, 0, width, 100))
    # Padding on a side that was not cut is one affine map.
    Geometry.from_steps(300, 200, resized=(150, 100), crop=(0, 0, 100, 100), pad=(10, 0, 110, 100))


def test_grid_of_a_token_sequence():
    assert grid_of(197, 1, 224, 224, 16) == (14, 14)
    assert grid_of(5 + 14 * 9, 5, 224, 150, 16) == (14, 9)
    assert grid_of(2 + 6, 2, 30, 40, (10, 20)) == (3, 2)
    with pytest.raises(GeometryError, match=r"197 tokens are not 0 \+ 14 x 14: .* makes 196"):
        grid_of(197, 0, 224, 224, 16)
    with pytest.raises(GeometryError, match=r"are not 1 \+ 0 x 14"):
        grid_of(1, 1, 15, 224, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"rows": -1}, "rows must be at least 1"),
        ({"scale": (1.0, -1.0)}, "scale must be positive"),
        ({"scale": (1.0, float("nan"))}, "scale must be finite"),
        ({"offset": (float("inf"), 0.0)}, "offset must be finite"),
        ({"patch": (0.0, 1.0)}, "patch must be positive"),
        ({"offset": (-100.0, 0.0)}, "no part of the image is in the model input"),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(GeometryError, match=message):
        Geometry(**({"width": 10, "height": 10, "input_width": 10, "input_height": 10} | change))


def test_values_of_the_wrong_kind():
    with pytest.raises(GeometryError, match=r"rows must be a whole number, got 1\.5"):
        positive_int("rows", 1.5)
    geometry = Geometry(10, 10, 10, 10, rows=2, columns=3)
    with pytest.raises(GeometryError, match=r"no cell \(2, 0\) in a grid of 2 x 3"):
        geometry.cell_box(2, 0)
    with pytest.raises(GeometryError, match=r"shape \(3, 2\) do not end in the grid 2 x 3"):
        geometry.to_original(np.zeros((3, 2)))
    with pytest.raises(GeometryError, match=r"expected an array \(\.\.\., 2\), got shape \(4, 3\)"):
        geometry.points_to_input(np.zeros((4, 3)))
    with pytest.raises(GeometryError, match="size must be at least 1"):
        geometry.to_original(np.zeros((2, 3)), (0, 5))
    with pytest.raises(GeometryError, match=r"not a geometry: .*colour"):
        Geometry.from_dict(geometry.to_dict() | {"colour": 1})
