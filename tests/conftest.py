"""Shared fixtures. Shapes and types of public signatures are checked at run time, in tests only."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test but the `network` ones may wait for a hub
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from jaxtyping import install_import_hook

import tests.support.typecheck  # noqa: F401  the hook finds it by name

install_import_hook(["grounding", "adapters"], "tests.support.typecheck.check")

import pytest
import torch

from tests.support import models
from tests.support.images import noise

torch.set_num_threads(int(os.environ.get("GROUNDING_TEST_THREADS", "1")))


@pytest.fixture(params=sorted(models.FACTORIES))
def any_adapter(request):
    """Each architecture once, tiny, with random weights."""
    return models.FACTORIES[request.param]()


@pytest.fixture
def clip():
    return models.clip_adapter()


@pytest.fixture
def trocr():
    return models.trocr_adapter()


@pytest.fixture
def image():
    """An image that is neither square nor flat."""
    return noise(90, 60)
