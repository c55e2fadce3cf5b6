"""Does the model itself care for what a map calls important? Its score while patches are taken away, or put back.

Deletion and insertion (Petsiuk et al. 2018) on the explained score itself: the patches that the model saw are taken
away (put back) in the map's order, in the model's input, and the score is computed anew. Departures: the area is
normalised over all cases together (see `areas`), since a cosine has no natural zero; a random order of the same run is
the control.
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
from grounding.explanation.explanation import Explanation

Baseline = Literal["blur", "black", "mean"]
STEPS = 20
# Standard deviation of the blur, in short sides of the model input.
BLUR = 1 / 16
CONTROL = "random"


@dataclass(frozen=True, eq=False)
class Case:
    """One picture, its explained texts, their raw maps (`maps[key][text]`), and one or two captions that differ."""

    image: Path
    texts: tuple[str, ...]
    maps: Mapping[str, Mapping[str, Float[np.ndarray, "rows columns"]]]
    seen: Bool[np.ndarray, "rows columns"]
    captions: tuple[str, ...]

    @classmethod
    def of(cls, image: Path, found: Mapping[str, Explanation], captions: Iterable[str]) -> Case:
        """The case of explanations by text; the first two different `captions` are kept."""
        first = next(iter(found.values()))
        maps = {key: {text: one.map(0, key).raw for text, one in found.items()} for key in first.methods}
        two = tuple(dict.fromkeys(captions))[:2]
        return cls(image, tuple(found), maps, first.geometry.seen_cells, two)


@dataclass(frozen=True, eq=False)
class Curves:
    """Scores (texts, steps + 1) while a growing part of the seen patches is taken away, or put back."""

    fraction: Float[np.ndarray, "steps"]
    deletion: Float[np.ndarray, "texts steps"]
    insertion: Float[np.ndarray, "texts steps"]


def order_of(raw: Float[np.ndarray, "rows columns"], seen: Bool[np.ndarray, "rows columns"]) -> Int[np.ndarray, "n"]:
    """Seen cells (row-major numbers) from the strongest raw value to the weakest, equal ones in row-major order."""
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
    """Deletion and insertion of one picture for all targets, patches in one `order` (row-major numbers of cells).

    Every step is a picture of one forward pass. `baseline` takes a patch's place; what is no seen patch stays.
    """
    pixels = inputs.tensors["pixel_values"][0]
    counts = np.round(np.linspace(0, len(order), steps + 1)).astype(int)
    rank = np.full(inputs.geometry[0].rows * inputs.geometry[0].columns + 1, len(order))  # one more: no cell
    rank[order] = np.arange(len(order))
    ranks = torch.from_numpy(rank[cell_numbers(inputs.geometry[0], *pixels.shape[-2:])]).to(pixels.device)
    gone = ranks[None] < torch.from_numpy(counts).to(pixels.device)[:, None, None]  # (S, H, W)
    fixed = ranks == len(order)
    deleted = torch.where(gone[:, None], baseline, pixels)
    inserted = torch.where((gone | fixed)[:, None], pixels, baseline)
    return Curves(
        counts / len(order),
        scores_of(adapter, inputs, targets, deleted),
        scores_of(adapter, inputs, targets, inserted),
    )


def scores_of(
    adapter: Adapter, inputs: Inputs, targets: Targets, pixels: Float[Tensor, "S C H W"]
) -> Float[np.ndarray, "K S"]:
    """The scores of all targets (of one picture) on S versions of that picture, in one forward pass.

    Raises NumericError for NaN or Inf.
    """
    count = len(pixels)
    repeated, every = repeat_image(inputs, targets, count)
    repeated = replace(repeated, tensors={**repeated.tensors, "pixel_values": pixels})
    scores = adapter.scores(repeated, every)
    if not torch.isfinite(scores).all():
        raise NumericError("scores of a picture with patches taken away are NaN or Inf")
    return scores.detach().cpu().double().numpy().reshape(len(targets), count)


def cell_numbers(geometry: Geometry, height: int, width: int) -> Int[np.ndarray, "height width"]:
    """The row-major number of the patch that reads each input pixel; one more than the last where none does."""
    cell_width, cell_height = geometry.cell_size
    rows = np.floor((np.arange(height) + 0.5) / cell_height).astype(int)
    columns = np.floor((np.arange(width) + 0.5) / cell_width).astype(int)
    numbers = rows[:, None] * geometry.columns + columns[None]
    numbers[(rows >= geometry.rows)[:, None] | (columns >= geometry.columns)[None]] = geometry.rows * geometry.columns
    return numbers


def baseline_of(adapter: Adapter, inputs: Inputs, kind: Baseline) -> Float[Tensor, "C H W"]:
    """What takes a patch's place: the picture blurred, black (through the image processor), or its mean colour."""
    pixels = inputs.tensors["pixel_values"][0]
    if kind == "mean":
        numbers = cell_numbers(inputs.geometry[0], *pixels.shape[-2:])
        seen = np.append(inputs.geometry[0].seen_cells.ravel(), False)[numbers]
        return pixels[:, torch.from_numpy(seen).to(pixels.device)].mean(1)[:, None, None].expand_as(pixels)
    if kind == "black":
        size = (inputs.images[0].width, inputs.images[0].height)
        return adapter.prepare([Image.new("RGB", size)], [[inputs.tokens[0].text]]).tensors["pixel_values"][0]
    array = pixels.detach().cpu().float().movedim(0, -1).contiguous().numpy()
    blurred = cv2.GaussianBlur(array, (0, 0), BLUR * min(array.shape[:2]))
    return torch.from_numpy(blurred.reshape(array.shape)).movedim(-1, 0).to(pixels)


@dataclass(frozen=True, eq=False)
class CurveAreas:
    """Areas under the curves of one picture, summed over its texts, and the sums they are normalised with."""

    deletion: Mapping[str, float]
    insertion: Mapping[str, float]
    full: float
    empty: float
    texts: int


def deletion_curves_area(adapter: Adapter, case: Case, baseline: Baseline, target: str | None, seed: int) -> CurveAreas:
    """Trapezoid areas of every method, and of one random order, for one picture.

    Areas are those above the score of the picture with nothing left. Divided by the score that the whole picture has
    above it, both summed over all cases, an area is 0 where the score falls at once and 1 where it never falls; a
    quotient case by case would have denominators near zero.
    """
    with torch.inference_mode(False), torch.no_grad(), random_state(adapter.model):
        torch.manual_seed(seed)
        inputs = adapter.prepare([str(case.image)], [list(case.texts)])
        if "pixel_values" not in inputs.tensors:
            raise ModelError(f"{adapter.info.type} has no input pixel_values: faithfulness cannot be measured")
        targets = adapter.targets(inputs, [[tokens.caption()] for tokens in inputs.tokens], target)
        base = baseline_of(adapter, inputs, baseline)
        # One order, one forward pass: also for the many texts that share a map.
        wanted: dict[bytes, list[tuple[str, int]]] = {}
        orders: dict[bytes, np.ndarray] = {}
        for key, text, order in _orders(case, seed):
            orders[order.tobytes()] = order
            wanted.setdefault(order.tobytes(), []).append((key, text))
        deletion, insertion = dict.fromkeys([*case.maps, CONTROL], 0.0), dict.fromkeys([*case.maps, CONTROL], 0.0)
        full = empty = 0.0
        for name, members in wanted.items():
            texts = sorted({text for _, text in members})
            found = curves(adapter, inputs, targets.select(texts), orders[name], base)
            for key, text in members:
                row = texts.index(text)
                nothing = found.insertion[row, 0]
                deletion[key] += float(np.trapezoid(found.deletion[row] - nothing, found.fraction))
                insertion[key] += float(np.trapezoid(found.insertion[row] - nothing, found.fraction))
                if key == CONTROL:
                    full, empty = full + float(found.deletion[row, 0]), empty + float(nothing)
    return CurveAreas(deletion, insertion, full, empty, len(case.texts))


def _orders(case: Case, seed: int) -> Iterable[tuple[str, int, np.ndarray]]:
    """(method, text, order) of all maps; the control is one random order per picture."""
    for key, maps in case.maps.items():
        for number, text in enumerate(case.texts):
            yield key, number, order_of(maps[text], case.seen)
    shuffled = np.random.default_rng([seed, *case.image.name.encode()]).permutation(np.flatnonzero(case.seen))
    for number in range(len(case.texts)):
        yield CONTROL, number, shuffled
