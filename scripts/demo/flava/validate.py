"""Scores of the demo FLAVA on the validation or test scenes: one-attribute swaps, pointing, masked words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import FlavaForPreTraining

from scripts.demo.clip.pointing import is_hit, peak_point
from scripts.demo.clip.validate import ValidationSet
from scripts.demo.flava.losses import fuse, image_states, text_states
from scripts.demo.flava.maps import matching_maps, similarity_maps
from scripts.demo.flava.text import CONTENT_IDS, MASK, WORD_IDS, build_tokenizer
from scripts.demo.flava.towers import text_embeddings
from scripts.demo.scenes.phrases import join, phrase, plan_caption
from scripts.demo.scenes.vocabulary import SEEN_SWAPS

ROWS = 40


def token_ids(texts: Sequence[str]) -> torch.Tensor:
    """(n, T) token ids."""
    return build_tokenizer()(list(texts), padding=True, return_tensors="pt")["input_ids"]


@torch.no_grad()
def embed_texts(model: FlavaForPreTraining, texts: Sequence[str]) -> torch.Tensor:
    """(n, D) of length 1."""
    return text_embeddings(model, token_ids(texts))[:, 0]


@torch.no_grad()
def embed_images(model: FlavaForPreTraining, pixels: torch.Tensor) -> torch.Tensor:
    """(n, D) of length 1."""
    tower = model.flava.image_model
    cls = torch.cat([tower(pixel_values=part).last_hidden_state[:, 0] for part in pixels.split(64)])
    return functional.normalize(model.flava.image_projection(cls), dim=-1)


def swap_pairs(data: ValidationSet) -> list[tuple[int, str, str]]:
    """All triples of image index, true phrase, and a one-attribute swap that is absent from the image."""
    return [
        (index, phrase(entity), phrase(swap))
        for index, scene in enumerate(data.scenes)
        for entity in scene.entities
        for swap in SEEN_SWAPS[entity]
        if swap not in scene.entities
    ]


def similarity_beats_swap(model: FlavaForPreTraining, data: ValidationSet) -> float:
    """Share of swaps that are less similar to the image than the true phrase."""
    pairs = swap_pairs(data)
    texts = {text: index for index, text in enumerate(dict.fromkeys(t for _, a, b in pairs for t in (a, b)))}
    scores = embed_images(model, data.pixels) @ embed_texts(model, list(texts)).T
    return float(np.mean([float(scores[i, texts[a]]) > float(scores[i, texts[b]]) for i, a, b in pairs]))


def point_at(data: ValidationSet, maps_of: Callable[[slice], dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Hits (bool) of all cases by map name; `maps_of` returns the maps (R, N) of a slice of the cases."""
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(data.cases), ROWS):
        chunk = slice(start, start + ROWS)
        for name, rows in maps_of(chunk).items():
            side = round(rows.shape[1] ** 0.5)
            for case, grid in zip(data.cases[chunk], rows.view(-1, side, side).numpy(), strict=True):
                hits.setdefault(name, []).append(is_hit(peak_point(grid, case.size), case.boxes))
    return {name: np.array(values) for name, values in hits.items()}


def case_pixels(data: ValidationSet, chunk: slice) -> torch.Tensor:
    """(R, 3, S, S) images of some cases."""
    return data.pixels[[case.image for case in data.cases[chunk]]]


def similarity_hits(model: FlavaForPreTraining, data: ValidationSet) -> dict[str, np.ndarray]:
    """Hits of the maps of the similarity of the towers."""
    text = embed_texts(model, [case.phrase for case in data.cases])
    return point_at(data, lambda chunk: similarity_maps(model, case_pixels(data, chunk), text[chunk]))


def fusion_hits(model: FlavaForPreTraining, data: ValidationSet) -> dict[str, np.ndarray]:
    """Hits of the maps of the multimodal encoder."""
    ids = token_ids([case.phrase for case in data.cases])
    return point_at(data, lambda chunk: matching_maps(model, case_pixels(data, chunk), ids[chunk]))


def validate_towers(model: FlavaForPreTraining, data: ValidationSet) -> dict[str, float]:
    """Scores of the similarity of the towers."""
    was_training = model.training
    model.eval()
    scores = {"similarity beats swap": similarity_beats_swap(model, data)}
    scores |= {name: float(values.mean()) for name, values in similarity_hits(model, data).items()}
    model.train(was_training)
    return scores


Pair = tuple[int, str, str]


def caption_pairs(data: ValidationSet) -> list[Pair]:
    """Triples of image index, a true caption of all entities, and the caption with one attribute swapped."""
    rng, pairs = random.Random(7), []
    for index, scene in enumerate(data.scenes):
        order = rng.sample(range(len(scene.entities)), len(scene.entities))
        plan, victim = plan_caption(order, scene.place, rng), rng.choice(order)
        absent = [swap for swap in SEEN_SWAPS[scene.entities[victim]] if swap not in scene.entities]
        if absent:
            wrong = list(scene.entities)
            wrong[victim] = rng.choice(absent)
            pairs.append((index, join(plan.segments(scene.entities)), join(plan.segments(wrong))))
    return pairs


@torch.no_grad()
def matching_scores(
    model: FlavaForPreTraining, states: torch.Tensor, images: list[int], texts: list[str]
) -> torch.Tensor:
    """(n,) logit("match") - logit("no match")."""
    scores = []
    for start in range(0, len(texts), ROWS):
        ids = token_ids(texts[start : start + ROWS])
        output = fuse(model, states[images[start : start + ROWS]], text_states(model, ids), ids)
        logits = model.itm_head(output.last_hidden_state)
        scores.append(logits[:, 1] - logits[:, 0])
    return torch.cat(scores)


def pair_scores(model: FlavaForPreTraining, states: torch.Tensor, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Share of pairs in which the true text scores higher, and share of texts whose score has the correct sign."""
    images = [index for index, _, _ in pairs]
    true = matching_scores(model, states, images, [text for _, text, _ in pairs])
    false = matching_scores(model, states, images, [text for _, _, text in pairs])
    right = 0.5 * ((true > 0).float().mean() + (false < 0).float().mean())
    return (true > false).float().mean().item(), right.item()


@torch.no_grad()
def masked_words(model: FlavaForPreTraining, data: ValidationSet, states: torch.Tensor) -> dict[str, float]:
    """Share of masked content words whose prediction completes the phrase to that of an entity in the image."""
    ids, images, positions = [], [], []
    for case in data.cases:
        row = token_ids([case.phrase])[0]
        for position in [position for position, word in enumerate(row.tolist()) if word in CONTENT_IDS]:
            ids.append(row.index_fill(0, torch.tensor([position]), MASK))
            images.append(case.image)
            positions.append(position)
    table = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    words = {word: name for name, word in WORD_IDS.items()}
    hits: dict[str, list[bool]] = {"masked word with image": [], "masked word without": []}
    for start in range(0, len(ids), ROWS):
        part, own = table[start : start + ROWS], torch.tensor(positions[start : start + ROWS])
        text = text_states(model, part)
        fused = fuse(model, states[images[start : start + ROWS]], text, part).last_hidden_state
        at = torch.arange(len(part))
        guesses = {
            "masked word with image": model.mmm_text_head(fused[:, -part.shape[1] :][at, own]),
            "masked word without": model.mlm_head(model.flava.text_model.layernorm(text)[at, own]),
        }
        for name, logits in guesses.items():
            best = logits.argmax(-1).tolist()
            for row, position, image, guess in zip(part, own, images[start:], best, strict=False):
                filled = [words.get(guess if i == position else word, "") for i, word in enumerate(row.tolist())]
                names = [phrase(entity) for entity in data.scenes[image].entities]
                hits[name].append(" ".join(filled).strip() in names)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def fusion_scores(model: FlavaForPreTraining, data: ValidationSet, swap_share: float = 1.0) -> dict[str, float]:
    """Scores of phrase swaps (a share `swap_share` of them), caption swaps and masked words."""
    rng = random.Random(3)
    pairs = [pair for pair in swap_pairs(data) if rng.random() < swap_share]
    with torch.no_grad():
        states = torch.cat([image_states(model, part) for part in data.pixels.split(64)])
    phrases = pair_scores(model, states, pairs)
    captions = pair_scores(model, states, caption_pairs(data))
    return {
        "matching phrase beats swap": phrases[0],
        "matching phrase right": phrases[1],
        "matching caption beats swap": captions[0],
        "matching caption right": captions[1],
        **masked_words(model, data, states),
    }


def validate_fusion(model: FlavaForPreTraining, data: ValidationSet, swap_share: float = 0.1) -> dict[str, float]:
    """Scores of matching and of masked words."""
    was_training = model.training
    model.eval()
    scores = fusion_scores(model, data, swap_share)
    scores |= {name: float(values.mean()) for name, values in fusion_hits(model, data).items()}
    model.train(was_training)
    return scores
