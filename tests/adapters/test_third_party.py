"""A distribution of a third party joins an architecture and a method by entry points, from loading to files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapters import ADAPTERS, load
from adapters.clip.adapter import ClipAdapter
from grounding import METHODS, explain
from grounding.methods.cam import gradcam
from grounding.testing import check_adapter
from tests.support.commands import ROOT, SCRIPT
from tests.support.images import noise
from tests.support.tolerances import COMMAND, TUTORIAL, close

PACKAGE = ROOT / "tests" / "support" / "third_party_package"
WARNING = r"^entry point '{}' of tiny-maps 1.0 is ignored: there is a built-in {} of this name, choose another$"


@pytest.fixture
def installed(monkeypatch):
    """The distribution, found as an installed one is; without it again afterwards."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    for registry in (ADAPTERS, METHODS):
        if "_table" in vars(registry):
            monkeypatch.delitem(vars(registry), "_table")
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert {"TinyMapsModel", "feature_norm"} <= {*ADAPTERS, *METHODS}
    yield [str(one.message) for one in caught]
    for registry in (ADAPTERS, METHODS):
        vars(registry).pop("_table", None)


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny checkpoint, written by a process that knows the model type."""
    folder = tmp_path / "tiny"
    code = "from tiny_maps.model import *; import torch; torch.manual_seed(0);"
    code += f"TinyMapsModel(TinyMapsConfig()).save_pretrained({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=COMMAND)
    return folder


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGE), str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_built_in_names_stay_and_the_attempt_is_a_warning_of_one_line(installed):
    assert ADAPTERS["CLIPModel"] is ClipAdapter
    assert METHODS["gradcam"] is gradcam
    assert re.match(WARNING.format("CLIPModel", "architecture"), installed[0])
    assert re.match(WARNING.format("gradcam", "method"), installed[1])
    assert len(installed) == 2
    assert not any("\n" in message for message in installed)


def test_a_checkpoint_of_its_model_type_is_loaded_checked_and_explained(installed, checkpoint):
    adapter = load(str(checkpoint), device="cpu")
    assert type(adapter).__module__ == "tiny_maps.adapter"
    assert (adapter.info.id, adapter.info.type) == (str(checkpoint), "tiny_maps")
    found = explain(adapter, noise(60, 40), "a red car", methods=["gradcam", "rollout", "feature_norm"])
    assert [entry.label for entry in found.entries] == ["a red car", "a", "red", "car"]
    pixels = adapter.prepare_images([noise(60, 40)]).tensors["pixels"]
    with torch.no_grad():
        normed = adapter.model.norm(adapter.model.patches(pixels).flatten(2).mT)[0]
    assert close(found.methods["feature_norm"].maps[0].ravel(), normed.norm(dim=-1), TUTORIAL)
    assert found.methods["rollout"].shared
    adapter.model.double()
    check_adapter(adapter, [noise(60, 40), noise(50, 50, 1)], [["a red car", "two dogs"], ["a bus"]])


def test_without_the_distribution_its_checkpoint_is_an_error_of_one_line(checkpoint):
    code = f"import adapters; adapters.load({str(checkpoint)!r})"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=COMMAND, cwd=ROOT
    )
    assert made.stderr.splitlines()[-1].startswith(
        f"grounding.core.errors.ModelError: cannot load the configuration of '{checkpoint}': "
    )


def test_the_command_explains_it(checkpoint, tmp_path):
    noise(60, 40).save(tmp_path / "photo.png")
    argv = ["--model", str(checkpoint), "--image", "photo.png", "--caption", "a red car", "--output", "out"]
    made = subprocess.run(
        [sys.executable, str(SCRIPT), *argv, "--methods", "gradcam", "feature_norm"],
        capture_output=True, text=True, check=False, timeout=COMMAND, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("is ignored: there is a built-in") == 2
    assert not [line for line in made.stderr.splitlines() if line.startswith(" ")]  # no line of source code
    [path] = Path(tmp_path / "out").rglob("explanation.json")
    document = json.loads(path.read_text())
    assert list(document["methods"]) == ["gradcam", "feature_norm"]
    assert document["methods"]["gradcam"]["title"] == "Grad-CAM"
    assert document["model"]["type"] == "tiny_maps"
