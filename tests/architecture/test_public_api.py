"""The public names, their signatures and the keys of stored results: a change here is a change for users."""

import dataclasses
import inspect

import numpy as np
import pytest

import adapters
import grounding
from grounding.adapter import Adapter, ModelInfo
from grounding.batch.config import RunConfig
from grounding.batch.rows import RunMetadata, schema
from grounding.core.errors import ModelError
from grounding.engine.plan import plan_methods
from grounding.engine.request import Request
from grounding.explanation.explanation import Entry, MethodMaps, PatchMap
from tests.support.images import noise

NAMES = [
    "METHODS",
    "Explanation",
    "GroundingError",
    "Selection",
    "__version__",
    "explain",
    "inspect",
    "list_layers",
    "load",
]
METHODS = [
    "gradcam", "gradcam_ln", "hirescam", "layercam", "gradcam_pp", "rollout", "relevance", "gradient_rollout",
    "attention", "grad_x_attention", "attention_gradcam", "cross_attention", "gradient_x_cross_attention",
    "legrad", "grad_eclip", "occlusion", "rise",
]  # fmt: skip
ARCHITECTURES = [
    "CLIPModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "SiglipModel", "Siglip2Model", "AlignModel",
    "BlipForImageTextRetrieval", "FlavaForPreTraining", "FlavaModel", "VisionEncoderDecoderModel",
    "AutoModelForImageClassification", "nn.Module",
]  # fmt: skip
PARAMETERS = {
    grounding.explain: "adapter images texts methods select target token_target layers average_layers options "
    "batch_size seed",
    grounding.inspect: "adapter image text entry method layer select target token_target options seed",
    grounding.list_layers: "adapter image text target",
    grounding.load: "checkpoint options",
    adapters.load: "checkpoint options",
    grounding.Explanation.map: "self which method occurrence",
    grounding.Explanation.figure: "self options",
    grounding.Explanation.save: "self directory write per_token options",
    grounding.Explanation.load: "directory",
}
FIELDS = {
    grounding.Selection: "caption tokens words phrases special where contrast",
    Request: "methods select target token_target layers average_layers options seed",
    RunConfig: "data split captions protocols request shard_size batch_size workers threads max_pixels max_failed",
    grounding.Explanation: "image caption entries methods geometry target token_target model warnings provenance "
    "origin truncated overview",
    Entry: "label kind start end score token_id probability alternatives",
    MethodMaps: "key method title layer options signed text_conditioned maps status overview overview_status",
    PatchMap: "entry method raw status geometry overview",
    ModelInfo: "id type revision processor",
}
JSON = {
    "": "format schema_version image model caption origin truncated target token_target score entries methods geometry "
    "warnings provenance files",
    "image": "path width height seen sha256 warnings crop relative_path",
    "model": "id type",
    "geometry": "width height input_width input_height scale offset rows columns patch",
}
ENTRY = "label kind start end token_id score probability alternatives maps"
MAP = "peak box min max status reason layer text_conditioned"
METHOD = "method title layer options signed text_conditioned"
NPZ = (
    "schema_version caption labels kinds starts ends token_ids scores origin keys text_conditioned seen "
    "geometry/width geometry/height geometry/input_width geometry/input_height geometry/scale geometry/offset "
    "geometry/rows geometry/columns maps/gradcam maps/rollout"
)
PARQUET = (
    "id image line caption status error image_sha256 origin truncated score entries geometry warnings gradcam rollout"
)


def test_public_names():
    assert sorted(grounding.__all__) == sorted(NAMES)
    assert all(hasattr(grounding, name) for name in NAMES)
    assert list(grounding.METHODS)[: len(METHODS)] == METHODS
    assert list(adapters.ADAPTERS)[: len(ARCHITECTURES)] == ARCHITECTURES


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda f: f.__qualname__)
def test_parameters(function):
    assert list(inspect.signature(function).parameters) == PARAMETERS[function].split()


@pytest.mark.parametrize("record", FIELDS, ids=lambda c: c.__name__)
def test_fields(record):
    assert [field.name for field in dataclasses.fields(record)] == FIELDS[record].split()


def test_what_an_adapter_must_define():
    required = "structure prepare_images prepare_texts targets encode_images score"
    assert Adapter.__abstractmethods__ == set(required.split())


def test_an_adapter_without_a_structure_cannot_be_made():
    names = Adapter.__abstractmethods__ - {"structure"}
    incomplete = type("Incomplete", (Adapter,), {"target_kinds": ("x",)} | {n: lambda self: None for n in names})
    with pytest.raises(ModelError, match=r"^Incomplete does not implement structure: see docs/adapters\.md"):
        incomplete()


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"kinds": ("similarity",), "fast_taps": {}}, r"\(kinds, fast_taps\) and does not implement target_kinds:"),
        (
            {"target_kinds": ("x",), "structure": property(lambda self: None)},
            r"\(structure without a kind of target\):",
        ),
    ],
)
def test_adapters_of_the_first_contract_are_refused(members, named):
    """Where they are made, with one line that says what is wrong: not by an error in the middle of a run."""
    own = {name: lambda self: None for name in Adapter.__abstractmethods__}
    former = type("Former", (Adapter,), own | members)
    with pytest.raises(ModelError, match=f"^Former implements version 1 of the adapter contract {named}") as caught:
        former()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(explanation.json, maps.npz) of a tiny CLIP."""
    import json

    from tests.support import models

    folder = tmp_path_factory.mktemp("stored")
    found = grounding.explain(models.clip_adapter(), noise(90, 60), "two dogs", methods=["gradcam", "rollout"])
    files = found.save(folder / "result", ["json", "npz"])
    with np.load(files["npz"]) as archive:
        return json.loads(files["json"].read_bytes()), set(archive)


def test_keys_of_the_json(stored):
    content, _ = stored
    for part, names in JSON.items():
        own = content[part] if part else content
        assert set(own) - {"sha256"} == set(names.split()) - {"sha256"}, part
    [entry, *_] = content["entries"]
    assert set(entry) == set(ENTRY.split())
    assert set(entry["maps"]) == {"gradcam", "rollout"}
    assert set(entry["maps"]["gradcam"]) == set(MAP.split())
    assert set(content["methods"]["gradcam"]) == set(METHOD.split())
    assert (content["format"], content["schema_version"]) == ("grounding.explanation", 1)


def test_keys_of_the_npz(stored):
    assert stored[1] == set(NPZ.split())


def test_columns_of_the_parquet_files(clip):
    calls = plan_methods(clip, Request(["gradcam", "rollout"])).calls
    metadata = RunMetadata.of(clip, calls, "similarity", "leave-one-out", 0)
    assert schema(metadata).names == PARQUET.split()
