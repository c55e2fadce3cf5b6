"""The start of the multimodal encoder: words look for patches that look like them.

The distilled towers put words and patches into one space (their norm and projection). Both projections into the
multimodal encoder start as these maps made linear, and the first block's queries and keys as one rotation of that
space, so that a word attends to patches like itself from the first step. Training is free to move away from there.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import FlavaForPreTraining

APART = 0.3  # by which a direction of its own sets patches and words apart, in lengths of a token
SHARPNESS = 1.1
TOWARDS_PATCHES = 12.0


@torch.no_grad()
def start_fusion(model: FlavaForPreTraining, image: torch.Tensor, text: torch.Tensor) -> None:
    """`image` and `text`, (n, D) last states of the towers before their norm, give the scales."""
    flava = model.flava
    weights_image = _as_linear(flava.image_model.layernorm, flava.image_projection, image)
    weights_text = _as_linear(flava.text_model.layernorm, flava.text_projection, text)
    tokens = torch.cat([image @ weights_image[0].T + weights_image[1], text @ weights_text[0].T + weights_text[1]])
    scale = 1 / tokens.norm(dim=-1).mean()
    apart = _quiet_direction(tokens)
    for target, (weight, bias), sign in (
        (flava.image_to_mm_projection, weights_image, 1.0),
        (flava.text_to_mm_projection, weights_text, -1.0),
    ):
        target.weight.copy_(weight * scale)
        target.bias.copy_(bias * scale + sign * APART * apart)
    for module in flava.multimodal_model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05)
    flava.multimodal_model.cls_token.normal_(std=0.05)
    attention = flava.multimodal_model.encoder.layer[0].attention.attention
    rotation = torch.linalg.qr(torch.randn_like(attention.query.weight)).Q
    attention.query.weight.copy_(SHARPNESS * rotation)
    attention.key.weight.copy_(SHARPNESS * rotation)
    attention.query.bias.copy_(TOWARDS_PATCHES * rotation @ apart)


def _as_linear(norm: nn.LayerNorm, projection: nn.Linear, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of norm and projection, with the mean 1/sigma over `states`."""
    scale = (1 / (states.var(-1, unbiased=False) + norm.eps).sqrt()).mean()
    weight = projection.weight * norm.weight * scale
    return weight - weight.mean(1, keepdim=True), projection.weight @ norm.bias + projection.bias


def _quiet_direction(tokens: torch.Tensor) -> torch.Tensor:
    """(D,) of length 1: where the tokens vary least, among those of mean 0, which a layer norm leaves alone."""
    width = tokens.shape[1]
    centred = torch.eye(width) - 1 / width
    spread = centred @ (tokens.T @ tokens / len(tokens)) @ centred + torch.full((width, width), 1e3)
    direction = torch.linalg.eigh(spread).eigenvectors[:, 0]
    return direction / direction.norm()
