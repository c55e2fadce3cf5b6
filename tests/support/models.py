"""Tiny random models, built from configurations: each architecture's shape at a thousandth of its size."""

from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertLMHeadModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextImageProcessor,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    FlavaConfig,
    FlavaForPreTraining,
    FlavaImageProcessor,
    FlavaModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    SwinConfig,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from adapters.classifier.adapter import ClassifierAdapter
from adapters.clip.adapter import ClipAdapter
from adapters.flava.adapter import FlavaAdapter
from adapters.module.adapter import ModuleAdapter
from adapters.trocr.adapter import TrOcrAdapter
from tests.support import align, blip
from tests.support.clip_kin import KIN, kin_adapter
from tests.support.siglip import naflex_adapter, siglip_adapter
from tests.support.third_party import MeanAdapter

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


def decoder(kind, width, vocabulary):
    """A random text decoder with cross-attention: TrOCR's, BERT's or GPT-2's."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": vocabulary}
    shared = {"is_decoder": True, "add_cross_attention": True, **ids}
    if kind == "bert":
        config = BertConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=LIMIT, **shared,
        )  # fmt: skip
        return BertLMHeadModel(config)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=4, n_positions=LIMIT, **shared))
    config = TrOCRConfig(
        d_model=width, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=LIMIT,
        cross_attention_hidden_size=None, use_learned_position_embeddings=kind == "trocr",
        layernorm_embedding=kind == "trocr", scale_embedding=kind != "trocr", **ids,
    )  # fmt: skip
    return TrOCRForCausalLM(config)


def trocr_model(seed=0, kind="trocr", encoder="vit", width=32, size=(16, 48), patch=(8, 6), dtype=torch.float64):
    """A random reader of lines: 3 encoder blocks of width 32 (2 x 8 patches), 2 decoder blocks of `width`."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    tower |= {"image_size": size, "patch_size": patch}
    seeing = DeiTModel(DeiTConfig(**tower)) if encoder == "deit" else ViTModel(ViTConfig(**tower), False)
    model = VisionEncoderDecoderModel(encoder=seeing, decoder=decoder(kind, width, len(tokenizer())))
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.generation_config.max_new_tokens = 9
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def trocr_adapter(seed=0, **model):
    """A tiny TrOCR with its tokenizer and processor."""
    made = trocr_model(seed, **model)
    height, width = made.config.encoder.image_size
    return TrOcrAdapter(
        made, tokenizer=tokenizer(), image_processor=ViTImageProcessor(size={"height": height, "width": width})
    )


def bert_tokenizer():
    """A word-piece tokenizer in FLAVA's manner: lower case, [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, made.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]", model_max_length=LIMIT,
    )  # fmt: skip


def flava_model(seed=0, size=32, patch=8, heads=True, dtype=torch.float64):
    """A random FLAVA: 3 image blocks, 2 text blocks and 3 multimodal ones of width 32; with its heads or without."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = FlavaConfig(
        image_config=tower | {"num_hidden_layers": 3, "image_size": size, "patch_size": patch, "vocab_size": 16},
        text_config=tower
        | {"num_hidden_layers": 2, "vocab_size": len(bert_tokenizer()), "max_position_embeddings": LIMIT},
        multimodal_config=tower | {"num_hidden_layers": 3},
        hidden_size=32, projection_dim=16, init_codebook=False,
    )  # fmt: skip
    model = FlavaForPreTraining(config) if heads else FlavaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def flava_adapter(seed=0, kind="similarity", **model):
    """A tiny FLAVA with its tokenizer and processor; `kind` is its default target."""
    made = flava_model(seed, **model)
    size = made.config.image_config.image_size
    settings = {"size": {"height": size, "width": size}, "crop_size": {"height": size, "width": size}}
    processor = FlavaImageProcessor(**settings)
    adapter = FlavaAdapter(made, tokenizer=bert_tokenizer(), image_processor=processor)
    adapter.target_kinds = (kind, *(other for other in adapter.target_kinds if other != kind))
    return adapter


def blip_adapter(seed=0, **model):
    """A tiny BLIP with its tokenizer and processor."""
    return blip.blip_adapter(bert_tokenizer(), seed, **model)


def align_adapter(seed=0, **model):
    """A tiny ALIGN with its tokenizer and processor; its feature maps are 4 x 6."""
    return align.align_adapter(bert_tokenizer(), seed, **model)


def mean_adapter():
    """An architecture from outside: no CLS token, mean pooling, a grid that is not square."""
    return MeanAdapter()


# Names of classes: what the contract tests ask for in place of texts.
CLASSES = [
    "a man in a red jacket",
    "two dogs",
    "red car",
    "a red bus",
    "a bus",
    "man in red jacket on a horse",
    "great white shark, white shark, man-eater",
    "crane",
    "Crane, bird",
]
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
# By what the tests call them. There are two kinds of DeiT: a checkpoint says which it is.
CLASSIFIERS = {
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16], depths=[1, 2, 1], layer_type="basic", hidden_act="relu"
    ),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], image_size=96),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4),
    "vit": ViTConfig(**TOWER, image_size=32, patch_size=8),
    "deit": DeiTConfig(**TOWER, image_size=32, patch_size=8, architectures=["DeiTForImageClassification"]),
    "deit with teacher": DeiTConfig(
        **TOWER, image_size=32, patch_size=8, architectures=["DeiTForImageClassificationWithTeacher"]
    ),
    "dinov2": Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8, num_register_tokens=3
    ),
}


def classifier_model(kind="resnet", seed=0, dtype=torch.float64):
    """A random classifier whose weights, and running statistics, are large enough for images to differ."""
    torch.manual_seed(seed)
    config = CLASSIFIERS[kind].__class__(**CLASSIFIERS[kind].to_diff_dict(), id2label=dict(enumerate(CLASSES)))
    return shaken(AutoModelForImageClassification.from_config(config)).to(dtype).eval()


def shaken(model):
    """The model with noise on all parameters and running statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.2 * torch.rand_like(buffer)
    return model


def classifier_adapter(kind="resnet", seed=0, size=None, **model):
    """A tiny classifier with an image processor that squashes; convolutional ones get 96 x 64 pixels."""
    made = classifier_model(kind, seed, **model)
    height, width = size or ((64, 96) if kind in ("resnet", "convnext") else (32, 32))
    if kind == "convnext":
        processor = ConvNextImageProcessor(do_resize=False, do_center_crop=True, crop_size={"height": 64, "width": 96})
    else:
        processor = ViTImageProcessor(size={"height": height, "width": width})
    return ClassifierAdapter(made, processor)


class TwoEnds(nn.Module):
    """A network of a user's own: in-place ReLUs, a residual sum in place, a tuple of outputs, any input size."""

    def __init__(self, channels=3, classes=9):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.same = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(inplace=True), nn.Linear(16, classes))

    def forward(self, x):
        x = self.features(x)
        y = self.same(x)
        y += x
        x = self.pool(y.relu_())
        return self.head(x), x


def to_pixels(width=48, height=32, mode="RGB"):
    """A transform of a user's own: squash, scale."""

    def transform(image):
        assert image.mode == mode
        array = np.asarray(image.resize((width, height))).astype(np.float64) / 255
        return torch.from_numpy(array[None] if mode == "L" else array.transpose(2, 0, 1).copy())

    return transform


def module_adapter(seed=0, layer=None, **options):
    """A tiny module, its layers on 48 x 32 pixels."""
    torch.manual_seed(seed)
    model = shaken(TwoEnds()).double().eval()
    return ModuleAdapter(model, layer, **{"preprocess": to_pixels(), "labels": CLASSES} | options)


# One per architecture in `adapters.ADAPTERS`, and one from outside.
FACTORIES = {
    "CLIPModel": clip_adapter,
    **{kind: partial(kin_adapter, kind) for kind in KIN},
    "FlavaForPreTraining": flava_adapter,
    "FlavaForPreTraining matching": partial(flava_adapter, kind="matching"),
    "FlavaForPreTraining logit": partial(flava_adapter, kind="logit"),
    "FlavaModel": partial(flava_adapter, heads=False),
    "AlignModel": align_adapter,
    "BlipForImageTextRetrieval": blip_adapter,
    "BlipForImageTextRetrieval similarity": partial(blip_adapter, kind="similarity"),
    "SiglipModel": siglip_adapter,
    "Siglip2Model": naflex_adapter,
    "VisionEncoderDecoderModel": trocr_adapter,
    "AutoModelForImageClassification": classifier_adapter,
    **{
        f"AutoModelForImageClassification {kind}": partial(classifier_adapter, kind)
        for kind in ("convnext", "swin", "vit", "dinov2")
    },
    "nn.Module": module_adapter,
    "third party": mean_adapter,
}
