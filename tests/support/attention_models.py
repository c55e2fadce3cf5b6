"""Tiny random models of many families, with a call that gives scores and the paths of their attention modules."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import transformers as hf
from torch import nn

from grounding.adapter.recorder import Recorder

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WORDS = torch.tensor([[3, 4, 5, 6, 1], [7, 8, 1, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@dataclass
class Case:
    """A model, a call that gives scores (B,), the paths of attention modules, and whether rows of weights sum to 1."""

    model: nn.Module
    call: Callable[[], torch.Tensor]
    attention: tuple[str, ...]
    rows_of_one: bool = True


def record(model, attention, *calls):
    """Make the calls in one recorded pass: the recorder."""
    with Recorder(model, attention=attention) as recorder:
        for call in calls:
            call()
        recorder.check()
    return recorder


def prepared(model, dtype, implementation=None):
    """Weights large enough for attention to differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model.to(dtype).eval()


def images(dtype, count=2, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)


def seeded(make):
    """A factory whose models are the same every time."""

    @wraps(make)
    def made(*args, **keywords):
        torch.manual_seed(0)
        return make(*args, **keywords)

    return made


@seeded
def siglip(dtype=torch.float64, implementation="sdpa"):
    text = TOWER | {"vocab_size": 20, "max_position_embeddings": 5}
    model = prepared(
        hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=TOWER | IMAGE)), dtype, implementation
    )
    pixels = images(dtype)
    paths = ("vision_model.encoder.layers.0.self_attn", "vision_model.encoder.layers.1.self_attn")
    return Case(
        model,
        lambda: model(input_ids=WORDS, pixel_values=pixels).logits_per_image.sum(1),
        (*paths, "vision_model.head.attention", "text_model.encoder.layers.1.self_attn"),
    )


@seeded
def siglip2(dtype=torch.float64, implementation="sdpa"):
    text = TOWER | {"vocab_size": 20, "max_position_embeddings": 5}
    vision = TOWER | {"patch_size": 4, "num_patches": 9}
    model = prepared(hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision)), dtype, implementation)
    pixels = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask, shapes = torch.ones(2, 9), torch.tensor([[3, 3], [2, 3]])
    mask[1, 6:] = 0  # packed patches: the second image has 2 x 3

    def call():
        found = model(input_ids=WORDS, pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
        return found.logits_per_image.sum(1)

    return Case(model, call, ("vision_model.encoder.layers.0.self_attn", "vision_model.head.attention"))


def blip_parts(is_decoder):
    text = TOWER | {"encoder_hidden_size": 32, "vocab_size": 20, "max_position_embeddings": 8}
    text |= IDS | {"sep_token_id": 1, "is_decoder": is_decoder, "bos_token_id": 0}
    return hf.BlipConfig(text_config=text, vision_config=TOWER | IMAGE, image_text_hidden_size=16)


@seeded
def bridgetower(dtype=torch.float64, implementation=None):
    """Its vision part uses `nn.MultiheadAttention` with the batch second, its text part the interface."""
    wide = {"hidden_size": 64, "num_hidden_layers": 2}
    text = wide | {"num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 20, "max_position_embeddings": 10}
    config = hf.BridgeTowerConfig(
        text_config=text | {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={"hidden_size": 128, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        hidden_size=128 // 2, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    )  # fmt: skip
    model = prepared(hf.BridgeTowerForImageAndTextRetrieval(config), dtype)
    pixels = images(dtype)
    mask = torch.ones(2, 16, 16, dtype=torch.long)
    return Case(
        model,
        lambda: model(input_ids=WORDS, attention_mask=MASK, pixel_values=pixels, pixel_mask=mask).logits[:, 1],
        (
            "bridgetower.vision_model.visual.transformer.resblocks.0.attn",
            "bridgetower.vision_model.visual.transformer.resblocks.1.attn",
            "bridgetower.cross_modal_text_layers.0.crossattention.self",
        ),
    )


@seeded
def blip_matching(dtype=torch.float64, implementation=None):
    model = prepared(hf.BlipForImageTextRetrieval(blip_parts(True)), dtype)
    pixels = images(dtype)
    text = "text_encoder.encoder.layer"
    return Case(
        model,
        lambda: model(input_ids=WORDS, pixel_values=pixels, attention_mask=MASK).itm_score[:, 1],
        (
            "vision_model.encoder.layers.1.self_attn",
            f"{text}.0.attention.self",
            f"{text}.0.crossattention.self",
            f"{text}.1.crossattention.self",
        ),
    )


@seeded
def blip_caption(dtype=torch.float64, implementation=None):
    model = prepared(hf.BlipForConditionalGeneration(blip_parts(True)), dtype)
    pixels = images(dtype)
    text = "text_decoder.bert.encoder.layer"
    return Case(
        model,
        lambda: model(input_ids=WORDS, pixel_values=pixels, attention_mask=MASK).logits[:, 1, 5],
        ("vision_model.encoder.layers.0.self_attn", f"{text}.1.attention.self", f"{text}.1.crossattention.self"),
    )


@seeded
def git(dtype=torch.float64, implementation=None):
    config = hf.GitConfig(vision_config=TOWER | IMAGE, vocab_size=20, max_position_embeddings=8, **TOWER, **IDS)
    model = prepared(hf.GitForCausalLM(config), dtype)
    pixels = images(dtype)
    return Case(
        model,
        lambda: model(input_ids=WORDS, pixel_values=pixels, attention_mask=MASK).logits[:, -4, 5],
        (
            "git.image_encoder.vision_model.encoder.layers.0.self_attn",
            "git.encoder.layer.0.attention.self",
            "git.encoder.layer.1.attention.self",
        ),
    )


@seeded
def pix2struct(dtype=torch.float64, implementation="eager"):
    tower = {"num_heads": 4, "d_kv": 8, "d_ff": 48, "num_layers": 2, "hidden_size": 32}
    text = tower | {"vocab_size": 20} | IDS | {"decoder_start_token_id": 0}
    vision = {
        "hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "seq_len": 16,
    }  # fmt: skip
    model = hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(text_config=text, vision_config=vision))
    model = prepared(model, dtype, implementation)
    patches = torch.randn(2, 6, 2 + 48, generator=torch.Generator().manual_seed(3))
    patches[..., 0] = torch.arange(6) // 3 + 1
    patches[..., 1] = torch.arange(6) % 3 + 1
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    inputs = {"flattened_patches": patches.to(dtype), "attention_mask": mask.to(dtype), "decoder_input_ids": WORDS}
    return Case(
        model,
        lambda: model(**inputs).logits[:, 2, 5],
        (
            "encoder.encoder.layer.0.attention",
            "decoder.layer.0.self_attention.attention",
            "decoder.layer.0.encoder_decoder_attention.attention",
            "decoder.layer.1.self_attention.attention",
        ),
    )


def language(kind, config, rows_of_one=True):
    """A decoder of text: the score is a logit of the last position."""

    @seeded
    def case(dtype=torch.float64, implementation="eager"):
        model = prepared(kind(config()), dtype, implementation)
        return Case(
            model,
            lambda: model(input_ids=WORDS, attention_mask=MASK).logits[:, 2, 5],
            ("model.layers.0.self_attn", "model.layers.1.self_attn"),
            rows_of_one,
        )

    return case


GROUPED = TOWER | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 20} | IDS
gemma2 = language(
    hf.Gemma2ForCausalLM,
    lambda: hf.Gemma2Config(**GROUPED, attn_logit_softcapping=2.0, sliding_window=3, query_pre_attn_scalar=8),
)
gpt_oss = language(
    hf.GptOssForCausalLM,
    lambda: hf.GptOssConfig(
        **GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=3, experts_implementation="eager"
    ),
    rows_of_one=False,
)


@seeded
def qwen2_5_vision(dtype=torch.float64, implementation="sdpa", images=((1, 4, 6), (1, 4, 4))):
    """Two images in one sequence of patches, attention by windows in the first block and by image in the second."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=1, window_size=16, out_hidden_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    model = prepared(Qwen2_5_VisionTransformerPretrainedModel(config), dtype, implementation)
    grid = torch.tensor(images)
    patches = torch.randn(int(grid.prod(1).sum()), 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Case(
        model,
        lambda: model(patches, grid_thw=grid).pooler_output.pow(2).sum(1),
        ("blocks.0.attn", "blocks.1.attn"),
    )


FAMILIES = {
    "siglip": siglip,
    "siglip2": siglip2,
    "bridgetower": bridgetower,
    "blip_matching": blip_matching,
    "blip_caption": blip_caption,
    "git": git,
    "pix2struct": pix2struct,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "qwen2_5_vision": qwen2_5_vision,
}
