"""Grad-CAM and relevance maps of the demo CLIP, and their strict pointing score.

Axis letters: R rows (one phrase of one image each), T tokens (CLS + patches), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPModel, PreTrainedTokenizerFast

from scripts.demo.clip.losses import embed_text
from scripts.demo.clip.tokenizer import IMAGE_SIZE, build_processor

Box = Sequence[float]


@dataclass(frozen=True)
class Case:
    """One phrase of one image with its boxes: original pixels, (x0, y0, x1, y1), half-open."""

    image: int
    size: tuple[int, int]  # (width, height) of the original image
    phrase: str
    boxes: tuple[Box, ...]
    group: str  # "people", "animals", ...: scored separately
    held_out: bool


def preprocess(images: Sequence[Image.Image]) -> torch.Tensor:
    """(n, 3, 112, 112), preprocessed by the exported image processor."""
    return build_processor().image_processor(list(images), return_tensors="pt")["pixel_values"]


def phrase_maps(model: CLIPModel, pixels: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Maps (R, side, side) of the cosine between each image (R, 3, S, S) and its phrase embedding (R, D)."""
    previous = model.config.vision_config._attn_implementation
    model.vision_model.set_attn_implementation("eager")
    outputs: list[torch.Tensor] = []
    hook = model.vision_model.encoder.layers[-1].layer_norm1.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output)
    )
    try:
        with torch.enable_grad():
            vision = model.vision_model(pixel_values=pixels.requires_grad_(), output_attentions=True)
            image = functional.normalize(model.visual_projection(vision.pooler_output), dim=-1)
            score = (image * text).sum()
            gradients = torch.autograd.grad(score, [outputs[0], *vision.attentions])
    finally:
        hook.remove()
        model.vision_model.set_attn_implementation(previous)
    side = round((outputs[0].shape[1] - 1) ** 0.5)
    relevance = _relevance(vision.attentions, gradients[1:])
    weights = gradients[0][:, 1:].mean(1, keepdim=True)  # (R, 1, D)
    gradcam = (outputs[0][:, 1:] * weights).sum(-1).relu()
    return {
        "gradcam": gradcam.detach().view(-1, side, side),
        "relevance": relevance.detach().view(-1, side, side),
    }


def _relevance(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """(R, T - 1) Chefer et al. 2021 for self-attention: R <- R + mean over heads of relu(gradient * attention) R."""
    tokens = attentions[0].shape[-1]
    total = torch.eye(tokens).expand(attentions[0].shape[0], -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        total = total + (attention * gradient).relu().mean(1) @ total
    return total[:, 0, 1:]


def peak_point(grid: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """Centre of the first highest cell of a map, as (x, y) in original pixels of an image of `size` (w, h)."""
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return crop_to_original((column + 0.5) / grid.shape[1], (row + 0.5) / grid.shape[0], size)


def crop_to_original(u: float, v: float, size: tuple[int, int]) -> tuple[float, float]:
    """Convert a point of the centre crop, (u, v) in 0..1 from its top-left corner, to original pixels (x, y)."""
    resized = [int(IMAGE_SIZE * side / min(size)) for side in size]
    x, y = (
        ((length - IMAGE_SIZE) // 2 + share * IMAGE_SIZE) * side / length
        for share, side, length in zip((u, v), size, resized, strict=True)
    )
    return x, y


def is_hit(point: tuple[float, float], boxes: Sequence[Box]) -> bool:
    """Whether the point is inside one of the half-open boxes, both in original pixels."""
    return any(x0 <= point[0] < x1 and y0 <= point[1] < y1 for x0, y0, x1, y1 in boxes)


def point_at(
    model: CLIPModel, pixels: torch.Tensor, cases: Sequence[Case], tokenizer: PreTrainedTokenizerFast, rows: int = 40
) -> dict[str, np.ndarray]:
    """Hits (bool) of all cases by map name; `pixels` (n, 3, S, S) are indexed by `Case.image`."""
    model.eval()
    hits: dict[str, list[bool]] = {"gradcam": [], "relevance": []}
    with torch.no_grad():
        ids = tokenizer([case.phrase for case in cases], padding=True, return_tensors="pt")["input_ids"]
        text = embed_text(model, ids)
    for start in range(0, len(cases), rows):
        chunk = cases[start : start + rows]
        maps = phrase_maps(model, pixels[[case.image for case in chunk]], text[start : start + rows])
        for name, grids in maps.items():
            for case, grid in zip(chunk, grids.numpy(), strict=True):
                hits[name].append(is_hit(peak_point(grid, case.size), case.boxes))
    return {name: np.array(values) for name, values in hits.items()}


def baselines(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """Hits of the centre of the crop, and the probability that a uniformly random point of the crop hits."""
    centre = [is_hit(crop_to_original(0.5, 0.5, case.size), case.boxes) for case in cases]
    chance = [sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in case.boxes) / min(case.size) ** 2 for case in cases]
    return {"centre": np.array(centre, dtype=float), "random": np.array(chance)}
