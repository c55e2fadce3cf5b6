"""Maps of the demo FLAVA that validation scores, implemented independently of the toolkit.

Axis letters: R rows (one phrase of one image each), T tokens, N patches, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import FlavaForPreTraining

from scripts.demo.flava.losses import FIRST_PATCH, fuse, text_states
from scripts.demo.flava.text import SPECIAL

Maps = dict[str, torch.Tensor]


def relevance(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """(R, T, T) Chefer et al. 2021 for self-attention: R <- R + mean over heads of relu(gradient * attention) R."""
    total = torch.eye(attentions[0].shape[-1]).expand(attentions[0].shape[0], -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        total = total + (attention * gradient).relu().mean(1) @ total
    return total


def rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """(R, T, T) attention rollout: product over blocks of half the head mean and half the identity."""
    total = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        total = (0.5 * attention.mean(1) + 0.5 * torch.eye(attention.shape[-1])) @ total
    return total


class RecordedOutputs:
    """Record the outputs of some modules during one forward pass."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.values: list[torch.Tensor] = []
        self.hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: self.values.append(output))
            for module in modules
        ]

    def __enter__(self) -> list[torch.Tensor]:
        return self.values

    def __exit__(self, *_error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def gradcam(features: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """(R, N) sum over channels of the features, weighted by their mean gradient; positive part."""
    return (features * gradients.mean(1, keepdim=True)).sum(-1).relu()


def similarity_maps(model: FlavaForPreTraining, pixels: torch.Tensor, text: torch.Tensor) -> Maps:
    """Maps (R, N) of the cosine between each image (R, 3, S, S) and its text embedding (R, D)."""
    tower = model.flava.image_model
    with torch.enable_grad(), RecordedOutputs([tower.encoder.layer[-1].layernorm_before]) as features:
        image = tower(pixel_values=pixels.requires_grad_(), output_attentions=True)
        own = functional.normalize(model.flava.image_projection(image.last_hidden_state[:, 0]), dim=-1)
        gradients = torch.autograd.grad((own * text).sum(), [features[0], *image.attentions])
    maps = {
        "similarity gradcam": gradcam(features[0][:, 1:], gradients[0][:, 1:]),
        "similarity relevance": relevance(image.attentions, gradients[1:])[:, 0, 1:],
    }
    return {name: grid.detach() for name, grid in maps.items()}


def matching_maps(model: FlavaForPreTraining, pixels: torch.Tensor, ids: torch.Tensor) -> Maps:
    """Maps (R, N) of logit("match") - logit("no match"), and attention and rollout maps from the rows of the text."""
    flava = model.flava
    words = ids >= len(SPECIAL)
    norms = [block.layernorm_before for block in flava.multimodal_model.encoder.layer]
    with torch.enable_grad():
        image = flava.image_model(
            pixel_values=pixels.requires_grad_(), output_attentions=True, output_hidden_states=True
        )
        with RecordedOutputs([flava.image_to_mm_projection, *norms]) as features:
            output = fuse(model, image.hidden_states[-1], text_states(model, ids), ids, output_attentions=True)
        logits = model.itm_head(output.last_hidden_state)
        wanted = [*features, *output.attentions, *image.attentions]
        gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), wanted)
    blocks = len(norms)
    slopes, gradients_fused = gradients[: 1 + blocks], gradients[1 + blocks : 1 + 2 * blocks]
    patches = slice(FIRST_PATCH, FIRST_PATCH + image.hidden_states[-1].shape[1] - 1)
    chain = relevance(output.attentions, gradients_fused)
    from_cls, from_words = chain[:, 0], _word_rows(chain, words)  # (R, 2 + N + T)
    below = relevance(image.attentions, gradients[1 + 2 * blocks :])
    rolled = _word_rows(rollout(output.attentions), words)
    attended = _word_rows(output.attentions[-1].mean(1), words)
    maps = {
        "matching elementwise": (output.attentions[-1] * gradients_fused[-1]).relu().mean(1)[:, 0, patches],
        "matching fusion relevance": from_cls[:, patches],
        "matching relevance": _through(from_cls, below, patches),
        "matching words relevance": _through(from_words, below, patches),
        "matching words alone": from_words[:, patches],
        "matching gradcam input": gradcam(features[0][:, 1:], slopes[0][:, 1:]),
        "fusion attention": attended[:, patches],
        "fusion rollout": _through(rolled, rollout(image.attentions), patches),
        "fusion rollout alone": rolled[:, patches],
    }
    for index in range(blocks):
        maps[f"matching gradcam {index}"] = gradcam(features[1 + index][:, patches], slopes[1 + index][:, patches])
    return {name: grid.detach() for name, grid in maps.items()}


def _word_rows(table: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(R, T) mean over the rows of the words without special tokens; the text comes last in the tokens."""
    rows = table[:, -words.shape[1] :] * words[..., None]
    return rows.sum(1) / words.sum(1, keepdim=True)


def _through(fused: torch.Tensor, below: torch.Tensor, patches: slice) -> torch.Tensor:
    """(R, N) chain the weights on the image tower's tokens (CLS before the patches) with the tower's own."""
    tower = slice(patches.start - 1, patches.stop)
    return torch.einsum("rn,rnm->rm", fused[:, tower], below)[:, 1:]
