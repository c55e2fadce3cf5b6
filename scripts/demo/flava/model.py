"""The demo FLAVA: configuration, initialisation from the demo CLIP, export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPModel, FlavaConfig, FlavaForPreTraining, FlavaImageProcessor

from scripts.demo.clip.tokenizer import IMAGE_SIZE
from scripts.demo.clip.tokenizer import SPECIAL as CLIP_SPECIAL
from scripts.demo.flava.text import MAX_TOKENS, PAD, SPECIAL, WORD_IDS, build_tokenizer
from scripts.demo.scenes.phrases import VOCABULARY
from scripts.demo.training import replaced, set_json_value

WIDTH = 128
PATCH = 8
FUSION_BLOCKS = 2


def build_model(fusion_blocks: int = FUSION_BLOCKS) -> FlavaForPreTraining:
    """A FlavaForPreTraining with random weights: width 128; 4 image, 2 text and 2 multimodal blocks; 112 pixels."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    # There is no codebook and no loss on image tokens, so their heads get the smallest possible vocabulary.
    image = {**shared, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH, "vocab_size": 2}
    text = {
        **shared,
        "num_hidden_layers": 2,
        "vocab_size": len(SPECIAL) + len(VOCABULARY),
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": PAD,
    }
    config = FlavaConfig(
        # The toolkit shows the advice for images that are not below these paths of the demo folder.
        demo_world={
            "images": ["scenes", "default.jpg"],
            "advice": "this model is trained on a cartoon world alone, maps of other images are meaningless: "
            "use --model facebook/flava-full",
        },
        image_config=image,
        text_config=text,
        multimodal_config={**shared, "num_hidden_layers": fusion_blocks},
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        init_codebook=False,
        return_loss=False,
        skip_unmasked_multimodal_encoder=False,
    )
    return FlavaForPreTraining(config)


def build_image_processor() -> FlavaImageProcessor:
    """The demo CLIP's geometry: shortest edge to 112 pixels (bicubic), centre crop."""
    return FlavaImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def copy_linear(source: nn.Module, target: nn.Module) -> None:
    """Copy the weight, and the bias if there is one (else set it to zero)."""
    target.weight.copy_(source.weight)
    if target.bias is not None:
        target.bias.copy_(source.bias) if source.bias is not None else target.bias.zero_()


def _copy_blocks(source: nn.ModuleList, target: nn.ModuleList) -> None:
    for old, new in zip(source, target, strict=True):
        own = new.attention.attention
        for a, b in (
            (old.self_attn.q_proj, own.query),
            (old.self_attn.k_proj, own.key),
            (old.self_attn.v_proj, own.value),
            (old.self_attn.out_proj, new.attention.output.dense),
            (old.layer_norm1, new.layernorm_before),
            (old.layer_norm2, new.layernorm_after),
            (old.mlp.fc1, new.intermediate.dense),
            (old.mlp.fc2, new.output.dense),
        ):
            copy_linear(a, b)


@torch.no_grad()
def start_from_clip(model: FlavaForPreTraining, clip: CLIPModel, pixels: torch.Tensor) -> None:
    """Copy the CLIP's weights; its pre-layernorm is folded into the embeddings with the mean 1/sigma over `pixels`."""
    flava, vision, text = model.flava, clip.vision_model, clip.text_model
    _copy_blocks(vision.encoder.layers, flava.image_model.encoder.layer)
    _copy_blocks(text.encoder.layers, flava.text_model.encoder.layer)
    copy_linear(vision.post_layernorm, flava.image_model.layernorm)
    copy_linear(text.final_layer_norm, flava.text_model.layernorm)
    copy_linear(clip.visual_projection, flava.image_projection)
    copy_linear(clip.text_projection, flava.text_projection)
    flava.logit_scale.copy_(clip.logit_scale.clamp(max=4.09))
    _fold_image_embeddings(model, clip, pixels)
    words = text.embeddings.token_embedding.weight
    table = flava.text_model.embeddings.word_embeddings.weight
    for index, name in enumerate(WORD_IDS):
        table[WORD_IDS[name]] = words[len(CLIP_SPECIAL) + index]
    # Unlike the CLIP, FLAVA normalises the embeddings: the weight of that norm restores their scale.
    flava.text_model.embeddings.LayerNorm.weight.fill_(words.std(1).mean().item())


def _fold_image_embeddings(model: FlavaForPreTraining, clip: CLIPModel, pixels: torch.Tensor) -> None:
    old, new = clip.vision_model.embeddings, model.flava.image_model.embeddings
    norm = clip.vision_model.pre_layrnorm
    tokens = old(pixels)  # (B, 1 + N, D)
    scale = 1 / (tokens.var(-1, unbiased=False) + norm.eps).sqrt()
    cls_scale, patch_scale = scale[:, 0].mean(), scale[:, 1:].mean()

    def centred(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x - x.mean(dim, keepdim=True)

    gain = norm.weight
    kernel = centred(old.patch_embedding.weight, 0) * gain[:, None, None, None] * patch_scale
    new.patch_embeddings.projection.weight.copy_(kernel)
    new.patch_embeddings.projection.bias.zero_()
    positions = centred(old.position_embedding.weight, 1) * gain
    new.position_embeddings[0, 1:] = positions[1:] * patch_scale + norm.bias
    new.position_embeddings[0, 0] = positions[0] * cls_scale + norm.bias
    new.cls_token[0, 0] = centred(old.class_embedding, 0) * gain * cls_scale


def export(model: FlavaForPreTraining, folder: Path) -> None:
    """Write model (fp16), tokenizer and image processor; the folder is replaced atomically."""
    with replaced(folder) as fresh:
        half = build_model(model.config.multimodal_config.num_hidden_layers)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(fresh)
        build_tokenizer().save_pretrained(fresh)
        build_image_processor().save_pretrained(fresh)
        # A class name that exists in transformers before and after 5.0.
        set_json_value(fresh / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
