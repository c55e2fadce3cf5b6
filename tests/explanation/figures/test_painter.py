"""One map over its image: colours, unseen areas, maps without evidence, marks."""

import numpy as np
import pytest
from PIL import Image

from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.explanation.figures.comparison import figure
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.overlays import overlay
from grounding.explanation.figures.painter import limits_of
from grounding.explanation.figures.pixels import colour_table, grid_lines
from tests.support.explanations import column, explanation, whole
from tests.support.figures import PLAIN, RAMP, colourful, images, painted, ramp, words

# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("name", ["jet", "magma", "viridis", "gray", "RdBu_r"])
def test_the_ends_of_a_map_have_the_end_colours_of_its_colour_map(name):
    table = colour_table(name).astype(int)
    drawn = painted(ramp(), cmap=name, opacity=1.0)
    assert np.abs(drawn[32, -1] - table[-1]).max() <= 1
    assert np.abs(drawn[32, 0] - table[0]).max() <= 1


def test_jet_is_the_right_way_round():
    red, _, blue = painted(ramp(), cmap="jet")[32].T
    assert red[-1] > blue[-1] + 60
    assert blue[0] > red[0] + 20


def test_more_heat_is_always_more_colour():
    made = ramp(signed=False)
    grey = painted(made, cmap="gray", opacity=0.6)[32, :, 0]
    assert (np.diff(grey) >= 0).all()
    assert grey[-1] > grey[0] + 40


def test_the_image_stays_recognisable_under_the_heat():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::8] = stripes[1::8] = stripes[2::8] = stripes[3::8] = 255
    drawn = painted(ramp(Image.fromarray(stripes))).mean(-1)
    assert (drawn[2:58:8] - drawn[6:62:8] > 60).all()


def test_opacity_zero_shows_the_muted_image_and_no_heat():
    assert not colourful(painted(ramp(), opacity=0.0)).any()


def test_signed_maps_are_red_for_blue_against_white_at_zero():
    drawn = painted(ramp(), signed=True, opacity=1.0)[32]
    assert drawn[-1][0] > drawn[-1][2] + 60
    assert drawn[0][2] > drawn[0][0] + 60
    assert drawn[24].min() > 230  # the cell of the zero: columns 16 to 31


def test_signed_limits_are_symmetric():
    made = explanation()
    low, high = limits_of([made.map(0)], FigureOptions(signed=True))
    assert (low, high) == (-high, pytest.approx(np.abs(made.map(0).raw).max()))


# ---------------------------------------------------------------- unseen areas, maps without evidence


@pytest.mark.parametrize("background", ["black", "white", "red"])
def test_the_unseen_area_is_hatched_and_never_coloured(background):
    image = Image.new("RGB", (192, 64), background)
    geometry = Geometry.from_steps(192, 64, resized=(192, 64), crop=(64, 0, 64, 64), grid=(4, 4))
    drawn = painted(ramp(image, geometry=geometry), cmap="jet")
    unseen = np.ones((64, 192), bool)
    unseen[:, 64:128] = False
    assert (drawn[unseen].max(-1) == drawn[unseen].min(-1)).all()
    assert colourful(drawn)[~unseen].mean() > 0.9
    left = drawn[:, :60, 0]
    assert len(np.unique(left)) == 2, "pale background and a darker line"
    assert left.max() - left.min() > 30
    assert left.min() > 40, "a line on black must be visible"


@pytest.mark.parametrize(("maps", "reason"), [
    (np.zeros((1, 4, 4)), "zero everywhere"), (np.ones((1, 4, 4)), "flat"), (-RAMP - 2, "all negative"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"signed": True}, {"background": "edges"}])
def test_a_map_without_evidence_has_no_heat_and_a_reason(maps, reason, options):
    geometry = whole(64, 64)
    image = Image.new("RGB", (64, 64), "red")
    made = explanation(image, labels=("x",), geometry=geometry, columns=[column("gradcam", maps, geometry)])
    drawn = figure(made, **options)
    assert not colourful(images(drawn)["overlay:gradcam:0"]).any()
    assert f"no evidence: {reason}" in words(drawn)
    assert not colourful(images(figure(made, layout="panels", **options))["heat:gradcam:0"]).any()


def test_a_map_without_evidence_does_not_change_a_shared_scale():
    geometry = whole(64, 64)
    maps = np.stack([RAMP[0], -1000 - RAMP[0], RAMP[0] * 2])
    made = explanation(geometry=geometry, image=Image.new("RGB", (64, 64)), columns=[column("gradcam", maps, geometry)])
    assert limits_of(list(made), FigureOptions(signed=True, scale="caption")) == (-2, 2)


@pytest.mark.parametrize("scale", [{"scale": "caption"}, {"scale": "fixed", "fixed": (-2.0, 2.0)}])
def test_a_map_without_evidence_has_no_heat_on_a_shared_scale_either(scale):
    geometry = whole(64, 64)
    one = column("gradcam", np.stack([RAMP[0], RAMP[0] - 3]), geometry)
    made = explanation(Image.new("RGB", (64, 64)), labels=("a", "b"), geometry=geometry, columns=[one])
    for options in ({}, {"signed": True}):
        panels = images(figure(made, **scale, **options), "overlay")
        assert colourful(panels["overlay:gradcam:0"]).any()
        assert not colourful(panels["overlay:gradcam:1"]).any()


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize("background", ["black", "white", "yellow"])
def test_the_peak_is_marked_visibly_on_every_background(background):
    made = ramp(Image.new("RGB", (640, 640), background))
    without, marked = painted(made), painted(made, peak=True)
    changed = np.abs(without - marked).max(-1) > 0
    rows, columns = np.nonzero(changed)
    x, y = made.map(0).peak
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == (pytest.approx(x, abs=1), pytest.approx(y, abs=1))
    shades = marked[changed].mean(-1)
    assert shades.max() > 240
    assert shades.min() < 15


def test_the_box_is_drawn_where_it_is():
    made = ramp(Image.new("RGB", (640, 640), "gray"))
    changed = np.abs(painted(made) - painted(made, box=True)).max(-1) > 0
    rows, columns = np.nonzero(changed)
    x0, y0, x1, y1 = made.map(0).box
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
    assert not changed[y0 + 40 : y1 - 40, x0 + 40 : x1 - 40].any()


def test_the_grid_follows_the_edges_of_patches():
    made = ramp(Image.new("RGB", (640, 640), "gray"))
    changed = np.abs(painted(made) - painted(made, grid=True)).max(-1) > 0
    assert changed[:, 160].all()
    assert not changed[20:140, 20:140].any()


def test_edges_replace_the_image():
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = (200, 0, 0)
    drawn = painted(ramp(Image.fromarray(half)), background="edges", opacity=0.0)
    assert not colourful(drawn).any()
    assert (drawn[:, 28:37].min(1) < 60).all()
    assert (drawn[:, :24] == 255).all()


def test_a_map_of_another_image_is_refused():
    with pytest.raises(OptionError, match="the image has 10 x 10 pixels, the map belongs to one of 96 x 96"):
        overlay(explanation().map(0), Image.new("RGB", (10, 10)))


def test_overlays_have_the_size_of_the_image_or_the_given_one():
    made = explanation(Image.new("RGB", (300, 90)))
    assert overlay(made.map(0), made.image).size == (300, 90)
    assert overlay(made.map(0), made.image, longest=100).size == (100, 30)
    assert overlay(made.map(0), made.image, longest=1000).size == (300, 90)


@pytest.mark.parametrize("size", [(64, 64), (640, 200), (1, 1), (3000, 2000)])
def test_the_box_in_the_figure_is_the_maps_own(size):
    made = ramp(Image.new("RGB", size, "gray"), geometry=whole(*size, 4, 4))
    drawn = [images(figure(made, peak=False, box=box))["overlay:gradcam:0"].astype(int) for box in (True, False)]
    rows, columns = np.nonzero(np.abs(drawn[0] - drawn[1]).max(-1))
    if made.map(0).box is None:
        assert not len(rows)
        return
    height, width = drawn[0].shape[:2]
    x0, y0, x1, y1 = made.map(0).box
    expected = [x0 * width / size[0], y0 * height / size[1], x1 * width / size[0], y1 * height / size[1]]
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx(expected, abs=1)


def test_small_boxes_and_their_hottest_patch_stay_visible():
    geometry = whole(640, 640, 16, 16)
    maps = np.zeros((1, 16, 16))
    maps[0, 7, 4] = 1
    made = explanation(
        Image.new("RGB", (640, 640), "gray"), labels=("x",), geometry=geometry,
        columns=[column("gradcam", maps, geometry, signed=False)],
    )  # fmt: skip
    changed = np.abs(painted(made) - painted(made, peak=True, box=True)).max(-1) > 0
    x0, y0, x1, y1 = made.map(0).box
    assert not changed[y0:y1, x0:x1].mean() > 0.5
    assert not changed[296:304, 176:184].any(), "the middle of the strongest patch: (180, 300)"
    frame = changed.copy()
    frame[y0:y1, x0:x1] = False
    assert frame[y0 - 6 : y1 + 6, x0 - 6 : x1 + 6].sum() > 4 * 5 * (x1 - x0), "drawn around it"


def test_grid_lines_are_those_of_seen_patches():
    geometry = Geometry.from_steps(200, 100, resized=(200, 100), crop=(50, 0, 100, 100), grid=(2, 4))
    lines = grid_lines(geometry)
    assert [line[0][0] for line in lines[:5]] == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75])
    assert [(line[0], line[1]) for line in lines[5:]] == [((0.25, y), (0.75, y)) for y in (0.0, 0.5, 1.0)]


def test_a_fixed_scale_of_signed_maps_has_zero_at_the_centre():
    made = ramp()
    assert limits_of([made.map(0)], FigureOptions(signed=True, scale="fixed", fixed=(0.0, 0.5))) == (-0.5, 0.5)
    assert limits_of([made.map(0)], FigureOptions(scale="fixed", fixed=(0.0, 0.5))) == (0.0, 0.5)
    drawn = images(figure(made, scale="fixed", fixed=(0, 0.5), signed=True, **PLAIN))["overlay:gradcam:0"]
    middle = drawn[drawn.shape[0] // 2, 3 * drawn.shape[1] // 8].astype(int)  # the cell of the zero
    assert np.ptp(middle) <= 3
