"""Texts in figures."""

from dataclasses import replace

from PIL import Image

from grounding.core.text import Alternative
from grounding.explanation.explanation import Entry
from grounding.explanation.figures.comparison import figure
from grounding.explanation.figures.wording import entry_titles, percent, score_note, short_layer
from tests.support.explanations import column, explanation, whole
from tests.support.figures import RAMP, text_of, words
from tests.support.lines import along, written


def test_the_figure_names_the_images_file(tmp_path):
    made = explanation()
    assert "image from memory, 96 x 96 pixels" in text_of(figure(made))
    for path, name in (
        ("/a/b/cat.jpg", "cat.jpg,"),
        ("c:\\d\\cat.jpg", "cat.jpg,"),
        ("\udc80\n.png", "\\udc80\\n.png,"),
        (f"{'n' * 200}.png", f"{'n' * 30}…{'n' * 26}.png,"),
    ):
        shown = words(figure(replace(made, image=replace(made.image, path=path))))
        assert name in shown.replace(" ", "") or name in shown
        assert "/a/b" not in shown


def test_changed_options_are_in_the_heading_of_a_map():
    geometry = whole(64, 64)
    columns = [
        column("gradcam", RAMP, geometry, smooth=0.0, threshold=0.25, token_centred=False),
        column("rollout", RAMP + 1, geometry, signed=False, shared=True, fusion="max", discard=0.0),
        column("attention", RAMP + 1, geometry, signed=False, layer=-1, head=3),
        column("gone_away", RAMP, geometry, depth=2),
    ]
    made = explanation(Image.new("RGB", (64, 64)), labels=("x",), geometry=geometry, columns=columns)
    for layout in ("rows", "panels"):
        text = words(figure(made, layout=layout))
        for part in ("threshold 0.25", "fusion max", "head 3", "depth 2"):
            assert part in text
        assert not any(part in text for part in ("smooth", "discard", "layer −1", "token_centred"))


def test_long_layer_paths_are_shortened_one_by_one():
    assert short_layer("vision_model.encoder.layers.3.layer_norm1") == "…layers.3.layer_norm1"
    assert short_layer("mean of a.b.layers.3.ln, a.b.layers.11") == "mean of …layers.3.ln, …layers.11"
    assert short_layer("visual.trunk") == "visual.trunk"
    assert short_layer("layers.3") == "layers.3"


def test_two_colour_bars_name_their_methods():
    text = text_of(figure(explanation(), signed=True, cmap="jet"))
    assert "Rollout, Relevance:" in text
    assert "Gradcam:" in text
    assert "signed maps symmetric around zero" in text
    assert "jet is not diverging: signed maps use RdBu_r" in text
    assert "drawn as zero" not in text
    plain = text_of(figure(explanation()))
    assert "Gradcam:" not in plain
    assert "negative values are drawn as zero" in plain
    geometry = whole(64, 64)
    one = [column("gradcam", RAMP, geometry)]
    alone = text_of(
        figure(explanation(Image.new("RGB", (64, 64)), labels=("x",), geometry=geometry, columns=one), signed=True)
    )
    assert "own largest absolute value, zero at the centre" in alone
    assert "lowest" not in alone


def test_parts_beyond_a_fixed_scale_are_noted():
    geometry = whole(64, 64)
    columns = [column("gradcam", RAMP, geometry), column("rollout", RAMP + 11, geometry, signed=False)]
    made = explanation(Image.new("RGB", (64, 64)), labels=("x",), geometry=geometry, columns=columns)
    text = text_of(figure(made, scale="fixed", fixed=(0.25, 0.75)))
    assert "50% of the patches below the scale and 25% of the patches above the scale" in text
    assert "100% of the patches above the scale" in text
    assert "of the patches" not in text_of(figure(made, scale="fixed", fixed=(-1, 20)))
    assert [percent(p) for p in (0.001, 0.129, 0.999, 1.0)] == ["less than 1%", "12%", "99%", "100%"]


def test_scores_of_parts_are_explained_where_there_are_any():
    made = explanation()
    assert "Score of a token: how much the similarity drops without it; below zero" in text_of(figure(made))
    assert "how much the logit drops without it" in text_of(figure(replace(made, target="logits")))
    assert "as a text of its own" in text_of(figure(replace(made, token_target="alone")))
    assert "Score of a" not in text_of(figure(replace(made, entries=made.entries[:1])))
    phrase = replace(made, entries=(made.entries[0], replace(made.entries[1], kind="phrase")))
    assert "Score of a phrase: its similarity as a text of its own." in text_of(figure(phrase))
    assert "drops" not in text_of(figure(phrase))


def test_the_legend_mentions_that_a_peak_may_be_outside_the_box():
    assert "may miss the strongest patch" in text_of(figure(explanation()))
    assert "strongest patch" not in text_of(figure(explanation(), peak=False))
    assert "largest region" not in text_of(figure(explanation(), box=False))


def test_repeated_labels_are_numbered():
    made = explanation(labels=("man", "man", "red", "man"))
    assert entry_titles(made) == ["man", "man", "red", "man (2)"]  # the first is the caption


def test_escapes_in_warnings_are_not_escaped_again():
    assert "'a\\u200bb'" in words(figure(explanation(warnings=["unknown: 'a\\u200bb'"])))


# ---------------------------------------------------------------- generated texts


def test_a_generated_text_has_its_origin_and_the_meaning_of_scores():
    made = written(["a", "b"], along(2, 4, 32))
    text = text_of(figure(made))
    assert "model some/reader · generated by the model · target logit" in text
    assert "Score of a token: the logit at its position." in text
    assert "drops" not in text
    assert "of its own" not in text.replace("its own lowest to its own highest", "")
    forced = replace(made, origin="forced", target="log_probability")
    assert "forced text · target log_probability" in text_of(figure(forced))
    assert "Score of a token: the log-probability at its position." in text_of(figure(forced))
    assert "by the model" not in text_of(figure(explanation()))


def test_the_scores_of_all_kinds_of_entries_are_explained():
    extra = (
        Entry("ab", "word", 0, 2, 1.0), Entry("ab", "caption", 0, 2, 1.0), Entry("z", "where", 1, 2, 0.5, 3),
        Entry("b - 8", "contrast", 1, 2, 0.5, 3),
    )  # fmt: skip
    made = written(["a", "b"], along(2, 4, 32), extra=extra, extra_cells=[(0, 0)] * 4)
    assert score_note(made) == (
        "Score of a token: the logit at its position. Score of a word or caption: the mean logit of its tokens. "
        "Score of a token in place of another: the logit of the token that was not generated, at that position. "
        "Score of a contrast: by how much the logit of the first token exceeds that of the second."
    )
    assert entry_titles(made)[2:] == ["ab", "ab", "z in place of “b”", "b - 8 at “b”"]


def test_titles_of_places_blanks_and_the_end():
    extra = (
        Entry("z", "where", 3, 3, 0.5, 3), Entry("z", "where", 1, 2, 0.5, 3), Entry("z", "where", 1, 1, 0.5, 3),
        Entry("", "where", 0, 1, 0.5, 3), Entry("", "image", 0, 0, 0.5),
    )  # fmt: skip
    made = written(["a", " ", "b", "", " "], along(5, 4, 32), caption="a b", extra=extra, extra_cells=[(0, 0)] * 5)
    assert entry_titles(made) == [
        "a", "␣", "b", "(end)", "␣ (2)", "z at the end", "z in place of “␣”", "z at character 1",
        "(end) in place of “a”", "(image)",
    ]  # fmt: skip


def test_an_entry_has_its_probability_and_alternatives():
    made = written(["a", "b", "c", "d"], along(4, 4, 32), probabilities=[0.981, 0.9999, 0.00042, 1.0])
    text = text_of(figure(made))
    for part in ("score 9.5 · p=0.98 or: o 1%, c 0.4%", "p>0.99", "p=0.0004", "p=1.00"):
        assert part in text, part
    assert text.count("or: o 1%") == 4
    assert " p " not in text_of(figure(explanation()))
    assert "or:" not in text_of(figure(explanation()))


def test_alternatives_that_cannot_be_drawn_are_explained():
    others = (Alternative("\U000e0041", 4, 0.2),)
    assert "cannot be drawn here" in text_of(figure(written(["a"], [(0, 0)], alternatives=others)))
