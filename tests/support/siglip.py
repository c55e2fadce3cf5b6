"""Tiny random models of SigLIP and SigLIP 2 NaFlex, tokenizers in their manner, and text embeddings by the model."""

import json

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from adapters.siglip.adapter import SiglipAdapter
from adapters.siglip.naflex import Siglip2Adapter

CORPUS = [
    "a man in a red jacket and a blue car",
    "two dogs playing on the green grass",
    "unbelievably photogenic women",
    "man in red jacket",
    "red car and red bus",
    "the quick brown fox jumps over the lazy dog",
]
LENGTH = 24


def tokenizer(side="right", limit=LENGTH):
    """A tokenizer in SigLIP's manner: lower case, no punctuation, pieces that begin with their blank, an end token that
    is also the padding."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Strip()]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=limit,
        padding_side=side,
    )  # fmt: skip


def gemma_tokenizer(side="left", limit=LENGTH):
    """The tokenizer of SigLIP 2, with a small vocabulary: lower case, pieces that begin with their blank, an end token;
    by default it pads on the left."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.train_from_iterator([line.replace(" ", " \u2581") for line in CORPUS], trainer)
    trained = json.loads(made.to_str())["model"]
    return Siglip2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], model_max_length=limit,
        padding_side=side, add_bos_token=False, add_eos_token=True,
    )  # fmt: skip


def configuration(kind, vision, layers):
    """Configuration of 3 vision blocks of width 32 and 2 text blocks, its dictionary as `kind` takes it."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"num_hidden_layers": 2, "vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH}
    text |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    return kind(text_config=tower | text, vision_config=tower | {"num_hidden_layers": layers} | vision)


def randomised(model, dtype):
    """The model with weights large enough for attention to differ, a scale and a bias."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    return model.to(dtype).eval()


def siglip_model(seed=0, size=32, patch=8, layers=3, dtype=torch.float64, attention="sdpa", **vision):
    """A random SigLIP."""
    torch.manual_seed(seed)
    config = configuration(SiglipConfig, {"image_size": size, "patch_size": patch} | vision, layers)
    return randomised(SiglipModel._from_config(config, attn_implementation=attention), dtype)


def siglip_adapter(seed=0, side="right", dtype=torch.float64, pixels=None, **model):
    """A tiny SigLIP with its tokenizer and an image processor that squashes to `pixels` (height, width)."""
    made = siglip_model(seed, dtype=dtype, **model)
    height, width = pixels or [made.config.vision_config.image_size] * 2
    processor = SiglipImageProcessor(size={"height": height, "width": width})
    return SiglipAdapter(made, tokenizer=tokenizer(side), image_processor=processor)


def naflex_model(seed=0, patch=8, positions=16, layers=3, dtype=torch.float64, attention="sdpa", **vision):
    """A random SigLIP 2 NaFlex; its position embeddings are a square of `positions`."""
    torch.manual_seed(seed)
    config = configuration(Siglip2Config, {"patch_size": patch, "num_patches": positions} | vision, layers)
    return randomised(Siglip2Model._from_config(config, attn_implementation=attention), dtype)


def naflex_adapter(seed=0, side="left", dtype=torch.float64, patches=23, **model):
    """A tiny SigLIP 2 NaFlex with its tokenizer, which pads on the left, and image processor: at most `patches`. An
    image of 90 x 60 pixels has a grid of 3 x 5."""
    made = naflex_model(seed, dtype=dtype, **model)
    processor = Siglip2ImageProcessor(patch_size=made.config.vision_config.patch_size, max_num_patches=patches)
    return Siglip2Adapter(made, tokenizer=gemma_tokenizer(side), image_processor=processor)


def text_embedding(adapter, text, hidden=()):
    """Normalised embedding (E,) of a text padded by the tokenizer itself; tokens at positions `hidden` are masked, all
    others are attended to."""
    ids = adapter.tokenizer(text, padding="max_length", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, list(hidden)] = 0
    with torch.no_grad():
        found = adapter.model.get_text_features(ids, attention_mask=mask if hidden else None).pooler_output[0]
    return found / found.norm()
