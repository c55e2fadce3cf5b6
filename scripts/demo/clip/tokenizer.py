"""Word-level tokenizer and processor of the demo CLIP."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

from scripts.demo.scenes.phrases import VOCABULARY

# The end token must not be 2: CLIPTextConfig takes 2 for an old checkpoint and pools at another position.
PAD, BOS, UNK, EOS = 0, 1, 2, 3
SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<unk>": UNK, "<eos>": EOS}
MAX_TOKENS = 48
IMAGE_SIZE = 112


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case, split at spaces and punctuation, one id per word of the closed vocabulary."""
    words = {**SPECIAL, **{word: len(SPECIAL) + index for index, word in enumerate(VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
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
    )


def build_processor() -> CLIPProcessor:
    """Shortest edge to 112 pixels (bicubic), centre crop, CLIP's mean and standard deviation; and the tokenizer."""
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return CLIPProcessor(images, build_tokenizer())
