"""The architectures with CLIP's image encoder, and the differences between their text encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AltCLIPModel, ChineseCLIPModel, CLIPModel, MetaClip2Model

from adapters.table import MODEL_TYPES


@dataclass(frozen=True)
class Family:
    """Text encoder of an architecture; `model` is the class of the whole model.

    causal: it is CLIP's: causal, pooled at the first end token. Otherwise it is bidirectional, pooled at the first
        token, and needs an attention mask where a text is padded.
    after_padding: its positions are numbered from the padding token's id plus one, as in RoBERTa.
    """

    model: Any
    causal: bool = True
    after_padding: bool = False

    def limit(self, config: Any) -> int:
        """The largest number of tokens for which the text encoder has positions; `config` is its configuration."""
        taken = config.pad_token_id + 1 if self.after_padding else 0
        return int(config.max_position_embeddings) - taken


FAMILIES = {
    "CLIPModel": Family(CLIPModel),
    "MetaClip2Model": Family(MetaClip2Model),
    "ChineseCLIPModel": Family(ChineseCLIPModel, causal=False),
    "AltCLIPModel": Family(AltCLIPModel, causal=False, after_padding=True),
}
MODELS = tuple(family.model for family in FAMILIES.values())


def family_of(model: Any) -> Family:
    """The family of a model of one of `MODELS`."""
    return next(family for family in FAMILIES.values() if isinstance(model, family.model))


def configured_family(config: Any) -> Family:
    """The family named by a checkpoint's configuration: by its architecture, or else by its model type."""
    names = (*(config.architectures or ()), MODEL_TYPES.get(config.model_type, ""))
    return next((FAMILIES[name] for name in names if name in FAMILIES), FAMILIES["CLIPModel"])
