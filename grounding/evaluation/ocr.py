"""Evaluate an OCR model on lines with character boxes: generate each line, explain its tokens, score text and maps.

`ocr_scoring` computes the numbers. Lines with a recognition error count in the error rate only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from grounding.adapter.base import Adapter
from grounding.core.demo import data_name
from grounding.core.errors import DataError, GroundingError, OptionError
from grounding.core.images import ImageError, Picture, open_image
from grounding.datasets.text_lines import Line, Lines, open_lines, splits_of
from grounding.engine.explain import explain_request
from grounding.engine.plan import available, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from grounding.evaluation.ocr_scoring import (
    OCR_BASELINES,
    LineScore,
    OtherTokens,
    line_groups,
    map_summary,
    recognition_summary,
    score_line,
)
from grounding.evaluation.phrases import REQUEST_ERRORS, TUNING_SPLIT, text_warnings
from grounding.evaluation.report import FORMAT
from grounding.evaluation.statistics import CONFIDENCE, RESAMPLES
from grounding.explanation.explanation import Explanation

LINES_PER_BATCH = 16
# Default methods; those that the architecture has are scored.
OCR_METHODS = ("gradcam", "gradcam_ln", "rollout", "cross_attention", "gradient_x_cross_attention", "relevance")
PROTOCOL = (
    "own box: the model generates the text of each line; in lines recognised exactly, each visible token is a case; "
    "hit: the centre of the strongest seen patch of its map lies in the box of its character (half-open; several "
    "characters: any of their boxes); a map without evidence is a miss"
)
DEFINITIONS = {
    "cer": "sum of Levenshtein distances between generated text and label, divided by the summed length of the labels; "
    "all lines",
    "exact": "share of lines whose generated text equals the label",
    "in_box": "share of cases whose peak lies in the own box",
    "elsewhere": "share of cases whose peak lies in a box of the same characters elsewhere in the line, not in the own",
    "aimed": "another token of the line, drawn with the seed, is explained at the position of each token; share of "
    "these whose peak lies in a box of that other token, anywhere in the line",
    "position": "baseline from the position of the token alone: the centre of the seen patch nearest to (width * "
    "(t + 0.5) / T, height / 2) for token t of T",
    "random": "uniform draw of a seen patch: the share of seen patch centres in the box, exact",
    "ci": f"percentile bootstrap over lines, {RESAMPLES} resamples, level {CONFIDENCE}",
    "recommended": f"the method with the largest in_box on the whole split {TUNING_SPLIT}, with its scores there",
}


@dataclass(frozen=True)
class OcrConfig:
    """Configuration of an evaluation on lines.

    `limit`: only the first lines. `aimed`: also explain another token of the line at the position of each token.
    `seed`: of the draws of these tokens, of the maps and of the intervals. Raises OptionError.
    """

    limit: int | None = None
    aimed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit must be at least 1 line, got {self.limit}")


@dataclass(eq=False)
class OcrScores:
    """Scores of the lines of a split, counts of skipped lines by reason, and problems."""

    scored: list[LineScore] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def add_failure(self, place: str, error: GroundingError) -> None:
        """Count a line that could not be scored; `place` names it in its file."""
        self.skipped[error.status] += 1
        self.problems.append(f"{place}: {error}")


def evaluate_lines(
    adapter: Adapter,
    lines: Lines,
    config: OcrConfig | None = None,
    request: Request | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Score text and maps on one split and return the document that `scripts/evaluate.py --format json` prints.

    `request`: how the maps are computed; its selection and seed are replaced by those of `config`. A line that fails is
    counted and named in the document. Raises GroundingError for an invalid request, and if no line could be scored.
    """
    config = config or OcrConfig()
    if not adapter.generates:
        raise OptionError(f"{adapter.info.type} generates no text: scoring lines needs a model that does")
    request = request or Request()
    kind, _ = adapter.check_target(request.target, request.token_target)
    methods = request.methods or [name for name in OCR_METHODS if name in available(adapter.structure(kind))]
    select = OtherTokens(seed=config.seed) if config.aimed else Selection(caption=False)
    request = replace(request, methods=methods, seed=config.seed, select=select)
    # Planned before the model runs, so that an unknown name costs nothing.
    keys = [call.key for call in plan_methods(adapter, request).calls]
    scores = _score_split(adapter, lines, config.limit, request, progress)
    scored = scores.scored
    return {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "definitions": DEFINITIONS,
        "model": adapter.info.id,
        "data": data_name(lines.folder),
        "split": lines.split,
        **recognition_summary(scored, config.seed),
        "characters": _case_count(scored),
        "skipped": dict(scores.skipped),
        "rules": {
            "limit": config.limit,
            "aimed": config.aimed,
            "target": kind,
            "options": {key: str(value) for key, value in request.options.items()},
            "layers": list(request.layers),
            "seed": config.seed,
            "interval": {"method": "percentile bootstrap over lines", "resamples": RESAMPLES, "level": CONFIDENCE},
        },
        "methods": {
            key: map_summary(scored, key, config.seed, other_tokens=config.aimed) for key in (*keys, *OCR_BASELINES)
        },
        "groups": {
            name: recognition_summary([s for s in scored if name in s.line.groups], config.seed)
            for name in line_groups(score.line for score in scored)
        },
        "recommended": _recommended(adapter, lines, config, request, keys, progress),
        "problems": scores.problems,
        "warnings": dict(scores.warnings.most_common()),
        "provenance": provenance_of(adapter, config.seed),
    }


def _case_count(scored: Sequence[LineScore]) -> int:
    """Return the number of cases, which is the same for every method."""
    return sum(len(next(iter(score.hits.values())).tokens) for score in scored if score.exact)


def _recommended(
    adapter: Adapter, lines: Lines, config: OcrConfig, request: Request, keys: Sequence[str], progress: bool
) -> dict[str, Any] | None:
    """Return the method with the best pointing score on the validation split.

    None if that is the split to score, if there is none, with a limit, and if none of its lines is recognised.
    """
    if config.limit is not None or lines.split in (None, TUNING_SPLIT) or TUNING_SPLIT not in splits_of(lines.folder):
        return None
    validation = open_lines(lines.folder, TUNING_SPLIT)
    request = replace(request, select=Selection(caption=False))
    scored = _score_split(adapter, validation, None, request, progress).scored
    summaries = {key: map_summary(scored, key, config.seed) for key in (*keys, *OCR_BASELINES)}
    if not _case_count(scored):
        return None
    best = max(keys, key=lambda key: summaries[key]["in_box"])
    return {
        "method": best,
        "split": TUNING_SPLIT,
        **{name: summaries[best][name] for name in ("in_box", "ci", "n")},
        "of": {key: own["in_box"] for key, own in summaries.items()},
    }


# ---------------------------------------------------------------- scoring a split


def _score_split(adapter: Adapter, lines: Lines, limit: int | None, request: Request, progress: bool) -> OcrScores:
    """Explain and score lines, a batch at a time. Raises DataError if none could be scored."""
    scores = OcrScores()
    chosen = lines.lines[:limit]
    with tqdm(total=len(chosen), desc=lines.split, unit="line", disable=not progress) as bar:
        for first in range(0, len(chosen), LINES_PER_BATCH):
            part = chosen[first : first + LINES_PER_BATCH]
            batch = [(line, image) for line in part if (image := _open_line(lines, line, scores)) is not None]
            for line, explanation in _explain_batch(adapter, lines, batch, request, scores):
                scores.warnings.update(text_warnings(explanation))
                scores.scored.append(score_line(line, explanation))
            bar.update(len(part))
    if not scores.scored:
        reasons = ", ".join(f"{count} {reason}" for reason, count in scores.skipped.items())
        raise DataError(f"no line could be scored ({reasons}); first problem: {scores.problems[0]}")
    return scores


def _open_line(lines: Lines, line: Line, scores: OcrScores) -> Picture | None:
    """Return the image of a line; None, and count the failure, if it cannot be used or does not contain the boxes."""
    try:
        image = open_image(line.image)
    except ImageError as error:
        scores.add_failure(lines.place(line), error)
        return None
    if wrong := line.misfit(image.width, image.height):
        scores.add_failure(lines.place(line), DataError(wrong))
        return None
    return image


def _explain_batch(
    adapter: Adapter, lines: Lines, batch: Sequence[tuple[Line, Picture]], request: Request, scores: OcrScores
) -> list[tuple[Line, Explanation]]:
    """Generate and explain the lines of a batch. If the batch fails, retry its lines singly and count failures."""
    if not batch:
        return []
    try:
        images = [image for _, image in batch]
        explanations = explain_request(adapter, images, None, request, batch_size=LINES_PER_BATCH)
        return list(zip((line for line, _ in batch), explanations, strict=True))
    except GroundingError as error:
        if isinstance(error, REQUEST_ERRORS) and not scores.scored:
            raise
        if len(batch) > 1:
            return [pair for one in batch for pair in _explain_batch(adapter, lines, [one], request, scores)]
        scores.add_failure(lines.place(batch[0][0]), error)
        return []
