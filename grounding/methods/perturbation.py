"""Methods that score altered images: occlusion and RISE. They need neither gradients nor attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grounding.adapter.structure import ModelStructure
from grounding.core.errors import OptionError
from grounding.core.geometry import Geometry
from grounding.methods.base import Reading, method
from grounding.methods.masks import Baseline, Masks, RandomCells, patch_masks, windows
from grounding.methods.options import Count, Probability
from grounding.methods.trace import Trace


def _check_windows(options: Mapping[str, Any], _structure: ModelStructure) -> Mapping[str, Reading]:
    if options["stride"] > options["window"]:
        raise OptionError(
            f"option occlusion.stride: {options['stride']} patches leave gaps between windows of {options['window']}: "
            "use a stride of at most the window"
        )
    return {}


def _windows(options: Mapping[str, Any], geometry: Geometry, _seed: int, dtype: torch.dtype) -> Masks:
    return patch_masks(geometry, windows(geometry, options["window"], options["stride"]), options["baseline"], dtype)


def _random(options: Mapping[str, Any], geometry: Geometry, seed: int, dtype: torch.dtype) -> Masks:
    size = (geometry.input_height, geometry.input_width)
    drawn = RandomCells.draw(options["masks"], options["cells"], options["keep"], size, seed, dtype)
    return Masks(geometry, options["masks"], options["baseline"], drawn.masks)


@method("Occlusion", {"rescoring"}, signed=True, reads=_check_windows, masks=_windows)
def occlusion(
    trace: Trace,
    *,
    window: Count = 1,  # noqa: ARG001 - read by `_windows`
    stride: Count = 1,  # noqa: ARG001
    baseline: Baseline = "mean",  # noqa: ARG001
) -> Float[Tensor, "k rows columns"]:
    """Occlusion: what the score loses when a window is replaced by the baseline, f(x) - f(x without the window).

    Source: Zeiler & Fergus 2014, arXiv:1311.2901, who slide a grey square and show f at its centre.
    Departures: the difference in place of f, and at each patch the mean over the windows that contain it (both as in
    Captum). `window` and `stride` count patches; windows at the end are cut off. `baseline` is the mean colour of the
    image, the blurred image or black. A window hides only patches that contain a part of the image.
    Range: unbounded. Sign: signed; positive values raise the score.
    Cost: one forward pass for each window, which serves all targets of the image; no gradient.
    """
    losses = trace.whole_scores()[:, None] - trace.masked_scores()
    sums, counts = (trace.weighted_masks(weights, hidden=True) for weights in (losses, torch.ones_like(losses)))
    return sums / counts.clamp(min=1)


@method("RISE", {"rescoring"}, signed=True, masks=_random)
def rise(
    trace: Trace,
    *,
    masks: Count = 1000,  # noqa: ARG001 - read by `_random`
    cells: Count = 7,  # noqa: ARG001
    keep: Probability = 0.5,
    baseline: Baseline = "mean",  # noqa: ARG001
    centred: bool = False,
) -> Float[Tensor, "k rows columns"]:
    """RISE: sum_i f(x M_i + b (1 - M_i)) M_i / (N p) over N random masks M_i, b the baseline; per patch the mean over
    its pixels.

    A mask enlarges `cells` x `cells` random bits, 1 with probability p = `keep`, bilinearly to one cell more than the
    input and cuts it out at a random shift, so that E[M] = p at every pixel. The seed of the request draws them, the
    same for every image of a size and every target.
    Source: Petsiuk et al. 2018, arXiv:1806.07421, eq. 6 (4000 or 8000 masks, 7 x 7 cells, p = 0.5).
    Departures: fewer `masks` by default; beyond the outer cells their value (published code: mirrored). `baseline` as
    in `occlusion`. `centred` subtracts the mean over masks from the scores: constant in expectation, but a score that
    varies little around a large value, like a cosine, otherwise drowns in the noise of sum M_i; recommended for
    `similarity`.
    Range: unbounded. Sign: signed as the score.
    Cost: `masks` forward passes, which serve all targets of the image; no gradient.
    """
    scores = trace.masked_scores()
    if centred:
        scores = scores - scores.mean(1, keepdim=True)
    return trace.weighted_masks(scores) / (scores.shape[1] * keep)
