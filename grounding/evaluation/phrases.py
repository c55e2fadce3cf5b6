"""Scoring maps against boxes: explain every picture of a data set once, count, and say under which rules.

Rules (`mention-anybox`): a case is every mention of a phrase whose chain has a box, the text is the phrase alone in
lower case, a hit is a peak strictly inside any of the chain's boxes. Numbers of other protocols (unions of boxes,
chains in place of mentions, other texts) must not stand beside these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from grounding.adapter.base import Adapter
from grounding.batch.requests import PHRASE_ALONE
from grounding.core.demo import data_name
from grounding.core.errors import DataError, GroundingError, LayerError, OptionError, TargetError, UnknownNameError
from grounding.datasets.caption_lists import ALL
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Dataset, Record
from grounding.engine.explain import explain_request
from grounding.engine.plan import for_target, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import Request
from grounding.engine.warnings import map_warnings
from grounding.evaluation.config import FEW, PointingConfig
from grounding.evaluation.deletion import Baseline, Case
from grounding.evaluation.faithfulness import WHOLE, faithfulness
from grounding.evaluation.pointing import (
    BASELINES,
    MapScores,
    Mention,
    best_threshold,
    mentions_of,
    score_image,
    summary,
)
from grounding.evaluation.report import FORMAT
from grounding.evaluation.statistics import mean
from grounding.evaluation.word_swaps import Swaps, beaten
from grounding.explanation.explanation import Explanation

PROTOCOL = PHRASE_ALONE
BASELINE: Baseline = "blur"
TUNING_SPLIT = "val"
TUNING = tuple(round(float(t), 2) for t in [0.02, 0.04, 0.06, 0.08, *np.arange(0.1, 0.91, 0.05)])
# Wrong for every picture alike, where already the first one has it: no case for counting.
REQUEST_ERRORS = (LayerError, OptionError, TargetError, UnknownNameError)


@dataclass(frozen=True)
class PhraseConfig(PointingConfig):
    """What is scored, and how.

    `limit`: only the first so many pictures that qualify. `tune_threshold`: per method the threshold with the best IoU
    score on the whole validation split. `faithfulness` adds deletion, insertion and what maps depend on, with patches
    replaced by `baseline` (None: blur).
    """

    limit: int | None = None
    tune_threshold: bool = False
    faithfulness: bool = False
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit must be at least 1 picture, got {self.limit}")
        if self.threshold is not None and self.tune_threshold:
            raise OptionError("a threshold was given, and tuning it was asked for: choose one")
        if self.baseline is not None and not self.faithfulness:
            raise OptionError("a baseline belongs to faithfulness, which was not asked for")


@dataclass(eq=False)
class PhraseScores:
    """What one way through a split gave: scores per picture, and what was left out and why."""

    scored: list[dict[str, MapScores]] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_images: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    beaten: list[list[float]] = field(default_factory=list)

    def compare(
        self, adapter: Adapter, record: Record, swaps: Swaps | None, dataset: Dataset, kind: str | None
    ) -> None:
        """Let the model compare a picture's first caption with wrong ones, where the data set knows such."""
        if swaps is not None:
            self.beaten.append(beaten(adapter, record, swaps, dataset.heldout or frozenset(), kind))

    def failed(self, error: GroundingError, phrases: int) -> None:
        """One picture could not be scored."""
        self.skipped_images[error.status] += 1
        self.skipped[error.status] += phrases
        self.problems.append(str(error))


def evaluate(
    adapter: Adapter,
    dataset: Dataset,
    rules: PhraseConfig | None = None,
    request: Request | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Score methods on one split and return the document that `scripts/evaluate.py --format json` prints.

    `request` says how the maps are computed; every phrase is explained as a text of its own. Raises GroundingError where
    an argument is wrong, and where not one phrase could be scored; an image that fails is counted and named.
    """
    rules = rules or PhraseConfig()
    rules = replace(rules, min_entities=rules.entities(dataset.folder))
    request = replace(request or Request(), select=WHOLE)
    swaps = Swaps.read(dataset.folder)
    # Before anything runs: a wrong name costs nothing.
    aimed, own = for_target(adapter, request)
    keys = [call.key for call in plan_methods(aimed, own)]
    adapter.check_kind(request.target, request.token_target)
    thresholds = dict.fromkeys(keys, rules.cut)
    if rules.tune_threshold:
        if dataset.split in (TUNING_SPLIT, ALL):
            raise OptionError(f"the threshold is tuned on the split {TUNING_SPLIT}: score one that has none of it")
        whole = replace(rules, limit=None)
        tuning = _tally(adapter, open_dataset(dataset.folder, TUNING_SPLIT), whole, TUNING, request, progress)
        thresholds = {key: best_threshold(tuning.scored, key, TUNING) for key in keys}
    compared = swaps if aimed.text_conditioned(request.target or adapter.kinds[0], gradient=True) else None
    cuts = sorted(set(thresholds.values()))
    tally = _tally(adapter, dataset, rules, cuts, request, progress, rules.faithfulness, compared)
    scored = tally.scored
    document: dict[str, Any] = {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "model": adapter.info.id,
        "data": data_name(dataset.folder),
        "split": dataset.split,
        "pictures": len(scored),
        "phrases": sum(len(next(iter(image.values())).phrases) for image in scored),
        "skipped": dict(tally.skipped),
        "skipped_pictures": dict(tally.skipped_images),
        "rules": _rules(adapter, dataset, rules, request),
        "methods": {
            key: summary([image[key] for image in scored], thresholds.get(key), rules.seed)
            for key in (*keys, *BASELINES)
        },
        "problems": tally.problems,
        "warnings": dict(tally.warnings.most_common()),
        "provenance": provenance_of(adapter, rules.seed),
    }
    if any(tally.beaten):
        told = mean(tally.beaten, rules.seed)
        document |= {"swap_accuracy": told.value, "swap_accuracy_ci": told.interval, "swap_captions": told.count}
    if rules.faithfulness:
        document["faithfulness"] = faithfulness(
            aimed, tally.cases, request, rules.baseline or BASELINE, rules.seed, progress=progress
        )
    return document


def _rules(adapter: Adapter, dataset: Dataset, rules: PhraseConfig, request: Request) -> dict[str, Any]:
    """Everything that the numbers depend on, in words and values."""
    return {
        "layout": dataset.layout,
        "text": "the phrase alone, lower case",
        "hit": "strictly inside any box of the chain",
        **rules.described(),
        "limit": rules.limit,
        "target": request.target or adapter.kinds[0],
        "threshold": f"tuned on {TUNING_SPLIT}" if rules.tune_threshold else rules.cut,
        "tuned": rules.tune_threshold,
        "options": {key: str(value) for key, value in request.options.items()},
        "layers": list(request.layers),
    }


# ---------------------------------------------------------------- through the pictures


def _tally(
    adapter: Adapter,
    dataset: Dataset,
    rules: PhraseConfig,
    thresholds: Sequence[float],
    request: Request,
    progress: bool,
    keep_cases: bool = False,
    swaps: Swaps | None = None,
) -> PhraseScores:
    """Explain and score every picture that qualifies; with `swaps`, compare its first caption with wrong ones.

    Raises GroundingError where none could be scored.
    """
    tally = PhraseScores(problems=list(dataset.problems))
    seen = 0
    for name in tqdm(dataset.ids, desc=dataset.split, unit="picture", disable=not progress):
        if seen == rules.limit:
            break
        try:
            record = dataset.read(name)
            image = _file(record)
        except GroundingError as error:
            seen += 1
            tally.failed(error, 0)
            continue
        mentions = _mentions(record, dataset, rules, tally)
        if not mentions:
            continue
        seen += 1
        try:
            texts = tuple(dict.fromkeys(mention.text for mention in mentions))
            found = explain_request(adapter, [str(image)], [list(texts)], request)[0]
        except GroundingError as error:
            if isinstance(error, REQUEST_ERRORS) and not tally.scored:
                raise
            tally.failed(error, len(mentions))
            continue
        explanations: dict[str, Explanation] = dict(zip(texts, found, strict=True))
        for one in found:  # what the methods say of their maps is in the scores already
            tally.warnings.update(set(one.warnings) - set(map_warnings(one.methods, one.entries)))
        tally.scored.append(score_image(record.boxes, mentions, explanations, rules.peak, thresholds))
        tally.compare(adapter, record, swaps, dataset, request.target)
        if keep_cases:
            tally.cases.append(Case.of(image, explanations, (caption.text for caption in record.captions)))
    if not tally.scored:
        why = "; ".join([f"{n} pictures {reason}" for reason, n in tally.skipped_images.items()] or ["no boxes"])
        first = f"; first of all: {tally.problems[0]}" if tally.problems else ""
        raise GroundingError(f"not one phrase of split {dataset.split!r} could be scored ({why}){first}")
    return tally


def _file(record: Record) -> Path:
    """The picture of a record. Raises DataError for one that is no file: it has no boxes either."""
    if record.image is None:
        raise DataError(record.failures[0].error)
    if isinstance(record.image, bytes):
        raise DataError(f"{record.id}: a picture inside a table cannot be scored; boxes belong to picture files")
    return record.image


def _mentions(record: Record, dataset: Dataset, rules: PhraseConfig, tally: PhraseScores) -> list[Mention]:
    """The mentions to score, none where the picture does not qualify; what is left out is counted."""
    mentions, skipped = mentions_of(record, rules.captions, dataset.heldout or frozenset())
    if len(record.boxes) < (rules.min_entities or 1):
        tally.skipped_images[FEW] += 1
        tally.skipped[FEW] += len(mentions) + skipped.total()
        return []
    tally.problems += record.problems
    tally.skipped += skipped
    if not mentions:
        tally.skipped_images["no_boxes"] += 1
    return mentions
