"""Scoring a batch run against annotated boxes: the maps are in the run, the boxes in its data set; no model is needed.

Every phrase of the pictures that were run is scored, or counted as skipped with a reason: of the data (`scene`,
`nobndbox`, `notvisual`, `missing`), of the protocol (`small`), of the rules (`min_entities`), or of the run (the status
of a row that failed; `not_read`: the model did not read as far; `not_in_run`: there is no map of such a text;
`other_caption`: the data set has another caption there by now). What is scored, and how: see `protocols`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from grounding.batch.rows import PROMPT, Row, RunMetadata, from_row
from grounding.batch.run_folder import RunFolder
from grounding.core.demo import data_name
from grounding.core.errors import DataError, GroundingError
from grounding.core.images import Picture
from grounding.core.printable import escape
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Caption, Dataset, Record
from grounding.evaluation.config import FEW, PointingConfig
from grounding.evaluation.pointing import BASELINES, MISSING, Captions, MapScores, mention_of, score_maps, summary
from grounding.evaluation.protocols import TABLE, PhraseMaps, Protocol
from grounding.evaluation.report import FORMAT
from grounding.explanation.explanation import PatchMap

NOT_READ, NOT_IN_RUN, OTHER_CAPTION = "not_read", "not_in_run", "other_caption"
NO_BOXES = "no_boxes"
_NO_PIXELS = Image.new("RGB", (1, 1))


@dataclass(frozen=True)
class RunScoreConfig(PointingConfig):
    """What of a run is scored. `protocol`: by name; none: all those that the run has texts for."""

    captions: Captions = "all"
    protocol: tuple[str, ...] = ()


@dataclass(eq=False)
class RunScores:
    """What one protocol scored, per picture, and what it left out and why. `texts` counts the run's texts for it."""

    protocol: Protocol
    scored: list[dict[str, MapScores]] = field(default_factory=list)
    phrases: int = 0
    texts: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_images: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, told: Sequence[PhraseMaps], rules: RunScoreConfig) -> None:
        """Score a picture, or count why not."""
        cases = self.protocol.cases(record, told)
        self.skipped += cases.skipped
        if not cases.mentions:
            self.skipped_images[_why(record, cases.skipped)] += 1
            return
        self.phrases += cases.phrases
        how = (rules.peak, (rules.cut,), self.protocol.closed)
        self.scored.append(score_maps(cases.boxes, cases.mentions, cases.maps, *how))


def run_dataset(run: RunFolder, folder: str | Path | None = None) -> Dataset:
    """The data set of a run, or the same in another folder. Raises DataError where it is gone or has no boxes."""
    said = run.manifest.get("data") or {}
    where = folder or said.get("folder")
    if not where:
        raise DataError(f"{escape(run.path)} does not say where its pictures are from: name them with --data")
    try:
        dataset = open_dataset(where, said.get("split"))
    except DataError as error:
        raise DataError(f"{error}" if folder else f"{error}; if the run's data moved, name them with --data") from None
    if not dataset.boxes:
        raise DataError(
            f"{escape(Path(where))} ({dataset.layout}) has no boxes for phrases: there is nothing to score by"
        )
    return dataset


def evaluate_run(
    run: RunFolder, dataset: Dataset, rules: RunScoreConfig | None = None, *, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """One document per protocol, by its name, as `scripts/evaluate.py --run --format json` prints them.

    Raises DataError for a damaged run, GroundingError where a protocol that was asked for, or any, scores nothing.
    """
    rules = rules or RunScoreConfig()
    rules = replace(rules, min_entities=rules.entities(dataset.folder))
    tallies = [RunScores(TABLE[name]) for name in rules.protocol or TABLE]
    problems = [*_doubts(run, dataset), *dataset.problems]
    for rows in tqdm(run.images(), desc="scored", unit="picture", disable=not progress):
        name = rows[0]["image"]
        if name in dataset.broken:
            continue
        try:
            record = dataset.read(name)
        except DataError as error:
            problems.append(str(error))
            for tally in tallies:
                tally.skipped_images[error.status] += 1
            continue
        if not _few(record, rules, tallies):
            problems += record.problems
            found, captions = _Maps(rows, run), _captions(record, rules.captions)
            for tally in tallies:
                tally.texts += found.count(tally.protocol.kind)
                tally.add(record, found.told(captions, tally.protocol.kind, dataset.heldout or frozenset()), rules)
    silent = {tally.protocol.name: _silence(run, tally, problems) for tally in tallies if not tally.scored}
    if silent and (rules.protocol or len(silent) == len(tallies)):
        raise GroundingError(next(iter(silent.values())))
    problems += silent.values()
    return {
        tally.protocol.name: _document(tally, run.about, dataset, rules, problems) for tally in tallies if tally.scored
    }


def _doubts(run: RunFolder, dataset: Dataset) -> list[str]:
    """What must be known of the run as a whole."""
    said = []
    missing = sum(run.said(shard) is None for shard in run.shards)
    if missing:
        said.append(f"{missing} of {len(run.shards)} shards of the run are not done: their pictures are not scored")
    digest = run.manifest["fingerprint"].get("data")
    if digest is not None and digest != dataset.digest():
        said.append(f"{escape(dataset.folder)} is not as it was when the run was made: captions or boxes changed")
    return said


def _few(record: Record, rules: RunScoreConfig, tallies: Sequence[RunScores]) -> bool:
    """Whether a picture has too few entities to be scored, and counted as such."""
    if len(record.boxes) >= (rules.min_entities or 1):
        return False
    phrases = sum(len(caption.phrases) for caption in _captions(record, rules.captions))
    for tally in tallies:
        tally.skipped_images[FEW] += 1
        tally.skipped[FEW] += phrases
    return True


def _captions(record: Record, captions: Captions) -> tuple[Caption, ...]:
    return record.captions[:1] if captions == "first" else record.captions


def _silence(run: RunFolder, tally: RunScores, problems: Sequence[str]) -> str:
    """Why a protocol scored nothing."""
    name = tally.protocol.name
    counts = run.counts()
    if not any(tally.skipped_images.values()) or all(status.startswith("failed") for status in counts):
        return f"{escape(run.path)} has no maps to score: {_listed(counts) or 'no shard is done'}"
    if not tally.texts and tally.skipped[NOT_IN_RUN]:
        return (
            f"{name} cannot be scored: {escape(run.path)} has no maps of its texts ({tally.protocol.text}); "
            f"ground_flickr30k.py makes them with --protocols {name}"
        )
    first = f"; first of all: {problems[0]}" if problems else ""
    skipped = {"phrases": tally.skipped, "pictures": tally.skipped_images}
    why = "; ".join(f"{what}: {_listed(counts)}" for what, counts in skipped.items() if counts)
    return f"{name} scored nothing of {escape(run.path)} ({why}){first}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _document(
    tally: RunScores, about: RunMetadata, dataset: Dataset, rules: RunScoreConfig, problems: Sequence[str]
) -> dict[str, Any]:
    protocol = tally.protocol
    thresholds = dict.fromkeys(about.methods, rules.cut)
    return {
        "format": FORMAT,
        "protocol": protocol.name,
        "model": about.model["id"],
        "data": data_name(dataset.folder),
        "split": dataset.split,
        "pictures": len(tally.scored),
        "cases": sum(len(next(iter(image.values())).phrases) for image in tally.scored),
        "phrases": tally.phrases,
        "skipped": dict(tally.skipped),
        "skipped_pictures": dict(tally.skipped_images),
        "rules": {
            "layout": dataset.layout,
            "unit": protocol.unit,
            "text": protocol.text,
            "hit": protocol.hit,
            **rules.described(),
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
            key: summary([image[key] for image in tally.scored], thresholds.get(key), rules.seed)
            for key in (*about.methods, *BASELINES)
        },
        "problems": list(problems),
        "warnings": {},
        "provenance": dict(about.provenance),
    }


# ---------------------------------------------------------------- one picture


class _Maps:
    """The maps of one picture's phrases, by kind of text, line of the caption and characters."""

    def __init__(self, rows: Sequence[Row], run: RunFolder) -> None:
        self.rows = {row["line"]: row for row in rows}
        self.maps: dict[tuple[str, int, int, int], Mapping[str, PatchMap]] = {}
        about, shared = run.about, run.shared(rows)
        kinds = {protocol.kind for protocol in TABLE.values()}
        for row in rows:
            if row["entries"] is None:
                continue
            found = from_row(row, about, _stand_in(row), shared, prompts=True)
            for place, entry in enumerate(found.entries):
                if entry.kind in kinds:
                    maps = {key: found.map(place, key) for key in found.methods}
                    self.maps.setdefault((entry.kind, row["line"], entry.start, entry.end), maps)

    def count(self, kind: str) -> int:
        """How many texts of a kind there are."""
        return sum(key[0] == kind for key in self.maps)

    def told(self, captions: Sequence[Caption], kind: str, heldout: frozenset[str]) -> list[PhraseMaps]:
        """Every phrase with its maps, or why there are none."""
        made = []
        for caption in captions:
            reason = self._reason(caption)
            for phrase in caption.phrases:
                maps = None if reason else self.maps.get((kind, caption.line, phrase.start, phrase.end))
                cut = kind != PROMPT and maps is None and not reason and self.rows[caption.line]["truncated"]
                made.append(
                    PhraseMaps(phrase, mention_of(phrase, heldout), maps, reason or (NOT_READ if cut else NOT_IN_RUN))
                )
        return made

    def _reason(self, caption: Caption) -> str:
        """Why nothing of a caption can be scored, empty where it can."""
        row = self.rows.get(caption.line)
        if row is None:
            return NOT_IN_RUN
        if row["entries"] is None:
            return str(row["status"])
        return "" if row["caption"] == caption.text else OTHER_CAPTION


def _stand_in(row: Row) -> Picture:
    """In place of the picture, which no score looks at: its size and digest."""
    size = row["geometry"]["width"], row["geometry"]["height"]
    return Picture(_NO_PIXELS, *size, None, row["image_sha256"])


def _why(record: Record, skipped: Mapping[str, int]) -> str:
    """Why no phrase of a picture was scored: the commonest reason among those with boxes."""
    boxless = {MISSING, *record.no_box.values()}
    own = {reason: count for reason, count in skipped.items() if reason not in boxless}
    return max(own, key=own.__getitem__) if own else NO_BOXES
