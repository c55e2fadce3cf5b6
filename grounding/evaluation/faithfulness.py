"""Whether maps can be believed: deletion and insertion, and what a map depends on, for all cases of an evaluation.

Text sensitivity: the correlation between the maps of two captions of one picture; 1 where a map cannot see the text.
Captions of one picture may name the same things, so its caption is also held against one of another picture.
Parameter randomisation (Adebayo et al. 2018, cascading): weights are drawn anew block by block from the top, in a copy
of the model, and each map is correlated with that of the trained model; a map that stays alike shows the picture and
the architecture, not what was learned.
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
from grounding.evaluation.deletion import BLUR, CONTROL, STEPS, Baseline, Case, CurveAreas, deletion_curves_area
from grounding.evaluation.statistics import Estimate, mean, pearson, ratio

WHOLE = Selection(tokens=False)
EVERYTHING = "every parameter"


def faithfulness(
    adapter: Adapter,
    cases: Sequence[Case],
    request: Request,
    baseline: Baseline = "blur",
    seed: int = 0,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """The scores as a document: per method deletion, insertion, text sensitivity, randomisation.

    `request`: the one that the maps of the `cases` were computed for. Intervals are over pictures.
    A picture that fails is counted and left out of everything. Raises GroundingError where all fail.
    """
    given = len(cases)
    shown = tqdm(cases, desc="deletion, insertion", unit="picture", disable=not progress)
    measured, cases = _measured(adapter, shown, request, baseline, seed)
    keys = list(cases[0].maps)
    names, by_depth = randomisation(adapter, cases, request, seed, progress=progress)
    sensitivity = text_sensitivity(adapter, cases, request)
    methods: dict[str, Any] = {key: _area_scores(measured, key, seed) for key in [*keys, CONTROL]}
    for key in keys:
        for name, groups in sensitivity[key].items():
            methods[key][name] = mean(groups, seed).value
        methods[key]["randomisation"] = [mean(groups, seed).value for groups in by_depth[key]]
    texts = sum(one.texts for one in measured)
    return {
        "protocol": "deletion-insertion",
        "steps": STEPS,
        "baseline": baseline,
        "blur": BLUR if baseline == "blur" else None,
        "pictures": len(cases),
        "failed_pictures": given - len(cases),
        "texts": texts,
        "score": {
            "whole": sum(one.full for one in measured) / texts,
            "nothing": sum(one.empty for one in measured) / texts,
        },
        "randomised": names,
        "methods": methods,
    }


def _measured(
    adapter: Adapter, cases: Iterable[Case], request: Request, baseline: Baseline, seed: int
) -> tuple[list[CurveAreas], list[Case]]:
    measured, kept, first = [], [], GroundingError("there is no case to measure faithfulness on")
    for case in cases:
        try:
            measured.append(deletion_curves_area(adapter, case, baseline, request.target, seed))
            kept.append(case)
        except GroundingError as error:
            first = first if measured else error
    if not kept:
        raise first
    return measured, kept


def _area_scores(measured: Sequence[CurveAreas], key: str, seed: int) -> dict[str, Any]:
    gap = [one.full - one.empty for one in measured]
    scores: dict[str, Any] = {}
    for name in ("deletion", "insertion"):
        own = [getattr(one, name)[key] for one in measured]
        control = [getattr(one, name)[CONTROL] for one in measured]
        scores[name] = _named(ratio(own, gap, seed))
        if key != CONTROL:
            paired = ratio([a - b for a, b in zip(own, control, strict=True)], gap, seed)
            scores[name] |= {"minus_random": paired.value, "minus_random_ci": paired.interval}
    return scores


def _named(estimate: Estimate) -> dict[str, Any]:
    return {"auc": estimate.value, "ci": estimate.interval}


def text_sensitivity(
    adapter: Adapter, cases: Sequence[Case], request: Request
) -> dict[str, dict[str, list[list[float | None]]]]:
    """Per method, correlations between raw maps over seen patches, a group for each picture.

    `text_sensitivity`: its first two captions that differ. `foreign_text`: its first one and that of the next picture.
    A picture whose captions cannot be explained has none.
    """
    names = ("text_sensitivity", "foreign_text")
    found: dict[str, Any] = {key: {name: [] for name in names} for key in cases[0].maps}
    for case, following in zip(cases, [*cases[1:], cases[0]], strict=True):
        others = [case.captions[1:2], following.captions[:1]]
        texts = list(dict.fromkeys([*case.captions[:2], *following.captions[:1]]))
        try:
            maps = explain_request(adapter, [str(case.image)], [texts], replace(request, select=WHOLE))[0]
        except GroundingError:
            continue
        for key, groups in found.items():
            raw = {text: one.map(0, key).raw[case.seen] for text, one in zip(texts, maps, strict=True)}
            own = raw[case.captions[0]]
            for name, other in zip(names, others, strict=True):
                groups[name].append([pearson(own, raw[text]) for text in other if text != case.captions[0]])
    return found


def randomisation(
    adapter: Adapter, cases: Sequence[Case], request: Request, seed: int = 0, *, progress: bool = False
) -> tuple[list[str], dict[str, list[list[list[float | None]]]]]:
    """What was drawn anew at each depth, and per method, depth and picture the correlations with the trained maps.

    A picture that the re-drawn model cannot explain (a dead layer, NaN) has no correlation.
    """
    names: list[str] = []
    found: dict[str, list[list[list[float | None]]]] = {key: [] for key in cases[0].maps}
    for name, redrawn in cascade(adapter, seed):
        names.append(name)
        for groups in found.values():
            groups.append([])
        for case in tqdm(cases, desc="randomisation", unit="picture", disable=not progress):
            try:
                maps = explain_request(redrawn, [str(case.image)], [list(case.texts)], replace(request, select=WHOLE))[
                    0
                ]
            except GroundingError:
                continue
            for key, groups in found.items():
                pairs = zip(case.texts, maps, strict=True)
                groups[-1].append(
                    [pearson(case.maps[key][t][case.seen], m.map(0, key).raw[case.seen]) for t, m in pairs]
                )
    return names, found


def cascade(adapter: Adapter, seed: int = 0) -> Iterator[tuple[str, Adapter]]:
    """A copy of the adapter with the last block of the vision stack drawn anew, then the last two, ..., then all.

    The same copy each time: use it before the next is asked for. The user's model is never touched.
    """
    redrawn = copy.deepcopy(adapter)
    generator = torch.Generator().manual_seed(seed)
    for path in reversed(redrawn.structure.stack("vision").blocks):
        redraw(find_module(redrawn.model, path), generator)
        yield path, redrawn
    redraw(redrawn.model, generator)
    yield EVERYTHING, redrawn


def redraw(module: nn.Module, generator: torch.Generator) -> None:
    """Draw each parameter anew from a normal distribution with its own mean and standard deviation.

    Scales stay, whatever the architecture's own initialisation would be, so that the model still computes something.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            old = parameter.detach().float()
            fresh = torch.randn(old.shape, generator=generator)
            parameter.copy_(fresh.to(old) * old.std(correction=0) + old.mean())
