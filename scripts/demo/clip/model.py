"""The demo CLIP: configuration, change of patch size, export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from scripts.demo.clip.tokenizer import BOS, EOS, IMAGE_SIZE, MAX_TOKENS, PAD, SPECIAL, build_processor
from scripts.demo.scenes.phrases import VOCABULARY
from scripts.demo.training import replaced, set_json_value

WIDTH = 128


def build_model(patch: int) -> CLIPModel:
    """A CLIPModel with random weights: width 128, 4 vision blocks, 2 text blocks, 112 pixels."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    config = CLIPConfig(
        # The toolkit shows the advice for images that are not below these paths of the demo folder.
        demo_world={
            "images": ["scenes", "default.jpg"],
            "advice": "this model is trained on a cartoon world alone, maps of other images are meaningless: "
            "use --model openai/clip-vit-base-patch16",
        },
        text_config={
            **shared,
            "vocab_size": len(SPECIAL) + len(VOCABULARY),
            "num_hidden_layers": 2,
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": patch},
        projection_dim=WIDTH,
    )
    return CLIPModel(config)


def change_patch(model: CLIPModel, patch: int) -> CLIPModel:
    """Copy the model with another patch size; patch kernel and position embeddings are resized."""
    new = build_model(patch)
    state = model.state_dict()
    kernel = state["vision_model.embeddings.patch_embedding.weight"]
    size = functional.interpolate(kernel, size=(patch, patch), mode="bicubic", align_corners=False)
    # A smaller kernel sums fewer pixels; the factor keeps the embedding of a constant image.
    state["vision_model.embeddings.patch_embedding.weight"] = size * (kernel.shape[-1] / patch) ** 2
    table = state["vision_model.embeddings.position_embedding.weight"]
    old_grid, grid = IMAGE_SIZE // kernel.shape[-1], IMAGE_SIZE // patch
    positions = table[1:].T.reshape(1, -1, old_grid, old_grid)
    positions = functional.interpolate(positions, size=(grid, grid), mode="bicubic", align_corners=False)
    state["vision_model.embeddings.position_embedding.weight"] = torch.cat([table[:1], positions[0].flatten(1).T])
    position_ids = "vision_model.embeddings.position_ids"
    if position_ids in state:
        state[position_ids] = new.state_dict()[position_ids]
    new.load_state_dict(state)
    return new


def export(model: CLIPModel, folder: Path) -> None:
    """Write model (fp16), tokenizer and processor; the folder is replaced atomically."""
    with replaced(folder) as fresh:
        half = build_model(model.config.vision_config.patch_size)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(fresh)
        processor = build_processor()
        processor.save_pretrained(fresh)
        processor.image_processor.save_pretrained(fresh)
        # A class name that exists in transformers before and after 5.0.
        set_json_value(fresh / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
