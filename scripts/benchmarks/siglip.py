"""Cost of maps for SigLIP B/16 and SigLIP 2 NaFlex with random weights, next to CLIP ViT-B/16 in the same run.

5 captions of 12 tokens, 60 leave-one-out targets per image, 224 x 224 pixels (NaFlex: at most 196 patches). `maps`: the
maps alone, from prepared inputs and targets, without texts; each ratio is to the bare forward pass of the model's own
image encoder. `targets`: leave-one-out of all captions, which for SigLIP is one text of full length per target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from adapters.siglip.adapter import SiglipAdapter
from adapters.siglip.naflex import Siglip2Adapter
from benchmarks import clip
from benchmarks.meter import Ratio, no_progress, print_progress, ratio
from grounding.adapter.base import Adapter
from grounding.adapter.inputs import ImageInputs, Inputs, Targets
from grounding.core.images import open_image
from grounding.engine.explain import compute_maps
from grounding.engine.plan import Plan, plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request

SIZES = "pictures"
UNIT = "one bare image-tower forward pass of the same model on the same images"
LAST = "-1"
# Method, layer. The cost of relevance is proportional to the number of targets: one image suffices.
CASES: tuple[tuple[str, str | None], ...] = (
    ("gradcam", None),
    ("gradcam_ln", None),
    ("gradcam_ln", LAST),
    ("rollout", None),
    ("relevance", None),
)
END = 1


def measure(counts: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all cases for each number of images."""
    torch.set_num_threads(1)
    report = no_progress if quiet else print_progress
    cases = []
    for name, make in FAMILIES.items():
        adapter = make()
        for count in counts:
            images = [open_image(clip._noise(seed)) for seed in range(count)]
            inputs = prepare(adapter, images, [clip.captions()] * count)
            spans = [tokens.tokens() for tokens in inputs.texts]
            report(f"{name}: {count} images, {sum(map(len, spans))} targets")
            bare, texts = _forward(adapter, inputs.images), partial(adapter.targets, inputs, spans, "similarity")
            if count == counts[0]:
                found = ratio(texts, bare, 1, bare)
                cases.append(_case("targets", name, None, None, count, spans, found))
            targets = texts()
            for method, layer in CASES:
                if (method == "relevance" and count > 1) or (layer and name == "clip"):
                    continue
                plan = plan_methods(adapter, Request([method], layers=[layer] if layer else []))
                found = ratio(partial(_maps, adapter, inputs, targets, plan), bare, repeats, bare, enough=60)
                cases.append(_case("maps", name, method, layer, count, spans, found))
    return cases


def _maps(adapter: Adapter, inputs: Inputs, targets: Targets, plan: Plan) -> object:
    """Compute all maps; every run gets an empty cache, or only the first would run the vision stack."""
    empty = inputs.images.select(range(len(inputs.images)))
    return compute_maps(adapter, replace(inputs, images=empty), targets, plan)


def _forward(adapter: Adapter, images: ImageInputs) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return adapter.encode_images(images)

    return forward


def make_siglip() -> SiglipAdapter:
    """Return a SigLIP of B/16's size at 224 pixels with random weights."""
    torch.manual_seed(0)
    config = SiglipConfig(text_config=_text(), vision_config={"image_size": 224, "patch_size": 16})
    return SiglipAdapter(SiglipModel(config).eval(), tokenizer=_tokenizer(), image_processor=SiglipImageProcessorPil())


def make_naflex() -> Siglip2Adapter:
    """Return a SigLIP 2 NaFlex of B/16's size with random weights."""
    torch.manual_seed(0)
    config = Siglip2Config(text_config=_text(), vision_config={"patch_size": 16, "num_patches": 256})
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=196)
    return Siglip2Adapter(Siglip2Model(config).eval(), tokenizer=_tokenizer(), image_processor=processor)


FAMILIES: dict[str, Callable[[], Adapter]] = {"siglip": make_siglip, "naflex": make_naflex, "clip": clip.make_adapter}


def _text() -> dict[str, int | None]:
    return {"vocab_size": 32000, "bos_token_id": None, "eos_token_id": END, "pad_token_id": END}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i + 2 for i in range(1000)} | {"</s>": END}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", model_max_length=64)


def _case(
    case: str,
    model: str,
    method: str | None,
    layer: str | None,
    images: int,
    spans: Sequence[Sequence[Any]],
    found: Ratio,
) -> dict[str, Any]:
    return {
        "case": case,
        "model": model,
        "method": method,
        "layer": layer,
        "pictures": images,
        "targets": sum(map(len, spans)),
        "ratio_to_forward": round(found.value, 3),
        "peak_mb": round(found.peak_mb),
    }
