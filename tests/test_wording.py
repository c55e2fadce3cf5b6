"""What the words of a figure say."""

from dataclasses import replace

from PIL import Image

from grounding.render import figure
from grounding.wording import entry_titles, percent, short_layer
from tests.drawn import RAMP, words
from tests.made import column, explanation, whole


def said(made):
    """The words of a figure without the places where lines broke."""
    return " ".join(words(made).split())


def test_the_figure_names_the_pictures_file(tmp_path):
    made = explanation()
    assert "picture from memory, 96 x 96 pixels" in said(figure(made))
    for path, name in (
        ("/a/b/cat.jpg", "cat.jpg,"),
        ("c:\\d\\cat.jpg", "cat.jpg,"),
        ("\udc80\n.png", "\\udc80\\n.png,"),
        (f"{'n' * 200}.png", f"{'n' * 30}…{'n' * 26}.png,"),
    ):
        shown = words(figure(replace(made, picture=replace(made.picture, path=path))))
        assert name in shown.replace(" ", "") or name in shown
        assert "/a/b" not in shown


def test_options_that_changed_a_map_stand_in_its_heading():
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


def test_two_colour_bars_say_whose_they_are():
    text = said(figure(explanation(), signed=True, cmap="jet"))
    assert "Rollout, Relevance:" in text
    assert "Gradcam:" in text
    assert "a signed one equally far on both sides of zero" in text
    assert "jet has no middle: signed maps have RdBu_r" in text
    assert "drawn as zero" not in text
    plain = said(figure(explanation()))
    assert "Gradcam:" not in plain
    assert "negative values are drawn as zero" in plain
    geometry = whole(64, 64)
    one = [column("gradcam", RAMP, geometry)]
    alone = said(
        figure(explanation(Image.new("RGB", (64, 64)), labels=("x",), geometry=geometry, columns=one), signed=True)
    )
    assert "on both sides of zero, zero in the middle" in alone
    assert "lowest" not in alone


def test_what_a_fixed_scale_cuts_off_is_said():
    geometry = whole(64, 64)
    columns = [column("gradcam", RAMP, geometry), column("rollout", RAMP + 11, geometry, signed=False)]
    made = explanation(Image.new("RGB", (64, 64)), labels=("x",), geometry=geometry, columns=columns)
    text = said(figure(made, scale="fixed", fixed=(0.25, 0.75)))
    assert "50% of the patches below the scale and 25% of the patches above the scale" in text
    assert "100% of the patches above the scale" in text
    assert "of the patches" not in said(figure(made, scale="fixed", fixed=(-1, 20)))
    assert [percent(p) for p in (0.001, 0.129, 0.999, 1.0)] == ["less than 1%", "12%", "99%", "100%"]


def test_scores_of_parts_are_explained_where_there_are_any():
    made = explanation()
    assert "Score of a token: what the similarity loses without it; below zero" in said(figure(made))
    assert "as a text of its own" in said(figure(replace(made, token_target="alone")))
    assert "Score of a" not in said(figure(replace(made, entries=made.entries[:1])))
    phrase = replace(made, entries=(made.entries[0], replace(made.entries[1], kind="phrase")))
    assert "Score of a phrase: its similarity as a text of its own." in said(figure(phrase))
    assert "loses" not in said(figure(phrase))


def test_the_legend_says_that_a_peak_may_lie_outside_the_box():
    assert "may miss the strongest patch" in said(figure(explanation()))
    assert "strongest patch" not in said(figure(explanation(), peak=False))
    assert "largest region" not in said(figure(explanation(), box=False))


def test_repeated_labels_are_numbered():
    made = explanation(labels=("man", "man", "red", "man"))
    assert entry_titles(made) == ["man", "man", "red", "man (2)"]  # the first is the caption


def test_escapes_in_warnings_are_not_escaped_again():
    assert "'a\\u200bb'" in words(figure(explanation(warnings=["unknown: 'a\\u200bb'"])))
