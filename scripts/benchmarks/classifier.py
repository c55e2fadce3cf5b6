"""Cost of maps for a ResNet-50 of full size with random weights: B images, one class for each.

The unit is one bare forward pass over the same B images, measured before and after every run. `case` is what is
computed from pixel values: Grad-CAM at the last stage or at the one before for given classes, at the last stage for the
predicted classes, HiResCAM, ten classes per image; or `explain()` end to end, with image processor, probabilities and
boxes. The tutorial loop is a full forward and backward pass per image with gradients of all parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ResNetConfig, ResNetForImageClassification

from adapters.classifier.adapter import ClassifierAdapter
from benchmarks.meter import Ratio, no_progress, print_progress, ratio
from grounding.adapter.inputs import ImageInputs
from grounding.core.text import Classes, Query
from grounding.engine.explain import compute_maps, explain
from grounding.engine.passes import look_ahead
from grounding.engine.plan import plan_methods
from grounding.engine.queries import needs_features, prepare_inputs
from grounding.engine.request import Request

SIZES = "images"
UNIT = "one bare forward pass over the same images"
CLASSES = 1000
# Case, classes per image (0: the predicted one), layer, method.
CASES = (
    ("maps, last stage", 1, None, "gradcam"),
    ("maps, predicted class", 0, None, "gradcam"),
    ("maps, ten classes", 10, None, "gradcam"),
    ("maps, last stage", 1, None, "hirescam"),
    ("maps, stage before", 1, "-2", "gradcam"),
)


def measure(images: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all cases for each number of images."""
    torch.set_num_threads(1)
    adapter = make_adapter()
    report = no_progress if quiet else print_progress
    return [case for count in images for case in _cases(adapter, count, repeats, report)]


def _cases(
    adapter: ClassifierAdapter, count: int, repeats: int, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    images = [_noise(seed) for seed in range(count)]
    prepared = adapter.prepare_images(images)
    forward = functools.partial(_forward, adapter, prepared)
    works: list[tuple[str, str, int, Callable[[], object]]] = []
    for case, classes, layer, method in CASES:
        queries = [
            [Query(Classes(tuple((7 * b + k) % len(adapter.class_names) for k in range(classes))))]
            for b in range(count)
        ]
        plan = plan_methods(adapter, Request([method], layers=[layer] if layer else []))

        def maps(queries: Any = queries, plan: Any = plan) -> object:
            # Every run gets an empty cache, or only the first would run the model.
            fresh = replace(prepared)
            if needs_features(adapter, queries):
                look_ahead(adapter, fresh, plan)
            inputs = prepare_inputs(adapter, fresh, queries)
            targets = adapter.targets(inputs, [tokens.class_spans() for tokens in inputs.texts], "class")
            return compute_maps(adapter, inputs, targets, plan).maps

        works.append((case, method, max(1, classes), maps))
    known = [(7 * b) % len(adapter.class_names) for b in range(count)]
    works.append(
        ("end to end", "gradcam", 1, lambda: explain(adapter, images, known, methods=["gradcam"], batch_size=count))
    )
    for case, method, classes, work in works:
        yield _row(case, method, count, classes, ratio(work, forward, repeats, work), report)
    loop = ratio(lambda: _tutorial(adapter, prepared, known), forward, repeats, forward)
    adapter.model.zero_grad(set_to_none=True)
    yield _row("tutorial loop", "gradcam", count, 1, loop, report)


def _row(
    case: str, method: str, count: int, classes: int, found: Ratio, report: Callable[[str], None]
) -> dict[str, Any]:
    report(f"{count} images, {case}, {method}: {found.value:.2f} x a forward pass, {found.peak_mb:.0f} MB")
    return {
        "case": case,
        "method": method,
        "pictures": count,
        "classes_per_picture": classes,
        "ratio_to_forward": round(found.value, 3),
        "peak_mb": round(found.peak_mb),
    }


def make_adapter() -> ClassifierAdapter:
    """Return a ResNet-50 with a thousand classes and random weights."""
    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(CLASSES)}
    model = ResNetForImageClassification(ResNetConfig(id2label=names)).eval()
    size = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    return ClassifierAdapter(model, CLIPImageProcessor(**size))


def _noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (240, 320, 3), dtype=np.uint8))


@torch.no_grad()
def _forward(adapter: ClassifierAdapter, images: ImageInputs) -> torch.Tensor:
    return adapter.model(pixel_values=images.tensors["pixel_values"]).logits


def _tutorial(adapter: ClassifierAdapter, images: ImageInputs, classes: Sequence[int]) -> list[torch.Tensor]:
    """Return Grad-CAM of one image after the other, by full passes with gradients of every parameter."""
    made = []
    for pixels, index in zip(images.tensors["pixel_values"], classes, strict=True):
        kept: list[torch.Tensor] = []

        def keep(_module: object, _args: object, out: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            out.retain_grad()
            kept.append(out)

        handle = adapter.model.get_submodule(adapter.structure("class").default_layer).register_forward_hook(keep)
        adapter.model.zero_grad()
        adapter.model(pixel_values=pixels[None]).logits[0, index].backward()
        handle.remove()
        assert kept[0].grad is not None
        made.append((kept[0].grad.mean((2, 3), keepdim=True) * kept[0]).sum(1).detach())
    return made
