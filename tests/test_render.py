import sys
import time

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grounding.drawing import Style, colour_table
from grounding.errors import OptionError
from grounding.geometry import Geometry
from grounding.lettering import printable, width_of, wrap
from grounding.page import DPI
from grounding.panel import limits_of
from grounding.render import figure, overlay
from tests.made import LABELS, column, explanation, whole

RAMP = np.array([[[-1, 0, 0.5, 1.0]] * 4])  # from against (left) to for (right)
PLAIN = {"peak": False, "box": False}
HOSTILE = (
    r"$x_1^2$ $\frac{a}{", "new\nline\ttab", "\x1b[31mred\x1b[0m", "猫がソファの上", "سلام שלום", "😀👩‍👩‍👧",
    "<script>alert(1)</script>",
    "\udc80 lone", "a" * 400, "\u202eltr\u2028", "{{7*7}} %s \\", " ",
)  # fmt: skip


def pixels(made):
    made.canvas.draw()
    return np.asarray(made.canvas.buffer_rgba())[..., :3].copy()


def images(made, start=""):
    """Panels of a figure by name."""
    found = [(i.get_gid(), np.asarray(i.get_array())) for i in made.axes[0].images if i.get_gid().startswith(start)]
    assert len(found) == len(dict(found)) or start == ""
    return dict(found)


def words(made):
    return " ".join(t.get_text() for t in made.axes[0].texts)


def colourful(array):
    """Where red, green and blue differ."""
    array = np.asarray(array).astype(int)
    return array.max(-1) - array.min(-1) > 12


def ramp(picture=None, *, signed=True, geometry=None):
    picture = picture or Image.new("RGB", (64, 64), (128, 128, 128))
    geometry = geometry or whole(*picture.size)
    return explanation(
        picture, labels=("x",), geometry=geometry, columns=[column("gradcam", RAMP, geometry, signed=signed)]
    )


def painted(made, **style):
    return np.asarray(overlay(made.map(0), made.picture, **{**PLAIN, **style})).astype(int)


@pytest.fixture
def coarse(monkeypatch):
    """Panels of few pixels, where only the layout matters."""
    monkeypatch.setattr("grounding.comparison.OVERSAMPLING", 0.2)


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


def test_the_picture_stays_recognisable_under_the_heat():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::8] = stripes[1::8] = stripes[2::8] = stripes[3::8] = 255
    drawn = painted(ramp(Image.fromarray(stripes))).mean(-1)
    assert (drawn[2:58:8] - drawn[6:62:8] > 60).all()


def test_opacity_zero_shows_the_muted_picture_and_no_heat():
    assert not colourful(painted(ramp(), opacity=0.0)).any()


def test_signed_maps_are_red_for_blue_against_white_at_zero():
    drawn = painted(ramp(), signed=True, opacity=1.0)[32]
    assert drawn[-1][0] > drawn[-1][2] + 60
    assert drawn[0][2] > drawn[0][0] + 60
    assert drawn[24].min() > 230  # the cell of the zero: columns 16 to 31


def test_signed_limits_lie_at_the_same_distance_from_zero():
    made = explanation()
    style = Style(signed=True)
    low, high = limits_of([made.map(0)], style)
    assert (low, high) == (-high, pytest.approx(np.abs(made.map(0).raw).max()))


# ---------------------------------------------------------------- what was not seen, what is no evidence


@pytest.mark.parametrize("ground", ["black", "white", "red"])
def test_the_unseen_area_is_hatched_and_never_coloured(ground):
    picture = Image.new("RGB", (192, 64), ground)
    geometry = Geometry.from_steps(192, 64, resized=(192, 64), crop=(64, 0, 64, 64), grid=(4, 4))
    drawn = painted(ramp(picture, geometry=geometry), cmap="jet")
    unseen = np.ones((64, 192), bool)
    unseen[:, 64:128] = False
    assert (drawn[unseen].max(-1) == drawn[unseen].min(-1)).all()
    assert colourful(drawn)[~unseen].mean() > 0.9
    left = drawn[:, :60, 0]
    assert len(np.unique(left)) == 2, "pale ground and a darker line"
    assert left.max() - left.min() > 30
    assert left.min() > 40, "a line on black must still show as a line"


@pytest.mark.parametrize(("maps", "reason"), [
    (np.zeros((1, 4, 4)), "zero everywhere"), (np.ones((1, 4, 4)), "flat"), (-RAMP - 2, "all negative"),
])  # fmt: skip
@pytest.mark.parametrize("style", [{}, {"signed": True}, {"background": "edges"}])
def test_a_map_without_evidence_has_no_heat_and_says_why(maps, reason, style):
    geometry = whole(64, 64)
    picture = Image.new("RGB", (64, 64), "red")
    made = explanation(picture, labels=("x",), geometry=geometry, columns=[column("gradcam", maps, geometry)])
    drawn = figure(made, **style)
    assert not colourful(images(drawn)["overlay:gradcam:0"]).any()
    assert f"no evidence: {reason}" in words(drawn)
    assert not colourful(images(figure(made, layout="panels", **style))["heat:gradcam:0"]).any()


def test_a_map_without_evidence_has_no_say_in_a_shared_scale():
    geometry = whole(64, 64)
    maps = np.stack([RAMP[0], -1000 - RAMP[0], RAMP[0] * 2])
    made = explanation(
        geometry=geometry, picture=Image.new("RGB", (64, 64)), columns=[column("gradcam", maps, geometry)]
    )
    assert limits_of(list(made), Style(signed=True), "caption") == (-2, 2)


@pytest.mark.parametrize("scale", [{"scale": "caption"}, {"scale": "fixed", "fixed": (-2.0, 2.0)}])
def test_a_map_without_evidence_has_no_heat_on_a_shared_scale_either(scale):
    geometry = whole(64, 64)
    one = column("gradcam", np.stack([RAMP[0], RAMP[0] - 3]), geometry)
    made = explanation(Image.new("RGB", (64, 64)), labels=("a", "b"), geometry=geometry, columns=[one])
    for style in ({}, {"signed": True}):
        panels = images(figure(made, **scale, **style), "overlay")
        assert colourful(panels["overlay:gradcam:0"]).any()
        assert not colourful(panels["overlay:gradcam:1"]).any()


def test_a_single_patch_is_drawn_as_no_range():
    made = explanation(Image.new("RGB", (1, 1)), labels=("x",), geometry=whole(1, 1, 1, 1))
    assert "a single value: no range to draw" in words(figure(made))


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize("ground", ["black", "white", "yellow"])
def test_the_peak_is_marked_visibly_on_every_ground(ground):
    made = ramp(Image.new("RGB", (640, 640), ground))
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


def test_the_grid_runs_along_the_patches_edges():
    made = ramp(Image.new("RGB", (640, 640), "gray"))
    changed = np.abs(painted(made) - painted(made, grid=True)).max(-1) > 0
    assert changed[:, 160].all()
    assert not changed[20:140, 20:140].any()


def test_edges_replace_the_picture():
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = (200, 0, 0)
    drawn = painted(ramp(Image.fromarray(half)), background="edges", opacity=0.0)
    assert not colourful(drawn).any()
    assert (drawn[:, 28:37].min(1) < 60).all()
    assert (drawn[:, :24] == 255).all()


# ---------------------------------------------------------------- the figure


def test_a_shared_map_is_drawn_once_and_says_so():
    made = figure(explanation())
    panels = images(made, "overlay")
    assert sorted(panels) == sorted(
        [f"overlay:{m}:{i}" for m in ("gradcam", "relevance") for i in range(3)] + ["overlay:rollout:0"]
    )
    assert "does not see the text: one map for all entries" in " ".join(words(made).split())
    assert len(images(made, "picture")) == 1


def test_panels_show_picture_heat_and_overlay():
    made = figure(explanation(), layout="panels")
    assert len(images(made, "heat")) == len(images(made, "overlay")) == 7
    heat = images(made)["heat:gradcam:0"]
    table = {tuple(c) for c in colour_table("magma")}
    plain = images(figure(explanation(), layout="panels", peak=False, box=False))["heat:gradcam:0"]
    assert {tuple(c) for c in plain.reshape(-1, 3)} <= table
    assert heat.shape == plain.shape


def test_the_figure_says_what_it_shows():
    text = words(figure(explanation(warnings=["the text was cut: 3 words dropped"])))
    for part in ("man in red", "some/model", "similarity (leave-one-out)", "score 0.25", "Gradcam", "vision.11",
                 "Scale per entry", "lowest", "highest", "strongest patch", "the text was cut", "96 x 96"):  # fmt: skip
        assert part in text, part
    low, high = explanation().map(0).range
    assert f"raw −{abs(low):.3g} to {high:.3g}" in text


def test_scale_per_entry_caption_and_fixed():
    geometry = whole(64, 64)
    maps = np.stack([RAMP[0], RAMP[0] * 4])
    made = explanation(
        Image.new("RGB", (64, 64), "gray"), labels=("a", "b"), geometry=geometry,
        columns=[column("gradcam", maps, geometry)],
    )  # fmt: skip
    own = images(figure(made, **PLAIN), "overlay")
    assert (own["overlay:gradcam:0"] == own["overlay:gradcam:1"]).all()
    joint = figure(made, scale="caption", **PLAIN)
    panels = images(joint, "overlay")
    assert panels["overlay:gradcam:0"].max() < panels["overlay:gradcam:1"].max()
    assert (panels["overlay:gradcam:1"] == own["overlay:gradcam:1"]).all()
    assert "Scale per caption" in words(joint)
    assert "scale 0 to 4" in words(joint)
    fixed = figure(made, scale="fixed", fixed=[0, 8], **PLAIN)
    assert images(fixed)["overlay:gradcam:1"].max() < panels["overlay:gradcam:1"].max()
    assert "Scale fixed" in words(fixed)


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize(("size", "count"), [
    ((64, 64), 1), ((160, 40), 1), ((40, 160), 1), ((1, 4000), 1), ((4000, 1), 1), ((1, 1), 1),
    ((64, 64), 12), ((160, 40), 12), ((40, 160), 3),
])  # fmt: skip
def test_no_text_leaves_the_figure_and_no_two_panels_overlap(layout, size, count, coarse):
    labels = tuple(f"word{i} with a long label of many words" for i in range(count))
    shown = explanation(Image.new("RGB", size, "teal"), labels=labels, warnings=["too long " * 60] * 12)
    made = figure(shown, layout=layout)
    width, height = made.canvas.get_width_height()
    for text in made.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= width, text.get_text()
        assert box.y0 >= 0, text.get_text()
        assert box.y1 <= height, text.get_text()
    boxes = [i.get_extent() for i in made.axes[0].images]
    for i, (l0, r0, b0, t0) in enumerate(boxes):
        assert min(l0, t0) >= 0
        assert r0 * DPI <= width + 1
        assert all(r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0 for l1, r1, b1, t1 in boxes[:i])
    text = words(made)
    assert "and 4 more warnings: see the JSON" in text
    assert text.count("Warning:") == 8


def test_a_caption_of_many_tokens_still_fits_what_agg_can_draw(coarse):
    geometry = whole(96, 96)
    one = [column("gradcam", np.repeat(RAMP, 77, 0), geometry)]
    made = figure(explanation(labels=tuple(f"w{i}" for i in range(77)), columns=one), layout="panels")
    assert max(made.get_size_inches() * made.dpi) < 2**16
    assert made.dpi > 40


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(text, recwarn):
    made = figure(explanation(labels=(text, text), caption=text, warnings=[text]))
    pixels(made)
    assert not recwarn
    shown = " ".join(t.get_text() for t in made.axes[0].texts)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert not any(t.get_parse_math() or t.get_usetex() for t in made.axes[0].texts)


def test_markup_is_not_read():
    assert printable("$x^2$") == "$x^2$"
    assert "$x^2$" in words(figure(explanation(labels=("$x^2$",))))
    with mpl.rc_context({"text.usetex": True, "text.parse_math": True}):
        pixels(figure(explanation(labels=("$x^2$ \\alpha",))))


def test_characters_no_font_has_are_escaped_and_explained():
    assert printable("a\U000e0041b") == "a\\U000e0041b"
    assert "a character that cannot be drawn here" in words(figure(explanation(labels=("a\U0001fabc\x1b",))))
    assert printable("Straße Ωμέγα сад") == "Straße Ωμέγα сад"


@pytest.mark.parametrize(
    "text", ["a few words that are wrapped", "x" * 300, "a " * 300, "dotted.path.of.many.parts" * 9, ""]
)
def test_wrapped_lines_fit_and_lose_nothing(text):
    lines = wrap(text, 1.2, 8.0)
    assert all(width_of(line, 8.0) <= 1.2 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    short = wrap(text, 1.2, 8.0, lines=2)
    assert len(short) <= 2
    assert short == lines or short[-1].endswith("…")
    assert all(width_of(line, 8.0) <= 1.2 for line in short)


def test_the_same_input_gives_the_same_pixels_whatever_the_settings():
    before = pixels(figure(explanation()))
    with mpl.rc_context({"axes.facecolor": "k", "figure.facecolor": "k", "font.size": 30, "image.cmap": "jet",
                                "text.color": "r", "savefig.bbox": "tight", "font.family": "serif"}):  # fmt: skip
        assert (pixels(figure(explanation())) == before).all()


def test_pyplot_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error
    pixels(figure(explanation()))


@pytest.mark.parametrize(("options", "message"), [
    ({"cmap": "magna"}, "unknown colour map 'magna'; did you mean 'magma'"),
    ({"cmap": "zzzz"}, "unknown colour map 'zzzz'; for example magma"),
    ({"layout": "row"}, "unknown layout 'row'; did you mean 'rows'"),
    ({"background": "canny"}, "unknown background 'canny'"),
    ({"opacity": 1.5}, "opacity must be from 0 to 1"),
    ({"opacity": float("nan")}, "opacity must be from 0 to 1"),
    ({"scale": "fixed"}, "needs its limits"),
    ({"scale": "fixed", "fixed": (2.0, 1.0)}, "low < high"),
    ({"fixed": (0.0, 1.0)}, "only for scale 'fixed'"),
])  # fmt: skip
def test_options_that_cannot_be_drawn_are_refused_in_one_line(options, message):
    with pytest.raises(Exception, match=message) as caught:
        figure(explanation(), **options)
    assert "\n" not in str(caught.value) or not isinstance(caught.value, OptionError)


def test_a_map_of_another_picture_is_refused():
    with pytest.raises(OptionError, match="the picture has 10 x 10 pixels, the map belongs to one of 96 x 96"):
        overlay(explanation().map(0), Image.new("RGB", (10, 10)))


def test_overlays_have_the_pictures_size_or_the_one_asked_for():
    made = explanation(Image.new("RGB", (300, 90)))
    assert overlay(made.map(0), made.picture).size == (300, 90)
    assert overlay(made.map(0), made.picture, longest=100).size == (100, 30)
    assert overlay(made.map(0), made.picture, longest=1000).size == (300, 90)


def test_a_figure_of_ten_entries_and_a_large_photograph_takes_seconds():
    made = explanation(Image.new("RGB", (4000, 3000)), labels=tuple(f"w{i}" for i in range(10)))
    start = time.perf_counter()
    drawn = figure(made)
    assert isinstance(drawn.canvas, FigureCanvasAgg)
    pixels(drawn)
    assert time.perf_counter() - start < 8  # about 1.5 on a quiet machine
    assert len(LABELS) == 3
