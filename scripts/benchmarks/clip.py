"""Cost of maps for CLIP ViT-B/16 with random weights: 5 captions of 12 tokens, 60 leave-one-out targets per image.

`maps`: the maps alone, from prepared inputs and targets, without texts. `end_to_end`: `explain()` with its defaults on
opened images, with preprocessing and texts (65 entries: the captions too). The tutorial loop is a full forward and
backward pass per target with gradients of all parameters, without texts, measured on a few targets and scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adapters.clip.adapter import ClipAdapter
from benchmarks.meter import Cost, cost, no_progress, print_progress
from grounding.core.images import open_image
from grounding.engine.explain import compute_maps, explain
from grounding.engine.plan import plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request

SIZES = "pictures"
UNIT = "one bare image-tower forward pass on the same images"
CAPTIONS, TOKENS = 5, 12
CACHED = "picture seen before"
# Method, variant, options. The cost of relevance is proportional to the number of targets: one image suffices.
CASES: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("gradcam", None, {}),
    ("gradcam_ln", None, {}),
    ("rollout", None, {}),
    ("relevance", None, {}),
    ("relevance", "last 4 blocks", {"relevance.start_layer": -4}),
)
NAIVE_TARGETS = 3
BOS, EOS = 49406, 49407


def measure(counts: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all cases for each number of images."""
    torch.set_num_threads(1)
    adapter = make_adapter()
    report = no_progress if quiet else print_progress
    cases = []
    for count in counts:
        images = [open_image(_noise(seed)) for seed in range(count)]
        inputs = prepare(adapter, images, [captions()] * count)
        targets = adapter.targets(inputs, [tokens.tokens() for tokens in inputs.texts], "similarity")
        pixels = inputs.images.tensors["pixel_values"]
        report(f"{count} images, {len(targets)} targets: bare forward")
        bare = cost(lambda pixels=pixels: _forward(adapter.model, pixels), repeats)
        loops = {m: _naive(adapter, inputs, targets, m) / bare.seconds for m in ("gradcam", "relevance")}
        for method, variant, options in CASES:
            if method == "relevance" and count > 1:
                continue
            naive = None if variant else loops.get(method)
            report(f"{count} images: {method} {variant or ''}")
            plan = plan_methods(adapter, Request([method], options=options))
            # Every run gets an empty cache, or only the first would run the vision stack.
            found = cost(
                lambda p=plan, i=inputs, t=targets: compute_maps(adapter, replace(i, images=replace(i.images)), t, p),
                repeats,
            )
            cases.append(_case("maps", method, variant, count, len(targets), found, bare, naive))
            if method != "relevance":
                found = cost(lambda p=plan, i=inputs, t=targets: compute_maps(adapter, i, t, p), repeats)
                cases.append(_case("maps", method, CACHED, count, len(targets), found, bare, None))
            found = cost(
                lambda m=method, o=options, i=images: explain(
                    adapter, i, [captions()] * len(i), methods=[m], options=o, batch_size=len(i)
                ),
                repeats,
            )
            cases.append(
                _case("end_to_end", method, variant, count, len(targets) + CAPTIONS * count, found, bare, None)
            )
    return cases


def make_adapter() -> ClipAdapter:
    """Return a CLIP of ViT-B/16's size with random weights."""
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
            "vocab_size": EOS + 1, "max_position_embeddings": 77, "bos_token_id": BOS, "eos_token_id": EOS,
        },
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16,
        },
        projection_dim=512,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(1000)} | {"<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    return ClipAdapter(CLIPModel(config).eval(), tokenizer=fast, image_processor=CLIPImageProcessorPil())


def captions() -> list[str]:
    """Return five texts of twelve tokens."""
    return [" ".join(f"w{1 + TOKENS * c + t}" for t in range(TOKENS)) for c in range(CAPTIONS)]


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8))


@torch.no_grad()
def _forward(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.get_image_features(pixel_values=pixels).pooler_output


def _naive(adapter: ClipAdapter, inputs: Any, targets: Any, method: str) -> float:
    """Return CPU seconds of the tutorial loop over all targets, measured on a few and scaled."""
    model, pixels = adapter.model, inputs.images.tensors["pixel_values"]
    eager = method == "relevance"
    before = model.config._attn_implementation
    if eager:
        model.set_attn_implementation("eager")
    chosen = list(range(NAIVE_TARGETS))
    steps: list[Callable[[], object]] = [
        lambda k=k: _tutorial_step(adapter, pixels[targets.image[k]][None], targets.data["seeds"][k], attention=eager)
        for k in chosen
    ]
    found = cost(lambda: [step() for step in steps], 1)
    model.set_attn_implementation(before)
    model.zero_grad(set_to_none=True)
    return found.seconds / NAIVE_TARGETS * len(targets)


def _tutorial_step(adapter: ClipAdapter, pixels: torch.Tensor, seed: torch.Tensor, *, attention: bool) -> torch.Tensor:
    """Return the map of one target by a full forward and backward pass with gradients of every parameter."""
    model, kept = adapter.model, []
    layer = model.get_submodule(adapter.structure("similarity").default_layer)

    def keep(_module: torch.nn.Module, _args: object, out: torch.Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handle = layer.register_forward_hook(keep)
    out = model.vision_model(pixels, output_attentions=attention)
    handle.remove()
    for weights in out.attentions if attention else ():
        weights.retain_grad()
    image = F.normalize(model.visual_projection(out.pooler_output), dim=-1)
    model.zero_grad()
    (image[0] @ seed).backward()
    if attention:
        relevance = torch.eye(out.attentions[0].shape[-1])
        for weights in out.attentions:
            relevance = relevance + (weights.grad * weights).clamp(min=0).mean(1)[0].detach() @ relevance
        return relevance[0, 1:]
    return torch.relu(kept[0][0, 1:].detach() @ kept[0].grad[0, 1:].mean(0))


def _case(
    case: str,
    method: str,
    variant: str | None,
    images: int,
    targets: int,
    found: Cost,
    bare: Cost,
    naive: float | None,
) -> dict[str, Any]:
    ratio = found.seconds / bare.seconds
    return {
        "case": case,
        "method": method,
        "variant": variant,
        "pictures": images,
        "targets": targets,
        "ratio_to_forward": round(ratio, 3),
        "naive_ratio": None if naive is None else round(naive, 1),
        "speedup": None if naive is None else round(naive / ratio, 1),
        "peak_mb": round(found.peak_mb),
    }
