"""Distilling the demo CLIP into the two towers of the demo FLAVA.

The text tower learns the CLIP's embeddings of phrases and captions, and lets each word of a phrase carry the phrase's
embedding; the image tower learns the hidden states, and lets each patch carry what the CLIP's patch said of it. So
words and patches that speak of one thing look alike to the multimodal encoder, which reads the towers' last states.
"""

from __future__ import annotations

import random

import torch
from torch.nn import functional
from transformers import CLIPModel, FlavaForPreTraining

from scripts.demo.clip.losses import embed_text
from scripts.demo.clip.tokenizer import build_tokenizer as clip_tokenizer
from scripts.demo.flava.batches import TRAIN_SEED, Pictures, masked, text_without_picture
from scripts.demo.flava.text import PAD, padded
from scripts.demo.scenes.phrases import phrase

Losses = dict[str, torch.Tensor]
CLIP_TOKENIZER = clip_tokenizer()


def text_embeddings(model: FlavaForPreTraining, ids: torch.Tensor) -> torch.Tensor:
    """(R, T, D) of length 1: every token through the final norm and the projection; token 0 is the text's embedding."""
    states = model.flava.text_model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state
    return functional.normalize(model.flava.text_projection(states).float(), dim=-1)


@torch.no_grad()
def clip_embeddings(teacher: CLIPModel, texts: list[str]) -> torch.Tensor:
    """(n, D) of length 1."""
    return embed_text(teacher, CLIP_TOKENIZER(texts, padding=True, return_tensors="pt")["input_ids"])


def text_losses(model: FlavaForPreTraining, teacher: CLIPModel, number: int, size: int) -> Losses:
    """Batch `number`: embeddings of whole texts, of the words of a phrase, and masked words without a picture."""
    rng = random.Random(TRAIN_SEED * 1_000_003 - 1 - number)
    rows = [text_without_picture(rng) for _ in range(size)]
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
    own = text_embeddings(model, ids)
    named = owner >= 0
    wanted = parts[index.gather(1, owner.clamp(min=0))]
    hidden = [masked(words, 0.25, rng) for words, _ in rows[: size // 4]]
    hidden_ids = padded([row for row, _ in hidden], PAD)
    labels = padded([row for _, row in hidden], -100)
    states = model.flava.text_model(input_ids=hidden_ids, attention_mask=(hidden_ids != PAD).long()).last_hidden_state
    guesses = model.mlm_head(states[labels != -100]).float()
    return {
        "text": (1 - (own[:, 0] * whole).sum(-1)).mean(),
        "words": (1 - (own * wanted).sum(-1))[named].mean(),
        "mlm": functional.cross_entropy(guesses, labels[labels != -100]),
    }


def _clip_ids(ids: tuple[int, ...]) -> list[int]:
    """Without the special tokens, in the numbering of the CLIP, whose special tokens are one fewer."""
    return [word - 1 for word in ids[1:-1]]


def image_losses(model: FlavaForPreTraining, teacher: CLIPModel, pictures: Pictures) -> Losses:
    """Hidden states, CLS attention and embedding as the CLIP's; last patches as the CLIP's patches that saw boxes."""
    pixels = pictures.normalised()
    with torch.no_grad():
        wanted = teacher.vision_model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        embedding = functional.normalize(teacher.visual_projection(wanted.pooler_output).float(), dim=-1)
        inner = teacher.vision_model.post_layernorm(wanted.hidden_states[-2][:, 1:])
        patches = functional.normalize(teacher.visual_projection(inner).float(), dim=-1)
    own = model.flava.image_model(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    projected = functional.normalize(model.flava.image_projection(own.last_hidden_state).float(), dim=-1)
    pairs = list(zip(own.hidden_states, wanted.hidden_states, strict=True))
    cls = sum(_relative_error(a[:, 0], b[:, 0]) for a, b in pairs[1:])
    hidden = sum(_relative_error(a[:, 1:], b[:, 1:]) for a, b in pairs[:-1])
    attention = sum(
        functional.kl_div(a[:, :, 0].float().clamp(min=1e-8).log(), b[:, :, 0].float(), reduction="none").sum(-1).mean()
        for a, b in zip(own.attentions, wanted.attentions, strict=True)
    )
    return {
        "image": (1 - (projected[:, 0] * embedding).sum(-1)).mean(),
        "patches": (1 - (projected[:, 1:] * patches).sum(-1)).mean(),
        "cls": cls,
        "hidden": hidden,
        "attention": attention,
    }


def _relative_error(own: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    own, wanted = own.float(), wanted.float()
    return (own - wanted).square().mean() / wanted.var(-1).mean()
