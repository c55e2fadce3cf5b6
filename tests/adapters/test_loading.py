"""Load a checkpoint by id or folder, and the one-line errors for those that cannot be loaded."""

import json
import pickle
import shutil

import pytest
import torch
from transformers import CLIPModel, PreTrainedModel

import adapters
from adapters import load
from adapters.clip.adapter import ClipAdapter
from adapters.loading import find_adapter
from grounding import explain
from grounding.core.errors import ModelError
from tests.support import models
from tests.support.images import noise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny CLIP saved as Hugging Face does, in half precision."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    models.clip_model(dtype=torch.float16).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    models.clip_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_in_float32_on_a_cpu(checkpoint):
    adapter = load(str(checkpoint), device="cpu")
    assert isinstance(adapter, ClipAdapter)
    assert adapter.dtype == torch.float32
    assert (adapter.info.id, adapter.info.type) == (str(checkpoint), "clip")
    assert load(str(checkpoint), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    found = explain(adapter, noise(60, 40), "a man in a red jacket")
    assert found.provenance["dtype"] == "float32"
    assert found.provenance["processor"]["size"] == {"shortest_edge": 32}


def test_around_a_model_the_user_has(checkpoint):
    class Processor:
        tokenizer, image_processor = models.tokenizer(), models.clip_processor()

    mine = adapters.ClipAdapter(CLIPModel.from_pretrained(checkpoint, dtype=torch.float32), Processor())
    a, b = (explain(x, noise(60, 40), "red car", methods=["gradcam"]) for x in (mine, load(str(checkpoint))))
    assert (a.methods["gradcam"].maps == b.methods["gradcam"].maps).all()


def test_weights_as_bin_are_loaded_safely(copy):
    model = CLIPModel.from_pretrained(copy, dtype=torch.float32)
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    assert torch.equal(load(str(copy)).model.visual_projection.weight, model.visual_projection.weight)


def test_a_pickle_with_code_is_refused(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"visual_projection.weight": Evil()}, protocol=2))
    with pytest.raises(ModelError, match="cannot load the weights"):
        load(str(copy))
    assert not (tmp_path / "pwned").exists()


def test_cut_off_weights_are_one_line(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the weights"):
        load(str(copy))


def test_missing_weights_are_not_replaced_by_random_ones(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing \(visual_projection.weight"):
        load(str(copy))


def test_lookup_by_architecture_then_by_type(copy):
    edit(copy, architectures=None)
    assert isinstance(load(str(copy)), ClipAdapter)
    edit(copy, architectures=["SomethingNew"])
    assert isinstance(load(str(copy)), ClipAdapter)


def test_an_unknown_architecture_names_the_known_ones():
    class Config:
        architectures, model_type = ("BertModel",), "bert"

    with pytest.raises(ModelError, match=r"BertModel is not supported \(there are: CLIPModel.*docs/adapters.md"):
        find_adapter(Config(), "x")


def test_a_checkpoint_with_its_own_code_is_refused(copy):
    edit(copy, model_type="strange", auto_map={"AutoConfig": "code.Config"})
    (copy / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="needs code of its own, which is not run"):
        load(str(copy))
    with pytest.raises(ModelError, match="needs a pinned revision"):
        load(str(copy), trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such/folder", "no model folder"),
        ("./nowhere", "no model folder"),
        ("someone/no-such-model", "cannot load the configuration of 'someone/no-such-model': .*(hub|cache)"),
    ],
)
def test_unknown_models_are_one_line(name, words):
    with pytest.raises(ModelError, match=words) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        load(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        load(str(tmp_path / "file"))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="cannot load the configuration"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "warp"}, "device 'warp'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "meta"}, "it has no data"),
    ],
)
def test_wrong_device_or_dtype(checkpoint, options, words):
    with pytest.raises(ModelError, match=words):
        load(str(checkpoint), **options)


def test_a_broken_tokenizer_is_one_line(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_text("{}")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load(str(copy))


def test_the_table_is_open_to_third_parties(copy, monkeypatch):
    from tests.support.third_party import MeanAdapter

    monkeypatch.setitem(adapters.ADAPTERS._table, "Foreign", "tests.support.third_party:MeanAdapter")
    edit(copy, architectures=["Foreign"])
    with pytest.raises(ModelError, match=r"MeanAdapter cannot load .* by name"):
        load(str(copy))
    monkeypatch.setattr(MeanAdapter, "from_checkpoint", classmethod(lambda cls, source: cls()))
    assert isinstance(load(str(copy)), MeanAdapter)


def test_models_are_pretrained_models():
    assert issubclass(CLIPModel, PreTrainedModel)
    with pytest.raises(AttributeError, match="NoSuchAdapter"):
        _ = adapters.NoSuchAdapter
