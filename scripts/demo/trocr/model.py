"""The demo TrOCR: configuration, tokenizer, image processor, change of patch size, export."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from scripts.demo.lines.lines import INPUT_HEIGHT, INPUT_WIDTH
from scripts.demo.lines.text import ALPHABET
from scripts.demo.training import replaced, set_json_value

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNK}
MAX_TOKENS = 24
WIDTH = 128
HEADS = 4
KERNEL = "encoder.embeddings.patch_embeddings.projection.weight"
POSITIONS = "encoder.embeddings.position_embeddings"
POOLER = "encoder.pooler.dense"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per character, spaces included; decoding joins without spaces."""
    characters = {**SPECIAL, **{character: len(SPECIAL) + index for index, character in enumerate(ALPHABET)}}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> ViTImageProcessor:
    """Resize any image to 32 x 256 pixels (bilinear) and scale to -1 ... 1."""
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessor(size={"height": INPUT_HEIGHT, "width": INPUT_WIDTH}, image_mean=half, image_std=half)


def build_model(patch: tuple[int, int]) -> VisionEncoderDecoderModel:
    """A TrOCR with random weights and patches of `patch` (height, width); the unused pooler of the encoder is zero.

    The pooler must exist: `from_pretrained` would create one with random weights.
    """
    encoder = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=(INPUT_HEIGHT, INPUT_WIDTH),
        patch_size=patch,
    )
    decoder = TrOCRConfig(
        vocab_size=len(SPECIAL) + len(ALPHABET),
        d_model=WIDTH,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=32,
        cross_attention_hidden_size=WIDTH,
        scale_embedding=False,
        use_learned_position_embeddings=True,
        activation_function="gelu",
        dropout=0.0,
        decoder_start_token_id=BOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder,
        decoder,
        # The toolkit shows the advice for images that are not below these paths of the demo folder.
        demo_world={
            "images": ["lines", "line.png"],
            "advice": "this model is trained on rendered lines of text alone, maps of other images are meaningless: "
            "use --model microsoft/trocr-base-printed",
        },
        decoder_start_token_id=BOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        vocab_size=decoder.vocab_size,
        tie_word_embeddings=False,
    )
    model = VisionEncoderDecoderModel(config)
    for name, value in (("decoder_start", BOS), ("pad", PAD), ("bos", BOS), ("eos", EOS)):
        setattr(model.generation_config, f"{name}_token_id", value)
    model.generation_config.max_length = MAX_TOKENS
    for parameter in model.get_submodule(POOLER).parameters():
        torch.nn.init.zeros_(parameter).requires_grad_(False)
    return model


def change_patch(model: VisionEncoderDecoderModel, patch: tuple[int, int]) -> VisionEncoderDecoderModel:
    """Copy the model with another patch size; patch kernel and position embeddings are resized."""
    new = build_model(patch)
    state = model.state_dict()
    kernel = state[KERNEL]
    old = tuple(kernel.shape[-2:])
    size = functional.interpolate(kernel, size=patch, mode="bicubic", align_corners=False)
    # A smaller kernel sums fewer pixels; the factor keeps the embedding of a constant image.
    state[KERNEL] = size * (old[0] * old[1] / (patch[0] * patch[1]))
    table = state[POSITIONS]
    positions = table[:, 1:].mT.unflatten(2, grid(old))
    positions = functional.interpolate(positions, size=grid(patch), mode="bicubic", align_corners=False)
    state[POSITIONS] = torch.cat([table[:, :1], positions.flatten(2).mT], dim=1)
    new.load_state_dict(state)
    return new


def grid(patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches."""
    return INPUT_HEIGHT // patch[0], INPUT_WIDTH // patch[1]


def patch_of(model: VisionEncoderDecoderModel) -> tuple[int, int]:
    """The patch size (height, width) of a model."""
    height, width = model.config.encoder.patch_size
    return height, width


def export(model: VisionEncoderDecoderModel, folder: Path) -> None:
    """Write model (fp16), tokenizer and processor; the folder is replaced atomically."""
    with replaced(folder) as fresh:
        half = build_model(patch_of(model))
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(fresh)
        build_tokenizer().save_pretrained(fresh)
        build_image_processor().save_pretrained(fresh)
        # Class names that exist in transformers before 5.0 and with all image back ends.
        set_json_value(fresh / "tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast")
        set_json_value(fresh / "preprocessor_config.json", "image_processor_type", "ViTImageProcessor")
