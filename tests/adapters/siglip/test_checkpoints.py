"""Saved checkpoints of SigLIP and SigLIP 2: loading, the commands, a batch run that is interrupted and resumed."""

import importlib.util
import json

import pytest
import torch

import adapters
from grounding import Selection, explain
from grounding.core.demo import demo_scenes
from grounding.core.errors import ModelError
from tests.support import batch, siglip
from tests.support.commands import ROOT, answer, script
from tests.support.images import noise
from tests.support.tolerances import TUTORIAL, close

FACTORIES = {"SiglipModel": siglip.siglip_adapter, "Siglip2Model": siglip.naflex_adapter}
CAPTION = "a man in a red jacket"


@pytest.fixture(scope="module", params=sorted(FACTORIES))
def saved(request, tmp_path_factory):
    """The adapter, and the folder of its checkpoint as Hugging Face saves it."""
    adapter = FACTORIES[request.param](dtype=torch.float32)
    folder = tmp_path_factory.mktemp("tiny")
    for part in (adapter.model, adapter.tokenizer, adapter.image_processor):
        part.save_pretrained(folder)
    return adapter, folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda name, *argv: answer(script(ROOT / "scripts" / f"{name}.py"), argv, capsys)


@pytest.mark.parametrize("architectures", ["as saved", None])
def test_a_saved_checkpoint_loads(saved, architectures, tmp_path):
    adapter, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(adapter.model).__name__]
    if architectures is None:
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
        folder = tmp_path
    loaded = adapters.load(str(folder), device="cpu")
    assert type(loaded) is type(adapter)
    assert loaded.tokenizer.padding_side == adapter.tokenizer.padding_side
    found, expected = (explain(one, noise(90, 60), CAPTION, methods=["gradcam"]) for one in (loaded, adapter))
    assert close([e.score for e in found.entries], [e.score for e in expected.entries], TUTORIAL)
    assert close(found.methods["gradcam"].maps, expected.methods["gradcam"].maps, TUTORIAL)


def test_the_command_explains_and_lists_layers(saved, command, tmp_path):
    adapter, folder = saved
    noise(120, 80).save(tmp_path / "photo.png")
    own = ["--model", str(folder), "--image", "photo.png", "--caption", CAPTION]
    code, out, _ = command("ground", *own, "--target", "logits", "--output", "out")
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["entry", "kind", "score", "p"]
    code, out, _ = command("ground", *own, "--list-layers")
    assert code == 0
    default = adapter.structure("similarity").default_layer
    assert any(default in line and "default" in line for line in out.splitlines())


def test_an_interrupted_batch_run_is_resumed(saved, tmp_path):
    """A run that ends in the middle of its shards, then the same run again: only the others are computed."""
    _, folder = saved
    config = batch.run_config(demo_scenes(), methods=("gradcam", "rollout"), select=Selection(tokens=()))

    def load():
        return adapters.load(str(folder), device="cpu")

    class Stop(BaseException):
        pass

    class Stopping(batch.Counting):
        def __init__(self):
            super().__init__(load())
            prepare_images = self.adapter.prepare_images

            def stopping(images):
                if len(self.seen) >= 2:
                    raise Stop
                return prepare_images(images)

            self.adapter.prepare_images = stopping

    first = Stopping()
    with pytest.raises(Stop):
        batch.run(tmp_path / "run", config, first, limit=4)
    second, whole = batch.Counting(load()), batch.Counting(load())
    resumed = batch.run(tmp_path / "run", config, second, limit=4)
    unbroken = batch.run(tmp_path / "whole", config, whole, limit=4)
    assert len(whole.seen) == 4
    assert sorted(first.seen + second.seen) == sorted(whole.seen)
    assert not [status for status in batch.statuses(resumed).values() if status.startswith("failed")]
    assert batch.rows(resumed) == batch.rows(unbroken)


def test_a_sentencepiece_tokenizer_without_the_library_is_one_line(saved, tmp_path):
    """SigLIP's first checkpoints name this tokenizer."""
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "siglip"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["SiglipModel"]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    with pytest.raises(ModelError, match=r"its tokenizer needs sentencepiece: pip install sentencepiece protobuf$"):
        adapters.load(str(tmp_path))
