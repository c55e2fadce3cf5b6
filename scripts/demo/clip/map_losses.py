"""Training losses of the demo CLIP on its maps: the map of a phrase must point into the phrase's box.

The idea is attention mask consistency (AMC, Yang et al. 2023). Maps are functions of gradients, so the losses
differentiate twice. To keep this cheap, only the CLS token is recomputed for each phrase; keys and values of the
patches are computed once per image:

- `gradcam`: Grad-CAM at the input of the last block's attention, exact;
- `relevance`: sum over blocks of the head mean of relu(A dA) in the CLS row, without the paths from the CLS token to
  patches and back.

Axis letters: R rows (a phrase of an image), N patches, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from scripts.demo.clip.losses import Step
from scripts.demo.clip.tokenizer import IMAGE_SIZE

PHRASES = 2  # per image and step, drawn at random among its entities
SHARPNESS = 3.0  # of the softmax over patches, in standard deviations of the map
MARGIN = 1.0  # minimum of the largest value inside, in the same unit


@dataclass
class Maps:
    """Signed Grad-CAM and relevance (R, N), and the patches in the boxes of the phrase (R, N) bool."""

    gradcam: torch.Tensor
    relevance: torch.Tensor
    inside: torch.Tensor


def draw_rows(step: Step, patches: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image (R,), query (R,) and patches inside its boxes (R, N); rows without a patch centre inside are dropped."""
    query = step.batch.entity_query  # (B, 4)
    order = torch.rand(query.shape).masked_fill(query < 0, 2.0).argsort(1)[:, :PHRASES]
    image = torch.arange(len(query))[:, None].expand_as(order)
    chosen = query.gather(1, order)
    image, chosen = image[chosen >= 0], chosen[chosen >= 0]
    side = round(patches**0.5)
    centre = (torch.arange(side) + 0.5) * IMAGE_SIZE / side
    x, y = centre.repeat(side), centre.repeat_interleave(side)
    x0, y0, x1, y1 = (edge[..., None] for edge in step.batch.boxes[image].unbind(-1))  # (R, 4, 1)
    covered = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)  # (R, 4, N)
    # Entities with equal attributes match the same phrase: any of them counts.
    inside = (covered & (query[image] == chosen[:, None])[..., None]).any(1)
    kept = inside.any(1)
    return image[kept], chosen[kept], inside[kept]


def maps_of(step: Step) -> Maps:
    """Maps of some phrases of each image, differentiable in all parameters; computed once per step."""
    if step.maps is None:
        with torch.autocast("cpu", enabled=False):
            step.maps = _compute(step)
    return step.maps


def _compute(step: Step) -> Maps:
    hidden = [h.float() for h in step.hidden]
    image_index, query, inside = draw_rows(step, hidden[0].shape[1] - 1)
    attentions, features = [], None
    row = hidden[0][image_index, :1]  # (R, 1, D)
    blocks = step.model.vision_model.encoder.layers
    for index, block in enumerate(blocks):
        patches = block.layer_norm1(hidden[index][:, 1:])
        if index == len(blocks) - 1:
            features = patches = patches[image_index]  # a copy per row: each phrase has its own gradient
            keys, values = block.self_attn.k_proj(patches), block.self_attn.v_proj(patches)
        else:
            keys, values = (p(patches)[image_index] for p in (block.self_attn.k_proj, block.self_attn.v_proj))
        row, weights = _cls_block(block, row, keys, values)
        attentions.append(weights)
    pooled = step.model.vision_model.post_layernorm(row[:, 0])
    image = functional.normalize(step.model.visual_projection(pooled), dim=-1)
    score = (image * step.queries[query]).sum()
    gradients = torch.autograd.grad(score, [features, *attentions], create_graph=True)
    gradcam = (features * gradients[0].mean(1, keepdim=True)).sum(-1)
    relevance = sum((a * g).relu().mean(1)[:, 0, 1:] for a, g in zip(attentions, gradients[1:], strict=True))
    return Maps(gradcam, relevance, inside)


def _cls_block(
    block: torch.nn.Module, row: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CLS token (R, 1, D) through one block, and its attention weights (R, H, 1, 1 + N)."""
    attention = block.self_attn
    own = block.layer_norm1(row)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    keys = heads(torch.cat([attention.k_proj(own), keys], 1))
    values = heads(torch.cat([attention.v_proj(own), values], 1))
    weights = (heads(attention.q_proj(own)) @ keys.transpose(-1, -2) * attention.scale).softmax(-1)
    row = row + attention.out_proj((weights @ values).transpose(1, 2).flatten(2))
    return row + block.mlp(block.layer_norm2(row)), weights


def _pointing(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Minus the log of the softmax mass inside, and a margin for the largest value inside; scale-free."""
    scaled = maps / maps.std(1, keepdim=True).clamp(min=1e-12)
    mass = functional.log_softmax(SHARPNESS * scaled, 1).masked_fill(~inside, -torch.inf).logsumexp(1)
    largest = scaled.masked_fill(~inside, -torch.inf).amax(1)
    return (-mass + (MARGIN - largest).relu()).mean()


def gradcam_loss(step: Step) -> torch.Tensor:
    """Grad-CAM must point into the box."""
    maps = maps_of(step)
    return _pointing(maps.gradcam, maps.inside)


def relevance_loss(step: Step) -> torch.Tensor:
    """Relevance must point into the box, and lie in it as a whole."""
    maps = maps_of(step)
    total = maps.relevance.sum(1).clamp(min=1e-12)
    fraction = (maps.relevance * maps.inside).sum(1) / total
    return _pointing(maps.relevance, maps.inside) - fraction.clamp(min=1e-6).log().mean()


MAP_LOSSES = {"gradcam": gradcam_loss, "relevance": relevance_loss}
