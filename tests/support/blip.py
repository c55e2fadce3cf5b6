"""Tiny random BLIP models for image-text retrieval, and their parts."""

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

from adapters.blip.adapter import BlipAdapter


def blip_model(vocabulary, limit, seed=0, size=32, patch=8, layers=3, dtype=torch.float64):
    """A random BLIP: 3 image blocks and `layers` text blocks of width 32, 4 heads."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = BlipConfig(
        vision_config=tower | {"num_hidden_layers": 3, "image_size": size, "patch_size": patch},
        text_config=tower
        | {"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": limit, "pad_token_id": 0}
        | {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3},
        image_text_hidden_size=16,
    )
    model = BlipForImageTextRetrieval(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def blip_adapter(tokenizer, seed=0, kind="matching", **model):
    """A tiny BLIP with this tokenizer and its image processor; `kind` is its default target."""
    made = blip_model(len(tokenizer), tokenizer.model_max_length, seed, **model)
    size = made.config.vision_config.image_size
    processor = BlipImageProcessor(size={"height": size, "width": size})
    adapter = BlipAdapter(made, tokenizer=tokenizer, image_processor=processor)
    adapter.target_kinds = (kind, *(other for other in adapter.target_kinds if other != kind))
    return adapter
