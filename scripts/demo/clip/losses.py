"""Training losses of the demo CLIP that need no maps: contrast, phrases, boxes.

Each loss takes a `Step` and returns a scalar; a training stage weighs the losses by name.

Axis letters: B images, P queries, N patches, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from scripts.demo.clip.batches import Batch
from scripts.demo.clip.tokenizer import IMAGE_SIZE, PAD


class LossScales(nn.Module):
    """Trainable scales and thresholds of cosines for the losses; not part of the exported model.

    Scales are stored as logarithms, so that the common learning rate can change them far enough.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phrase_scale = nn.Parameter(torch.tensor(12.0).log())
        self.phrase_threshold = nn.Parameter(torch.tensor(0.4))
        self.patch_scale = nn.Parameter(torch.tensor(12.0).log())
        self.background = nn.Parameter(torch.tensor(0.3))


@dataclass
class Step:
    """Inputs of the losses at one training step; all embeddings have length 1."""

    model: CLIPModel
    scales: LossScales
    batch: Batch
    image: torch.Tensor  # (B, D)
    captions: torch.Tensor  # (2 B, D)
    queries: torch.Tensor  # (P, D)
    patches: torch.Tensor  # (B, N, D) hidden_states[-2] through the projection
    temperature: torch.Tensor  # scalar, exp(logit_scale)
    hidden: tuple[torch.Tensor, ...]  # (B, 1 + N, width) inputs of the vision blocks, and the output of the last
    maps: Any = None  # computed once, by the losses on maps


def embed_text(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """(n, D) embeddings of length 1."""
    mask = (ids != PAD).long()
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def forward(model: CLIPModel, scales: LossScales, batch: Batch) -> Step:
    """Compute the embeddings of images, patches, captions and queries of a batch."""
    vision = model.vision_model(pixel_values=batch.normalised(), output_hidden_states=True)
    image = functional.normalize(model.visual_projection(vision.pooler_output).float(), dim=-1)
    inner = model.vision_model.post_layernorm(vision.hidden_states[-2][:, 1:])
    patches = functional.normalize(model.visual_projection(inner).float(), dim=-1)
    return Step(
        model=model,
        scales=scales,
        batch=batch,
        image=image,
        captions=embed_text(model, batch.captions),
        queries=embed_text(model, batch.queries),
        patches=patches,
        temperature=model.logit_scale.exp().clamp(max=60.0),
        hidden=vision.hidden_states,
    )


def contrast_loss(step: Step) -> torch.Tensor:
    """CLIP's contrastive loss in both directions, with the swapped captions as extra negatives for the images."""
    count = len(step.image)
    labels = torch.arange(count)
    logits = step.temperature * step.image @ step.captions.T  # (B, 2 B)
    by_text = functional.cross_entropy(logits[:, :count].T, labels)
    return 0.5 * (functional.cross_entropy(logits, labels) + by_text)


def phrase_loss(step: Step) -> torch.Tensor:
    """Sigmoid loss: does the phrase match the image? Half of the weight of false pairs is on swaps."""
    logits = step.scales.phrase_scale.exp() * (step.image @ step.queries.T - step.scales.phrase_threshold)  # (B, P)
    batch = step.batch
    loss = functional.binary_cross_entropy_with_logits(logits, batch.present.float(), reduction="none")
    easy = ~(batch.present | batch.hard)
    return loss[batch.present].mean() + 0.5 * loss[batch.hard].mean() + 0.5 * loss[easy].mean()


def patch_targets(batch: Batch, patches: int) -> torch.Tensor:
    """(B, N) index of the query of the entity whose box contains the patch centre, -1 for background."""
    side = round(patches**0.5)
    centre = (torch.arange(side) + 0.5) * IMAGE_SIZE / side
    x, y = centre.repeat(side), centre.repeat_interleave(side)  # row-major
    x0, y0, x1, y1 = (edge[..., None] for edge in batch.boxes.unbind(-1))  # (B, 4, 1)
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)  # (B, 4, N)
    query = batch.entity_query[..., None].expand_as(inside).masked_fill(~inside, -1)
    return query.max(dim=1).values


def box_loss(step: Step) -> torch.Tensor:
    """Classify each patch among the full queries of the batch and background."""
    targets = patch_targets(step.batch, step.patches.shape[1])
    cosines = (step.patches @ step.queries.T).masked_fill(~step.batch.full, -100.0)  # (B, N, P)
    background = step.scales.background.expand(*cosines.shape[:2], 1)
    logits = step.scales.patch_scale.exp() * torch.cat([cosines, background], dim=-1)
    filled = torch.where(targets < 0, logits.shape[-1] - 1, targets)
    loss = functional.cross_entropy(logits.flatten(0, 1), filled.flatten(), reduction="none").view_as(targets)
    return loss[targets >= 0].mean() + 0.5 * loss[targets < 0].mean()


LOSSES = {"contrast": contrast_loss, "phrase": phrase_loss, "box": box_loss}
