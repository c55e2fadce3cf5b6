"""Computing the shards of a batch run in one process: pictures decoded ahead, explained in batches, committed whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from grounding.adapter.base import Adapter
from grounding.batch.config import RunConfig
from grounding.batch.decode_pool import Decoders, Opening, Source
from grounding.batch.explainer import BatchExplainer, ImageJob
from grounding.batch.failure_limit import FailureLimit
from grounding.batch.requests import Sample, sample_of
from grounding.batch.rows import INPUT, Row, deduplicate_shared_maps, failed_row
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import ImageError
from grounding.core.images import Picture
from grounding.datasets.records import Dataset

Tell = Callable[[Sequence[Row], int], None]
Opened = tuple[tuple[int, Sample], Picture | ImageError]


class ShardRunner:
    """Computes shards of a run. `tell` is called with rows as they come and how many pictures are finished by them."""

    def __init__(
        self,
        run: RunFolder,
        work: RunConfig,
        adapter: Adapter,
        dataset: Dataset,
        *,
        budget: FailureLimit | None = None,
        tell: Tell = lambda _rows, _images: None,
    ) -> None:
        self.run, self.work, self.dataset = run, work.settled(adapter), dataset
        self.budget, self.tell = budget or FailureLimit(), tell
        self.explainer = BatchExplainer(adapter, self.work.request)
        # As many as the run began with: sums in another order differ in the last digit.
        torch.set_num_threads(run.manifest["threads"])

    def compute(self, shards: Sequence[int], retry: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Compute and commit shards, each of them whole; yields their sidecars.

        With `retry`, only pictures that have a row of such a status, beside the rows that the shard has already.
        Raises BudgetError, OutputError; the shard that was under way is dropped.
        """
        opening = Opening(self.dataset.root, self.work.max_pixels)
        ahead = self.work.batch_size  # large photographs take 40 MB each, decoded
        decoders: Decoders[tuple[int, Sample]] = Decoders(opening, self.work.workers, ahead)
        with decoders:
            stream = decoders.opened(self._items(shards, retry))
            for shard, opened in groupby(stream, key=lambda one: one[0][0]):
                started = time.perf_counter()
                rows = self._rows(opened) | (self._kept(shard, retry) if retry else {})
                ordered = [row for name in self.run.members(shard) for row in rows[name]]
                deduplicate_shared_maps(ordered, self.run.about.shared)
                yield self.run.commit(shard, ordered, time.perf_counter() - started)

    def _items(self, shards: Sequence[int], retry: Collection[str]) -> Iterator[tuple[tuple[int, Sample], Source]]:
        for shard in shards:
            kept = self._kept(shard, retry) if retry else {}
            for name in self.run.members(shard):
                if name not in kept:
                    sample = sample_of(self.dataset, name, self.work.captions or "all", self.work.protocols)
                    yield (shard, sample), sample.image if sample.asks else None

    def _kept(self, shard: int, retry: Collection[str]) -> dict[str, list[Row]]:
        """The rows of a shard's pictures that are not to be computed again, by picture."""
        rows: dict[str, list[Row]] = {}
        for row in self.run.table(shard).to_pylist():
            rows.setdefault(row["image"], []).append(row)
        return {name: own for name, own in rows.items() if not any(row["status"] in retry for row in own)}

    def _rows(self, opened: Iterator[Opened]) -> dict[str, list[Row]]:
        """Rows by picture, of one shard."""
        made: dict[str, list[Row]] = {}
        batch: list[ImageJob] = []
        for (_, sample), image in opened:
            failures = [_failure(sample, f.line, f.text or None, INPUT, f.error) for f in sample.failures]
            if sample.asks and isinstance(image, Picture):
                batch.append(ImageJob(sample.id, image, sample.asks))
            elif sample.asks and isinstance(image, ImageError):
                why = image.status, str(image)
                failures += [_failure(sample, ask.line, ask.caption, *why) for ask in sample.asks]
            made[sample.id] = failures
            self._count(failures, 0 if batch and batch[-1].sample == sample.id else 1)
            if len(batch) == self.work.batch_size:
                self._explain(batch, made)
                batch = []
        if batch:
            self._explain(batch, made)
        return {name: sorted(rows, key=lambda row: row["line"]) for name, rows in made.items()}

    def _explain(self, batch: Sequence[ImageJob], made: dict[str, list[Row]]) -> None:
        rows = self.explainer.rows(batch)
        for row in rows:
            made[row["image"]].append(row)
        self._count(rows, len(batch))

    def _count(self, rows: Sequence[Row], images: int) -> None:
        self.tell(rows, images)
        self.budget.add(rows)


def _failure(sample: Sample, line: int, caption: str | None, status: str, error: str) -> Row:
    # A broken row of the data set belongs to no picture: its name is its id.
    name = None if sample.listed else sample.id
    return failed_row(sample.id, line, caption, status, error, name)
