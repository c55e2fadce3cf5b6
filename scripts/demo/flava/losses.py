"""Training losses of the demo FLAVA's multimodal encoder on the frozen image and text towers.

Axis letters: R rows (an image with a text), T text tokens, N patches, D width, H heads. The tokens of the multimodal
encoder are its own CLS token, the image CLS token, the patches and the text, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import FlavaForPreTraining

from scripts.demo.clip.tokenizer import IMAGE_SIZE
from scripts.demo.flava.batches import ImageBatch
from scripts.demo.flava.rows import IGNORED, Rows
from scripts.demo.flava.text import PAD

FIRST_PATCH = 2


class WordPatchHead(nn.Module):
    """Auxiliary head that predicts whether a patch lies in the box of a word's phrase; not exported."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.word = nn.Linear(width, width // 2)
        self.patch = nn.Linear(width, width // 2)
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, words: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """(R, T, N) logits."""
        return self.word(words) @ self.patch(patches).transpose(1, 2) / 8 + self.bias


@dataclass
class Fused:
    """Inputs of the losses at one step of the multimodal encoder."""

    model: FlavaForPreTraining
    head: WordPatchHead
    rows: Rows
    inside: torch.Tensor  # (R, T, N) bool: the patch centre lies in a box of the token's phrase
    states: torch.Tensor  # (R, 2 + N + T, D) after the last norm
    attentions: Sequence[torch.Tensor]  # (R, H, 2 + N + T, 2 + N + T)

    @property
    def patches(self) -> slice:
        """The positions of the patches."""
        return slice(FIRST_PATCH, FIRST_PATCH + self.inside.shape[-1])

    @property
    def words(self) -> slice:
        """The positions of the text."""
        return slice(self.patches.stop, None)


def fuse(model: FlavaForPreTraining, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor, **wanted: bool) -> Any:
    """Run the multimodal encoder on the last states (before the norm) of the towers: (R, 1 + N, D) and (R, T, D)."""
    flava = model.flava
    tokens = torch.cat([flava.image_to_mm_projection(image), flava.text_to_mm_projection(text)], dim=1)
    seen = torch.ones(len(ids), 1 + image.shape[1], dtype=torch.long)
    mask = torch.cat([seen, (ids != PAD).long()], dim=1)
    return flava.multimodal_model(tokens, attention_mask=mask, **wanted)


def text_states(model: FlavaForPreTraining, ids: torch.Tensor) -> torch.Tensor:
    """(R, T, D) last states of the text tower, before its norm."""
    mask = (ids != PAD).long()
    return model.flava.text_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]


def image_states(model: FlavaForPreTraining, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 1 + N, D) last states of the image tower, before its norm."""
    return model.flava.image_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]


def boxes_to_patches(boxes: torch.Tensor, patches: int) -> torch.Tensor:
    """(B, 4, N) bool: whether the patch centre lies in the box."""
    side = round(patches**0.5)
    centre = (torch.arange(side) + 0.5) * IMAGE_SIZE / side
    x, y = centre.repeat(side), centre.repeat_interleave(side)  # row-major
    x0, y0, x1, y1 = (edge[..., None] for edge in boxes.unbind(-1))
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def fused_step(
    model: FlavaForPreTraining, head: WordPatchHead, images: ImageBatch, rows: Rows, kept: float = 1.0
) -> Fused:
    """Run the frozen towers, then the multimodal encoder.

    A random share `kept` of the patches of each row is used, to save time. The multimodal encoder has no position
    embeddings, so dropping patches does not shift the others.
    """
    with torch.no_grad():
        image = image_states(model, images.normalised())[rows.image]
        text = text_states(model, rows.ids)
    covered = boxes_to_patches(images.boxes, image.shape[1] - 1)[rows.image]  # (R, 4, N)
    if kept < 1:
        drawn = torch.rand(covered[:, 0].shape).argsort(1)[:, : round(kept * covered.shape[-1])]
        covered = covered.gather(2, drawn[:, None].expand(-1, covered.shape[1], -1))
        patches = image[:, 1:].gather(1, drawn[..., None].expand(-1, -1, image.shape[-1]))
        image = torch.cat([image[:, :1], patches], 1)
    output = fuse(model, image, text, rows.ids, output_attentions=True)
    inside = torch.einsum("rte,ren->rtn", rows.entities.float(), covered.float()) > 0
    return Fused(model, head, rows, inside, output.last_hidden_state, output.attentions)


def matching_loss(step: Fused) -> torch.Tensor:
    """Does the text match the image? Class 1 is yes, as in transformers."""
    logits = step.model.itm_head(step.states).float()
    return functional.cross_entropy(logits, step.rows.match, ignore_index=IGNORED)


def masked_loss(step: Fused) -> torch.Tensor:
    """Predict the masked words of matching texts."""
    hidden = step.rows.labels != IGNORED
    logits = step.model.mmm_text_head(step.states[:, step.words][hidden]).float()
    return functional.cross_entropy(logits, step.rows.labels[hidden])


def box_loss(step: Fused) -> torch.Tensor:
    """Box-supervised: predict for every word the patches in its phrase's box; none for a false phrase."""
    logits = step.head(step.states[:, step.words], step.states[:, step.patches]).float()[step.rows.in_phrase]
    inside = step.inside[step.rows.in_phrase]
    loss = functional.binary_cross_entropy_with_logits(logits, inside.float(), reduction="none")
    return 0.5 * loss[inside].mean() + 0.5 * loss[~inside].mean()


def attention_loss(step: Fused) -> torch.Tensor:
    """Box-supervised, on a map: attention of a word to patches should lie in its phrase's box."""
    chosen = step.rows.in_phrase & step.inside.any(-1)
    inside = step.inside[chosen]
    losses = []
    for attention in step.attentions:
        rows = attention.float().mean(1)[:, step.words, step.patches][chosen]  # (rows, N)
        share = (rows * inside).sum(-1) / rows.sum(-1).clamp(min=1e-9)
        losses.append(-share.clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean()


FUSION_LOSSES = {"matching": matching_loss, "masked": masked_loss, "box": box_loss, "attention": attention_loss}
