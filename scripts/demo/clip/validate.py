"""Scores of the demo CLIP on the validation or test scenes: retrieval, one-attribute swaps, pointing."""

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
    """Scenes of a split, preprocessed by the exported processor."""

    scenes: list[Scene]
    pixels: torch.Tensor  # (n, 3, 112, 112)
    cases: list[Case]  # pointing cases of the scenes with at least `min_entities` entities


def load_split(split: str, folder: Path | None = None, min_entities: int = 3) -> ValidationSet:
    """Render a split from its seeds, or load its shipped images from `folder`."""
    scenes = split_scenes(split)
    images, cases = [], []
    for index, (name, scene) in enumerate(scenes.items()):
        image, boxes = render(scene, SHORT_SIDE)
        images.append(Image.open(folder / f"{name}.jpg").convert("RGB") if folder else image)
        if len(scene.entities) < min_entities:
            continue
        for entity, box in zip(scene.entities, boxes.tolist(), strict=True):
            group = ENTITY_TYPES[entity.kind]
            cases.append(Case(index, image.size, phrase(entity), (tuple(box),), group, entity in HELD_OUT))
    return ValidationSet(list(scenes.values()), preprocess(images), cases)


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
    """Recall at 1 among 32: from image to caption, from caption to image."""
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
    """Share of one-attribute swaps absent from the image that score below the true phrase."""
    texts: dict[str, int] = {}
    pairs: list[tuple[int, int, int]] = []
    for index, scene in enumerate(data.scenes):
        for entity in scene.entities:
            true = texts.setdefault(phrase(entity), len(texts))
            absent = [phrase(swap) for swap in SEEN_SWAPS[entity] if swap not in scene.entities]
            pairs += [(index, true, texts.setdefault(text, len(texts))) for text in absent]
    scores = images @ embed_texts(model, list(texts), tokenizer).T
    image, true, false = torch.tensor(pairs).unbind(1)
    return (scores[image, true] > scores[image, false]).float().mean().item()


def validate(model: CLIPModel, data: ValidationSet) -> dict[str, float]:
    """All scores by name, as fractions."""
    was_training = model.training
    model.eval()
    tokenizer = build_tokenizer()
    images = embed_images(model, data.pixels)
    results: dict[str, float] = {}
    results["image->text"], results["text->image"] = retrieval(model, data, images, tokenizer)
    results["beats swap"] = swap_accuracy(model, data, images, tokenizer)
    people = torch.tensor([case.group == "people" for case in data.cases]).numpy()
    unseen = torch.tensor([case.held_out for case in data.cases]).numpy()
    for name, hits in point_at(model, data.pixels, data.cases, tokenizer).items():
        results[name] = float(hits.mean())
        results[f"{name} people"] = float(hits[people].mean())
        results[f"{name} rest"] = float(hits[~people].mean())
        if unseen.any():
            results[f"{name} held out"] = float(hits[unseen].mean())
    results |= {name: float(values.mean()) for name, values in baselines(data.cases).items()}
    model.train(was_training)
    return results
