"""Cost of maps for FLAVA of full size with random weights: a caption of T words, each of them a target.

The unit is one bare forward pass of FlavaModel over the same image and text, with the multimodal encoder, measured
before and after every run. `tap` is the layer of Grad-CAM: the input of the last multimodal block, the output of the
last image block, or (similarity) the input of its attention. The tutorial loop is a full forward and backward pass per
token with gradients of all parameters, measured on three tokens and scaled; `difference` is the largest difference
between its maps and ours on these tokens, relative to our largest value.
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
from transformers import FlavaConfig, FlavaForPreTraining, PreTrainedTokenizerFast
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

from adapters.flava.adapter import FlavaAdapter
from benchmarks.meter import Ratio, no_progress, print_progress, ratio
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.patch_tokens import fold
from grounding.engine.explain import compute_maps
from grounding.engine.plan import Plan, plan_methods
from grounding.engine.queries import prepare
from grounding.engine.request import Request

SIZES = "words"
UNIT = "one bare forward pass of FlavaModel over the same image and text"
# Target, stack of the layer, layer, method.
CASES = (
    ("logit", "fusion", "fusion:-1.in", "gradcam"),
    ("logit", "vision", "-1", "gradcam"),
    ("logit", "vision", None, "rollout"),
    ("matching", "fusion", "fusion:-1.in", "gradcam"),
    ("matching", "fusion", "fusion:0.in", "gradcam"),
    ("matching", "vision", "-1", "gradcam"),
    ("similarity", "vision", "-1.in", "gradcam"),
)
LOOP_TOKENS = 3
VOCABULARY = 30522


def measure(words: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all cases for each length of text."""
    torch.set_num_threads(1)
    adapter = make_adapter()
    report = no_progress if quiet else print_progress
    return [case for count in words for case in _cases(adapter, count, repeats, report)]


def _cases(adapter: FlavaAdapter, count: int, repeats: int, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    inputs = prepare(adapter, [_noise()], [[sentence(count)]])
    forward = functools.partial(_forward, adapter, inputs)
    for target, stack, layer, method in CASES:
        targets = adapter.targets(inputs, [inputs.texts[0].tokens()], target)
        assert len(targets) == count
        plan = plan_methods(adapter, Request([method], target=target, layers=[layer] if layer else []))

        def maps(targets: Targets = targets, plan: Plan = plan) -> list[np.ndarray]:
            # Every run gets an empty cache, or only the first would run the vision stack.
            fresh = replace(inputs, images=replace(inputs.images))
            return next(iter(compute_maps(adapter, fresh, targets, plan).maps.values()))

        found = ratio(maps, forward, repeats, maps)
        loop, difference = None, None
        if target == "logit" and layer is not None:
            path = plan.structure.find_layer(adapter.model, layer)
            loop, difference = _loop(adapter, inputs, path, maps(), repeats, forward)
            loop = replace(loop, value=loop.value / LOOP_TOKENS * count)
        report(f"{count} words: {target} at {layer}: {found.value:.2f} x a forward pass, {found.peak_mb:.0f} MB")
        yield {
            "target": target,
            "tap": stack,
            "method": method,
            "layer": layer,
            "tokens": count,
            "ratio_to_forward": round(found.value, 3),
            "naive_ratio": loop and round(loop.value, 1),
            "speedup": loop and round(loop.value / found.value, 1),
            "peak_mb": round(found.peak_mb),
            "difference": difference and float(f"{difference:.1e}"),
        }


def _loop(
    adapter: FlavaAdapter,
    inputs: Inputs,
    path: str,
    ours: Sequence[np.ndarray],
    repeats: int,
    forward: Callable[[], object],
) -> tuple[Ratio, float]:
    """Return the cost of the tutorial loop for its tokens, and the largest difference of its maps from ours."""
    kept: dict[int, np.ndarray] = {}
    rows = [(len(ours) - 1) * k // (LOOP_TOKENS - 1) for k in range(LOOP_TOKENS)]

    def work() -> None:
        kept.update({row: _tutorial(adapter, inputs, path, row) for row in rows})

    found = ratio(work, forward, repeats, forward)
    adapter.model.zero_grad(set_to_none=True)
    return found, max(float(np.abs(ours[row] - cam).max() / np.abs(ours[row]).max()) for row, cam in kept.items())


def make_adapter() -> FlavaAdapter:
    """Return a FLAVA of the published size with random weights, without its codebook, which no case uses."""
    torch.manual_seed(0)
    model = FlavaForPreTraining(FlavaConfig(init_codebook=False)).eval()
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}
    words = special | {f"w{i}": i + 10_000 for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    return FlavaAdapter(model, tokenizer=fast, image_processor=FlavaImageProcessorPil())


def sentence(count: int) -> str:
    """Return a text of `count` words, one token each."""
    return " ".join(f"w{i}" for i in range(100, 100 + count))


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8))


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask")
    return {name: inputs.tensors[name] for name in names} | dict(inputs.images.tensors)


@torch.no_grad()
def _forward(adapter: FlavaAdapter, inputs: Inputs) -> torch.Tensor:
    return adapter.model.flava(**_tensors(inputs)).multimodal_embeddings


def _tutorial(adapter: FlavaAdapter, inputs: Inputs, path: str, row: int) -> np.ndarray:
    """Return the map of one token by a full forward and backward pass with gradients of every parameter."""
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: object, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)
        kept[0].retain_grad()

    handle = adapter.model.get_submodule(path).register_forward_hook(keep)
    states = adapter.model.flava(**_tensors(inputs)).multimodal_embeddings
    handle.remove()
    adapter.model.zero_grad()
    place = inputs.texts[0].visible[row]
    ahead = states.shape[1] - inputs.tensors["input_ids"].shape[1]
    logits = adapter.model.mmm_text_head(states[0, ahead + place])
    logits[inputs.tensors["input_ids"][0, place]].backward()
    assert kept[0].grad is not None
    places = adapter.patch_tokens(path, inputs, tuple(kept[0].shape))
    features, gradient = (fold(t.detach(), places)[0] for t in (kept[0], kept[0].grad))
    return (features @ gradient.mean((0, 1))).numpy()
