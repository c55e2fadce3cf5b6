"""Cost of maps for a TrOCR of base size with random weights: a line of T tokens, each of them a target.

The unit is one bare forward pass of encoder and decoder over the same T tokens, with all logits, measured before and
after every run. Rows named after a method are its maps alone, for a given text and an image without cached features;
`default methods` are the adapter's, together; `explain` is `explain()` with its defaults, which generates the text
first. The tutorial loop is a full forward and backward pass per token with gradients of all parameters, measured on
three tokens and scaled; `difference` is the largest difference between its maps and ours on these tokens, relative to
our largest value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    TrOCRConfig,
    TrOCRForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from adapters.trocr.adapter import TrOcrAdapter
from benchmarks.meter import Ratio, no_progress, print_progress, ratio
from grounding.adapter.inputs import Inputs
from grounding.core.images import open_image
from grounding.core.text import Generate
from grounding.engine.explain import compute_maps, explain
from grounding.engine.plan import plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request

SIZES = "tokens"
UNIT = "one bare forward pass of encoder and decoder over the same tokens"
# Name, methods, layer. Cases with a backward pass per token are measured on short texts only.
LAST, INNER = "last encoder block", "-2"
CASES: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    (f"gradcam @ {LAST}", ("gradcam",), None),
    (f"gradcam_ln @ {LAST}", ("gradcam_ln",), None),
    ("gradcam @ encoder.layernorm", ("gradcam",), "encoder.layernorm"),
    ("gradcam @ encoder block -2", ("gradcam",), INNER),
    ("rollout", ("rollout",), None),
    ("cross_attention", ("cross_attention",), None),
    ("gradient_x_cross_attention", ("gradient_x_cross_attention",), None),
    ("relevance", ("relevance",), None),
    ("default methods", ("default",), None),
)
SHORT = 20
SHORT_ONLY = ("gradcam @ encoder block -2", "relevance")
LOOPED = CASES[0][0]
BEAMS = 4
WARM_UP = 2  # tokens
LOOP_TOKENS = 3
VOCABULARY = 50265
BOS, PAD, EOS = 0, 1, 2


def measure(tokens: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all cases for each length of text."""
    torch.set_num_threads(1)
    adapter = make_adapter()
    report = no_progress if quiet else print_progress
    return [case for count in tokens for case in _cases(adapter, count, repeats, report)]


def _cases(adapter: TrOcrAdapter, count: int, repeats: int, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    image = open_image(_noise())
    inputs = prepare(adapter, [image], [[sentence(count)]])
    targets = adapter.targets(inputs, [inputs.texts[0].tokens(special=True)], "logit")
    assert len(targets) == count
    measured = functools.partial(ratio, unit=functools.partial(_forward, adapter.model, inputs), repeats=repeats)

    def maps(methods: Sequence[str], layer: str | None, size: int) -> dict[str, list[np.ndarray]]:
        plan = plan_methods(adapter, Request(methods, layers=[layer] if layer else []))
        # Every run gets an empty cache, or only the first would run the encoder.
        fresh = replace(inputs, images=replace(inputs.images), notes={})
        return compute_maps(adapter, fresh, targets.select(range(size)), plan).maps

    def explained(size: int) -> object:
        adapter.model.generation_config.min_new_tokens = size
        return explain(adapter, image, Generate(max_length=size))

    def case(method: str, found: Ratio, loop: Ratio | None = None, difference: float | None = None) -> dict[str, Any]:
        return {
            "method": method,
            "tokens": count,
            "ratio_to_forward": round(found.value, 3),
            "ratio_to_generate": round(found.value / generate.value, 3),
            "naive_ratio": loop and round(loop.value, 1),
            "speedup": loop and round(loop.value / found.value, 1),
            "peak_mb": round(found.peak_mb),
            "difference": difference and float(f"{difference:.1e}"),
        }

    def run(method: str, work: Callable[[int], object], size: int = count) -> Ratio:
        found = measured(lambda: work(size), warm_up=lambda: work(WARM_UP))
        report(f"{count} tokens: {method}: {found.value:.2f} x a forward pass for {size}, {found.peak_mb:.0f} MB")
        return found

    generate_tokens = functools.partial(_generate, adapter.model, inputs)
    generate = run("generate", generate_tokens)
    yield case("generate", generate)
    name = f"generate, {BEAMS} beams"
    yield case(name, run(name, lambda size: generate_tokens(size, beams=BEAMS)))
    name, kept = "tutorial loop", {}
    rows = [(count - 1) * k // (LOOP_TOKENS - 1) for k in range(LOOP_TOKENS)]
    loop = run(
        name, lambda size: kept.update({row: _tutorial(adapter, inputs, row) for row in rows[:size]}), LOOP_TOKENS
    )
    loop = replace(loop, value=loop.value / LOOP_TOKENS * count)
    adapter.model.zero_grad(set_to_none=True)
    yield case(name, loop)
    for name, methods, layer in CASES:
        if name in SHORT_ONLY and count > SHORT:
            continue
        found = run(name, functools.partial(maps, methods, layer))
        if name == LOOPED:
            ours = maps(methods, layer, count)["gradcam"]
            largest = max(float(np.abs(ours[row] - cam).max() / np.abs(ours[row]).max()) for row, cam in kept.items())
            yield case(name, found, loop, largest)
        else:
            yield case(name, found)
    yield case("explain", run("explain", explained))


def make_adapter() -> TrOcrAdapter:
    """Return a TrOCR of base size with random weights."""
    torch.manual_seed(0)
    encoder = ViTConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=384,
        patch_size=16,
    )  # fmt: skip
    decoder = TrOCRConfig(
        d_model=1024, decoder_layers=12, decoder_attention_heads=16, decoder_ffn_dim=4096, vocab_size=VOCABULARY,
        cross_attention_hidden_size=768, max_position_embeddings=512, activation_function="gelu", bos_token_id=BOS,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=EOS, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=ViTModel(encoder, False), decoder=TrOCRForCausalLM(decoder)).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = EOS, PAD, EOS
    words = {"<bos>": BOS, "<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(EOS + 1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    shape = {"height": encoder.image_size, "width": encoder.image_size}
    return TrOcrAdapter(model, tokenizer=fast, image_processor=ViTImageProcessorPil(size=shape))


def sentence(count: int) -> str:
    """Return a text of `count` tokens, its end token included."""
    return " ".join(f"w{i}" for i in np.random.default_rng(count).integers(EOS + 1, VOCABULARY, count - 1))


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 384, 3), dtype=np.uint8))


def _pixels(inputs: Inputs) -> torch.Tensor:
    return inputs.images.tensors["pixel_values"]


@torch.no_grad()
def _forward(model: VisionEncoderDecoderModel, inputs: Inputs) -> torch.Tensor:
    ids, pixels = inputs.tensors["input_ids"], _pixels(inputs)
    return model(pixel_values=pixels, decoder_input_ids=ids, use_cache=False).logits


def _generate(model: VisionEncoderDecoderModel, inputs: Inputs, size: int, beams: int = 1) -> torch.Tensor:
    """Generate exactly `size` tokens."""
    made = model.generate(_pixels(inputs), max_new_tokens=size, min_new_tokens=size, num_beams=beams, do_sample=False)
    assert made.shape[1] == size + 1
    return made


def _tutorial(adapter: TrOcrAdapter, inputs: Inputs, row: int) -> np.ndarray:
    """Return the map of one token by a full forward and backward pass with gradients of every parameter."""
    model, kept, structure = adapter.model, [], adapter.structure("logit")
    rows, across = inputs.images.geometry(0).rows, inputs.images.geometry(0).columns

    def keep(_module: torch.nn.Module, _args: object, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)
        kept[0].retain_grad()

    handle = model.get_submodule(structure.default_layer).register_forward_hook(keep)
    ids, pixels = inputs.tensors["input_ids"], _pixels(inputs)
    logits = model(pixel_values=pixels, decoder_input_ids=ids, use_cache=False).logits
    handle.remove()
    model.zero_grad()
    logits[0, row, inputs.tensors["target_ids"][0, row]].backward()
    features, gradient = (t[0, structure.prefix :].detach() for t in (kept[0], kept[0].grad))
    return (features @ gradient.mean(0)).reshape(rows, across).numpy()
