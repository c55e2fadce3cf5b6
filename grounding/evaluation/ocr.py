"""Scoring the reading of lines: let the model write every line, explain its tokens, count, and say under which rules.

The numbers of `reading_score`; lines that were misread count in the error rate and in nothing else.
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
from grounding.engine.plan import available, for_target, plan_methods
from grounding.engine.provenance import provenance_of
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from grounding.engine.warnings import map_warnings
from grounding.evaluation.ocr_scoring import (
    BASELINES,
    Aimed,
    LineScore,
    groups_of,
    map_summary,
    reading_summary,
    score_line,
)
from grounding.evaluation.phrases import REQUEST_ERRORS, TUNING_SPLIT
from grounding.evaluation.report import FORMAT
from grounding.evaluation.statistics import CONFIDENCE, RESAMPLES
from grounding.explanation.explanation import Explanation

BATCH = 16
# Those of them are scored that the architecture has.
METHODS = ("gradcam", "gradcam_ln", "rollout", "cross_attention", "gradient_x_cross_attention", "relevance")
PROTOCOL = (
    "own box: the model reads each line by itself; in lines read exactly, every token that is no blank is a case; hit: "
    "the centre of its map's strongest seen patch lies in the box of its character (half-open; several characters: any "
    "of their boxes); a map without evidence is a miss"
)
DEFINITIONS = {
    "cer": "sum of Levenshtein distances between text read and label, over the sum of the labels' lengths; all lines",
    "exact": "share of lines that were read exactly",
    "in_box": "share of cases whose peak lies in the own box",
    "elsewhere": "share of cases whose peak lies in a box of the same characters elsewhere in the line, not in the own",
    "aimed": "share of questions for another token of the line in the place of each token, drawn with the seed, whose "
    "peak lies in a box of what was asked for, wherever in the line",
    "position": "prior that knows the token's place alone: the centre of the seen patch nearest to (width * (t + 0.5) "
    "/ T, height / 2) for token t of T",
    "random": "any seen patch alike: the share of seen patch centres in the box, exact",
    "ci": f"percentile bootstrap over lines, {RESAMPLES} resamples, level {CONFIDENCE}",
    "recommended": f"the method with the largest in_box on the whole split {TUNING_SPLIT}, with its figures there",
}


@dataclass(frozen=True)
class OcrConfig:
    """What is scored. `limit`: only the first so many lines; `aimed` adds questions for other tokens of the line."""

    limit: int | None = None
    aimed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"limit must be at least 1 line, got {self.limit}")


@dataclass(eq=False)
class OcrScores:
    """What one way through a split gave: scores per line, and what was left out and why."""

    scored: list[LineScore] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)

    def failed(self, place: str, error: GroundingError) -> None:
        """One line could not be scored."""
        self.skipped[error.status] += 1
        self.problems.append(f"{place}: {error}")


def evaluate_lines(
    adapter: Adapter,
    lines: Lines,
    rules: OcrConfig | None = None,
    request: Request | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Score reading and methods on one split and return the document that `scripts/evaluate.py --format json` prints.

    `request` says how the maps are computed; its selection and seed are those of the rules. Raises GroundingError where
    an argument is wrong, and where not one line could be scored; a line that fails is counted and named.
    """
    rules = rules or OcrConfig()
    if not adapter.generates:
        raise OptionError(f"{adapter.info.type} writes no text: lines are scored with a model that reads them")
    request = request or Request()
    methods = request.methods or [name for name in METHODS if name in available(adapter)]
    select = Aimed(seed=rules.seed) if rules.aimed else Selection(caption=False)
    request = replace(request, methods=methods, seed=rules.seed, select=select)
    # Before anything runs: a wrong name costs nothing.
    plan = plan_methods(*for_target(adapter, request))
    adapter.check_kind(request.target, request.token_target)
    tally = _tally(adapter, lines, rules.limit, request, progress)
    scored = tally.scored
    keys = [column.key for column in plan]
    return {
        "format": FORMAT,
        "protocol": PROTOCOL,
        "definitions": DEFINITIONS,
        "model": adapter.info.id,
        "data": data_name(lines.folder),
        "split": lines.split,
        **reading_summary(scored, rules.seed),
        "characters": _characters(scored),
        "skipped": dict(tally.skipped),
        "rules": {
            "limit": rules.limit,
            "aimed": rules.aimed,
            "target": request.target or adapter.kinds[0],
            "options": {key: str(value) for key, value in request.options.items()},
            "layers": list(request.layers),
            "seed": rules.seed,
            "interval": {"method": "percentile bootstrap over lines", "resamples": RESAMPLES, "level": CONFIDENCE},
        },
        "methods": {key: map_summary(scored, key, rules.seed, aimed=rules.aimed) for key in (*keys, *BASELINES)},
        "groups": {
            name: reading_summary([s for s in scored if name in s.line.groups], rules.seed)
            for name in groups_of(score.line for score in scored)
        },
        "recommended": _recommended(adapter, lines, rules, request, keys, progress),
        "problems": tally.problems,
        "warnings": dict(tally.warnings.most_common()),
        "provenance": provenance_of(adapter, rules.seed),
    }


def _characters(scored: Sequence[LineScore]) -> int:
    """How many cases there are: the same for every method."""
    return sum(len(next(iter(score.hits.values())).tokens) for score in scored if score.exact)


def _recommended(
    adapter: Adapter, lines: Lines, rules: OcrConfig, request: Request, keys: Sequence[str], progress: bool
) -> dict[str, Any] | None:
    """The method that points best on the validation split; None where that is the split being scored, where there is
    none, for a part of a split, and where no line of it is read."""
    if rules.limit is not None or lines.split in (None, TUNING_SPLIT) or TUNING_SPLIT not in splits_of(lines.folder):
        return None
    held = open_lines(lines.folder, TUNING_SPLIT)
    scored = _tally(adapter, held, None, replace(request, select=Selection(caption=False)), progress).scored
    found = {key: map_summary(scored, key, rules.seed) for key in (*keys, *BASELINES)}
    if not _characters(scored):
        return None
    best = max(keys, key=lambda key: found[key]["in_box"])
    return {
        "method": best,
        "split": TUNING_SPLIT,
        **{name: found[best][name] for name in ("in_box", "ci", "n")},
        "of": {key: own["in_box"] for key, own in found.items()},
    }


# ---------------------------------------------------------------- through the lines


def _tally(adapter: Adapter, lines: Lines, limit: int | None, request: Request, progress: bool) -> OcrScores:
    """Read, explain and score lines, a batch at a time. Raises GroundingError where none could be scored."""
    tally = OcrScores()
    chosen = lines.lines[:limit]
    with tqdm(total=len(chosen), desc=lines.split, unit="line", disable=not progress) as bar:
        for first in range(0, len(chosen), BATCH):
            part = chosen[first : first + BATCH]
            batch = [(line, image) for line in part if (image := _opened(lines, line, tally)) is not None]
            for line, found in _explained(adapter, lines, batch, request, tally):
                # What the methods say of their maps is in the scores already.
                tally.warnings.update(set(found.warnings) - set(map_warnings(found.methods, found.entries)))
                tally.scored.append(score_line(line, found))
            bar.update(len(part))
    if not tally.scored:
        why = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
        raise DataError(f"not one line could be scored ({why}); first of all: {tally.problems[0]}")
    return tally


def _opened(lines: Lines, line: Line, tally: OcrScores) -> Picture | None:
    """The picture of a line; None for one that cannot be used or that the boxes do not fit: counted and named."""
    try:
        image = open_image(line.image)
    except ImageError as error:
        tally.failed(lines.place(line), error)
        return None
    if wrong := line.misfit(image.width, image.height):
        tally.failed(lines.place(line), DataError(wrong))
        return None
    return image


def _explained(
    adapter: Adapter, lines: Lines, batch: Sequence[tuple[Line, Picture]], request: Request, tally: OcrScores
) -> list[tuple[Line, Explanation]]:
    """The lines of a batch with what the model wrote; where the batch fails, each by itself, and failures counted."""
    if not batch:
        return []
    try:
        found = explain_request(adapter, [image for _, image in batch], None, request, batch_size=BATCH)
        return list(zip((line for line, _ in batch), found, strict=True))
    except GroundingError as error:
        if isinstance(error, REQUEST_ERRORS) and not tally.scored:
            raise
        if len(batch) > 1:
            return [done for one in batch for done in _explained(adapter, lines, [one], request, tally)]
        tally.failed(lines.place(batch[0][0]), error)
        return []
