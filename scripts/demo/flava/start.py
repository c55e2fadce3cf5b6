"""Initialise the multimodal encoder so that words attend to similar patches.

The norm and projection of each distilled tower map words and patches into one space. Both projections into the
multimodal encoder start as linear approximations of these maps, and queries and keys of the first block start as the
same rotation of that space, so that a word attends to similar patches from the first step.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import FlavaForPreTraining

OFFSET = 0.3  # offset between patches and words along a separate direction, in units of the mean token norm
SHARPNESS = 1.1
TOWARDS_PATCHES = 12.0


@torch.no_grad()
def start_fusion(model: FlavaForPreTraining, image: torch.Tensor, text: torch.Tensor) -> None:
    """Initialise the encoder at the scale of `image` and `text`, (n, D) last states of the towers before their norm."""
    flava = model.flava
    weights_image = _as_linear(flava.image_model.layernorm, flava.image_projection, image)
    weights_text = _as_linear(flava.text_model.layernorm, flava.text_projection, text)
    tokens = torch.cat([image @ weights_image[0].T + weights_image[1], text @ weights_text[0].T + weights_text[1]])
    scale = 1 / tokens.norm(dim=-1).mean()
    separator = _quiet_direction(tokens)
    for target, (weight, bias), sign in (
        (flava.image_to_mm_projection, weights_image, 1.0),
        (flava.text_to_mm_projection, weights_text, -1.0),
    ):
        target.weight.copy_(weight * scale)
        target.bias.copy_(bias * scale + sign * OFFSET * separator)
    for module in flava.multimodal_model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    flava.multimodal_model.cls_token.normal_(std=0.05)
    attention = flava.multimodal_model.encoder.layer[0].attention.attention
    rotation = torch.linalg.qr(torch.randn_like(attention.query.weight)).Q
    attention.query.weight.copy_(SHARPNESS * rotation)
    attention.key.weight.copy_(SHARPNESS * rotation)
    attention.query.bias.copy_(TOWARDS_PATCHES * rotation @ separator)


def _as_linear(norm: nn.LayerNorm, projection: nn.Linear, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of norm and projection as one linear map, with the mean 1/sigma over `states`."""
    scale = (1 / (states.var(-1, unbiased=False) + norm.eps).sqrt()).mean()
    weight = projection.weight * norm.weight * scale
    return weight - weight.mean(1, keepdim=True), projection.weight @ norm.bias + projection.bias


def _quiet_direction(tokens: torch.Tensor) -> torch.Tensor:
    """(D,) unit vector of least variance of the tokens, among vectors of mean 0, which a layer norm does not remove."""
    width = tokens.shape[1]
    centred = torch.eye(width) - 1 / width
    spread = centred @ (tokens.T @ tokens / len(tokens)) @ centred + torch.full((width, width), 1e3)
    direction = torch.linalg.eigh(spread).eigenvectors[:, 0]
    return direction / direction.norm()
