"""Evaluate methods on images with boxes for phrases: explain each image once and score its maps.

Protocol `mention-anybox`: each mention of a phrase whose chain has a box is a case, its text is the phrase alone in
lower case, and a hit is a peak strictly inside any of the chain's boxes. Numbers of other protocols (enclosing boxes,
chains instead of mentions, other texts) are not comparable.
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
from grounding.core.images import open_image
from grounding.datasets.caption_lists import ALL
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Dataset, Record
from grounding.engine.explain import explain_request
from grounding.engine.plan import plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import Request
from grounding.engine.warnings import map_warnings
from grounding.evaluation.config import TOO_FEW_ENTITIES, PointingConfig
from grounding.evaluation.deletion import Baseline, FaithfulnessCase
from grounding.evaluation.faithfulness import CAPTION_ONLY, faithfulness
from grounding.evaluation.pointing import (
    POINTING_BASELINES,
    MapScores,
    Mention,
    best_threshold,
    mentions_of,
    score_image,
    summary,
)
from grounding.evaluation.report import FORMAT
from grounding.evaluation.statistics import mean
from grounding.evaluation.word_swaps import Swaps, swap_test
from grounding.explanation.explanation import Explanation

DEFAULT_BASELINE: Baseline = "blur"
TUNING_SPLIT = "val"
TUNING_THRESHOLDS = tuple(round(float(t), 2) for t in [0.02, 0.04, 0.06, 0.08, *np.arange(0.1, 0.91, 0.05)])
# Errors of the request, the same for every image: raised at the first one instead of counted for each.
REQUEST_ERRORS = (LayerError, OptionError, TargetError, UnknownNameError)


@dataclass(frozen=True)
class PhraseConfig(PointingConfig):
    """Configuration of an evaluation on images with boxes for phrases.

    `limit`: only the first images that qualify.
    `tune_threshold`: choose for each method the threshold with the best IoU score on the whole validation split.
    `faithfulness`: also measure deletion, insertion, text sensitivity and parameter randomisation.
    `baseline`: what replaces removed patches. None: blur.

    Raises OptionError.
    """

    limit: int | None = None
    tune_threshold: bool = False
    faithfulness: bool = False
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit must be at least 1 image, got {self.limit}")
        if self.threshold is not None and self.tune_threshold:
            raise OptionError("a threshold was given, so it cannot be tuned: choose one of the two options")
        if self.baseline is not None and not self.faithfulness:
            raise OptionError("a baseline was given, but only faithfulness uses one")


@dataclass(eq=False)
class PhraseScores:
    """Scores of each image of a split, counts of skipped phrases and images by reason, and problems.

    `swap_test`: per image, results of `word_swaps.swap_test`.
    """

    scored: list[dict[str, MapScores]] = field(default_factory=list)
    cases: list[FaithfulnessCase] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_images: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)
    swap_test: list[list[float]] = field(default_factory=list)

    def add_failure(self, error: GroundingError, phrases: int) -> None:
        """Count an image that could not be scored, and its phrases."""
        self.skipped_images[error.status] += 1
        self.skipped[error.status] += phrases
        self.problems.append(str(error))


def evaluate(
    adapter: Adapter,
    dataset: Dataset,
    config: PhraseConfig | None = None,
    request: Request | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Score methods on one split and return the document that `scripts/evaluate.py --format json` prints.

    `request`: how the maps are computed; its selection is ignored, since each phrase is explained as a text of its own.
    An image that fails is counted and named in the document. Raises GroundingError for an invalid request, and if no
    phrase could be scored.
    """
    config = config or PhraseConfig()
    config = replace(config, min_entities=config.min_entities_of(dataset.folder))
    request = replace(request or Request(), select=CAPTION_ONLY)
    swaps = Swaps.read(dataset.folder)
    # Planned before the model runs, so that an unknown name costs nothing.
    keys = [call.key for call in plan_methods(adapter, request).calls]
    kind, _ = adapter.check_target(request.target, request.token_target)
    thresholds = dict.fromkeys(keys, config.box_threshold)
    if config.tune_threshold:
        if dataset.split in (TUNING_SPLIT, ALL):
            raise OptionError(f"the threshold is tuned on the split {TUNING_SPLIT}: choose a split to score without it")
        tuning_set, unlimited = open_dataset(dataset.folder, TUNING_SPLIT), replace(config, limit=None)
        tuning = _score_split(adapter, tuning_set, unlimited, TUNING_THRESHOLDS, request, progress)
        thresholds = {key: best_threshold(tuning.scored, key, TUNING_THRESHOLDS) for key in keys}
    if kind in adapter.text_independent:
        swaps = None
    cuts = sorted(set(thresholds.values()))
    scores = _score_split(adapter, dataset, config, cuts, request, progress, config.faithfulness, swaps)
    document: dict[str, Any] = {
        "format": FORMAT,
        "protocol": PHRASE_ALONE,
        "model": adapter.info.id,
        "data": data_name(dataset.folder),
        "split": dataset.split,
        "pictures": len(scores.scored),
        "phrases": sum(len(next(iter(image.values())).phrases) for image in scores.scored),
        "skipped": dict(scores.skipped),
        "skipped_pictures": dict(scores.skipped_images),
        "rules": _rules(adapter, dataset, config, request),
        "methods": {
            key: summary([image[key] for image in scores.scored], thresholds.get(key), config.seed)
            for key in (*keys, *POINTING_BASELINES)
        },
        "problems": scores.problems,
        "warnings": dict(scores.warnings.most_common()),
        "provenance": provenance_of(adapter, config.seed),
    }
    if any(scores.swap_test):
        accuracy = mean(scores.swap_test, config.seed)
        document |= {
            "swap_accuracy": accuracy.value,
            "swap_accuracy_ci": accuracy.interval,
            "swap_captions": accuracy.count,
        }
    if config.faithfulness:
        baseline = config.baseline or DEFAULT_BASELINE
        document["faithfulness"] = faithfulness(
            adapter, scores.cases, request, baseline, config.seed, progress=progress
        )
    return document


def _rules(adapter: Adapter, dataset: Dataset, config: PhraseConfig, request: Request) -> dict[str, Any]:
    """Return what the numbers depend on, as the document stores it."""
    return {
        "layout": dataset.layout,
        "text": "the phrase alone, lower case",
        "hit": "strictly inside any box of the chain",
        **config.to_document(),
        "limit": config.limit,
        "target": request.target or adapter.target_kinds[0],
        "threshold": f"tuned on {TUNING_SPLIT}" if config.tune_threshold else config.box_threshold,
        "tuned": config.tune_threshold,
        "options": {key: str(value) for key, value in request.options.items()},
        "layers": list(request.layers),
    }


# ---------------------------------------------------------------- scoring a split


def _score_split(
    adapter: Adapter,
    dataset: Dataset,
    config: PhraseConfig,
    thresholds: Sequence[float],
    request: Request,
    progress: bool,
    keep_cases: bool = False,
    swaps: Swaps | None = None,
) -> PhraseScores:
    """Explain and score every image that qualifies; with `swaps`, also run the swap test of the model's score.

    `keep_cases`: also return the maps, for faithfulness. Raises GroundingError if no image could be scored.
    """
    scores = PhraseScores(problems=list(dataset.problems))
    count = 0
    for name in tqdm(dataset.ids, desc=dataset.split, unit="image", disable=not progress):
        if count == config.limit:
            break
        try:
            record = dataset.read(name)
            path = _image_path(record)
        except GroundingError as error:
            count += 1
            scores.add_failure(error, 0)
            continue
        mentions = _mentions(record, dataset, config, scores)
        if not mentions:
            continue
        count += 1
        try:
            texts = tuple(dict.fromkeys(mention.text for mention in mentions))
            image = open_image(path)
            found = explain_request(adapter, [image], [list(texts)], request)[0]
        except GroundingError as error:
            if isinstance(error, REQUEST_ERRORS) and not scores.scored:
                raise
            scores.add_failure(error, len(mentions))
            continue
        explanations: dict[str, Explanation] = dict(zip(texts, found, strict=True))
        scores.warnings.update(warning for one in found for warning in text_warnings(one))
        scores.scored.append(score_image(record.boxes, mentions, explanations, config.peak, thresholds))
        if swaps is not None:
            heldout = dataset.heldout or frozenset()
            scores.swap_test.append(swap_test(adapter, image, record, swaps, heldout, request.target))
        if keep_cases:
            scores.cases.append(FaithfulnessCase.of(path, explanations, (caption.text for caption in record.captions)))
    if not scores.scored:
        raise _nothing_scored(dataset, scores)
    return scores


def text_warnings(explanation: Explanation) -> list[str]:
    """Return the warnings of an explanation except those about its maps: these are numbers in the scores."""
    about_maps = set(map_warnings(explanation.methods, explanation.entries))
    return [warning for warning in dict.fromkeys(explanation.warnings) if warning not in about_maps]


def _nothing_scored(dataset: Dataset, scores: PhraseScores) -> GroundingError:
    reasons = "; ".join(f"{n} images {reason}" for reason, n in scores.skipped_images.items()) or "no boxes"
    first = f"; first problem: {scores.problems[0]}" if scores.problems else ""
    return GroundingError(f"no phrase of split {dataset.split!r} could be scored ({reasons}){first}")


def _image_path(record: Record) -> Path:
    """Return the image file of a record. Raises DataError for an image that is not a file: it has no boxes."""
    if record.image is None:
        raise DataError(record.failures[0].error)
    if isinstance(record.image, bytes):
        raise DataError(f"{record.id}: an image inside a table cannot be scored; boxes belong to image files")
    return record.image


def _mentions(record: Record, dataset: Dataset, config: PhraseConfig, scores: PhraseScores) -> list[Mention]:
    """Return the mentions to score, none if the image does not qualify; skipped phrases are counted in `scores`."""
    mentions, skipped = mentions_of(record, config.captions, dataset.heldout or frozenset())
    if len(record.boxes) < (config.min_entities or 1):
        scores.skipped_images[TOO_FEW_ENTITIES] += 1
        scores.skipped[TOO_FEW_ENTITIES] += len(mentions) + skipped.total()
        return []
    scores.problems += record.problems
    scores.skipped += skipped
    if not mentions:
        scores.skipped_images["no_boxes"] += 1
    return mentions
