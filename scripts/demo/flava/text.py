"""Tokenizer of the demo FLAVA, and token ids with the entity that each word refers to.

The format is [CLS] text [SEP] as in BERT, with the vocabulary of the demo CLIP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scripts.demo.scenes.phrases import VOCABULARY, Segment
from scripts.demo.scenes.vocabulary import COLOURS, GARMENTS, KINDS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL))
MAX_TOKENS = 48
WORD_IDS = {word: len(SPECIAL) + index for index, word in enumerate(VOCABULARY)}
# Words that an image determines: kinds, colours and garments.
CONTENT_IDS = frozenset(WORD_IDS[word] for word in (*KINDS, *COLOURS, *GARMENTS))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case, split at spaces and punctuation, one id per word of the closed vocabulary."""
    specials = {token: index for index, token in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.WordLevel({**specials, **WORD_IDS}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_TOKENS,
    )


@dataclass(frozen=True)
class Words:
    """Token ids of a text with special tokens; `owner` is the index of the entity of each token, -1 for none."""

    ids: tuple[int, ...]
    owner: tuple[int, ...]


def words_of(segments: Sequence[Segment]) -> Words:
    """Tokenize the segments, with the same ids as the tokenizer gives for the joined text."""
    ids, owner = [CLS], [-1]
    for text, entity in segments:
        found = [WORD_IDS[word] for word in re.findall(r"\w+|[.,]", text)]
        ids += found
        owner += [-1 if entity is None else entity] * len(found)
    return Words((*ids, SEP), (*owner, -1))


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """(R, T) tensor of the rows, padded with `fill`."""
    table = torch.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return table
