"""Deletion and insertion curves: the model's score while patches are removed from, or put back into, its input.

Deletion and insertion (RISE: Petsiuk et al. 2018, arXiv:1806.07421) of the explained score: the seen patches are
removed from (put back into) the model's input in the order of the map, and the score is computed again at each step.
Departures: the area is normalised over all cases together, since a cosine has no natural zero (see
`deletion_curves_area`); a random order of the same patches is the control.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import random_state
from grounding.engine.masking import BLUR, masked_scores
from grounding.engine.passes import encode
from grounding.engine.queries import prepare
from grounding.explanation.explanation import Explanation
from grounding.methods.masks import Baseline, cell_numbers, patch_masks

__all__ = [
    "BLUR",
    "CONTROL",
    "STEPS",
    "Baseline",
    "CurveAreas",
    "Curves",
    "FaithfulnessCase",
    "cell_numbers",
    "curves",
    "deletion_curves_area",
    "deletion_order",
]

STEPS = 20
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
    baseline: Baseline,
    steps: int = STEPS,
) -> Curves:
    """Compute deletion and insertion of one image for all targets, from steps + 1 versions of it each.

    `order`: cells (row-major indices) in the order of removal. `baseline`: what replaces a removed patch. Pixels
    outside of all seen patches stay. Raises NumericError for NaN or Inf.
    """
    counts = np.round(np.linspace(0, len(order), steps + 1)).astype(int)
    geometry = inputs.images.geometry(0)
    rank = np.full(geometry.rows * geometry.columns, len(order))  # an unseen patch: never removed
    rank[order] = np.arange(len(order))
    ranks = rank.reshape(geometry.rows, geometry.columns)
    removed = ranks[None] < counts[:, None, None]
    missing = ~removed & (ranks < len(order))
    features = encode(adapter, inputs.images)
    dtype = torch.promote_types(adapter.dtype, torch.float32)
    deletion, insertion = (
        masked_scores(adapter, inputs, features, targets, [patch_masks(geometry, hidden, baseline, dtype)])
        for hidden in (removed, missing)
    )
    return Curves(counts / len(order), *(one.cpu().double().numpy() for one in (deletion, insertion)))


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
    have denominators near zero. Raises NumericError for NaN or Inf.
    """
    with torch.inference_mode(False), torch.no_grad(), random_state(adapter.model):
        torch.manual_seed(seed)
        kind, _ = adapter.check_target(target)
        inputs = prepare(adapter, [str(case.image)], [list(case.texts)], kind)
        targets = adapter.targets(inputs, [[text.caption()] for text in inputs.texts], kind)
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
            found = curves(adapter, inputs, targets.select(texts), orders[name], baseline)
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
