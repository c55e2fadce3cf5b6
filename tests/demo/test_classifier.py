"""The demo classifier: what it was trained on, what is shipped, and its predictions on the shipped images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adapters
from grounding import explain
from grounding.core.demo import demo_model
from tests.support.images import noise

ROOT = Path(__file__).resolve().parents[2]
PICTURES = sorted((ROOT / "data/demo/classes").glob("*.jpg"))


@pytest.fixture(scope="module")
def adapter():
    return adapters.load(str(demo_model("classifier")), device="cpu")


def test_every_shipped_image_gets_its_class_and_a_peak(adapter):
    found = explain(adapter, PICTURES)
    assert [e.entries[0].label for e in found] == [path.stem for path in PICTURES]
    assert len(found) == len(adapter.class_names) == 12
    assert not any(explanation.warnings for explanation in found)
    assert found[0].model["id"] == "demo-classifier"
    assert all(explanation[0].peak for explanation in found)


def test_other_pictures_are_warned_about(adapter):
    [warning] = explain(adapter, noise(90, 60)).warnings
    assert "trained on single objects of a cartoon world alone" in warning
    assert "--model microsoft/resnet-34" in warning


def test_batches_follow_from_their_number_and_hold_one_object_each():
    from scripts.demo.classifier.pictures import held_out, training_batch

    first, again, other = training_batch(3, 6), training_batch(3, 6), training_batch(4, 6)
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.classes, again.classes)
    assert not torch.equal(first.pixels, other.pixels)
    assert first.pixels.shape == (6, 3, 112, 112)
    x0, y0, x1, y1 = first.boxes.T
    assert (x0 < x1).all()
    assert (y0 < y1).all()
    assert first.boxes.min() >= 0
    assert first.boxes.max() <= 112
    assert len(held_out().classes) == 600


def test_training_resumes_and_exports_as_a_whole(tmp_path, monkeypatch):
    from scripts.demo.classifier import train as training

    monkeypatch.setattr(training, "STAGES", (replace(training.STAGES[0], steps=2, batch=4, validate_every=1),))
    monkeypatch.setattr("scripts.demo.classifier.pictures.PER_CLASS", 1)
    folder, checkpoint = tmp_path / "models/classifier", tmp_path / "run.pt"
    argv = ["--checkpoint", str(checkpoint), "--folder", str(folder)]
    assert training.main(argv) == 0
    state = torch.load(checkpoint, weights_only=True)
    assert state["optimizers"][0]["state"][0]["step"] == 2
    assert state["stage"] == 1  # the only one is done
    before = (folder / "model.safetensors").read_bytes()
    assert training.main(argv) == 0  # nothing is left to do
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list((tmp_path / "classes").glob("*.jpg"))) == 12
    assert not list(folder.parent.glob("*.new"))
    assert adapters.load(str(folder), device="cpu").class_names.names[4] == "dog"
