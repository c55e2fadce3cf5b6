"""Faithfulness of maps: deletion and insertion, text sensitivity and parameter randomisation, over all cases.

Text sensitivity: correlation between the maps of two captions of one image; 1 where a map does not depend on the text.
Captions of one image may name the same things, so its first caption is also compared with one of another image.
Parameter randomisation (Adebayo et al. 2018, arXiv:1810.03292, cascading): in a copy of the model the parameters are
drawn at random block by block from the top, and each map is correlated with that of the trained model. A map that stays
similar depends on the image and the architecture, not on what was learned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from grounding.adapter.base import Adapter
from grounding.adapter.recorder import find_module
from grounding.core.errors import GroundingError
from grounding.engine.explain import explain_request
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from grounding.evaluation.deletion import (
    BLUR,
    CONTROL,
    STEPS,
    Baseline,
    CurveAreas,
    FaithfulnessCase,
    deletion_curves_area,
)
from grounding.evaluation.statistics import mean, pearson, ratio

CAPTION_ONLY = Selection(tokens=False)
ALL_PARAMETERS = "every parameter"


def faithfulness(
    adapter: Adapter,
    cases: Sequence[FaithfulnessCase],
    request: Request,
    baseline: Baseline = "blur",
    seed: int = 0,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the faithfulness of all methods and return it as the part of an evaluation document.

    `request`: the one that the maps of the `cases` were computed with. An image that fails is counted and left out of
    all scores. Raises GroundingError if all fail.
    """
    given = len(cases)
    bar = tqdm(cases, desc="deletion, insertion", unit="image", disable=not progress)
    areas, cases = _curve_areas(adapter, bar, request, baseline, seed)
    keys = list(cases[0].maps)
    names, by_depth = randomisation(adapter, cases, request, seed, progress=progress)
    sensitivity = text_sensitivity(adapter, cases, request)
    methods: dict[str, Any] = {key: _area_scores(areas, key, seed) for key in [*keys, CONTROL]}
    for key in keys:
        for name, groups in sensitivity[key].items():
            methods[key][name] = mean(groups, seed).value
        methods[key]["randomisation"] = [mean(groups, seed).value for groups in by_depth[key]]
    texts = sum(one.texts for one in areas)
    return {
        "protocol": "deletion-insertion",
        "steps": STEPS,
        "baseline": baseline,
        "blur": BLUR if baseline == "blur" else None,
        "pictures": len(cases),
        "failed_pictures": given - len(cases),
        "texts": texts,
        "score": {
            "whole": sum(one.full for one in areas) / texts,
            "nothing": sum(one.empty for one in areas) / texts,
        },
        "randomised": names,
        "methods": methods,
    }


def _curve_areas(
    adapter: Adapter, cases: Iterable[FaithfulnessCase], request: Request, baseline: Baseline, seed: int
) -> tuple[list[CurveAreas], list[FaithfulnessCase]]:
    """Return the areas of the cases that succeed, and these cases. Raises the last error if all fail."""
    areas, succeeded = [], []
    error = GroundingError("there is no case to measure faithfulness on")
    for case in cases:
        try:
            areas.append(deletion_curves_area(adapter, case, baseline, request.target, seed))
            succeeded.append(case)
        except GroundingError as failure:
            error = failure
    if not succeeded:
        raise error
    return areas, succeeded


def _area_scores(areas: Sequence[CurveAreas], key: str, seed: int) -> dict[str, Any]:
    gap = [one.full - one.empty for one in areas]
    scores: dict[str, Any] = {}
    for name in ("deletion", "insertion"):
        own = [getattr(one, name)[key] for one in areas]
        control = [getattr(one, name)[CONTROL] for one in areas]
        area = ratio(own, gap, seed)
        scores[name] = {"auc": area.value, "ci": area.interval}
        if key != CONTROL:
            paired = ratio([a - b for a, b in zip(own, control, strict=True)], gap, seed)
            scores[name] |= {"minus_random": paired.value, "minus_random_ci": paired.interval}
    return scores


def text_sensitivity(
    adapter: Adapter, cases: Sequence[FaithfulnessCase], request: Request
) -> dict[str, dict[str, list[list[float | None]]]]:
    """Return per method the correlations between raw maps over seen patches, one group per image.

    `text_sensitivity`: its first two different captions. `foreign_text`: its first caption and that of the next image.
    An image whose captions cannot be explained has no group.
    """
    names = ("text_sensitivity", "foreign_text")
    correlations: dict[str, Any] = {key: {name: [] for name in names} for key in cases[0].maps}
    for case, following in zip(cases, [*cases[1:], cases[0]], strict=True):
        others = [case.captions[1:2], following.captions[:1]]
        texts = list(dict.fromkeys([*case.captions[:2], *following.captions[:1]]))
        try:
            explanations = explain_request(adapter, [str(case.image)], [texts], replace(request, select=CAPTION_ONLY))
        except GroundingError:
            continue
        for key, groups in correlations.items():
            raw = {text: one.map(0, key).raw[case.seen] for text, one in zip(texts, explanations[0], strict=True)}
            own = raw[case.captions[0]]
            for name, other in zip(names, others, strict=True):
                groups[name].append([pearson(own, raw[text]) for text in other if text != case.captions[0]])
    return correlations


def randomisation(
    adapter: Adapter, cases: Sequence[FaithfulnessCase], request: Request, seed: int = 0, *, progress: bool = False
) -> tuple[list[str], dict[str, list[list[list[float | None]]]]]:
    """Return what was randomised at each depth, and by method, depth and image the correlations with trained maps.

    An image that the randomised model cannot explain (a dead layer, NaN) has no correlation.
    """
    request = replace(request, select=CAPTION_ONLY)
    names: list[str] = []
    correlations: dict[str, list[list[list[float | None]]]] = {key: [] for key in cases[0].maps}
    for name, randomised in cascade(adapter, seed):
        names.append(name)
        for groups in correlations.values():
            groups.append([])
        for case in tqdm(cases, desc="randomisation", unit="image", disable=not progress):
            try:
                [explanations] = explain_request(randomised, [str(case.image)], [list(case.texts)], request)
            except GroundingError:
                continue
            for key, groups in correlations.items():
                pairs = zip(case.texts, explanations, strict=True)
                groups[-1].append(
                    [pearson(case.maps[key][t][case.seen], e.map(0, key).raw[case.seen]) for t, e in pairs]
                )
    return names, correlations


def cascade(adapter: Adapter, seed: int = 0) -> Iterator[tuple[str, Adapter]]:
    """Yield a copy of the adapter with the last block of the vision stack randomised, then the last two, ..., then all.

    It is the same copy each time, so use it before the next one. The model of `adapter` is never changed.
    """
    randomised = copy.deepcopy(adapter)
    generator = torch.Generator().manual_seed(seed)
    for path in reversed(randomised.structure(randomised.target_kinds[0]).stack("vision").blocks):
        randomise(find_module(randomised.model, path), generator)
        yield path, randomised
    randomise(randomised.model, generator)
    yield ALL_PARAMETERS, randomised


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw each parameter from a normal distribution with the parameter's own mean and standard deviation.

    This keeps the scale, whatever the initialisation of the architecture, so that outputs stay finite.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            old = parameter.detach().float()
            fresh = torch.randn(old.shape, generator=generator)
            parameter.copy_(fresh.to(old) * old.std(correction=0) + old.mean())
