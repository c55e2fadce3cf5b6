"""The side-by-side figure: content, layout, text and options."""

import sys
import time

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grounding.core.errors import OptionError
from grounding.explanation.figures.comparison import figure
from grounding.explanation.figures.fonts import printable, width_of, wrap
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.figures.pixels import colour_table
from grounding.explanation.figures.sheet import DPI
from tests.support.explanations import LABELS, column, explanation, whole
from tests.support.figures import PLAIN, RAMP, images, pixels, text_of, words
from tests.support.lines import along, written
from tests.support.tolerances import SOON

HOSTILE = (
    r"$x_1^2$ $\frac{a}{", "new\nline\ttab", "\x1b[31mred\x1b[0m", "猫がソファの上", "سلام שלום", "😀👩‍👩‍👧",
    "<script>alert(1)</script>",
    "\udc80 lone", "a" * 400, "\u202eltr\u2028", "{{7*7}} %s \\", " ",
)  # fmt: skip


# Panels of few pixels, where only the layout matters.
COARSE = {"oversampling": 0.2}


def test_a_single_patch_is_drawn_as_no_range():
    made = explanation(Image.new("RGB", (1, 1)), labels=("x",), geometry=whole(1, 1, 1, 1))
    assert "a single value: no range to draw" in words(figure(made))


def test_a_shared_map_is_drawn_once_with_a_note():
    made = figure(explanation())
    panels = images(made, "overlay")
    assert sorted(panels) == sorted(
        [f"overlay:{m}:{i}" for m in ("gradcam", "relevance") for i in range(3)] + ["overlay:rollout:0"]
    )
    assert "independent of the text: one map for all entries" in text_of(made)
    assert len(images(made, "image")) == 1


def test_panels_show_image_heat_and_overlay():
    made = figure(explanation(), layout="panels")
    assert len(images(made, "heat")) == len(images(made, "overlay")) == 7
    heat = images(made)["heat:gradcam:0"]
    table = {tuple(c) for c in colour_table("magma")}
    plain = images(figure(explanation(), layout="panels", peak=False, box=False))["heat:gradcam:0"]
    assert {tuple(c) for c in plain.reshape(-1, 3)} <= table
    assert heat.shape == plain.shape


def test_the_figure_names_its_content():
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
def test_no_text_leaves_the_figure_and_no_two_panels_overlap(layout, size, count):
    labels = tuple(f"word{i} with a long label of many words" for i in range(count))
    shown = explanation(Image.new("RGB", size, "teal"), labels=labels, warnings=["too long " * 60] * 12)
    made = figure(shown, layout=layout, **COARSE)
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
    assert "and 4 more warnings, stored with the maps" in text
    assert text.count("Warning:") == 8
    assert text.count("… (whole with the maps)") == 8


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize(("size", "methods", "count"), [
    ((512, 64), 4, 12), ((1280, 64), 4, 3), ((1280, 64), 1, 12), ((2560, 64), 3, 2), ((512, 64), 5, 1),
    ((280, 70), 4, 40),
])  # fmt: skip
def test_lines_of_text_stay_readable_on_a_sheet_of_bounded_width(layout, size, methods, count):
    keys = tuple(f"method{i}" for i in range(methods))
    shown = written(["x"] * count, along(count, 4, 32), size=size, keys=keys, shared=("rollout",))
    made = figure(shown, layout=layout, **COARSE)
    assert made.get_size_inches()[0] <= 16.01
    panels = [i.get_extent() for i in made.axes[0].images if i.get_gid() != "bar"]
    assert all(right - left >= 3.1 and bottom - top >= 0.34 for left, right, bottom, top in panels)
    shape = {round((right - left) / (bottom - top), 3) for left, right, bottom, top in panels}
    assert shape == {size[0] / size[1]}, "a line is not distorted"
    assert len(images(made, "overlay")) == methods * count + 1
    for i, (l0, r0, b0, t0) in enumerate(panels):
        assert all(r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0 for l1, r1, b1, t1 in panels[:i])
    width, height = made.canvas.get_width_height()
    for text in made.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= width, text.get_text()
        assert box.y0 >= 0
        assert box.y1 <= height, text.get_text()


def test_panels_are_titled_where_methods_take_several_lines():
    keys = ("gradcam", "relevance", "attention")
    many = words(figure(written(list("abc"), along(3, 4, 32), size=(1280, 64), keys=keys), **COARSE))
    assert many.count("Relevance") == 3
    few = words(figure(written(list("abc"), along(3, 4, 32), size=(512, 64), keys=keys[:2]), **COARSE))
    assert few.count("Relevance") == 1


def test_a_caption_of_many_tokens_still_fits_what_agg_can_draw():
    geometry = whole(96, 96)
    one = [column("gradcam", np.repeat(RAMP, 77, 0), geometry)]
    made = figure(explanation(labels=tuple(f"w{i}" for i in range(77)), columns=one), layout="panels", **COARSE)
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


def test_markup_is_not_parsed():
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


def test_a_figure_of_ten_entries_and_a_large_photograph_takes_seconds():
    made = explanation(Image.new("RGB", (4000, 3000)), labels=tuple(f"w{i}" for i in range(10)))
    start = time.perf_counter()
    drawn = figure(made)
    assert isinstance(drawn.canvas, FigureCanvasAgg)
    pixels(drawn)
    assert time.perf_counter() - start < SOON
    assert len(LABELS) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"cmap": "magna"}, "unknown colour map 'magna'; did you mean 'magma'"),
    ({"cmap": "zzzz"}, "unknown colour map 'zzzz'; for example magma"),
    ({"layout": "row"}, "unknown layout 'row'; did you mean 'rows'"),
    ({"background": "canny"}, "unknown background 'canny'"),
    ({"opacity": 1.5}, "opacity must be from 0 to 1"),
    ({"opacity": float("nan")}, "opacity must be from 0 to 1"),
    ({"scale": "fixed"}, "needs its limits: --fixed LOW HIGH, low < high"),
    ({"scale": "fixed", "fixed": (2.0, 1.0)}, "low < high"),
    ({"scale": "fixed", "fixed": (0.0, float("inf"))}, "low < high"),
    ({"scale": "fixed", "fixed": (float("nan"), 1.0)}, "low < high"),
    ({"scale": "fixed", "fixed": (1.0,)}, "two numbers"),
    ({"scale": "caption", "fixed": (0.0, 1.0)}, "only for scale 'fixed', not for 'caption'"),
    ({"fixed": (0.0, 1.0)}, "only for scale 'fixed'"),
    ({"oversampling": 0}, "oversampling must be a number above 0, got 0"),
])  # fmt: skip
def test_options_that_cannot_be_drawn_are_refused_in_one_line(options, message):
    for refuse in (lambda: figure(explanation(), **options), lambda: FigureOptions.of(options)):
        with pytest.raises(OptionError, match=message) as caught:
            refuse()
        assert "\n" not in str(caught.value)


def test_options_are_checked_without_anything_to_draw():
    assert FigureOptions.of({}) == FigureOptions()
    options = FigureOptions(
        layout="panels", scale="fixed", fixed=[-1, 1], cmap="jet", opacity=0, grid=True, peak=False, box=False,
        background="edges", signed=True,
    )  # fmt: skip
    assert options.limits == (-1.0, 1.0)
    with pytest.raises(OptionError, match="no figure option 'gird'; did you mean 'grid'"):
        FigureOptions.of({"gird": True})


@pytest.mark.parametrize("options", [{}, {"layout": "panels"}, {"background": "edges"}, {"signed": True}])
@pytest.mark.parametrize(("count", "dpi"), [(1, 150), (1, 60), (9, 150), (9, 100)])
def test_every_line_of_the_grid_survives_in_the_finished_figure(options, count, dpi):
    """Each line changes its pixels, and about as much as the others."""
    geometry = whole(90, 90, 12, 12)
    maps = np.random.default_rng(0).uniform(0, 1, (count, 12, 12))
    made = explanation(
        Image.new("RGB", (90, 90), "gray"), labels=tuple(f"w{i}" for i in range(count)), geometry=geometry,
        columns=[column("gradcam", maps, geometry, signed=False)],
    )  # fmt: skip
    both = [figure(made, grid=grid, **PLAIN, **options) for grid in (True, False)]
    for one in both:
        one.set_dpi(dpi)
    change = np.abs(np.diff([pixels(one).astype(int) for one in both], axis=0)[0]).sum(-1)
    for image in both[0].axes[0].images:
        if not image.get_gid().startswith("overlay"):
            continue
        left, right, bottom, top = (round(edge * dpi) for edge in image.get_extent())
        profile = change[top:bottom, left - 2 : right + 2].mean(0)
        strength = [profile[round(x) : round(x) + 5].max() for x in np.linspace(0, right - left, 13)]
        assert min(strength) > 15
        assert max(strength) < 4 * min(strength)
