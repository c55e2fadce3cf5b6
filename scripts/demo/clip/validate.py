"""The validation figures of a training run: retrieval, one-attribute swaps, pointing; on the val or test scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPModel, PreTrainedTokenizerFast

from scripts.demo.clip.losses import embed_text
from scripts.demo.clip.pointing import Case, baselines, point_at, preprocess
from scripts.demo.clip.tokenizer import build_tokenizer
from scripts.demo.scenes.phrases import join, phrase, plan_caption
from scripts.demo.scenes.splits import SHORT_SIDE, split_scenes
from scripts.demo.scenes.vocabulary import ENTITY_TYPES, HELD_OUT, SEEN_SWAPS
from scripts.demo.scenes.world import Scene, render

GROUP_OF_RETRIEVAL = 32


@dataclass
class ValidationSet:
    """Rendered scenes of a split, preprocessed as the exported processor does."""

    scenes: list[Scene]
    pixels: torch.Tensor  # (n, 3, 112, 112)
    cases: list[Case]  # the pointing cases of the scenes with at least `crowd` entities


def load_split(split: str, images: Path | None = None, crowd: int = 3) -> ValidationSet:
    """A split made anew from its seeds; with `images` the pictures are read from that folder, as they are shipped."""
    scenes = split_scenes(split)
    pictures, cases = [], []
    for index, (name, scene) in enumerate(scenes.items()):
        picture, boxes = render(scene, SHORT_SIDE)
        pictures.append(Image.open(images / f"{name}.jpg").convert("RGB") if images else picture)
        if len(scene.entities) < crowd:
            continue
        for entity, box in zip(scene.entities, boxes.tolist(), strict=True):
            group = ENTITY_TYPES[entity.kind]
            cases.append(Case(index, picture.size, phrase(entity), (tuple(box),), group, entity in HELD_OUT))
    return ValidationSet(list(scenes.values()), preprocess(pictures), cases)


@torch.no_grad()
def embed_images(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """(n, D) of length 1."""
    pooled = [model.vision_model(pixel_values=part).pooler_output for part in pixels.split(64)]
    return functional.normalize(model.visual_projection(torch.cat(pooled)), dim=-1)


@torch.no_grad()
def embed_texts(model: CLIPModel, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(n, D) of length 1."""
    return embed_text(model, tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"])


def retrieval(
    model: CLIPModel, data: ValidationSet, images: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> tuple[float, float]:
    """Share of first places among 32: picture finds caption, caption finds picture."""
    rng = random.Random(5)
    captions = []
    for scene in data.scenes:
        order = rng.sample(range(len(scene.entities)), len(scene.entities))
        captions.append(join(plan_caption(order, scene.place, rng).segments(scene.entities)))
    text = embed_texts(model, captions, tokenizer)
    order = torch.tensor(rng.sample(range(len(captions)), len(captions)))
    groups = [part for part in order.split(GROUP_OF_RETRIEVAL) if len(part) == GROUP_OF_RETRIEVAL]
    by_image, by_text = [], []
    for part in groups:
        similarity = images[part] @ text[part].T
        labels = torch.arange(len(part))
        by_image.append((similarity.argmax(1) == labels).float().mean())
        by_text.append((similarity.argmax(0) == labels).float().mean())
    return torch.stack(by_image).mean().item(), torch.stack(by_text).mean().item()


def swap_accuracy(
    model: CLIPModel, data: ValidationSet, images: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> float:
    """How often the true phrase scores higher than a one-attribute swap that is not in the picture (all swaps)."""
    texts: dict[str, int] = {}
    pairs: list[tuple[int, int, int]] = []
    for index, scene in enumerate(data.scenes):
        for entity in scene.entities:
            true = texts.setdefault(phrase(entity), len(texts))
            absent = [phrase(swap) for swap in SEEN_SWAPS[entity] if swap not in scene.entities]
            pairs += [(index, true, texts.setdefault(text, len(texts))) for text in absent]
    scores = images @ embed_texts(model, list(texts), tokenizer).T
    picture, true, false = torch.tensor(pairs).unbind(1)
    return (scores[picture, true] > scores[picture, false]).float().mean().item()


def validate(model: CLIPModel, data: ValidationSet) -> dict[str, float]:
    """All figures by name, shares of 1."""
    was_training = model.training
    model.eval()
    tokenizer = build_tokenizer()
    images = embed_images(model, data.pixels)
    figures: dict[str, float] = {}
    figures["image->text"], figures["text->image"] = retrieval(model, data, images, tokenizer)
    figures["beats swap"] = swap_accuracy(model, data, images, tokenizer)
    people = torch.tensor([case.group == "people" for case in data.cases]).numpy()
    unseen = torch.tensor([case.held_out for case in data.cases]).numpy()
    for name, hits in point_at(model, data.pixels, data.cases, tokenizer).items():
        figures[name] = float(hits.mean())
        figures[f"{name} people"] = float(hits[people].mean())
        figures[f"{name} rest"] = float(hits[~people].mean())
        if unseen.any():
            figures[f"{name} held out"] = float(hits[unseen].mean())
    figures |= {name: float(values.mean()) for name, values in baselines(data.cases).items()}
    model.train(was_training)
    return figures
