"""The reading strip: token positions, labels without overlap, and reading order."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.core.errors import GroundingError
from grounding.core.geometry import Geometry
from grounding.explanation.figures.label_placement import GAP, extent, spread
from grounding.explanation.figures.sheet import ALERT
from grounding.explanation.labels import likelihood
from grounding.explanation.reading_order import reading_order, right_to_left
from tests.support.explanations import column, explanation
from tests.support.figures import images, pixels, text_of
from tests.support.lines import along, line, peaks, written


def strip(made, *args, **options):
    """A strip with an image of few pixels, where only the layout matters."""
    return made.strip(*args, oversampling=0.2, **options)


def artists(made, start):
    """Boxes, lines and texts of a strip by name."""
    axes = made.axes[0]
    found = [a for a in (*axes.patches, *axes.lines, *axes.texts) if (a.get_gid() or "").startswith(start)]
    return {a.get_gid(): a for a in found}


def at(*columns, rows=2, row=1):
    """Cells of one row."""
    return [None if c is None else (row % rows, c) for c in columns]


# ---------------------------------------------------------------- reading order


@pytest.mark.parametrize(("text", "columns", "back"), [
    ("abcd", (0, 3, 6, 9), ()),
    ("abcd", (0, 3, 2, 9), ()),  # one patch back is no step back
    ("abcd", (0, 3, 1, 9), (2,)),
    ("abcd", (9, 0, 1, 2), (1, 2, 3)),  # against the furthest, not against the neighbour
    ("abcd", (5, 5, 5, 5), ()),
    ("abcd", (0, 8, None, 1), (3,)),  # a map without evidence is ignored
    ("abcd", (None, None, None, None), ()),
    ("a cd", (0, 15, 4, 8), ()),  # a blank is ignored: neither as the furthest ...
    ("ab d", (4, 8, 0, 12), ()),  # ... nor as a token behind
    ("אבגד", (9, 6, 3, 0), ()),
    ("אבגד", (0, 3, 6, 9), (1, 2, 3)),
    ("אבגד", (9, 6, 8, 0), (2,)),
    ("אב1c", (9, 6, 3, 0), ()),  # more of its letters run from right to left
    ("a", (3,), ()),
])  # fmt: skip
def test_reading_order_of_known_peaks(text, columns, back):
    made = written(list(text), at(*columns), grid=(2, 16))
    assert reading_order(made, "gradcam") == back


def test_reading_order_gives_indices_of_entries_and_ignores_other_kinds():
    made = written(list("abc"), at(0, 9, 3), grid=(2, 16), shared=("rollout",))
    caption = explanation().entries[0]
    maps = np.concatenate([peaks(at(15), 2, 16), made.methods["gradcam"].maps])
    shifted = type(made)(**{
        **vars(made), "entries": (caption, *made.entries), "methods": {
            "gradcam": column("gradcam", maps, made.geometry), "rollout": made.methods["rollout"],
        },
    })  # fmt: skip
    assert reading_order(shifted, "gradcam") == (3,)
    assert reading_order(shifted, "rollout") == ()
    with pytest.raises(GroundingError, match="no method 'x'"):
        reading_order(shifted, "x")


def test_the_direction_of_a_text_is_that_of_most_of_its_letters():
    assert right_to_left("שלום a 123")
    assert right_to_left("سلام")
    assert not right_to_left("123 ...")
    assert not right_to_left("")
    assert not right_to_left("abc ש")


# ---------------------------------------------------------------- content of the strip


@pytest.mark.parametrize("size", [(512, 64), (2000, 60), (300, 1200), (200, 200), (7, 3)])
def test_the_box_is_that_of_the_peaks_cell(size):
    cells = [(0, 0), (2, 5), (3, 15)]
    made = written(list("abc"), cells, size=size, grid=(4, 16), image=line(*size, "abc", 8))
    drawn = strip(made)
    [image] = [i for i in drawn.axes[0].images if i.get_gid() == "strip:gradcam"]
    left, right, bottom, top = image.get_extent()
    boxes = artists(drawn, "cell:")
    for i, cell in enumerate(cells):
        x0, y0, x1, y1 = made.geometry.cell_box(*cell)
        across, down = (right - left) / size[0], (bottom - top) / size[1]
        expected = (left + x0 * across, top + y0 * down, (x1 - x0) * across, (y1 - y0) * down)
        box = boxes[f"cell:gradcam:{i}"]
        assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == pytest.approx(expected)
    assert len(boxes) == 3


def test_a_box_has_the_colour_of_its_token_and_neighbours_have_others():
    drawn = strip(written(list("abcd"), along(4, 4, 32)))
    boxes, labels = artists(drawn, "cell:"), artists(drawn, "token:")
    from matplotlib.colors import to_hex

    colours = [to_hex(boxes[f"cell:gradcam:{i}"].get_edgecolor()) for i in range(4)]
    assert colours == [labels[f"token:gradcam:{i}"].get_color() for i in range(4)]
    assert len(set(colours)) == 4
    assert ALERT not in colours


def test_tokens_of_one_cell_share_its_outline():
    drawn = strip(written(list("abc"), [(1, 7)] * 3))
    boxes = artists(drawn, "cell:").values()
    assert len({(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes}) == 1
    assert len({str(b.get_linestyle()) for b in boxes}) == 3


def test_only_token_entries_are_drawn_and_one_method_on_request():
    made = written(["a", "b"], along(2, 4, 32), keys=("gradcam", "relevance"), shared=("rollout",))
    assert set(images(made.strip(), "strip:")) == {"strip:gradcam", "strip:relevance"}
    assert set(images(strip(made, method="relevance"), "strip:")) == {"strip:relevance"}
    assert "Rollout" in text_of(made.strip())
    assert "no evidence about single tokens" in text_of(made.strip())
    assert not images(strip(made, method="rollout"))
    with pytest.raises(GroundingError, match="no method 'x'"):
        strip(made, method="x")
    with pytest.raises(GroundingError, match="no tokens to draw"):
        strip(type(made)(**{**vars(made), "entries": ()}))


def test_improbable_tokens_tokens_behind_and_missing_evidence_are_marked():
    made = written(
        ["a", "b", " ", "c", ""], [(1, 9), (1, 2), (1, 30), None, (1, 31)],
        probabilities=[0.98, 0.3, 1.0, 0.999, 0.0002],
        warnings=["w" * 300, "second"] * 6, origin="forced",
    )  # fmt: skip
    drawn = strip(made)
    text = text_of(drawn)
    assert "“ab c”" in text
    assert "forced text" in text
    assert "some/reader" in text
    assert "512 x 64" in text
    assert "reading order: 'b' at character 1 peaks left of an earlier token" in text
    assert "no evidence: 'c' at character 3 (zero everywhere" in text
    assert "Below 50%: 'b' at character 1 30% (or: o 1%, c 0.4%), (end) at character 4 <0.1% (or:" in text
    assert text.count("second") == 6
    assert text.replace(" ", "").count("w" * 300) == 6, "warnings are not cut"
    labels = {name: t.get_text() for name, t in artists(drawn, "token:").items()}
    assert list(labels.values()).count("␣") == 1
    assert labels["token:gradcam:4"] == "(end)"
    assert "cell:gradcam:3" not in artists(drawn, "cell:")
    assert "leader:gradcam:3" not in artists(drawn, "leader:")
    notes = {t.get_text(): t.get_color() for t in drawn.axes[0].texts if (t.get_gid() or "").startswith("note:")}
    assert notes["30% ?"] == notes["‹ back"] == notes["evidence"] == ALERT
    assert notes["98%"] != ALERT


def test_many_tokens_behind_are_counted():
    made = written(list("abcdefgh"), at(15, 0, 1, 2, 3, 4, 5, 6), grid=(2, 16))
    text = text_of(strip(made))
    assert "reading order: 'b' at character 1, 'c' at character 2, 'd' at character 3, and 4 more peak left" in text
    mirrored = written(list("אבג"), at(0, 8, 15), grid=(2, 16))
    assert "peak right of an earlier token" in text_of(strip(mirrored))
    assert "back ›" in text_of(strip(mirrored))
    assert "back" not in text_of(strip(written(list("abc"), along(3, 4, 32))))


@pytest.mark.parametrize(("labels", "cells", "size"), [
    (list("a"), along(1, 4, 32), (512, 64)),
    (list("the quick brown fox jumps over the lazy dog and runs away 12"), along(60, 24, 24), (2000, 60)),
    ([" administration"] * 60, along(60, 24, 24), (2000, 60)),
    (list("same peak all here"), [(2, 20)] * 18, (512, 64)),
    ([" considerable"] * 40, [(2, 23)] * 40, (512, 64)),
    (list("page of text"), [(23 - i, i) for i in range(12)], (300, 1200)),
    (list("x" * 30), [None, (0, 0)] * 15, (4000, 1)),
    (list("abc"), [None] * 3, (1, 4000)),
    (["猫", "😀", "$x$", "\n", "</b>", "\udc80", "../x", "", "a" * 90, " ", "\u202e", "سلام"],
     along(12, 4, 24), (1000, 25)),
])  # fmt: skip
def test_nothing_leaves_the_sheet_and_no_labels_overlap(labels, cells, size, recwarn):
    grid = (24, 32)
    made = written(
        labels, cells, size=size, grid=grid, probabilities=[0.3, 1.0] * (len(labels) // 2) + [0.99] * (len(labels) % 2)
    )
    drawn = strip(made)
    pixels(drawn)
    assert not recwarn
    width, height = drawn.canvas.get_width_height()
    assert drawn.get_size_inches()[0] <= 16
    for text in drawn.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0, text.get_text()
        assert box.x1 <= width, text.get_text()
        assert box.y0 >= 0, text.get_text()
        assert box.y1 <= height, text.get_text()
        assert not text.get_parse_math()
    labels_drawn = [t for name, t in artists(drawn, "token:").items()]
    assert len(labels_drawn) == len(labels)
    boxes = [t.get_window_extent() for t in labels_drawn]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i]), labels_drawn[i].get_text()


def test_a_stretched_image_has_a_note():
    assert "image drawn higher than it is" in text_of(strip(written(["a"], [(0, 0)], size=(4000, 1))))
    assert "image drawn wider than it is" in text_of(strip(written(["a"], [(0, 0)], size=(1, 4000))))
    assert "drawn" not in text_of(strip(written(["a"], [(0, 0)], size=(2000, 50))))


def test_leader_lines_cross_no_label():
    made = written(list("a few tokens at one place, and then some"), [(2, 11 + i % 3) for i in range(40)])
    drawn = strip(made)
    axes = drawn.axes[0]
    boxes = {n.split(":")[2]: t.get_window_extent() for n, t in artists(drawn, "token:").items()}
    for name, leader in artists(drawn, "leader:").items():
        points = axes.transData.transform(np.column_stack(leader.get_data()))
        (x, y0), (_, y1) = points[-2:]
        for entry, box in boxes.items():
            if entry != name.split(":")[2]:
                assert not (box.x0 < x < box.x1 and min(y0, y1) < box.y1 and max(y0, y1) > box.y0), (name, entry)


def test_the_unseen_part_is_hatched():
    image = Image.new("RGB", (512, 64), "red")
    geometry = Geometry.from_steps(512, 64, resized=(512, 64), crop=(128, 0, 256, 64), grid=(4, 16))
    made = written(["a"], [(1, 2)], image=image, grid=(4, 16))
    made = type(made)(**{**vars(made), "geometry": geometry})
    drawn = images(strip(made), "strip:")["strip:gradcam"].astype(int)
    edge = drawn.shape[1] // 4
    assert (np.ptp(drawn[:, : edge - 1], axis=-1) < 12).all()
    assert (np.ptp(drawn[:, edge + 1 : 2 * edge], axis=-1) > 200).all()


def test_the_same_strip_gives_the_same_pixels_and_leaves_pyplot_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it is an error
    made = written(list("abc d"), along(5, 4, 32))
    assert (pixels(strip(made)) == pixels(strip(made))).all()


# ---------------------------------------------------------------- labels along a line


def test_labels_keep_their_positions_if_there_is_room():
    assert spread([1.0, 3.0], [0.5, 0.5], 0, 5) == [1.0, 3.0]
    assert spread([], [], 0, 5) == []


def test_labels_of_one_position_are_spread_evenly_around_it():
    assert spread([2.0] * 3, [0.45] * 3, 0, 4) == pytest.approx([1.5, 2.0, 2.5])
    assert spread([0.0] * 2, [0.45] * 2, 0, 4) == pytest.approx([0.225, 0.725])
    assert spread([4.0] * 2, [0.45] * 2, 0, 4) == pytest.approx([3.275, 3.775])
    assert spread([2.0] * 3, [2.0] * 3, 0, 4) is None


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 1.5)), max_size=25), st.integers(1, 3))
def test_spread_labels_keep_their_distance_and_order(items, rows):
    wishes, widths = sorted(w for w, _ in items), [w for _, w in items]
    centres = spread(wishes, widths, 0, 10, rows)
    assert (centres is None) == (extent(widths, rows) > 10 + 1e-9)
    for i, a in enumerate(centres or []):
        assert widths[i] / 2 - 1e-6 <= a <= 10 - widths[i] / 2 + 1e-6
        for j in range(i + 1, len(centres)):
            if i % rows == j % rows:
                assert centres[j] - a >= (widths[i] + widths[j]) / 2 + GAP - 1e-6
            else:
                upper = min(i, j, key=lambda k: k % rows)
                assert centres[j] - a >= widths[upper] / 2 + GAP - 1e-6, "a line may not pass through a label"


@pytest.mark.parametrize(("probability", "text"), [
    (1.0, "100%"), (0.9999, ">99%"), (0.994, "99%"), (0.5, "50%"), (0.0123, "1%"), (0.0094, "0.9%"), (0.004, "0.4%"),
    (0.0002, "<0.1%"), (0.0, "0%"), (float("nan"), "?"),
])  # fmt: skip
def test_probabilities_are_short_and_never_more_certain_than_they_are(probability, text):
    assert likelihood(probability) == text
