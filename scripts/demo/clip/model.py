"""The small CLIP of the demo: its configuration, the change of patch size, and the export."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from phrases import VOCABULARY
from shipping import replaced
from text import BOS, EOS, IMAGE_SIZE, MAX_TOKENS, PAD, SPECIAL, build_processor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

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
    """The same model with another patch size: kernel and position embeddings are resized, all else is copied."""
    new = build_model(patch)
    state = model.state_dict()
    kernel = state["vision_model.embeddings.patch_embedding.weight"]
    size = functional.interpolate(kernel, size=(patch, patch), mode="bicubic", align_corners=False)
    # Fewer pixels are summed, so each one weighs more: a constant picture keeps its embedding.
    state["vision_model.embeddings.patch_embedding.weight"] = size * (kernel.shape[-1] / patch) ** 2
    table = state["vision_model.embeddings.position_embedding.weight"]
    old_grid, grid = IMAGE_SIZE // kernel.shape[-1], IMAGE_SIZE // patch
    places = table[1:].T.reshape(1, -1, old_grid, old_grid)
    places = functional.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    state["vision_model.embeddings.position_embedding.weight"] = torch.cat([table[:1], places[0].flatten(1).T])
    position_ids = "vision_model.embeddings.position_ids"
    if position_ids in state:
        state[position_ids] = new.state_dict()[position_ids]
    new.load_state_dict(state)
    return new


def export(model: CLIPModel, folder: Path) -> None:
    """Write model (fp16), tokenizer and processor; the folder is replaced as a whole, never seen half written."""
    with replaced(folder) as fresh:
        half = build_model(model.config.vision_config.patch_size)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(fresh)
        processor = build_processor()
        processor.save_pretrained(fresh)
        processor.image_processor.save_pretrained(fresh)
        # The class name that releases of transformers before and after 5.0 both know.
        settings = json.loads((fresh / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (fresh / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
