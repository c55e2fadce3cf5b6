"""Deletion and insertion curves: the model's score while patches are removed from, or put back into, its input.

Deletion and insertion (RISE: Petsiuk et al. 2018, arXiv:1806.07421) of the explained score: the seen patches are
removed from (put back into) the model's input in the order of the map, and the score is computed again at each step.
Departures: the area is normalised over all cases together, since a cosine has no natural zero (see
`deletion_curves_area`); a random order of the same patches is the control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import random_state
from grounding.adapter.replicate import repeat_image
from grounding.core.errors import ModelError, NumericError
from grounding.core.geometry import Geometry
from grounding.engine.queries import prepare
from grounding.engine.signals import scores
from grounding.explanation.explanation import Explanation

Baseline = Literal["blur", "black", "mean"]
STEPS = 20
# Standard deviation of the blur, as a fraction of the short side of the model input.
BLUR = 1 / 16
CONTROL = "random"


@dataclass(frozen=True, eq=False)
class FaithfulnessCase:
    """An image file, its explained texts, their raw maps (`maps[key][text]`), and one or two different captions."""

    image: Path
    texts: tuple[str, ...]
    maps: Mapping[str, Mapping[str, Float[np.ndarray, "rows columns"]]]
    seen: Bool[np.ndarray, "rows columns"]
    captions: tuple[str, ...]

    @classmethod
    def of(cls, image: Path, explanations: Mapping[str, Explanation], captions: Iterable[str]) -> FaithfulnessCase:
        """Return the case of explanations by text; the first two different `captions` are kept."""
        first = next(iter(explanations.values()))
        maps = {key: {text: one.map(0, key).raw for text, one in explanations.items()} for key in first.methods}
        two = tuple(dict.fromkeys(captions))[:2]
        return cls(image, tuple(explanations), maps, first.geometry.seen_cells, two)


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores of K targets while an increasing `fraction` of the seen patches is removed or put back."""

    fraction: Float[np.ndarray, "steps"]
    deletion: Float[np.ndarray, "texts steps"]
    insertion: Float[np.ndarray, "texts steps"]


def deletion_order(
    raw: Float[np.ndarray, "rows columns"], seen: Bool[np.ndarray, "rows columns"]
) -> Int[np.ndarray, "n"]:
    """Return the seen cells (row-major indices) by decreasing raw value; ties in row-major order."""
    cells = np.flatnonzero(seen)
    return cells[np.argsort(-raw.ravel()[cells], kind="stable")]


def curves(
    adapter: Adapter,
    inputs: Inputs,
    targets: Targets,
    order: Int[np.ndarray, "n"],
    baseline: Float[Tensor, "C H W"],
    steps: int = STEPS,
) -> Curves:
    """Compute deletion and insertion of one image for all targets, in two forward passes of steps + 1 versions each.

    `order`: cells (row-major indices) in the order of removal. `baseline`: pixels that replace a removed patch. Pixels
    outside of all seen patches stay.
    """
    pixels = inputs.images.tensors["pixel_values"][0]
    counts = np.round(np.linspace(0, len(order), steps + 1)).astype(int)
    geometry = inputs.images.geometry(0)
    rank = np.full(geometry.rows * geometry.columns + 1, len(order))  # the last: outside of patches
    rank[order] = np.arange(len(order))
    ranks = torch.from_numpy(rank[cell_numbers(geometry, *pixels.shape[-2:])]).to(pixels.device)
    removed = ranks[None] < torch.from_numpy(counts).to(pixels.device)[:, None, None]  # (S, H, W)
    fixed = ranks == len(order)
    deleted = torch.where(removed[:, None], baseline, pixels)
    inserted = torch.where((removed | fixed)[:, None], pixels, baseline)
    return Curves(
        counts / len(order),
        perturbed_scores(adapter, inputs, targets, deleted),
        perturbed_scores(adapter, inputs, targets, inserted),
    )


def perturbed_scores(
    adapter: Adapter, inputs: Inputs, targets: Targets, pixels: Float[Tensor, "S C H W"]
) -> Float[np.ndarray, "K S"]:
    """Compute the scores of all targets of one image on S versions of its pixels, in one forward pass.

    Raises NumericError for NaN or Inf.
    """
    count = len(pixels)
    repeated, repeated_targets = repeat_image(inputs, targets, count)
    images = replace(repeated.images, tensors={**repeated.images.tensors, "pixel_values": pixels})
    found = scores(adapter, replace(repeated, images=images), repeated_targets)
    if not torch.isfinite(found).all():
        raise NumericError("scores of an image with removed patches are NaN or Inf")
    return found.detach().cpu().double().numpy().reshape(len(targets), count)


def cell_numbers(geometry: Geometry, height: int, width: int) -> Int[np.ndarray, "height width"]:
    """Return the row-major index of the patch that each input pixel belongs to; rows * columns outside of patches."""
    cell_width, cell_height = geometry.cell_size
    rows = np.floor((np.arange(height) + 0.5) / cell_height).astype(int)
    columns = np.floor((np.arange(width) + 0.5) / cell_width).astype(int)
    numbers = rows[:, None] * geometry.columns + columns[None]
    numbers[(rows >= geometry.rows)[:, None] | (columns >= geometry.columns)[None]] = geometry.rows * geometry.columns
    return numbers


def baseline_pixels(adapter: Adapter, inputs: Inputs, kind: Baseline) -> Float[Tensor, "C H W"]:
    """Return the pixels that replace removed patches: the image blurred, black (preprocessed), or its mean colour."""
    pixels = inputs.images.tensors["pixel_values"][0]
    if kind == "mean":
        geometry = inputs.images.geometry(0)
        seen = np.append(geometry.seen_cells.ravel(), False)[cell_numbers(geometry, *pixels.shape[-2:])]
        return pixels[:, torch.from_numpy(seen).to(pixels.device)].mean(1)[:, None, None].expand_as(pixels)
    if kind == "black":
        image = inputs.images.images[0]
        return adapter.prepare_images([Image.new("RGB", (image.width, image.height))]).tensors["pixel_values"][0]
    array = pixels.detach().cpu().float().movedim(0, -1).contiguous().numpy()
    blurred = cv2.GaussianBlur(array, (0, 0), BLUR * min(array.shape[:2]))
    return torch.from_numpy(blurred.reshape(array.shape)).movedim(-1, 0).to(pixels)


@dataclass(frozen=True, eq=False)
class CurveAreas:
    """Areas of one image by method, summed over its texts, and the sums of scores that normalise them.

    `full`, `empty`: scores of the whole image and of the image without any seen patch.
    """

    deletion: Mapping[str, float]
    insertion: Mapping[str, float]
    full: float
    empty: float
    texts: int


def deletion_curves_area(
    adapter: Adapter, case: FaithfulnessCase, baseline: Baseline, target: str | None, seed: int
) -> CurveAreas:
    """Integrate the curves of every method, and of one random order, for one image (trapezoids).

    Areas are above the score of the image without any seen patch. They are divided by (full - empty), both summed over
    all cases, so that 0 means that the score drops at once and 1 that it never drops; a quotient for each case would
    have denominators near zero. Raises ModelError for a model without `pixel_values` (B, C, H, W), NumericError for
    NaN or Inf.
    """
    with torch.inference_mode(False), torch.no_grad(), random_state(adapter.model):
        torch.manual_seed(seed)
        kind, _ = adapter.check_target(target)
        inputs = prepare(adapter, [str(case.image)], [list(case.texts)], kind)
        if (pixels := inputs.images.tensors.get("pixel_values")) is None or pixels.ndim != 4:
            raise ModelError(
                f"{adapter.info.type} has no input pixel_values (B, C, height, width): faithfulness cannot be measured"
            )
        targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], kind)
        replacement = baseline_pixels(adapter, inputs, baseline)
        # One pair of forward passes per order: many texts may share a map.
        orders: dict[bytes, np.ndarray] = {}
        members: dict[bytes, list[tuple[str, int]]] = {}
        for key, text, order in _orders(case, seed):
            orders[order.tobytes()] = order
            members.setdefault(order.tobytes(), []).append((key, text))
        deletion, insertion = dict.fromkeys([*case.maps, CONTROL], 0.0), dict.fromkeys([*case.maps, CONTROL], 0.0)
        full = empty = 0.0
        for name, sharing in members.items():
            texts = sorted({text for _, text in sharing})
            found = curves(adapter, inputs, targets.select(texts), orders[name], replacement)
            for key, text in sharing:
                row = texts.index(text)
                empty_score = found.insertion[row, 0]
                deletion[key] += float(np.trapezoid(found.deletion[row] - empty_score, found.fraction))
                insertion[key] += float(np.trapezoid(found.insertion[row] - empty_score, found.fraction))
                if key == CONTROL:
                    full, empty = full + float(found.deletion[row, 0]), empty + float(empty_score)
    return CurveAreas(deletion, insertion, full, empty, len(case.texts))


def _orders(case: FaithfulnessCase, seed: int) -> Iterable[tuple[str, int, np.ndarray]]:
    """Yield (method, text, order) of all maps; the control is one random order per image."""
    for key, maps in case.maps.items():
        for index, text in enumerate(case.texts):
            yield key, index, deletion_order(maps[text], case.seen)
    shuffled = np.random.default_rng([seed, *case.image.name.encode()]).permutation(np.flatnonzero(case.seen))
    for index in range(len(case.texts)):
        yield CONTROL, index, shuffled
