"""What a terminal shows of an explanation."""

import unicodedata

import numpy as np

from grounding.explanation.explanation import Entry
from grounding.explanation.text_table import explanation_table, headline
from tests.support.explanations import column, explanation
from tests.support.lines import along, written


def test_a_given_text_has_neither_probabilities_nor_alternatives():
    lines = explanation_table(explanation()).splitlines()
    assert lines[0].split()[:5] == ["entry", "kind", "score", "gradcam", "peak"]
    assert "boxes:" not in lines[-1]
    assert headline(explanation()).endswith("target similarity, parts of the caption: leave-one-out")


def test_a_written_text_has_them():
    made = written(["a", " ", ""], along(3, 4, 32), probabilities=[0.98, 1e-5, 1.0])
    lines = explanation_table(made).splitlines()
    assert lines[0].split()[:6] == ["entry", "kind", "score", "p", "next", "best"]
    assert lines[2].split()[:8] == ["a", "token", "+9.5000", "0.9800", "o", "1%,", "c", "0.4%"]
    assert lines[3].split()[:4] == ["␣", "token", "+8.5000", "0.0000"]
    assert lines[4].split()[0] == "(end)"
    assert headline(made).endswith("target logit, read by the model")
    assert headline(written(["a"], [(0, 0)], origin="forced")).endswith("target logit, forced text")


def test_entries_that_were_not_written_have_no_probability():
    extra = (Entry("z", "where", 1, 2, 0.5, 3), Entry("b - 8", "contrast", 1, 2, 0.5, 3))
    made = written(["a", "b"], along(2, 4, 32), extra=extra, extra_cells=[(0, 0), (1, 1)])
    lines = explanation_table(made).splitlines()
    assert lines[4].startswith("z in place of “b”  where")
    assert lines[4].split()[5:9] == ["where", "+0.5000", "-", "-"]
    assert lines[5].startswith("b - 8 at “b”  ")


def test_a_table_that_is_too_wide_leaves_the_boxes_to_the_json():
    def lines(methods):
        keys = tuple(f"method_{i}" for i in range(methods))
        return explanation_table(written(["a", "b"], along(2, 4, 32), keys=keys)).splitlines()

    narrow, wide = lines(2), lines(6)
    assert narrow[0].count("box") == 2
    assert "box" not in wide[0]
    assert wide[0].count("peak") == 6
    assert wide[-1] == "boxes: see the JSON"
    assert len(lines(4)[1]) <= 160


def test_hostile_labels_and_alternatives_keep_the_table_in_shape():
    from grounding.core.text import Alternative

    others = (Alternative("\x1b[31m" * 20, 4, 0.2), Alternative("\n", 5, float("nan")))
    made = written(["\n", "\x1b[31m", "猫" * 50, "\u202e"], along(4, 4, 32), alternatives=others)
    text = explanation_table(made)
    assert len(text.splitlines()) == 6
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not any(unicodedata.bidirectional(c) == "RLO" for c in text)


def test_shared_maps_are_given_once():
    made = written(["a", "b"], along(2, 4, 32), shared=("rollout",))
    assert explanation_table(made).splitlines()[3].split().count('"') == 2
    flat = column("gradcam", np.zeros((2, 4, 32)), made.geometry)
    none = type(made)(**{**vars(made), "columns": {"gradcam": flat}})
    assert explanation_table(none).count("no evidence") == 2
