"""Explaining classes: layers by number, scores of several classes."""

import torch

from grounding import explain
from tests.support import models
from tests.support.images import noise


def test_layers_may_be_numbers():
    adapter = models.classifier_adapter(dtype=torch.float32)
    found = explain(adapter, noise(40, 40), methods=["gradcam"], layers=[-1, 0])
    assert list(found.methods) == ["gradcam@-1", "gradcam@0"]


def test_several_classes_have_no_score_in_common():
    adapter = models.classifier_adapter(dtype=torch.float32)
    assert explain(adapter, noise(40, 40), target=1).score is not None
    assert explain(adapter, noise(40, 40), target=[1, 2]).score is None
