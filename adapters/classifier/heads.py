"""Heads of convolutional classifiers as functions from the features of the last stage to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapters.shared.unmodified import has_no_hooks, is_unmodified

# Features (B, D, rows, columns) -> logits (B, C).
Head = Callable[[Tensor], Tensor]
POOLED, NORMED = ("resnet", "regnet"), ("convnext", "convnextv2")
POOLS = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Sequential)


def find_head(model: Any, layer: str) -> Head | None:
    """The head after `layer`; None for an unknown family, another layer than the last stage, or a modified head."""
    base, kind = getattr(model, model.base_model_prefix, None), model.config.model_type
    if base is None or kind not in POOLED + NORMED or not layer.endswith(f"stages.{len(base.encoder.stages) - 1}"):
        return None
    parts = [model.classifier, base.pooler if kind in POOLED else base.layernorm]
    inside = [part for whole in parts for part in whole.modules()]
    if not all(has_no_hooks(part) and (isinstance(part, POOLS) or is_unmodified(part)) for part in inside):
        return None
    classifier = model.classifier
    if kind in POOLED:
        return lambda features: classifier(base.pooler(features))
    return lambda features: classifier(base.layernorm(features.mean([-2, -1])))
