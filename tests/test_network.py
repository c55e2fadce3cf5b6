"""Real checkpoints, where a hub answers: `make network`. Everywhere else these are skipped, with the reason."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from huggingface_hub import constants

from grounding.demo import demo_picture
from tests.test_cli import SCRIPT


@pytest.fixture
def hub():
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except OSError as error:
        pytest.skip(f"no model hub answers: {error}")


@pytest.mark.network
def test_openai_clip_explains_a_picture(hub, tmp_path):
    argv = ["--model", "openai/clip-vit-base-patch16", "--image", str(demo_picture()), "--caption", "a brown dog"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *argv, "--format", "json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["model"] == {"id": "openai/clip-vit-base-patch16", "type": "clip"}
    assert [entry["label"] for entry in document["entries"]] == ["a brown dog", "a", "brown", "dog"]
    assert all(entry["maps"]["relevance"]["status"] == "ok" for entry in document["entries"])
