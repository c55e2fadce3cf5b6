"""Occlusion and RISE against their oracles, on every kind of model, and the masks by themselves."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from grounding import Selection, explain
from grounding.adapter.inputs import ImageInputs, View
from grounding.core.errors import NumericError, OptionError
from grounding.core.geometry import Geometry
from grounding.core.text import Generate
from grounding.engine import masking
from grounding.engine.passes import encode
from grounding.engine.queries import prepare
from grounding.engine.signals import scores
from grounding.methods.masks import RandomCells, cell_numbers, patch_masks, windows
from tests.support import models
from tests.support.images import noise
from tests.support.oracles import perturbation
from tests.support.tiled import PackedAdapter, TiledAdapter
from tests.support.tolerances import ORACLE, close

TEXT = "a man in a red jacket"
IMAGES = [noise(70, 50, 1), noise(40, 90, 2)]
CAPTION = Selection(tokens=False)
FEW = {"rise.masks": 12, "rise.cells": 3}
# Of one geometry: the input is the image.
SQUARE = Geometry.from_steps(32, 32).with_grid(4, 4)


def by_hand(adapter, image, kind=None, text=TEXT):
    """Pixels, and a function pixels -> score of the caption by a plain forward pass of one image."""
    inputs = prepare(adapter, [image], [[text]], kind)
    kind = kind or adapter.target_kinds[0]
    targets = adapter.targets(inputs, [[inputs.texts[0].caption()]], kind)
    tensors = inputs.images.tensors

    def score(pixels):
        value = torch.from_numpy(pixels)[None].to(tensors["pixel_values"])
        changed = ImageInputs(inputs.images.images, inputs.images.views, {**tensors, "pixel_values": value})
        again = prepare(adapter, [image], [[text]], kind)
        again = type(again)(changed, again.texts, again.text_image, again.tensors)
        return float(scores(adapter, again, targets)[0])

    return tensors["pixel_values"][0].double().numpy(), score, inputs


def baseline_of(adapter, image, pixels, kind):
    if kind == "black":
        black = Image.new("RGB", image.size)
        return adapter.prepare_images([black]).tensors["pixel_values"][0].double().numpy()
    return np.zeros_like(pixels) + pixels.mean((1, 2), keepdims=True)


@pytest.mark.parametrize("baseline", ["mean", "black"])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (3, 2), (9, 9)])
def test_occlusion(window, stride, baseline):
    adapter = models.clip_adapter()
    options = {"occlusion.window": window, "occlusion.stride": stride, "occlusion.baseline": baseline}
    found = explain(adapter, IMAGES, TEXT, methods="occlusion", select=CAPTION, options=options)
    for image, one in zip(IMAGES, found, strict=True):
        pixels, score, _ = by_hand(adapter, image)
        base = baseline_of(adapter, image, pixels, baseline)
        assert close(one[0].raw, perturbation.occlusion(score, pixels, base, 8, window, stride))


@pytest.mark.parametrize("kind", ["matching", "logit", "norm"])
def test_occlusion_of_other_targets(kind):
    adapter = models.flava_adapter(kind=kind)
    text = None if kind == "norm" else TEXT
    found = explain(adapter, IMAGES[0], text, methods="occlusion", target=kind, select=CAPTION)
    pixels, score, _ = by_hand(adapter, IMAGES[0], kind, text)
    expected = perturbation.occlusion(score, pixels, baseline_of(adapter, IMAGES[0], pixels, "mean"), 8)
    assert close(found[0].raw, expected)


def test_occlusion_of_tokens_left_out():
    """`matching` of a caption and of the caption without a token: the difference is what the score loses."""
    adapter = models.flava_adapter(kind="matching")
    found = explain(adapter, IMAGES, [[TEXT, "two dogs"], [TEXT]], methods="occlusion")
    for image, own in zip(IMAGES, found, strict=True):
        alone = explain(adapter, image, TEXT, methods="occlusion")
        assert close(own[0].methods["occlusion"].maps, alone.methods["occlusion"].maps)
    entry = found[1][0]
    inputs = prepare(adapter, [IMAGES[1]], [[TEXT]], "matching")
    targets = adapter.targets(inputs, [[inputs.texts[0].caption(), *inputs.texts[0].tokens()]], "matching")
    geometry = inputs.images.geometry(0)
    masks = patch_masks(geometry, windows(geometry, 1, 1), "mean", torch.float64)
    masked = masking.masker(adapter, inputs.images, [masks])([masks.pixels(5, 6)])
    lost = scores(adapter, inputs, targets) - scores(
        adapter, type(inputs)(masked, *list(vars(inputs).values())[1:4]), targets
    )
    assert close([maps.ravel()[5] for maps in entry.methods["occlusion"].maps], lost)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("cells", "keep"), [(3, 0.5), (7, 0.2)])
def test_rise(cells, keep, centred):
    """The masks themselves are held against their definition below."""
    adapter = models.clip_adapter()
    options = {"rise.masks": 12, "rise.cells": cells, "rise.keep": keep, "rise.centred": centred}
    found = explain(adapter, IMAGES, TEXT, methods="rise", select=CAPTION, options=options, seed=3)
    masks = RandomCells.draw(12, cells, keep, (32, 32), 3, torch.float64).masks(0, 12).numpy()
    for image, one in zip(IMAGES, found, strict=True):
        pixels, score, _ = by_hand(adapter, image)
        base = baseline_of(adapter, image, pixels, "mean")
        assert close(one[0].raw, perturbation.rise(score, pixels, base, masks, keep, 8, centred))


def test_the_masks_of_rise_are_those_of_the_paper():
    drawn = RandomCells.draw(6, 3, 0.5, (14, 11), 1, torch.float64)
    assert drawn.bits.unique().tolist() == [0.0, 1.0]
    assert drawn.shifts.max() > 0
    for mask, bits, shift in zip(drawn.masks(0, 6), drawn.bits, drawn.shifts.tolist(), strict=True):
        assert close(mask, perturbation.rise_mask(bits.numpy(), shift, 14, 11))
    assert close(drawn.masks(2, 5), drawn.masks(0, 6)[2:5])


def test_masks_of_rise_show_each_pixel_as_often():
    """E[M] = p at every pixel, its edges included; shifts cover a whole cell."""
    drawn = RandomCells.draw(20_000, 3, 0.3, (8, 5), 0, torch.float64)
    mean = drawn.masks(0, 20_000).mean(0)
    # Five standard errors of a bit's mean.
    assert (mean - 0.3).abs().max() < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert [drawn.shifts[:, axis].unique().tolist() for axis in (0, 1)] == [[0, 1, 2], [0, 1]]


def test_windows_are_those_of_the_oracle():
    geometry = Geometry.from_steps(40, 28).with_grid(7, 5)
    for window, stride in [(1, 1), (3, 2), (4, 4)]:
        found = windows(geometry, window, stride)
        tops, lefts = (perturbation.starts(length, window, stride) for length in (7, 5))
        assert len(found) == len(tops) * len(lefts)
        for one, (top, left) in zip(found, itertools.product(tops, lefts), strict=True):
            expected = np.zeros((7, 5), bool)
            expected[top : top + window, left : left + window] = True
            assert np.array_equal(one, expected)


def test_padding_is_no_part_of_a_window():
    geometry = Geometry.from_steps(32, 16, pad=(0, 8, 32, 32)).with_grid(4, 4)
    assert geometry.seen_cells.sum() == 8
    found = windows(geometry, 1, 1)
    assert len(found) == 8
    assert not found[:, ~geometry.seen_cells].any()
    assert windows(geometry, 2, 2).any(0)[geometry.seen_cells].all()


def test_the_mean_of_a_mask_over_each_patch():
    masks = patch_masks(SQUARE, windows(SQUARE, 2, 1), "mean", torch.float64)
    assert torch.equal(masks.over(SQUARE), torch.from_numpy(~windows(SQUARE, 2, 1)).double())
    # Pixels beyond the patches stay, whatever is hidden.
    cut = Geometry.from_steps(34, 34).with_grid(4, 4, (8.0, 8.0))
    assert patch_masks(cut, np.ones((1, 4, 4), bool), "mean", torch.float64).pixels(0, 1)[0].sum() == 34 * 34 - 32 * 32


def prepared_again(monkeypatch):
    """No model reads its pixels from now on: images are masked before they are prepared."""
    monkeypatch.setattr(masking, "reads_pixels", lambda images: False)


def test_hidden_in_the_image_as_in_the_models_input(monkeypatch):
    """An image of the input's own size, patches and black: both ways hide the same pixels."""
    adapter, image = models.clip_adapter(), noise(32, 32)
    options = {"occlusion.window": 2, "occlusion.baseline": "black"}
    asked = {"methods": "occlusion", "options": options}
    inside = explain(adapter, [image, noise(32, 32, 5)], TEXT, **asked)
    prepared_again(monkeypatch)
    before = explain(adapter, [image, noise(32, 32, 5)], TEXT, **asked)
    for one, other in zip(inside, before, strict=True):
        assert close(other.methods["occlusion"].maps, one.methods["occlusion"].maps)


@pytest.mark.parametrize("baseline", ["mean", "blur", "black"])
def test_hidden_in_the_image_under_resizing(monkeypatch, baseline):
    """Resizing mixes pixels at the edges of patches, and a crop has other edges for a blur: nearly the same maps."""
    adapter, image = models.clip_adapter(), noise(320, 480)
    image = Image.fromarray(np.asarray(image)).resize((40, 60)).resize((320, 480), Image.Resampling.BICUBIC)
    options = {"occlusion.window": 2, "occlusion.baseline": baseline, "rise.baseline": baseline, "rise.masks": 40}
    asked = {"methods": ["occlusion", "rise"], "options": options, "select": CAPTION}
    inside = explain(adapter, image, TEXT, **asked)
    prepared_again(monkeypatch)
    before = explain(adapter, image, TEXT, **asked)
    for name in ("occlusion", "rise"):
        one, other = (found.map(0, name).raw.ravel() for found in (inside, before))
        assert np.corrcoef(one, other)[0, 1] > 0.85
        assert not np.array_equal(one, other)


def test_what_the_model_reads_decides_where_pixels_are_hidden():
    adapter = models.clip_adapter()
    images = adapter.prepare_images(IMAGES)
    assert masking.reads_pixels(images)
    pixels = images.tensors["pixel_values"]
    others = [
        {"pixel_values": pixels.flatten(2)},  # patches in a sequence
        {"pixel_values": pixels, "sizes": pixels[:, 0, 0, :2]},
        {"pixel_values": pixels[:, :, :16]},
        {"inputs": pixels},
    ]
    for tensors in others:
        assert not masking.reads_pixels(ImageInputs(images.images, images.views, tensors))
    packed = ImageInputs(images.images, images.views, images.tensors, packed={"pixel_values": (1, 1)})
    assert not masking.reads_pixels(packed)
    overview = View(0, images.views[0].geometry, "overview")
    assert not masking.reads_pixels(ImageInputs(images.images, (overview, *images.views), images.tensors))


@pytest.mark.parametrize("make", [TiledAdapter, PackedAdapter])
def test_tiles_and_a_second_view(make):
    """Masks are over the detail view, and hide the same pixels in the thumbnail; its map has the coarser patches."""
    adapter, image = make(), noise(90, 70)
    found = explain(adapter, [image, noise(30, 24, 5)], "two dogs", methods=["occlusion", "rise"], options=FEW)
    first = found[0].methods["occlusion"]
    alone = explain(adapter, image, "two dogs", methods="occlusion")
    assert close(first.maps, alone.methods["occlusion"].maps)
    if first.overview is not None:
        rows, columns = first.overview.shape[1:]
        down, across = (own // small for own, small in zip(first.maps.shape[1:], (rows, columns), strict=True))
        assert (down, across) == (2, 2)
        means = first.maps.reshape(len(first.maps), rows, down, columns, across).mean((2, 4))
        assert close(first.overview, means)
    assert all(np.isfinite(one.methods["rise"].maps).all() for one in found)


@pytest.mark.parametrize("name", ["occlusion", "rise"])
@pytest.mark.parametrize("again", [False, True])
def test_on_every_architecture(any_adapter, name, again, monkeypatch):
    """Finite maps for a batch with ragged texts, equal to those one by one; hidden before and after preparation."""
    if again:
        prepared_again(monkeypatch)
    texts = [["two dogs", "a red bus"], ["man in red jacket on a horse"]]
    options = FEW if name == "rise" else {}
    together = explain(any_adapter, IMAGES, texts, methods=name, options=options)
    for b, own in enumerate(together):
        for text, one in zip(texts[b], own, strict=True):
            alone = explain(any_adapter, IMAGES[b], text, methods=name, options=options)
            assert close(one.methods[name].maps, alone.methods[name].maps)


@pytest.mark.parametrize("name", ["occlusion", "rise"])
def test_batches_do_not_change_the_maps(name, monkeypatch):
    adapter = models.clip_adapter()
    options = FEW if name == "rise" else {}
    whole = explain(adapter, IMAGES, TEXT, methods=name, options=options)
    monkeypatch.setattr(masking, "BUDGET", 1)  # one version at a time
    apart = explain(adapter, IMAGES, TEXT, methods=name, options=options)
    monkeypatch.setattr(masking, "BUDGET", 5 * 2 * 3 * 32 * 32)
    monkeypatch.setattr(masking, "_counts", lambda features, images: False)  # features that cannot be told apart
    told = explain(adapter, IMAGES, TEXT, methods=name, options=options)
    for one, *others in zip(whole, apart, told, strict=True):
        for other in others:
            assert close(other.methods[name].maps, one.methods[name].maps)


def test_a_generated_text_is_kept(monkeypatch):
    """The text comes from the whole image; masked images are forced to it."""
    adapter = models.trocr_adapter()
    given = explain(adapter, IMAGES[0], Generate(), methods="occlusion")
    monkeypatch.setattr(type(adapter), "generate", lambda *_: pytest.fail("a masked image was read"))
    seen = adapter.prepare_images([IMAGES[0]])
    encode(adapter, seen)
    assert given.methods["occlusion"].maps.shape[0] == len(given.entries)


def test_probabilities_stay_those_of_the_whole_image():
    adapter = models.trocr_adapter()
    plain, masked = (explain(adapter, IMAGES[0], "red car", methods=name) for name in ("rollout", "occlusion"))
    assert [e.probability for e in masked.entries] == pytest.approx([e.probability for e in plain.entries])


def test_the_seed_of_the_request_draws_the_masks():
    adapter = models.clip_adapter()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first, second, other = (
        explain(adapter, IMAGES[0], TEXT, methods="rise", options=FEW, seed=seed)[0].raw for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    # Not by what else is computed, nor in which batch.
    batch = explain(adapter, [IMAGES[1], IMAGES[0]], TEXT, methods=["gradcam", "rise"], options=FEW, seed=1)
    assert close(batch[1].map(0, "rise").raw, first)


def test_an_image_of_one_patch():
    adapter = models.clip_adapter(size=8)
    found = explain(adapter, IMAGES[0], TEXT, methods=["occlusion", "rise"], options=FEW, select=CAPTION)
    pixels, score, _ = by_hand(adapter, IMAGES[0])
    whole = score(pixels) - score(baseline_of(adapter, IMAGES[0], pixels, "mean"))
    assert found.map(0, "occlusion").raw.item() == pytest.approx(whole, rel=ORACLE)
    assert np.isfinite(found.map(0, "rise").raw).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"occlusion.stride": 3}, "3 patches leave gaps between windows of 1"),
        ({"occlusion.window": 0}, "occlusion.window: expected 1 or more, got 0"),
        ({"occlusion.baseline": "white"}, "'white' is none of mean, blur, black"),
        ({"rise.keep": 0}, "rise.keep"),
        ({"rise.keep": 1}, "rise.keep"),
        ({"rise.masks": 0}, "rise.masks: expected 1 or more"),
        ({"rise.norm_rule": "detach"}, "'rise' has no option 'norm_rule'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        explain(models.clip_adapter(), IMAGES[0], TEXT, methods=["occlusion", "rise"], options=options)


def test_scores_that_are_no_numbers_are_an_error(monkeypatch):
    adapter = models.clip_adapter()
    plain = adapter.encode_images
    calls = []

    def broken(images):
        calls.append(len(images))
        return plain(images) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(adapter, "encode_images", broken)
    with pytest.raises(NumericError, match="scores of masked images are NaN"):
        explain(adapter, IMAGES[0], TEXT, methods="occlusion")


def test_cells_of_pixels():
    assert cell_numbers(SQUARE, 32, 32)[[0, 8, 31], [31, 0, 31]].tolist() == [3, 4, 15]
