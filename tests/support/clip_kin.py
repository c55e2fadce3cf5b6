"""Tiny random models with CLIP's image encoder: MetaCLIP 2, Chinese-CLIP, AltCLIP, with tokenizers of their kinds."""

import string

import torch
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPImageProcessor,
    MetaClip2Config,
    MetaClip2Model,
    XLMRobertaTokenizer,
)

from adapters.clip.adapter import ClipAdapter

WORDS = ["a", "man", "in", "red", "jacket", "and", "blue", "car", "two", "dogs", "on", "the", "green", "grass"]
CHINESE = "一只穿红色夹克的男人和蓝汽车在草地上两狗"
LIMIT = 24
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def xlm_roberta_tokenizer():
    """XLM-R's tokenizer over whole words, letters and Chinese characters: the end token has the id 2, padding 1."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    scored = [(f"▁{word}", -4.0) for word in WORDS] + [(c, -5.0) for c in CHINESE]
    scored += [("▁", -3.0), *((c, -8.0) for c in string.ascii_letters + string.digits + string.punctuation)]
    return XLMRobertaTokenizer(vocab=[*((p, 0.0) for p in pieces), *scored, ("<mask>", 0.0)], model_max_length=512)


def bert_tokenizer():
    """BERT's tokenizer over words, pieces of words and single Chinese characters."""
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHINESE, *letters, *(f"##{c}" for c in letters)]
    pieces += [word for word in WORDS if len(word) > 1] + list(string.punctuation)
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=512)


KIN = {
    "MetaClip2Model": (MetaClip2Model, MetaClip2Config, xlm_roberta_tokenizer, CLIPImageProcessor),
    "ChineseCLIPModel": (ChineseCLIPModel, ChineseCLIPConfig, bert_tokenizer, ChineseCLIPImageProcessor),
    "AltCLIPModel": (AltCLIPModel, AltCLIPConfig, xlm_roberta_tokenizer, CLIPImageProcessor),
}


def kin_model(kind, seed=0, size=32, layers=3, dtype=torch.float64):
    """A random model: 3 vision blocks of width 32, 2 text blocks, texts of at most LIMIT tokens."""
    torch.manual_seed(seed)
    model, config, tokenizer, _ = KIN[kind]
    text = {
        "MetaClip2Model": {"max_position_embeddings": LIMIT, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        "ChineseCLIPModel": {"max_position_embeddings": LIMIT},
        # Positions are numbered from the padding token's id plus one.
        "AltCLIPModel": {"max_position_embeddings": LIMIT + 2, "project_dim": 24},
    }[kind]
    made = model._from_config(
        config(
            text_config=TOWER | {"num_hidden_layers": 2, "vocab_size": len(tokenizer())} | text,
            vision_config=TOWER | {"num_hidden_layers": layers, "image_size": size, "patch_size": 8},
            projection_dim=16,
        ),
        attn_implementation="sdpa",
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return made.to(dtype).eval()


def kin_adapter(kind, seed=0, size=32, **model):
    """A tiny model of this architecture with its tokenizer and image processor."""
    _, _, tokenizer, processor = KIN[kind]
    square = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    made = kin_model(kind, seed, size, **model)
    return ClipAdapter(made, tokenizer=tokenizer(), image_processor=processor(**square))
