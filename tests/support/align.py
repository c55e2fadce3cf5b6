"""Tiny random ALIGN models, and their parts."""

import torch
from transformers import AlignConfig, AlignModel, EfficientNetImageProcessor

from adapters.align.adapter import AlignAdapter


def align_model(vocabulary, limit, seed=0, dtype=torch.float64, **vision):
    """A random ALIGN: 4 image blocks that reduce the input to 1/16, the last of them 16 channels; 2 text blocks."""
    torch.manual_seed(seed)
    config = AlignConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
            "vocab_size": vocabulary, "max_position_embeddings": limit,
        },
        vision_config={
            "width_coefficient": 0.25, "depth_coefficient": 1.0, "image_size": 64, "hidden_dim": 16,
            "kernel_sizes": [3, 5, 3], "in_channels": [32, 32, 64], "out_channels": [32, 64, 64],
            "strides": [2, 2, 2], "num_block_repeats": [1, 2, 1], "expand_ratios": [1, 2, 2],
        }
        | vision,
        projection_dim=16, temperature_init_value=0.3,
    )  # fmt: skip
    model = AlignModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter += 0.15 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand_like(buffer)
    return model.to(dtype).eval()


def align_adapter(tokenizer, seed=0, size=(64, 96), **model):
    """A tiny ALIGN with this tokenizer and an image processor that squashes to `size`, (height, width)."""
    made = align_model(len(tokenizer), tokenizer.model_max_length, seed, **model)
    processor = EfficientNetImageProcessor(
        size={"height": size[0], "width": size[1]}, rescale_factor=1 / 127.5, rescale_offset=True
    )
    return AlignAdapter(made, tokenizer=tokenizer, image_processor=processor)
