"""The engine, the adapter's contract and text handling of an adapter, over all architectures."""

import ast
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

import adapters
from adapters import ADAPTERS
from grounding import METHODS, Selection, explain
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure
from grounding.core.errors import GroundingError, LayerError, ModelError, OptionError, TargetError, TextError
from grounding.engine.layers import list_layers
from grounding.engine.passes import disjoint_groups
from grounding.engine.plan import available
from grounding.engine.request import Request
from grounding.explanation.figures.overlays import overlay
from grounding.methods.base import Method
from tests.conftest import noise
from tests.support import models
from tests.support.oracles import vision
from tests.support.tolerances import HALF_MODEL, ORACLE, SINGLE, SLOPE, alike, close

CAPTION = "a man in a red jacket"
ENERGY = None


def test_every_architecture_in_the_table_is_tested():
    assert set(ADAPTERS) <= set(models.FACTORIES)


def test_every_adapter_in_the_folder_is_in_the_table():
    """An architecture is one file and one line: this is what fails while the line is missing."""
    targets = {ADAPTERS.target(name) for name in ADAPTERS}
    found = []
    for path in Path(adapters.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and b.id in ("Adapter", "ClassAdapter") for b in node.bases
            ):
                module = ".".join(path.relative_to(Path(adapters.__file__).parents[1]).with_suffix("").parts)
                assert f"{module}:{node.name}" in targets
                found.append(module)
    assert len(found) >= 5, found


def prepared(adapter, captions=(CAPTION,)):
    inputs = adapter.prepare([noise(90, 60)], [list(captions)])
    spans = [[tokens.caption(), *tokens.tokens()] for tokens in inputs.tokens]
    return inputs, adapter.targets(inputs, spans)


def test_scores_equal_the_engines(any_adapter):
    inputs, targets = prepared(any_adapter)
    found = explain(any_adapter, noise(90, 60), CAPTION)
    assert any_adapter.scores(inputs, targets).tolist() == pytest.approx([e.score for e in found.entries])


def test_activations_and_attentions_are_uniform(any_adapter):
    inputs, _ = prepared(any_adapter)
    rows, columns = any_adapter.grid(inputs)
    assert any_adapter.activations(inputs).shape[:3] == (1, rows, columns)
    if not any_adapter.structure.attention("vision"):
        with pytest.raises(ModelError, match=r"no attention of .* can be recorded: it "):
            any_adapter.attentions(inputs)
        return
    attentions = any_adapter.attentions(inputs)
    assert len(attentions) == len(any_adapter.structure.stacks["vision"].blocks)
    tokens = any_adapter.structure.prefix + rows * columns
    for weights in attentions:
        assert weights.shape[2:] == (tokens, tokens)
        assert weights.sum(-1).numpy() == pytest.approx(1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_recorded_however_the_model_was_loaded(implementation, image):
    adapter = models.clip_adapter(attention=implementation)
    expected = adapter.model.vision_model
    found = adapter.attentions(adapter.prepare([image], [[CAPTION]]))
    adapter.model.set_attn_implementation("eager")
    pixels = adapter.prepare([image], [[CAPTION]]).tensors["pixel_values"]
    for mine, theirs in zip(found, expected(pixels, output_attentions=True).attentions, strict=True):
        assert close(mine.detach(), theirs.detach())


def test_recorded_attention_keeps_causal_and_padding_masks(clip, image):
    """A registered attention function without its mask function would drop both in silence."""
    inputs = clip.prepare([image], [["red car", "the quick brown fox jumps"]])
    texts = {name: inputs.tensors[name] for name in ("input_ids", "attention_mask")}
    texts["attention_mask"][1, 2] = 0
    with torch.no_grad():
        expected = clip.model.get_text_features(**texts).pooler_output
    with Recorder(clip.model, attention=dict.fromkeys(clip.structure.stacks["vision"].attention, False)):
        found = clip.model.get_text_features(**texts).pooler_output
    assert close(found, expected)


def test_shift_gradient_equals_score_from(any_adapter):
    """The engine's shift signal against the contract's slow, right way: one vector added to all patches of a tap."""
    inputs, targets = prepared(any_adapter)
    for layer in (None, "0", "-1.in" if any_adapter.structure.stacks["vision"].inputs else "-1"):
        layer = any_adapter.resolve(layer)
        plan = plan_methods(any_adapter, Request(["gradcam"], layers=[layer]))
        shift = torch.zeros(len(targets), any_adapter.activations(inputs, layer).shape[-1], dtype=torch.float64)
        shift.requires_grad_(True)
        scores = any_adapter.score_from(layer, inputs, targets, shift)
        (expected,) = torch.autograd.grad(scores.sum(), shift)
        found = torch.cat(
            [chunk.trace.at(layer, frozenset({"shift"})).shift() for chunk in trace(any_adapter, inputs, targets, plan)]
        )
        assert close(found, expected)


@pytest.mark.parametrize("rule", [None, "layernorm"])
def test_fast_taps_equal_the_slow_way(any_adapter, rule):
    """Scores and shift gradients at every fast tap, pictures and texts mixed, against substituting the tap's output."""
    texts = [["a man in a red jacket", "two dogs"], ["red car"]]
    inputs = any_adapter.prepare([noise(90, 60), noise(50, 70, 3)], texts)
    targets = any_adapter.targets(inputs, [[t.caption(), *t.tokens()] for t in inputs.tokens])
    for layer, paths in any_adapter.fast_taps.items():
        with Recorder(any_adapter.model, dict.fromkeys([layer, *paths], False)) as recorder:
            plain = any_adapter.forward(inputs, targets)
        for outputs in (None, recorder.outputs):
            width = any_adapter.to_grid(recorder.outputs[layer], any_adapter.grid(inputs), layer).shape[-1]
            shift = torch.zeros(len(targets), width, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                scores = any_adapter.score_from(layer, inputs, targets, shift, outputs, rule)
            assert close(scores.detach(), plain)
            if outputs is None:
                [slow] = torch.autograd.grad(scores.sum(), shift)
        assert close(any_adapter.shifts(layer, inputs, targets, recorder.outputs, rule), slow)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("method", ["gradcam", "gradcam_ln"])
def test_fast_taps_of_towers_with_few_blocks(layers, method, image, monkeypatch):
    adapter = models.clip_adapter(layers=layers)
    assert len(adapter.fast_taps) == 2
    for layer in adapter.fast_taps:
        fast = explain(adapter, image, CAPTION, methods=[method], layers=[layer])
        with monkeypatch.context() as patch:
            patch.setattr(type(adapter), "fast_taps", {})
            slow = explain(adapter, image, CAPTION, methods=[method], layers=[layer])
        assert close(fast.methods[method].maps, slow.methods[method].maps)


class Scaled(torch.nn.Module):
    """A linear layer with something added, as fine-tuning adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.extra = base, torch.nn.Linear(base.in_features, base.out_features).double()

    def forward(self, x):
        return self.base(x) + self.extra(x)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
@pytest.mark.parametrize("change", ["wrapper", "hook", "forward"])
def test_a_changed_block_is_run_and_not_recomputed(clip, image, tower, change):
    block = clip.model.get_submodule(tower).encoder.layers[-1]
    before = explain(clip, image, CAPTION, methods=["gradcam"])
    if change == "wrapper":
        block.self_attn.k_proj = Scaled(block.self_attn.k_proj)
    elif change == "forward":
        plain = block.self_attn.v_proj.forward
        block.self_attn.v_proj.forward = lambda x: 0.3 * plain(x)
    else:
        block.self_attn.register_forward_hook(lambda module, args, out: (0.1 * out[0], *out[1:]))
    found = explain(clip, image, CAPTION, methods=["gradcam"])
    for entry, (score, features, gradient, _) in zip(
        found, tutorial_runs(clip, image, CAPTION, clip.structure.layer), strict=True
    ):
        assert entry.entry.score == pytest.approx(score, abs=1e-6)
        assert close(entry.raw.ravel(), vision.gradcam(features[1:], gradient[1:]))
    assert np.abs(found[0].raw - before[0].raw).max() > 0.01 * np.abs(before[0].raw).max()


def tutorial_runs(adapter, image, caption, layer):
    """The tutorial loop for the caption and each of its tokens left out."""
    whole = vision.text_embedding(adapter.model, adapter.tokenizer, caption)
    count = len(adapter.tokenizer(caption)["input_ids"]) - 2
    left = [vision.text_embedding(adapter.model, adapter.tokenizer, caption, [i + 1]) for i in range(count)]
    pixels = adapter.image_processor(image, return_tensors="pt")["pixel_values"].to(adapter.dtype)
    tutorial = vision.Tutorial(adapter.model, pixels)
    return [tutorial.run(seed, layer) for seed in [whole, *(whole - other for other in left)]]


def test_large_features_do_not_overflow_in_half_precision(image):
    """Squares of features above 255 overflow in float16: a live layer must not look dead."""
    half, double = (models.clip_adapter(dtype=dtype) for dtype in (torch.float16, torch.float64))
    with torch.no_grad():
        for adapter in (half, double):
            adapter.model.vision_model.encoder.layers[-2].mlp.fc2.bias[0] += 400
    found, expected = (explain(a, image, CAPTION, methods=["gradcam"], layers=["-2"])[0].raw for a in (half, double))
    assert alike(found, expected, HALF_MODEL)


def test_one_forward_pass_for_all_methods(any_adapter, image):
    counted = []
    first = next(m for m in any_adapter.model.modules() if isinstance(m, torch.nn.Conv2d))
    handle = first.register_forward_hook(lambda module, args, out: counted.append(1))
    texts = [["red car", "two dogs"], ["a bus"]]
    known = available(any_adapter)
    methods = [name for name in ("gradcam", "gradcam_ln", "rollout", "attention") if name in known]
    any_adapter.prepare_images([image])  # grids of convolutional networks are found once, by a pass of a blank picture
    counted.clear()
    explain(any_adapter, [image, noise(40, 40)], texts, methods=methods)
    # Off the fast taps the backward rule has a pass of its own, through the vision stack where the tap is in it.
    assert len(counted) == (
        1 if any_adapter.fast_taps or any_adapter.structure.axis(any_adapter.structure.layer) == "text" else 2
    )
    counted.clear()
    methods = ["gradcam", "hirescam", "rollout", "relevance", "gradient_rollout", "attention"]
    explain(any_adapter, [image, noise(40, 40)], texts, methods=[name for name in methods if name in known])
    handle.remove()
    # A model that writes looks once before it does; gradients inside the vision stack need another pass.
    assert len(counted) == 1 + any_adapter.generates


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


def test_attention_that_sees_the_text_is_read_for_every_target(clip, image):
    """An architecture whose attention depends on the text gets one map per entry, without any gradient."""
    clip.__dict__["structure"] = replace(clip.structure, text_stacks=frozenset({"vision"}))
    found = explain(clip, image, CAPTION, methods=["rollout"])
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
    assert any("saw 25% of the picture" in w for w in found.warnings)
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


def test_an_end_token_inside_the_text_is_an_error(clip, image):
    clip.model.text_model.eos_token_id = clip.tokenizer(" car")["input_ids"][-2]
    with pytest.raises(TextError, match=r"up to token \d of \d+ only"):
        explain(clip, image, "red car bus")


def test_an_adapter_needs_its_parts():
    with pytest.raises(ModelError, match="needs a processor, or a tokenizer and an image_processor"):
        adapters.ClipAdapter(models.clip_model())


def test_weights_that_lie_nowhere_are_refused(clip, image):
    clip.model.visual_projection.to("meta")
    with pytest.raises(ModelError, match="meta device"):
        explain(clip, image, CAPTION)


def test_fast_chunks_that_do_not_fit_are_split(clip, image, monkeypatch):
    whole = explain(clip, image, CAPTION, methods=["gradcam"])
    monkeypatch.setattr("grounding.engine.passes.FAST_BUDGET", 300)
    parts = explain(clip, image, CAPTION, methods=["gradcam"])
    assert close(parts.methods["gradcam"].maps, whole.methods["gradcam"].maps)


def test_shift_gradient_equals_finite_differences(any_adapter):
    inputs, targets = prepared(any_adapter)
    layer = any_adapter.structure.layer
    width = any_adapter.activations(inputs).shape[-1]
    direction = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 1e-5 * direction.repeat(len(targets), 1)
    with torch.no_grad():
        slope = (
            any_adapter.score_from(layer, inputs, targets, step) - any_adapter.score_from(layer, inputs, targets, -step)
        ) / 2e-5
    plan = plan_methods(any_adapter, Request(["gradcam"]))
    found = torch.cat(
        [
            chunk.trace.at(layer, frozenset({"shift"})).shift() @ direction
            for chunk in trace(any_adapter, inputs, targets, plan)
        ]
    )
    assert close(found, slope.detach(), SLOPE)


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


def test_list_layers_tells_live_from_dead(any_adapter, image):
    layers = {layer.path: layer for layer in list_layers(any_adapter, image, CAPTION)}
    assert sum(layer.default for layer in layers.values()) == 1
    assert next(layer for layer in layers.values() if layer.default).live
    for layer in layers.values():
        if layer.live:
            explain(any_adapter, image, CAPTION, methods=["gradcam"], layers=[layer.path])
        else:
            with pytest.raises(LayerError, match="dead"):
                explain(any_adapter, image, CAPTION, methods=["gradcam"], layers=[layer.path])


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


def test_wrong_targets_name_what_there_is(any_adapter, image):
    kind, known = any_adapter.kinds[0], any_adapter.token_targets
    with pytest.raises(TargetError, match=f"no target '{kind}s'; did you mean '{kind}'"):
        explain(any_adapter, image, CAPTION, target=f"{kind}s")
    with pytest.raises(TargetError, match=f"it has: {', '.join(known) or 'none, a token is scored by itself'}"):
        explain(any_adapter, image, CAPTION, token_target="left")


def test_token_counts_are_checked_with_numbers(clip):
    with pytest.raises(LayerError, match=r"\(1, 18, 4\).*1 prefix tokens \+ 4 x 4 patches = 17"):
        clip.to_grid(torch.zeros(1, 18, 4), (4, 4))


def test_text_independent_maps_are_stored_once_and_said(any_adapter, image):
    if any_adapter.structure.text_stacks:
        found = explain(any_adapter, image, CAPTION, methods=["rollout"])
        assert found.methods["rollout"].maps.shape[0] == len(found.entries)
        assert not any("does not depend on the text" in w for w in found.warnings)
        return
    found = explain(any_adapter, image, CAPTION)
    if "rollout" not in available(any_adapter):
        assert list(found.methods) == ["gradcam"]
        return
    assert found.methods["rollout"].maps.shape[0] == 1
    assert not found.methods["rollout"].text_conditioned
    assert found.methods["gradcam"].maps.shape[0] == len(found.entries)
    assert any("does not depend on the" in w for w in found.warnings)
    other = explain(any_adapter, image, "two dogs", methods=["rollout"])
    assert np.array_equal(found.methods["rollout"].maps, other.methods["rollout"].maps)


def test_a_target_without_text_says_so(image):
    found = explain(models.mean_adapter(), image, CAPTION, target="norm")
    assert not any(column.text_conditioned for column in found.methods.values())
    assert found.methods["gradcam"].maps.shape[0] == 1


def test_a_readout_without_an_answer_is_refused(clip, image):
    structure = clip.structure
    clip.__dict__["structure"] = replace(structure, pooling="attention_pool")
    assert isinstance(clip.structure, ModelStructure)
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


def test_leave_one_out_masks_and_alone_is_a_text_of_its_own(clip, image):
    from tests.support.oracles.vision import text_embedding

    inputs = clip.prepare([image], [["red car"]])
    embedded = clip.model.get_image_features(inputs.tensors["pixel_values"]).pooler_output[0].detach()
    embedded = embedded / embedded.norm()
    count = len(inputs.tokens[0].visible)
    whole = text_embedding(clip.model, clip.tokenizer, "red car")
    found = explain(clip, image, "red car", methods=["rollout"])
    expected = [whole @ embedded] + [
        (whole - text_embedding(clip.model, clip.tokenizer, "red car", [i + 1])) @ embedded for i in range(count)
    ]
    assert close([e.score for e in found.entries], torch.stack(expected))
    alone = explain(clip, image, "red car", methods=["rollout"], token_target="alone", select=Selection(words=True))
    assert [e.label for e in alone.entries] == ["red car", "red", "car"]
    assert close(alone.entries[1].score, text_embedding(clip.model, clip.tokenizer, "red") @ embedded)
    assert close(alone.entries[2].score, text_embedding(clip.model, clip.tokenizer, " car") @ embedded)


@pytest.mark.parametrize("eos", [1, 2])
def test_shared_prefixes_change_no_embedding(eos):
    """Leave-one-out with the causal prefix shared, against a text forward of its own per masked span, lengths mixed."""
    from adapters.clip.leave_one_out import embed_left_out
    from adapters.shared.tokenization import pad

    adapter = models.clip_adapter()
    adapter.model.text_model.eos_token_id = eos  # 2: the pooling of old configurations, at the largest id
    found = [[0, 5, 280, 30, 9, 1], [0, 77, 1], [0, 40, 41, 42, 43, 44, 1]]
    found = [[299 if i == 1 else i for i in ids] for ids in found] if eos == 2 else found
    ids, mask = pad(found, 1, torch.device("cpu"))
    texts, hidden = [0, 0, 1, 2, 2, 2], [(1,), (4,), (1,), (2, 3), (1, 5), (5,)]
    masks = mask[texts].clone()
    for row, positions in enumerate(hidden):
        masks[row, list(positions)] = 0
    with torch.no_grad():
        shared = embed_left_out(adapter.model, ids, mask, texts, hidden)
    assert close(shared, adapter.embed_texts(ids[texts], masks))


def test_a_long_text_is_cut_with_its_end_token_and_said(clip, image):
    text = " ".join(f"word{i}" for i in range(30))
    found = explain(clip, image, text)
    tokens = clip.prepare([image], [[text]]).tokens[0]
    assert len(tokens) == models.LIMIT
    assert tokens.ids[-1] == clip.tokenizer.eos_token_id
    assert text.endswith(tokens.dropped)
    assert any("longer than the model's 24 tokens" in w and "word29" in w for w in found.warnings)
    with pytest.raises(TextError, match="does not read"):
        explain(clip, image, text, select=Selection(phrases=["word29"]))
    cut = explain(clip, image, text, select=Selection(words=True))
    assert all(entry.end <= len(text) - len(tokens.dropped) for entry in cut.entries[1:])


def test_literal_special_tokens_are_ordinary_characters(clip, image):
    found = explain(clip, image, "red <|endoftext|> car")
    assert "<|endoftext|>" in "".join(e.label for e in found.entries[1:])
    assert any("read as ordinary characters" in w for w in found.warnings)
    tokens = clip.prepare([image], [["red <|endoftext|> car"]]).tokens[0]
    assert tokens.ids.count(clip.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_texts_are_refused(any_adapter, image, text):
    with pytest.raises(TextError, match="empty"):
        explain(any_adapter, image, text)


def test_tokens_by_name_and_repeated_words(clip, image):
    found = explain(clip, image, "red car and red bus", select=Selection(words=True))
    assert [e.label for e in found.entries].count("red") == 2
    first, second = (found.map("red", occurrence=i) for i in (0, 1))
    assert (first.entry.start, second.entry.start) == (0, 12)
    assert not np.array_equal(first.raw, second.raw)
    with pytest.raises(TextError, match=r"'blue' is not in the caption; it has 0:"):
        explain(clip, image, CAPTION, select=Selection(tokens=["blue"]))
    with pytest.raises(TextError, match="does not occur"):
        explain(clip, image, CAPTION, select=Selection(phrases=["green hat"]))


def test_padding_gets_no_map_and_changes_nothing(clip):
    short, long = "red car", "the quick brown fox jumps over"
    together = explain(clip, [noise(50, 40, 1)], [[short, long]])[0]
    for text, found in zip((short, long), together, strict=True):
        alone = explain(clip, noise(50, 40, 1), text)
        assert [e.label for e in found.entries] == [e.label for e in alone.entries]
        assert close(found.methods["relevance"].maps, alone.methods["relevance"].maps, ORACLE)
