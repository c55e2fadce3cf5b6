"""The engine, the adapter's contract and text handling of an adapter, over all architectures."""

from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

from grounding import METHODS, Selection, explain
from grounding.core.errors import GroundingError, LayerError, ModelError, OptionError
from grounding.engine.layers import list_layers
from grounding.engine.passes import disjoint_groups
from grounding.engine.queries import prepare
from grounding.explanation.figures.overlays import overlay
from grounding.methods.base import Method
from tests.support import models
from tests.support.contract import default_layer, structure
from tests.support.images import noise
from tests.support.tolerances import HALF_MODEL, SINGLE, alike, close

CAPTION = "a man in a red jacket"
ENERGY = None


def test_a_map_of_features_alone_reaches_every_image_of_a_split_batch(clip, monkeypatch):
    """Static columns are filled from the first chunk, which must have a target of every picture."""
    energy = Method("Energy", frozenset({"activations"}), False, lambda trace: trace.activations().square().sum(-1))
    monkeypatch.setattr("tests.engine.test_explain.ENERGY", energy)
    monkeypatch.setitem(METHODS._table, "energy", "tests.engine.test_explain:ENERGY")
    monkeypatch.setattr("grounding.engine.passes.FAST_BUDGET", 300)
    images = [noise(50, 40, 1), noise(50, 40, 2)]
    together = explain(clip, images, ["red car", "two dogs"], methods=["energy"])
    for found, image in zip(together, images, strict=True):
        alone = explain(clip, image, "red car", methods=["energy"])
        assert close(found.methods["energy"].maps, alone.methods["energy"].maps)


def test_images_seen_once_are_passed_once_for_all_later_texts(clip):
    images = [noise(50, 40, 1), noise(50, 40, 2)]
    explain(clip, images[0], "red car", methods=["rollout"])  # the first recorded pass is compared with a plain one
    counted = []
    handle = clip.model.vision_model.encoder.layers[0].register_forward_hook(
        lambda module, args, out: counted.append(1)
    )
    seen = clip.prepare_images(images)
    first = explain(clip, seen, "red car", methods=["gradcam", "gradcam_ln", "rollout"])
    assert len(counted) == 1
    again = explain(clip, seen, [["two dogs", "a bus"], ["red car"]], methods=["gradcam", "gradcam_ln", "rollout"])
    assert len(counted) == 1
    handle.remove()
    assert [len(found) for found in again] == [2, 1]
    for found, text, image in [(first[1], "red car", 1), (again[0][1], "a bus", 0), (again[1][0], "red car", 1)]:
        alone = explain(clip, images[image], text, methods=["gradcam", "gradcam_ln", "rollout"])
        assert [e.score for e in found.entries] == pytest.approx([e.score for e in alone.entries], abs=1e-9)
        for key, column in alone.methods.items():
            assert close(found.methods[key].maps, column.maps)
    relevance = explain(clip, seen, "red car", methods=["relevance"])[0]
    assert close(relevance.methods["relevance"].maps, explain(clip, images[0], "red car").methods["relevance"].maps)
    # Changed pixels are other pictures, whatever was remembered.
    pixels = seen.tensors["pixel_values"]
    dark = explain(clip, replace(seen, tensors={"pixel_values": 0 * pixels}), "red car", methods=["gradcam"])
    assert dark[0].entries[0].score != pytest.approx(first[0].entries[0].score, abs=1e-6)
    one = explain(clip, clip.prepare_images(images[:1]), "red car")
    assert one.caption == "red car"


def test_attention_that_sees_the_text_is_read_for_every_target(image):
    """An architecture whose attention depends on the text gets one map per entry, without any gradient."""
    found = explain(models.flava_adapter(kind="matching"), image, CAPTION, methods=["rollout"])
    assert found.methods["rollout"].maps.shape[0] == len(found.entries)
    assert all(m.raw.max() > 0 for m in found)


def test_threads_wait_for_each_other(clip, image):
    expected = explain(clip, image, CAPTION)
    found, failed = {}, []

    def work(name):
        try:
            found[name] = [explain(clip, image, CAPTION) for _ in range(5)]
        except Exception as error:  # noqa: BLE001  (an error in a thread would be lost)
            failed.append(error)

    threads = [Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(p.requires_grad for p in clip.model.parameters())
    assert clip.model.config.vision_config._attn_implementation == "sdpa"
    for result in [r for results in found.values() for r in results]:
        assert all(close(c.maps, expected.methods[k].maps) for k, c in result.methods.items())


def test_what_the_crop_cut_off_is_nan_and_hatched(clip):
    found = explain(clip, noise(1600, 400), CAPTION, select=Selection(tokens=False))
    assert found.geometry.seen == (600, 0, 1000, 400)
    heat = found[0].heat()
    assert np.isnan(heat[:, :600]).all()
    assert np.isnan(heat[:, 1000:]).all()
    assert np.isfinite(heat[:, 600:1000]).all()
    assert any("saw 25% of the image" in w for w in found.warnings)
    drawn = np.asarray(overlay(found[0], found.image).convert("RGB"), int)
    unseen, seen = drawn[:, :590], drawn[:, 610:990]
    assert (unseen.max(2) == unseen.min(2)).all()  # grey, no heat
    assert unseen.std() > 5  # and hatched
    assert (seen.max(2) - seen.min(2)).max() > 30


def test_layers_are_refused_where_no_method_reads_them(clip, image):
    with pytest.raises(OptionError, match="none of rollout is computed at a layer"):
        explain(clip, image, CAPTION, methods=["rollout"], layers=["-1.in"])
    with pytest.raises(OptionError, match="at least two different layers, got 1"):
        explain(clip, image, CAPTION, layers=["-1.in", "2.in"], average_layers=True)
    twice = explain(clip, image, CAPTION, methods=["gradcam"], layers=["-1.in", "2.in"])
    assert list(twice.methods) == ["gradcam"]


def test_a_text_alone_stands_for_a_list_of_one(clip, image):
    found = explain(clip, image, CAPTION, methods="gradcam", layers="-2", select=Selection(phrases="red jacket"))
    assert list(found.methods) == ["gradcam"]
    assert [e.label for e in found.entries if e.kind == "phrase"] == ["red jacket"]


def test_weights_that_lie_nowhere_are_refused(clip, image):
    clip.model.visual_projection.to("meta")
    with pytest.raises(ModelError, match="meta device"):
        explain(clip, image, CAPTION)


def test_fast_chunks_that_do_not_fit_are_split(clip, image, monkeypatch):
    whole = explain(clip, image, CAPTION, methods=["gradcam"])
    monkeypatch.setattr("grounding.engine.passes.FAST_BUDGET", 300)
    parts = explain(clip, image, CAPTION, methods=["gradcam"])
    assert close(parts.methods["gradcam"].maps, whole.methods["gradcam"].maps)


def test_single_precision_agrees_with_double():
    double, single = (models.clip_adapter(dtype=d) for d in (torch.float64, torch.float32))
    a, b = (explain(adapter, noise(90, 60), CAPTION) for adapter in (double, single))
    for key in a.methods:
        assert close(b.methods[key].maps, a.methods[key].maps, SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_resembles(dtype):
    double, half = (models.clip_adapter(dtype=d) for d in (torch.float64, dtype))
    a, b = (explain(adapter, noise(90, 60), CAPTION) for adapter in (double, half))
    for key in a.methods:
        assert alike(b.methods[key].maps[0], a.methods[key].maps[0], HALF_MODEL)


def test_non_square_input_of_another_size(image):
    """Position encodings are interpolated where the processor gives another size than the model was trained at."""
    adapter = models.clip_adapter()
    adapter.image_processor = ViTImageProcessor(size={"height": 24, "width": 40})
    found = explain(adapter, image, CAPTION)
    assert found.methods["gradcam"].maps.shape[1:] == (3, 5)
    assert found.geometry.seen == (0, 0, 90, 60)


def test_dead_tap_is_an_error_that_names_a_live_one(clip, image):
    for layer in ("-1", "vision_model.encoder.layers.2.layer_norm2"):
        with pytest.raises(LayerError, match=r"dead.*use 'vision_model.encoder.layers.2.layer_norm1'"):
            explain(clip, image, CAPTION, layers=[layer])


def test_list_layers_knows_the_short_names(clip, image):
    layers = {layer.alias: layer for layer in list_layers(clip, image, CAPTION)}
    assert not layers["2"].live
    assert layers["1"].live
    assert layers["2.in"].default
    assert layers["2.in"].shape == (1, 17, 32)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("-9", "3 blocks, -3 to 2"),
        ("fusion:-1", "no stack 'fusion'"),
        ("vision_model.encoder.layerz.1", "vision_model.encoder has layers"),
        ("text_model.encoder.layers.0", "took no part|no patch grid"),
        ("visual_projection", "no patch grid"),
    ],
)
def test_wrong_layers_are_refused(clip, image, layer, words):
    with pytest.raises(LayerError, match=words):
        explain(clip, image, CAPTION, layers=[layer])


def test_token_counts_are_checked_with_numbers(clip):
    with pytest.raises(LayerError, match=r"\(1, 18, 4\).*1 prefix tokens \+ 4 x 4 patches = 17"):
        clip.patch_tokens(default_layer(clip), prepare(clip, [noise(90, 60)], [[CAPTION]]), (1, 18, 4))


def test_a_target_without_text_says_so(image):
    found = explain(models.mean_adapter(), image, CAPTION, target="norm")
    assert not any(column.text_conditioned for column in found.methods.values())
    assert found.methods["gradcam"].maps.shape[0] == 1


def test_a_readout_without_an_answer_is_refused(clip, image, monkeypatch):
    own = replace(structure(clip), pooling="tokens")
    monkeypatch.setattr(clip, "structure", lambda kind: own)
    with pytest.raises(ModelError, match="must override pooling_weights"):
        explain(clip, image, CAPTION, methods=["rollout"])


def test_lists_give_lists_of_the_same_nesting(clip):
    a, b = noise(50, 40, 1), noise(60, 60, 2)
    assert explain(clip, a, "red car").caption == "red car"
    assert [e.caption for e in explain(clip, a, ["red car", "two dogs"])] == ["red car", "two dogs"]
    assert [e.caption for e in explain(clip, [a, b], "red car")] == ["red car", "red car"]
    nested = explain(clip, [a, b], [["red car"], ["two dogs", "a bus"]], batch_size=1)
    assert [[e.caption for e in found] for found in nested] == [["red car"], ["two dogs", "a bus"]]


@pytest.mark.parametrize(
    ("images", "texts", "words"),
    [([], "x", "no image"), ([1, 2], ["x"], "2 images but 1 texts"), (["p"], [[]], "empty list of texts")],
)
def test_wrong_pairings_are_refused(clip, images, texts, words):
    with pytest.raises(GroundingError, match=words):
        explain(clip, images, texts)


def test_batches_have_each_image_once():
    assert disjoint_groups([{b} for b in [0, 0, 1, 0, 1, 2]]) == [[0, 2, 5], [1, 4], [3]]


# ---------------------------------------------------------------- texts of a CLIP


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scores_of_another_number_than_the_targets_are_refused(clip, image, shape, monkeypatch):
    monkeypatch.setattr(clip, "score", lambda inputs, features, targets: features.sum().expand(shape))
    with pytest.raises(ModelError, match=r"ClipAdapter.score returned shape .* expected \(\d,\)"):
        explain(clip, image, "two dogs")
