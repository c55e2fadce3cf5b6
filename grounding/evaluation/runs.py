"""Evaluate a batch run: score its stored maps against the boxes of its data set, without a model.

Each phrase of an image of the run is scored, or counted as skipped by reason: of the data (`scene`, `nobndbox`,
`notvisual`, `missing`), of the protocol (`small`), of the configuration (`min_entities`), or of the run (the status of
a row that failed; `not_read`: the caption was truncated before the phrase; `not_in_run`: no map of this text;
`other_caption`: the caption in the data set has changed). `protocols` defines what is scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from grounding.batch.requests import IMAGE_ALONE
from grounding.batch.rows import PROMPT, Row, RunMetadata, from_row
from grounding.batch.run_folder import RunFolder
from grounding.core.demo import data_name
from grounding.core.errors import DataError, GroundingError
from grounding.core.images import Picture
from grounding.core.printable import escape
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Caption, Dataset, Record
from grounding.evaluation.config import TOO_FEW_ENTITIES, PointingConfig
from grounding.evaluation.pointing import (
    MISSING,
    POINTING_BASELINES,
    Captions,
    MapScores,
    mention_of,
    score_maps,
    summary,
)
from grounding.evaluation.protocols import PROTOCOL_TABLE, PhraseMaps, Protocol
from grounding.evaluation.report import FORMAT
from grounding.explanation.explanation import PatchMap

NOT_READ, NOT_IN_RUN, OTHER_CAPTION = "not_read", "not_in_run", "other_caption"
NO_BOXES = "no_boxes"
_NO_PIXELS = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class RunScoreConfig(PointingConfig):
    """Configuration of the evaluation of a run. `protocol`: names; empty: all that the run has texts for."""

    captions: Captions = "all"
    protocol: tuple[str, ...] = ()


@dataclass(eq=False)
class RunScores:
    """Scores of one protocol for each image, and counts of skipped phrases and images by reason.

    `phrases`: number of scored phrases. `texts`: number of texts of this protocol in the run.
    """

    protocol: Protocol
    scored: list[dict[str, MapScores]] = field(default_factory=list)
    phrases: int = 0
    texts: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_images: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, phrases: Sequence[PhraseMaps], config: RunScoreConfig) -> None:
        """Score an image, or count why it is skipped."""
        cases = self.protocol.cases(record, phrases)
        self.skipped += cases.skipped
        if not cases.mentions:
            self.skipped_images[_main_reason(record, cases.skipped)] += 1
            return
        self.phrases += cases.phrases
        thresholds = (config.box_threshold,)
        scores = score_maps(cases.boxes, cases.mentions, cases.maps, config.peak, thresholds, self.protocol.closed)
        self.scored.append(scores)


def run_dataset(run: RunFolder, folder: str | Path | None = None) -> Dataset:
    """Open the data set of a run, or the same one in another folder. Raises DataError if missing or without boxes."""
    stored = run.manifest.get("data") or {}
    path = folder or stored.get("folder")
    if not path:
        raise DataError(f"{escape(run.path)} does not name the folder of its images: name it with --data")
    try:
        dataset = open_dataset(path, stored.get("split"))
    except DataError as error:
        hint = "" if folder else "; if the data of the run were moved, name the folder with --data"
        raise DataError(f"{error}{hint}") from None
    if not dataset.boxes:
        raise DataError(f"{escape(Path(path))} ({dataset.layout}) has no boxes for phrases: nothing can be scored")
    return dataset


def evaluate_run(
    run: RunFolder, dataset: Dataset, config: RunScoreConfig | None = None, *, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Return one document per protocol, by name, as `scripts/evaluate.py --run --format json` prints them.

    Raises DataError for a damaged run, GroundingError if a requested protocol, or every protocol, scores nothing.
    """
    if run.manifest["fingerprint"].get("captions") == IMAGE_ALONE:
        raise GroundingError(
            f"{escape(run.path)} explains the target {run.metadata.target}, which no text can change: no phrase was "
            "explained, nothing can be scored"
        )
    config = config or RunScoreConfig()
    config = replace(config, min_entities=config.min_entities_of(dataset.folder))
    protocols = [RunScores(PROTOCOL_TABLE[name]) for name in config.protocol or PROTOCOL_TABLE]
    problems = [*_run_warnings(run, dataset), *dataset.problems]
    for rows in tqdm(run.images(), desc="scored", unit="image", disable=not progress):
        name = rows[0]["image"]
        if name in dataset.broken:
            continue
        try:
            record = dataset.read(name)
        except DataError as error:
            problems.append(str(error))
            for scores in protocols:
                scores.skipped_images[error.status] += 1
            continue
        captions = record.captions[:1] if config.captions == "first" else record.captions
        if len(record.boxes) < (config.min_entities or 1):
            _count_too_few(captions, protocols)
            continue
        problems += record.problems
        maps = _ImageMaps(rows, run)
        for scores in protocols:
            kind = scores.protocol.kind
            scores.texts += maps.count(kind)
            scores.add(record, maps.phrase_maps(captions, kind, dataset.heldout or frozenset()), config)
    failures = {one.protocol.name: _nothing_scored(run, one, problems) for one in protocols if not one.scored}
    if failures and (config.protocol or len(failures) == len(protocols)):
        raise GroundingError(next(iter(failures.values())))
    problems += failures.values()
    return {
        one.protocol.name: _document(one, run.metadata, dataset, config, problems) for one in protocols if one.scored
    }


def _run_warnings(run: RunFolder, dataset: Dataset) -> list[str]:
    """Return warnings about the run as a whole: missing shards, changed data."""
    warnings = []
    missing = sum(run.sidecar(shard) is None for shard in run.shards)
    if missing:
        warnings.append(f"{missing} of {len(run.shards)} shards of the run are not done: their images are not scored")
    digest = run.manifest["fingerprint"].get("data")
    if digest is not None and digest != dataset.digest():
        warnings.append(f"{escape(dataset.folder)}: captions or boxes changed since the run")
    return warnings


def _count_too_few(captions: Sequence[Caption], protocols: Sequence[RunScores]) -> None:
    """Count an image with too few entities, and its phrases, as skipped."""
    phrases = sum(len(caption.phrases) for caption in captions)
    for scores in protocols:
        scores.skipped_images[TOO_FEW_ENTITIES] += 1
        scores.skipped[TOO_FEW_ENTITIES] += phrases


def _nothing_scored(run: RunFolder, scores: RunScores, problems: Sequence[str]) -> str:
    """Return the message for a protocol without any scored phrase."""
    name = scores.protocol.name
    counts = run.counts()
    if not any(scores.skipped_images.values()) or all(status.startswith("failed") for status in counts):
        return f"{escape(run.path)} has no maps to score: {_listed(counts) or 'no shard is done'}"
    if not scores.texts and scores.skipped[NOT_IN_RUN]:
        return (
            f"{name} cannot be scored: {escape(run.path)} has no maps of its texts ({scores.protocol.text}); "
            f"ground_flickr30k.py computes them with --protocols {name}"
        )
    first = f"; first problem: {problems[0]}" if problems else ""
    skipped = {"phrases": scores.skipped, "images": scores.skipped_images}
    reasons = "; ".join(f"{what}: {_listed(counts)}" for what, counts in skipped.items() if counts)
    return f"{name} scored nothing of {escape(run.path)} ({reasons}){first}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _document(
    scores: RunScores, about: RunMetadata, dataset: Dataset, config: RunScoreConfig, problems: Sequence[str]
) -> dict[str, Any]:
    protocol, scored = scores.protocol, scores.scored
    thresholds = dict.fromkeys(about.methods, config.box_threshold)
    return {
        "format": FORMAT,
        "protocol": protocol.name,
        "model": about.model["id"],
        "data": data_name(dataset.folder),
        "split": dataset.split,
        "pictures": len(scored),
        "cases": sum(len(next(iter(image.values())).phrases) for image in scored),
        "phrases": scores.phrases,
        "skipped": dict(scores.skipped),
        "skipped_pictures": dict(scores.skipped_images),
        "rules": {
            "layout": dataset.layout,
            "unit": protocol.unit,
            "text": protocol.text,
            "hit": protocol.hit,
            **config.to_document(),
            "limit": None,
            "target": about.target,
            "options": {
                f"{key}.{name}": str(value)
                for key, own in about.methods.items()
                for name, value in own["options"].items()
            },
            "layers": list(dict.fromkeys(own["layer"] for own in about.methods.values() if own["layer"])),
        },
        "methods": {
            key: summary([image[key] for image in scored], thresholds.get(key), config.seed)
            for key in (*about.methods, *POINTING_BASELINES)
        },
        "problems": list(problems),
        "warnings": {},
        "provenance": dict(about.provenance),
    }


# ---------------------------------------------------------------- one image


class _ImageMaps:
    """Maps of the phrases of one image, by kind of entry, line of the caption and character span."""

    def __init__(self, rows: Sequence[Row], run: RunFolder) -> None:
        self.rows = {row["line"]: row for row in rows}
        self.maps: dict[tuple[str, int, int, int], Mapping[str, PatchMap]] = {}
        about, shared = run.metadata, run.shared(rows)
        kinds = {protocol.kind for protocol in PROTOCOL_TABLE.values()}
        for row in rows:
            if row["entries"] is None:
                continue
            explanation = from_row(row, about, _placeholder_image(row), shared, prompts=True)
            for index, entry in enumerate(explanation.entries):
                if entry.kind in kinds:
                    maps = {key: explanation.map(index, key) for key in explanation.methods}
                    self.maps.setdefault((entry.kind, row["line"], entry.start, entry.end), maps)

    def count(self, kind: str) -> int:
        """Return the number of texts of a kind."""
        return sum(key[0] == kind for key in self.maps)

    def phrase_maps(self, captions: Sequence[Caption], kind: str, heldout: frozenset[str]) -> list[PhraseMaps]:
        """Return each phrase with its maps, or with the reason why there are none."""
        phrases = []
        for caption in captions:
            reason = self._skip_reason(caption)
            for phrase in caption.phrases:
                maps = None if reason else self.maps.get((kind, caption.line, phrase.start, phrase.end))
                cut = kind != PROMPT and maps is None and not reason and self.rows[caption.line]["truncated"]
                missing = reason or (NOT_READ if cut else NOT_IN_RUN)
                phrases.append(PhraseMaps(phrase, mention_of(phrase, heldout), maps, missing))
        return phrases

    def _skip_reason(self, caption: Caption) -> str:
        """Return why no phrase of a caption can be scored; empty if they can."""
        row = self.rows.get(caption.line)
        if row is None:
            return NOT_IN_RUN
        if row["entries"] is None:
            return str(row["status"])
        return "" if row["caption"] == caption.text else OTHER_CAPTION


def _placeholder_image(row: Row) -> Picture:
    """Return an image of the row's size and digest without its pixels, which no score reads."""
    size = row["geometry"]["width"], row["geometry"]["height"]
    return Picture(_NO_PIXELS, *size, None, row["image_sha256"])


def _main_reason(record: Record, skipped: Mapping[str, int]) -> str:
    """Return the most frequent reason why phrases with boxes of an image were skipped."""
    boxless = {MISSING, *record.no_box.values()}
    own = {reason: count for reason, count in skipped.items() if reason not in boxless}
    return max(own, key=own.__getitem__) if own else NO_BOXES
