"""Load real checkpoints if a hub answers (`make network`); skipped otherwise."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from huggingface_hub import constants

from grounding.core.demo import demo_image, demo_line
from tests.support.commands import SCRIPT
from tests.support.tolerances import COMMAND, HUB


@pytest.fixture
def hub():
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB).close()
    except OSError as error:
        pytest.skip(f"no model hub answers: {error}")


def run(script, argv, folder):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    found = subprocess.run(
        [sys.executable, str(script), *argv, "--format", "json"],
        capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=COMMAND,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.network
def test_openai_clip_explains_a_image(hub, tmp_path):
    argv = ["--model", "openai/clip-vit-base-patch16", "--image", str(demo_image()), "--caption", "a brown dog"]
    document = run(SCRIPT, argv, tmp_path)
    assert document["model"] == {"id": "openai/clip-vit-base-patch16", "type": "clip"}
    assert [entry["label"] for entry in document["entries"]] == ["a brown dog", "a", "brown", "dog"]
    assert all(entry["maps"]["relevance"]["status"] == "ok" for entry in document["entries"])


@pytest.mark.network
def test_microsoft_trocr_reads_a_line(hub, tmp_path):
    argv = ["--model", "microsoft/trocr-base-printed", "--image", str(demo_line())]
    document = run(SCRIPT.with_name("inspect_ocr.py"), argv, tmp_path)
    assert document["model"] == {"id": "microsoft/trocr-base-printed", "type": "vision-encoder-decoder"}
    assert "12.50" in document["caption"]
    assert "".join(entry["label"] for entry in document["entries"]) == document["caption"].replace(" ", "")
    assert all(entry["maps"]["gradient_x_cross_attention"]["status"] == "ok" for entry in document["entries"])
    assert any("<activation, gradient> = 0" in warning for warning in document["warnings"])
