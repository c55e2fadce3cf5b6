"""Tiny random models, built from configurations: each architecture's shape at a thousandth of its size."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from adapters.clip import ClipAdapter
from tests.third_party import MeanAdapter

CORPUS = [
    "a man in a red jacket and a blue car",
    "two dogs playing on the green grass",
    "unbelievably photogenic women",
    "man in red jacket",
    "red car and red bus",
    "the quick brown fox jumps over the lazy dog",
]
LIMIT = 24


def tokenizer(limit=LIMIT):
    """A byte-level BPE tokenizer in CLIP's manner: lower case, start and end token, pieces of words."""
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(t, made.token_to_id(t)) for t in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        unk_token=special[1],
        model_max_length=limit,
    )


def clip_model(seed=0, size=32, patch=8, layers=3, dtype=torch.float64, attention="sdpa", **vision):
    """A random CLIP: 3 vision blocks of width 32, 2 text blocks. Weights are large enough for attention to differ."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=tower
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer()),
            "eos_token_id": 1,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "max_position_embeddings": LIMIT,
        },
        vision_config=tower | {"num_hidden_layers": layers, "image_size": size, "patch_size": patch} | vision,
        projection_dim=16,
    )
    model = CLIPModel._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def clip_processor(size=32, **settings):
    """CLIP's image processor: shortest edge, centre crop."""
    return CLIPImageProcessor(
        **{"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}} | settings
    )


def clip_adapter(seed=0, dtype=torch.float64, **model):
    """A tiny CLIP with its tokenizer and processor."""
    made = clip_model(seed, dtype=dtype, **model)
    size = made.config.vision_config.image_size
    return ClipAdapter(made, tokenizer=tokenizer(), image_processor=clip_processor(size))


def mean_adapter():
    """An architecture from outside: no CLS token, mean read-out, a grid that is not square."""
    return MeanAdapter()


# One per architecture in `adapters.ADAPTERS`, and one from outside.
FACTORIES = {"CLIPModel": clip_adapter, "third party": mean_adapter}
