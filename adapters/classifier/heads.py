"""Heads of convolutional classifiers, as functions from the features of the last stage to logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adapters.shared.unmodified import has_no_hooks, is_unmodified
from grounding.adapter.base import Features
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.adapter.recorder import Recorder

# Features (B, D, rows, columns) -> logits (B, C).
Head = Callable[[Tensor], Tensor]
POOLED, NORMED = ("resnet", "regnet"), ("convnext", "convnextv2")
POOLS = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Sequential)


@dataclass(frozen=True, eq=False)
class HeadShortcut:
    """The pooled gradient at the last stage of a network, from its head alone."""

    model: nn.Module
    layers: Mapping[str, tuple[str, ...]]
    head: Head

    def pooled_gradient(
        self,
        layer: str,
        inputs: Inputs,  # noqa: ARG002
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None,
    ) -> Float[Tensor, "K D"]:
        """The gradient of each target's logit, one vector added to all cells of a copy of the features."""
        output = outputs[layer].detach()
        features = output[targets.image.to(output.device)]
        with Recorder(self.model, rule=rule), torch.enable_grad():
            shift = features.new_zeros(len(targets), features.shape[1]).requires_grad_()
            logits = self.head(features + shift[:, :, None, None])
            own = torch.arange(len(targets), device=logits.device)
            total = logits[own, targets.data["class"].to(logits.device)].sum()
        [gradient] = torch.autograd.grad(total, shift)
        return gradient

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Features | None:  # noqa: ARG002
        """None: the head is no norm alone."""
        return None


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
