"""Looking inside: features, gradients, weights and the signed map are the tutorial's, and the figure shows them."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from grounding import Selection, explain, inspect
from grounding.core.errors import GroundingError, LayerError, OptionError, TextError
from grounding.core.geometry import Geometry
from grounding.core.text import find_label
from grounding.engine.inspect import inspect_request
from grounding.engine.request import Request
from grounding.explanation.figures.inspection import check_channels, figure
from grounding.explanation.figures.pixels import DIVERGING, colour_table
from tests.support import models
from tests.support.convolutional import COLUMNS, ROWS, ClassAdapter, one_by_one
from tests.support.figures import images, words
from tests.support.images import noise
from tests.support.inspections import inspection as made
from tests.support.oracles import vision
from tests.support.tolerances import STORED, close
from tests.support.tutorials.clip import CAPTION, LAYERS, run_tutorial
from tests.support.tutorials.flava import FUSION, TEXT, entries, loop, patches


def inspect_all(adapter, image, text=None, *, entry=None, **settings):
    return inspect_request(adapter, image, text, Request(**({"methods": ["gradcam"]} | settings)), entry=entry)


@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_what_a_tutorial_records(clip, image, layer):
    for entry, (score, features, gradient, _) in enumerate(run_tutorial(clip, image, layer)[:3]):
        found = inspect(clip, image, CAPTION, entry=entry, layer=layer)
        assert found.features.shape == found.gradients.shape == (4, 4, 32)
        assert close(found.features.reshape(16, -1), features[1:])
        assert close(found.gradients.reshape(16, -1), gradient[1:])
        assert close(found.weights, gradient[1:].mean(0), STORED)
        assert close(found.map.ravel(), vision.gradcam(features[1:], gradient[1:]))
        assert found.entry.score == pytest.approx(score)
        assert found.layer == layer
        assert np.array_equal(found.view, np.maximum(found.map, 0))


def test_behind_a_relu_that_works_in_place():
    adapter = ClassAdapter(layer="features")
    found = inspect(adapter, noise(70, 50), "2")
    features, gradient = one_by_one(adapter, noise(70, 50), 2, "features")
    assert found.features.min() < 0
    assert close(found.features.reshape(ROWS * COLUMNS, -1), features)
    assert close(found.gradients.reshape(ROWS * COLUMNS, -1), gradient)


def test_a_layer_with_a_grid_of_its_own():
    adapter = models.classifier_adapter("resnet")
    small, large = inspect_all(adapter, noise(90, 60), target=[1], layers=["-1", "0"])
    for one in (small, large):
        assert one.features.shape[:2] == one.map.shape == (one.geometry.rows, one.geometry.columns)
    assert large.geometry.rows == 4 * small.geometry.rows
    assert large.geometry.seen == small.geometry.seen == (0, 0, 90, 60)
    assert (large.entry.label, large.entry.kind) == ("two dogs", "class")
    shown = words(figure([small, large], 2))
    assert f"{large.geometry.rows} x {large.geometry.columns} cells, 8 channels" in shown


def test_entries_by_label_and_what_they_are(clip, image):
    found = inspect(clip, image, CAPTION, entry="red")
    assert (found.entry.kind, found.entry.label) == ("token", "red")
    same = explain(clip, image, CAPTION, methods=["gradcam"])
    assert close(found.map, same["red"].raw)
    phrase = inspect(clip, image, CAPTION, entry="red jacket", select=Selection(phrases=["red jacket"]))
    assert phrase.entry.kind == "phrase"
    with pytest.raises(TextError, match=r"no entry 'blue' \(occurrence 0\); there are 0:'a man in a red jacket'"):
        inspect(clip, image, CAPTION, entry="blue")
    with pytest.raises(TextError, match="entry 99 is not in 0 to"):
        inspect(clip, image, CAPTION, entry=99)


def test_places_count_from_either_end():
    labels = ["Red", "red", "bus"]
    assert [find_label(n, labels) for n in (0, -1, "red", "RED", "BUS")] == [0, 2, 1, 0, 2]
    assert find_label("RED", labels, 1) == 1


def test_all_entries_at_all_layers_come_from_one_pass(clip, image, monkeypatch):
    passes = []
    handle = clip.model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    found = inspect_all(clip, image, "two dogs", layers=["-1.in", "-2"], average_layers=True)
    handle.remove()
    assert len(passes) == 1
    assert [(one.entry.label, one.layer) for one in found] == [
        (label, layer) for label in ("two dogs", "two", "dog", "s") for layer in (LAYERS[0], LAYERS[1])
    ]
    for one in found:
        assert close(one.map, inspect(clip, image, "two dogs", entry=one.entry.label, layer=one.layer).map)


@pytest.mark.parametrize("method", ["gradcam", "gradcam_ln"])
def test_the_map_is_the_weighted_sum_on_every_architecture(any_adapter, method):
    """At a fast tap, too, where the map that `explain` gives comes without a gradient per patch."""
    found = inspect(any_adapter, noise(70, 50, 1), "two dogs", entry=-1, method=method)
    same = explain(any_adapter, noise(70, 50, 1), "two dogs", methods=[method])
    assert close(found.map, same.map(-1).raw)
    assert close(np.einsum("rcd,d->rc", found.features.astype(float), found.weights.astype(float)), found.map, STORED)
    assert found.title == same.methods[method].title
    assert (found.entry.label, found.entry.kind) == (same.entries[-1].label, same.entries[-1].kind)
    assert found.entry.score == pytest.approx(same.entries[-1].score)


def test_of_two_sequences_that_are_compared_both_are_kept():
    adapter = models.flava_adapter()
    layer = "fusion:0"
    runs = loop(adapter, "matching", FUSION[layer])
    found = inspect_all(adapter, noise(50, 40), TEXT, target="matching", layers=[layer], select=entries("matching"))
    assert [one.compared for one in found] == [False] + [True] * (len(found) - 1)
    for one, run in zip(found[1:], runs[1:], strict=True):
        for half, (features, gradient) in enumerate([run[1:3], *run[4]]):
            part = slice(32 * half, 32 * half + 32)
            assert close(one.features[..., part].reshape(16, -1), patches(features, 2))
            assert close(one.gradients[..., part].reshape(16, -1), patches(gradient, 2))
    assert len(found[0].weights) == 32  # the caption is compared with nothing
    assert close(found[0].gradients.reshape(16, -1), patches(runs[0][2], 2))
    assert close(np.einsum("rcd,d->rc", found[0].features, found[0].weights), found[0].map, STORED)
    assert "“Without it”: channels of the text that lacks the token" in words(figure(found, 1))
    assert "Without it" not in words(found[0].figure(1))
    assert (found[1].channel(3), found[1].channel(35)) == ("channel 3", "channel 3, without it")
    assert inspect(adapter, noise(50, 40), TEXT, target="matching", layer="-1.in").channel(31) == "channel 31"


def test_a_score_without_a_text_has_one_entry():
    [found] = inspect_all(models.mean_adapter(), noise(50, 40), "two dogs", target="norm")
    [alone] = inspect_all(models.mean_adapter(), noise(50, 40), target="norm")
    assert found.entry.kind == "image"
    assert found.map.any()
    assert np.array_equal(found.map, alone.map)
    assert np.array_equal(found.features, alone.features)


def test_options_are_those_of_the_method(clip, image):
    options = {"gradcam.threshold": 0.5, "gradcam.smooth": 1.0, "rollout.fusion": "max"}
    found = inspect_all(clip, image, CAPTION, methods=["rollout", "gradcam"], options=options)[0]
    same = explain(clip, image, CAPTION, methods=["rollout", "gradcam"], options=options).map(0, "gradcam")
    assert close(found.map, same.raw)
    assert close(found.view, same.view)
    assert (found.view[found.view > 0] >= 0.5 * found.map.max()).all()
    assert inspect_all(clip, image, CAPTION, methods=["rollout", "relevance"])[0].title == "Grad-CAM"
    assert [one.title for one in inspect_all(clip, image, "dogs", methods=["default", "gradcam_ln"])][:1] == [
        "Grad-CAM (LN-rule)"
    ]


def test_the_model_is_left_as_it_was(clip, image):
    clip.model.train()
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    state = torch.random.get_rng_state()
    inspect(clip, image, CAPTION)
    with pytest.raises(LayerError, match="is dead"):
        inspect(clip, image, CAPTION, layer="-1")
    assert clip.model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in clip.model.parameters())
    assert not any(m._forward_hooks for m in clip.model.modules() if type(m).__name__ == "LayerNorm")


def test_a_model_that_draws_lots_draws_those_of_its_explanation(clip, image):
    explain(clip, image, CAPTION)  # the first recorded pass is compared with a plain one
    drawn = []
    handle = clip.model.vision_model.register_forward_hook(lambda *_: drawn.append(torch.rand(()).item()))
    for call in (explain, inspect):
        for seed in (3, 4):
            call(clip, image, CAPTION, seed=seed)
    handle.remove()
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_what_cannot_be_inspected_is_refused(clip, image):
    with pytest.raises(
        OptionError, match=r"'layercam' has no channel weights .* \(methods that have: gradcam, gradcam_ln"
    ):
        inspect(clip, image, CAPTION, method="layercam")
    with pytest.raises(ValueError, match="did you mean 'gradcam'"):
        inspect(clip, image, CAPTION, method="gradkam")
    with pytest.raises(GroundingError, match="one image and one text, got 2 and 1"):
        inspect(clip, [image, image], CAPTION)
    with pytest.raises(GroundingError, match="one image and one text, got 1 and 2"):
        inspect(clip, image, [CAPTION, "dogs"])
    with pytest.raises(OptionError, match="nothing to explain in 'two dogs'"):
        inspect(clip, image, "two dogs", select=Selection(caption=False, tokens=False))
    with pytest.raises(OptionError, match=r"gradcam.threshold"):
        inspect(clip, image, CAPTION, options={"gradcam.threshold": 2})


def test_a_layer_read_through_a_norm_alone_is_said(trocr):
    found = inspect(trocr, noise(90, 30), "red car", entry=0)
    assert any("weak evidence" in w for w in found.warnings)
    assert "weak evidence" in words(found.figure(2))


# ---------------------------------------------------------------- the figure


def panels(shown):
    return {name.removeprefix("inspect:"): array for name, array in images(shown, "inspect:").items()}


def cells(panel, rows, columns):
    """The colour in the middle of each cell, after a check that cells are flat."""
    height, width = panel.shape[:2]
    ys, xs = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in ((rows, height), (columns, width)))
    assert len(np.unique(panel.reshape(-1, 3), axis=0)) <= rows * columns
    return panel[ys[:, None], xs[None, :]].astype(int)


def test_the_strongest_channels_by_absolute_weight():
    one = made()
    assert one.strongest(4) == (19, 18, 0, 17)  # 10.1, 9.1, -8.9, 8.1
    found = panels(one.figure(4))
    assert [name for name in found if name.startswith("f")] == [f"features:{d}" for d in (19, 18, 0, 17)]
    assert [name for name in found if name.startswith("g")] == [f"gradients:{d}" for d in (19, 18, 0, 17)]
    text = words(one.figure(4))
    for part in ("Channel 19", "mean = weight 10.1", "mean = weight −8.9", "20 channels", "3 x 4 cells", "jacket",
                 "token · score 0.25", "…layers.3.norm", "Map before ReLU", "Map after ReLU",
                 "highest bar"):  # fmt: skip
        assert part in text, part
    assert len([n for n in panels(one.figure(16)) if n.startswith("f")]) == 16
    assert len([n for n in panels(made(width=5).figure(16)) if n.startswith("f")]) == 5


def test_signs_are_colours_around_zero():
    found = panels(made().figure(4))
    table = colour_table(DIVERGING).astype(int)
    one = made()
    assert (cells(found["gradients:19"], 3, 4) == table[255]).all()
    assert (cells(found["gradients:0"], 3, 4) == table[0]).all()
    drawn, values = cells(found["features:19"], 3, 4), one.features[..., 19]
    redness = drawn[..., 0] - drawn[..., 2]
    strong = np.abs(values) > 0.2 * np.abs(values).max()
    assert (np.sign(redness[strong]) == np.sign(values[strong])).all()
    top = np.unravel_index(np.abs(values).argmax(), values.shape)
    assert tuple(drawn[top]) == tuple(table[255 if values[top] > 0 else 0])


def test_the_map_before_and_after():
    one = made()
    found = panels(one.figure(1))
    before, after = (cells(found[name], 3, 4) for name in ("before", "after"))
    sign = one.map > 0.1 * np.abs(one.map).max()
    assert (before[sign][:, 0] > before[sign][:, 2]).all()
    magma = colour_table("magma").astype(int)
    assert (after[one.map <= 0] == magma[0]).all()
    assert (after[np.unravel_index(one.map.argmax(), one.map.shape)] == magma[255]).all()
    jet = cells(panels(one.figure(1, cmap="jet"))["after"], 3, 4)
    assert (jet[one.map <= 0] == colour_table("jet")[0].astype(int)).all()
    level = made(options={"threshold": 0.7, "smooth": 0.0})
    cut = cells(panels(level.figure(1))["after"], 3, 4)
    assert (cut[one.map < 0.7 * one.map.max()] == magma[0]).all()
    assert "After threshold 0.7" in words(level.figure(1))
    assert "threshold 0.7" in words(level.figure(1))


def test_a_map_without_evidence_has_no_colour():
    found = made(map=-np.ones((3, 4), np.float32) - np.arange(12).reshape(3, 4))
    after = panels(found.figure(1))["after"].astype(int)
    assert (after.max(-1) - after.min(-1)).max() < 12
    assert "no evidence: all negative" in words(found.figure(1))
    assert panels(made(features=np.zeros((3, 4, 20), np.float32)).figure(1))["features:19"].min() == 255


def test_the_histogram_counts_channels():
    """Twenty weights from -8.9 to 10.1 in 41 bins over 5 % more than -10.1 to 10.1: each its own bar."""
    panel = panels(made().figure(3))["weights"].astype(int)
    middle = panel[panel.shape[0] // 2]
    blue, red = ((middle[:, 2 - 2 * side] - middle[:, 2 * side]) for side in (0, 1))
    half = len(middle) // 2
    assert (blue[:half] > 50).any()
    assert not (blue[half:] > 50).any()
    assert (red[half:] > 50).any()
    assert not (red[:half] > 50).any()
    ticks = np.flatnonzero((panel[-1] == 0).all(-1))
    groups = np.split(ticks, np.flatnonzero(np.diff(ticks) > 1) + 1)
    expected = [(w / 10.1 / 1.05 + 1) / 2 * len(middle) for w in (-8.9, 9.1, 10.1)]
    assert np.allclose([g.mean() for g in groups], expected, atol=4)
    one_sided = panels(made(weights=np.zeros(20, np.float32)).figure(1))["weights"]
    assert one_sided.any()


@pytest.mark.parametrize(
    ("geometry", "left", "right"),
    [
        (Geometry.from_steps(80, 40, resized=(80, 40), crop=(20, 0, 40, 40), grid=(4, 4)), "red", "blue"),
        (Geometry.from_steps(80, 40, resized=(40, 20), pad=(0, 10, 40, 40), grid=(4, 4)), "red", "blue"),
    ],
)
def test_what_the_model_saw_lies_under_the_grid(geometry, left, right):
    image = Image.new("RGB", (80, 40), left)
    image.paste(right, (40, 0, 80, 40))
    if geometry.input_width < 80 and not geometry.offset[1]:  # what the crop cuts off
        image.paste("lime", (0, 0, 20, 40))
        image.paste("lime", (60, 0, 80, 40))
    shown = panels(made(4, 4, image=image, geometry=geometry).figure(1))["seen"].astype(int)
    height, width = shown.shape[:2]
    assert tuple(shown[height // 2, width // 4]) == (255, 0, 0)
    assert tuple(shown[height // 2, 3 * width // 4]) == (0, 0, 255)
    assert tuple(shown[height // 2, width // 16]) == (255, 0, 0)
    if geometry.offset[1]:
        assert (shown[height // 8] == 208).all()  # padding


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (2, 64), (1, 200), (40, 2), (14, 14), (4, 10), (200, 1)])
def test_no_text_leaves_the_figure_and_no_two_panels_overlap(rows, columns, channels):
    one = made(rows, columns, label="a long label of very many words " * 5, warnings=("too long " * 60,) * 2)
    shown = figure([one, made(rows, columns)], channels, oversampling=0.2)
    width, height = shown.canvas.get_width_height()
    assert shown.get_size_inches()[0] <= 17
    boxes = [text.get_window_extent() for text in shown.axes[0].texts]
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)
    frames = [image.get_extent() for image in shown.axes[0].images if image.get_gid() != "bar"]
    for i, (a, b, bottom, top) in enumerate(frames):
        assert 0 <= a < b <= shown.get_size_inches()[0] + 1e-6
        for c, d, low, high in frames[:i]:
            assert b <= c + 1e-6 or d <= a + 1e-6 or bottom <= high + 1e-6 or low <= top + 1e-6
    scale = [(b - a, low - high) for a, b, low, high in frames]
    assert len(scale) == 2 * (4 + 2 * min(channels, 20))
    # No words over a panel.
    dpi = shown.dpi
    for box in boxes:
        for a, b, low, high in frames:
            apart = box.x1 <= a * dpi + 1 or box.x0 >= b * dpi - 1
            above_or_below = box.y0 >= height - high * dpi - 1 or box.y1 <= height - low * dpi + 1
            assert apart or above_or_below


def test_hostile_words_are_drawn_as_words():
    label = "$x_1^2$ \x1b[31m 猫 <b>"
    shown = figure([made(label=label, caption=label)], 1)
    shown.canvas.draw()
    assert "$x_1^2$" in words(shown)
    assert words(figure([made(label=" ")], 1)).count("␣")


def test_options_of_the_figure_are_checked():
    for count in (0, -1, 65):
        with pytest.raises(OptionError, match=rf"channels to show must be from 1 to 64, got {count}"):
            check_channels(count)
    with pytest.raises(OptionError, match="from 1 to 64"):
        figure([made()], 0)
    with pytest.raises(OptionError, match="unknown colour map 'magna'"):
        figure([made()], 1, cmap="magna")
    with pytest.raises(OptionError, match="no inspection"):
        figure([], 1)


def test_the_same_inspection_gives_the_same_pixels():
    first, second = (figure([made()], 3) for _ in range(2))
    for shown in (first, second):
        assert isinstance(shown.canvas, FigureCanvasAgg)
        shown.canvas.draw()
    assert np.array_equal(np.asarray(first.canvas.buffer_rgba()), np.asarray(second.canvas.buffer_rgba()))
