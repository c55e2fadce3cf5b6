"""Image classifiers of transformers: maps against oracles, classes by name, limits of each family."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, SwiftFormerConfig, ViTImageProcessor

import adapters
from adapters.classifier.adapter import ClassifierAdapter
from grounding import Explanation, Selection, explain
from grounding.adapter.class_names import ClassNames
from grounding.core.errors import LayerError, ModelError, OptionError, TargetError, TextError
from grounding.core.text import Classes
from grounding.engine.layers import list_layers
from grounding.engine.plan import available
from grounding.explanation.text_table import explanation_table, headline
from tests.support import models
from tests.support.contract import default_layer, shortcut, structure
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import TUTORIAL, close
from tests.support.tutorials.classifier import ASKED, INDICES, as_patches, tutorial

IMAGES = [noise(90, 60, 1), noise(40, 70, 2), noise(64, 64, 3)]


@pytest.mark.parametrize("kind", ["resnet", "convnext", "swin", "vit", "deit", "deit with teacher", "dinov2"])
@pytest.mark.parametrize("layer", [None, "0"])
def test_gradcam_equals_the_oracle(kind, layer):
    """Three images, each with a class of its own, in one batch, at the default layer and the first stage or block."""
    adapter = models.classifier_adapter(kind)
    path = structure(adapter).find_layer(adapter.model, layer)
    found = explain(adapter, IMAGES, ASKED, methods=["gradcam"], layers=[layer] if layer else [])
    for image, index, explanation in zip(IMAGES, INDICES, found, strict=True):
        logits, features, gradient, _ = tutorial(adapter, image, index, path)
        expected = vision.gradcam(*(as_patches(t, structure(adapter).prefix) for t in (features, gradient)))
        [entry] = explanation.entries
        assert (entry.kind, entry.token_id, entry.label) == ("class", index, models.CLASSES[index])
        assert close(explanation[0].raw.ravel(), expected)
        assert close(torch.tensor(entry.score), logits[index])
        probabilities = logits.softmax(0)
        assert entry.probability == pytest.approx(float(probabilities[index]))
        top = [i for i in probabilities.topk(5).indices.tolist() if i != index]
        assert [one.token_id for one in entry.alternatives] == top
        assert [one.probability for one in entry.alternatives] == pytest.approx(probabilities[top].tolist())


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("vit", lambda n: np.eye(n)[0]),
        ("deit", lambda n: np.eye(n)[0]),
        ("deit with teacher", lambda n: (np.eye(n)[0] + np.eye(n)[1]) / 2),
        ("dinov2", lambda n: np.r_[0.5, 0, 0, 0, np.full(n - 4, 0.5 / (n - 4))]),
    ],
)
def test_attention_methods_equal_the_oracle(kind, read):
    """Chains start where the logits are read: CLS, both tokens of a DeiT with a teacher, CLS and patches of DINOv2."""
    adapter = models.classifier_adapter(kind)
    methods = ["rollout", "relevance", "gradient_rollout"]
    found = explain(adapter, IMAGES, ASKED, methods=methods)
    for image, index, explanation in zip(IMAGES, INDICES, found, strict=True):
        *_, pairs = tutorial(adapter, image, index, default_layer(adapter))
        row, prefix = read(pairs[0][0].shape[-1]), structure(adapter).prefix
        for name, matrix in zip(
            methods,
            (vision.rollout([a for a, _ in pairs]), vision.relevance(pairs), vision.gradient_rollout(pairs)),
            strict=True,
        ):
            assert close(explanation.map(0, name).raw.ravel(), (row @ matrix)[prefix:])


@pytest.mark.parametrize(
    ("kind", "why"),
    [("resnet", "none whose weights span the image"), ("convnext", "none whose"), ("swin", "within windows")],
)
@pytest.mark.parametrize("method", ["rollout", "relevance", "attention", "gradient_rollout"])
def test_attention_that_cannot_be_chained_is_refused_with_the_reason(kind, why, method):
    adapter = models.classifier_adapter(kind)
    with pytest.raises(OptionError, match=f"'{method}' reads vision attention, which {kind} does not have: it .*{why}"):
        explain(adapter, IMAGES[0], methods=[method])
    assert list(explain(adapter, IMAGES[0]).methods) == ["gradcam"]  # what is left of the default methods


def test_the_predicted_class_is_explained_and_named(tmp_path):
    adapter = models.classifier_adapter()
    found = explain(adapter, IMAGES[0])
    best = int(tutorial(adapter, IMAGES[0], 0, default_layer(adapter))[0].argmax())
    assert (found.entries[0].token_id, found.origin, found.caption, found.target) == (best, "predicted", "", "class")
    assert "target class, predicted by the model" in headline(found)
    assert "p" in explanation_table(found).split()
    found.save(tmp_path / "out")
    again = Explanation.load(tmp_path / "out")
    assert again.entries == found.entries
    assert np.array_equal(again.methods["gradcam"].maps, found.methods["gradcam"].maps)


def test_classes_by_index_name_synonym_and_list():
    adapter = models.classifier_adapter()
    by = [
        explain(adapter, IMAGES[0], target=asked)
        for asked in (6, "White  Shark", "man-eater", np.int64(6), np.array([6]))
    ]
    assert all(one.entries == by[0].entries for one in by)
    several = explain(adapter, IMAGES[0], target=["two dogs", 6, "two dogs"])
    assert [e.token_id for e in several.entries] == [1, 6]
    assert close(several[1].raw, by[0][0].raw)
    [first, second] = explain(adapter, IMAGES[:2], target=[1, 6])  # the same classes for every image
    assert [e.token_id for e in second.entries] == [1, 6]
    assert close(first[1].raw, several[1].raw)
    apart = explain(adapter, IMAGES[0], ["two dogs", Classes((6,))])  # in place of texts: one Explanation each
    assert [e.entries[0].token_id for e in apart] == [1, 6]
    assert explain(adapter, IMAGES[0], target="class").origin == "predicted"


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ("two dog", TargetError, r"has no class 'two dog'; did you mean 'two dogs'\? \(it has 9: 'a man in a red"),
        (9, TargetError, "no class 9: its 9 classes are 0 to 8"),
        (-1, TargetError, "no class -1"),
        ("12", TargetError, "no class 12"),
        (True, TargetError, "by name or index, not by True"),
        (2.5, TargetError, r"not by 2.5 \(float\)"),
        ([], TargetError, "an empty list of classes"),
        (" ", TextError, "a class name is empty"),
    ],
)
def test_wrong_classes_are_refused(asked, error, words):
    with pytest.raises(error, match=words) as caught:
        explain(models.classifier_adapter(), IMAGES[0], target=asked)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_names_of_several_classes_are_refused_with_their_indices():
    labels = ClassNames(
        ("crane", "crane", "great white shark, white shark", "tiger, white shark", "tank, army tank", "Tank")
    )
    with pytest.raises(TargetError, match="'Crane' names 2 classes of the model: 0 'crane', 1 'crane'; give the index"):
        labels.find("Crane")
    with pytest.raises(TargetError, match="'white shark' names 2 classes"):
        labels.find("white shark")
    assert labels.find("tank") == 5  # a whole name before a part of one
    assert labels.find("army tank") == 4


def test_classes_have_no_parts_and_texts_no_classes(clip):
    adapter = models.classifier_adapter()
    for select in (Selection(words=True), Selection(tokens=["dogs"]), Selection(phrases=["dogs"])):
        with pytest.raises(OptionError, match="a class has no tokens, words or phrases"):
            explain(adapter, IMAGES[0], select=select)
    with pytest.raises(OptionError, match="generates no text"):
        explain(adapter, IMAGES[0], select=Selection(where="5"))
    with pytest.raises(OptionError, match="nothing to explain"):
        explain(adapter, IMAGES[0], select=Selection(caption=False))
    with pytest.raises(TargetError, match="given twice"):
        explain(adapter, IMAGES[0], "two dogs", target=2)
    with pytest.raises(TargetError, match="targets similarity, logits, norm and no classes, got 2"):
        explain(clip, IMAGES[0], "two dogs", target=2)


def test_unnamed_classes_and_models_that_judge_each_class_are_said():
    model = models.classifier_model()
    model.config.id2label = {i: f"LABEL_{i}" for i in range(9)}
    model.config.problem_type = "multi_label_classification"
    adapter = ClassifierAdapter(model, ViTImageProcessor(size={"height": 64, "width": 96}))
    found = explain(adapter, IMAGES[0], target=3)
    assert any("does not name its classes (LABEL_0" in warning for warning in found.warnings)
    assert any("sigmoids and do not sum to 1" in warning for warning in found.warnings)
    assert found.entries[0].probability == pytest.approx(float(torch.tensor(found.entries[0].score).sigmoid()))
    model.config.id2label = {}
    with pytest.raises(ModelError, match="does not number its classes"):
        ClassifierAdapter(model, adapter.image_processor)
    with pytest.raises(ModelError, match="needs a PreTrainedModel, got Linear"):
        ClassifierAdapter(torch.nn.Linear(1, 1), adapter.image_processor)


def test_several_classes_that_a_map_cannot_see():
    found = explain(models.classifier_adapter("vit"), IMAGES[0], target=[0, 1])
    assert any(
        "rollout does not depend on the class here: one map for all entries" in warning for warning in found.warnings
    )


def test_layers_of_a_network_have_grids_of_their_own():
    adapter = models.classifier_adapter()
    layers = {layer.alias: layer for layer in list_layers(adapter, IMAGES[0]) if layer.alias}
    assert [layers[i].shape for i in "012"] == [(1, 8, 16, 24), (1, 12, 8, 12), (1, 16, 4, 6)]
    assert layers["2"].default
    found = explain(adapter, IMAGES[0], target=1, methods=["gradcam"], layers=["0", "2"])
    assert [c.maps.shape for c in found.methods.values()] == [(1, 16, 24), (1, 4, 6)]
    fine = found.map(0, "gradcam@0")
    assert (fine.geometry.rows, fine.geometry.columns) == (16, 24)
    assert fine.heat().shape == (60, 90)
    row, column = np.unravel_index(fine.raw.argmax(), fine.raw.shape)
    assert fine.peak == pytest.approx(((column + 0.5) * 90 / 24, (row + 0.5) * 60 / 16))
    found.figure(grid=True)
    with pytest.raises(LayerError, match=r"different grids cannot be averaged \(.*stages.0 16 x 24, .*stages.2 4 x 6"):
        explain(adapter, IMAGES[0], target=1, layers=["0", "2"], average_layers=True)
    with pytest.raises(LayerError, match=r"\(1, 16, 1, 1\) is no patch grid: expected maps over the whole image"):
        explain(adapter, IMAGES[0], target=1, layers=["resnet.pooler"])
    with pytest.raises(LayerError, match="no grid of patches: use a larger image"):
        models.classifier_adapter(size=(16, 16)).prepare_images(IMAGES[:1])


def test_the_fast_tap_is_left_where_the_head_was_changed():
    adapter = models.classifier_adapter()
    plain = explain(adapter, IMAGES[0], target=1)
    assert list(shortcut(adapter).layers) == [default_layer(adapter)]
    handle = adapter.model.classifier.register_forward_hook(lambda module, args, out: 2 * out)
    assert not shortcut(adapter)
    assert close(explain(adapter, IMAGES[0], target=1)[0].raw, 2 * plain[0].raw)
    handle.remove()
    adapter.model.resnet.register_forward_hook(lambda module, args, out: None)
    assert not shortcut(adapter)


def test_layers_that_ran_twice_are_not_listed():
    """A Swin's dropout runs within windows and over the image: only one of its outputs is a patch grid."""
    adapter = models.classifier_adapter("swin", size=(48, 48))
    found = [layer.path for layer in list_layers(adapter, IMAGES[0])]
    assert default_layer(adapter) in found
    assert not [path for path in found if path.endswith("blocks.0.dropout")]


def test_the_predicted_class_costs_one_pass_at_the_fast_tap():
    adapter, counted = models.classifier_adapter(), []
    adapter.prepare_images(IMAGES[:1])
    adapter.model.resnet.embedder.pooler.register_forward_hook(lambda module, args, out: counted.append(1))
    explain(adapter, IMAGES[0], methods=["gradcam"])
    assert len(counted) == 1
    seen = adapter.prepare_images(IMAGES[:1])
    explain(adapter, seen)
    explain(adapter, seen, target=[1, 2])
    assert len(counted) == 2


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_position_codes_are_stretched_to_another_size(kind):
    adapter = models.classifier_adapter(kind, size=(24, 40))
    assert explain(adapter, IMAGES[0]).methods["gradcam"].maps.shape[1:] == (3, 5)


@pytest.mark.parametrize("kind", ["resnet", "vit", "deit with teacher"])
def test_checkpoints_are_loaded_by_the_end_of_their_architecture(kind, tmp_path):
    adapter = models.classifier_adapter(kind, dtype=torch.float32)
    adapter.model.save_pretrained(tmp_path / "model")
    adapter.image_processor.save_pretrained(tmp_path / "model")
    loaded = adapters.load(str(tmp_path / "model"))
    assert type(loaded) is ClassifierAdapter
    assert type(loaded.model) is type(adapter.model)
    assert loaded.class_names.names == tuple(models.CLASSES)
    found, expected = (explain(one, IMAGES[0], target=1)[0].raw for one in (loaded, adapter))
    assert close(found, expected, TUTORIAL)


def test_a_model_without_a_known_pooling_is_refused():
    model = models.classifier_model("vit")
    model.config.model_type = "other"
    adapter = ClassifierAdapter(model, ViTImageProcessor(size={"height": 32, "width": 32}))
    with pytest.raises(ModelError, match="no list of layers with a spatial size, nor a known pooling"):
        explain(adapter, IMAGES[0])


def test_as_many_names_as_scores(monkeypatch):
    model = models.classifier_model()
    model.config.id2label = {0: "one", 1: "two"}
    adapter = ClassifierAdapter(model, ViTImageProcessor(size={"height": 64, "width": 96}))
    with pytest.raises(ModelError, match=r"scores of shape \(1, 9\) for 1 images and 2 class names"):
        explain(adapter, IMAGES[0])


def test_available_methods_follow_the_family():
    assert "rollout" in available(structure(models.classifier_adapter("dinov2")))
    assert not {"rollout", "relevance", "attention"} & set(available(structure(models.classifier_adapter("swin"))))


def small(config, size=64):
    """A random classifier of a configuration, with an image processor that squashes."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config)
    return ClassifierAdapter(models.shaken(model).eval(), ViTImageProcessor(size={"height": size, "width": size}))


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.mark.parametrize(
    ("settings", "measures"),
    [
        ({"num_labels": 1}, True),  # as transformers trains it by default
        ({"num_labels": 3, "problem_type": "regression"}, True),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, False),
        ({"num_labels": 3}, False),
    ],
)
def test_a_measured_quantity_has_no_probability(settings, measures):
    found = explain(small(ResNetConfig(**RESNET, **settings)), IMAGES[0], target=0)
    assert found[0].entry.probability is None if measures else 0 < found[0].entry.probability < 1
    assert ("most probable" in explanation_table(found)) != measures


def test_images_with_other_channels_than_the_processor_gives():
    adapter = small(ResNetConfig(**RESNET, num_labels=3, num_channels=1))
    with pytest.raises(
        ModelError, match=r"gives 3 channels, .* takes 1: load the model yourself and use .*ModuleAdapter"
    ):
        explain(adapter, IMAGES[0], target=0)


def test_the_last_stage_is_the_one_that_ends_last():
    """A list of the stem's layers stands as deep in a SwiftFormer as that of its stages."""
    config = SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], num_labels=3)
    assert default_layer(small(config)) == "swiftformer.encoder.network.6"
