"""Losses that distil the demo CLIP into the image and text tower of the demo FLAVA.

The text tower learns the CLIP's embeddings of phrases and captions, and for each word the embedding of its phrase; the
image tower learns the CLIP's hidden states and patch embeddings. Words and patches of the same entity thus have
similar states, which are the inputs of the multimodal encoder.
"""

from __future__ import annotations

import random

import torch
from torch.nn import functional
from transformers import CLIPModel, FlavaForPreTraining

from scripts.demo.clip.losses import embed_text
from scripts.demo.clip.tokenizer import build_tokenizer as clip_tokenizer
from scripts.demo.flava.batches import TRAIN_SEED, ImageBatch, masked, text_without_image
from scripts.demo.flava.text import PAD, padded
from scripts.demo.scenes.phrases import phrase

Losses = dict[str, torch.Tensor]
CLIP_TOKENIZER = clip_tokenizer()


def text_embeddings(model: FlavaForPreTraining, ids: torch.Tensor) -> torch.Tensor:
    """(R, T, D) normalised embeddings of all tokens; token 0 is the embedding of the text."""
    states = model.flava.text_model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
    return functional.normalize(model.flava.text_projection(states).float(), dim=-1)


@torch.no_grad()
def clip_embeddings(teacher: CLIPModel, texts: list[str]) -> torch.Tensor:
    """(n, D) of length 1."""
    return embed_text(teacher, CLIP_TOKENIZER(texts, padding=True, return_tensors="pt")["input_ids"])


def text_losses(model: FlavaForPreTraining, teacher: CLIPModel, number: int, size: int) -> Losses:
    """Losses on embeddings of texts, on embeddings of words, and on masked words without an image."""
    rng = random.Random(TRAIN_SEED * 1_000_003 - 1 - number)
    rows = [text_without_image(rng) for _ in range(size)]
    ids = padded([words.ids for words, _ in rows], PAD)
    owner = padded([words.owner for words, _ in rows], -1)
    names: dict[str, int] = {}
    for _, entities in rows:
        for entity in entities:
            names.setdefault(phrase(entity), len(names))
    index = padded([[names[phrase(entity)] for entity in entities] for _, entities in rows], 0)
    texts = [CLIP_TOKENIZER.convert_ids_to_tokens(_clip_ids(words.ids)) for words, _ in rows]
    whole = clip_embeddings(teacher, [" ".join(words) for words in texts])
    parts = clip_embeddings(teacher, list(names))
    student = text_embeddings(model, ids)
    named = owner >= 0
    target = parts[index.gather(1, owner.clamp(min=0))]
    hidden = [masked(words, 0.25, rng) for words, _ in rows[: size // 4]]
    hidden_ids = padded([row for row, _ in hidden], PAD)
    labels = padded([row for _, row in hidden], -100)
    states = model.flava.text_model(input_ids=hidden_ids, attention_mask=(hidden_ids != PAD).long()).last_hidden_state
    guesses = model.mlm_head(states[labels != -100]).float()
    return {
        "text": (1 - (student[:, 0] * whole).sum(-1)).mean(),
        "words": (1 - (student * target).sum(-1))[named].mean(),
        "mlm": functional.cross_entropy(guesses, labels[labels != -100]),
    }


def _clip_ids(ids: tuple[int, ...]) -> list[int]:
    """The CLIP's ids of the words; the CLIP has one special token less."""
    return [word - 1 for word in ids[1:-1]]


def image_losses(model: FlavaForPreTraining, teacher: CLIPModel, images: ImageBatch) -> Losses:
    """Losses on hidden states, CLS attention, image embedding and patch embeddings."""
    pixels = images.normalised()
    with torch.no_grad():
        target = teacher.vision_model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        embedding = functional.normalize(teacher.visual_projection(target.pooler_output).float(), dim=-1)
        inner = teacher.vision_model.post_layernorm(target.hidden_states[-2][:, 1:])
        patches = functional.normalize(teacher.visual_projection(inner).float(), dim=-1)
    student = model.flava.image_model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    projected = functional.normalize(model.flava.image_projection(student.last_hidden_state).float(), dim=-1)
    pairs = list(zip(student.hidden_states, target.hidden_states, strict=True))
    cls = sum(_relative_error(a[:, 0], b[:, 0]) for a, b in pairs[1:])
    hidden = sum(_relative_error(a[:, 1:], b[:, 1:]) for a, b in pairs[:-1])
    attention = sum(
        functional.kl_div(a[:, :, 0].float().clamp(min=1e-8).log(), b[:, :, 0].float(), reduction="none").sum(-1).mean()
        for a, b in zip(student.attentions, target.attentions, strict=True)
    )
    return {
        "image": (1 - (projected[:, 0] * embedding).sum(-1)).mean(),
        "patches": (1 - (projected[:, 1:] * patches).sum(-1)).mean(),
        "cls": cls,
        "hidden": hidden,
        "attention": attention,
    }


def _relative_error(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    student, target = student.float(), target.float()
    return (student - target).square().mean() / target.var(-1).mean()
