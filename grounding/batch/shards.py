"""Compute the shards of a batch run in one process: decode images ahead, explain batches, commit whole shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from grounding.adapter.base import Adapter
from grounding.batch.config import RunConfig
from grounding.batch.decode_pool import Decoders, ImageOpener, Source
from grounding.batch.explainer import BatchExplainer, ImageJob
from grounding.batch.failure_limit import FailureLimit
from grounding.batch.requests import Sample, sample_of
from grounding.batch.rows import INPUT, Row, deduplicate_shared_maps, failed_row
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import ImageError
from grounding.core.images import Picture
from grounding.datasets.records import Dataset

# Called with computed rows, and the number of images that these rows complete.
OnRows = Callable[[Sequence[Row], int], None]
# (shard, sample) and its decoded image.
DecodedItem = tuple[tuple[int, Sample], Picture | ImageError]


class ShardRunner:
    """Compute shards of a run with one model. `on_rows` is called for each batch of rows."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        adapter: Adapter,
        dataset: Dataset,
        *,
        failure_limit: FailureLimit | None = None,
        on_rows: OnRows = lambda _rows, _images: None,
    ) -> None:
        self.run, self.config, self.dataset = run, config.resolve(adapter), dataset
        self.failure_limit, self.on_rows = failure_limit or FailureLimit(), on_rows
        self.explainer = BatchExplainer(adapter, self.config.request)
        # The number of threads of the first start: sums in another order differ in the last digit.
        torch.set_num_threads(run.manifest["threads"])

    def compute(self, shards: Sequence[int], retry: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Compute and commit shards, each of them whole; yield their sidecars.

        With `retry`, only images with a row of one of these statuses are computed; the shard's other rows are kept.
        Raises FailureLimitError, OutputError; the shard in progress is dropped.
        """
        opener = ImageOpener(self.dataset.root, self.config.max_pixels)
        ahead = self.config.batch_size  # a large photograph takes 40 MB, decoded
        decoders: Decoders[tuple[int, Sample]] = Decoders(opener, self.config.workers, ahead)
        with decoders:
            stream = decoders.decode(self._items(shards, retry))
            for shard, decoded in groupby(stream, key=lambda one: one[0][0]):
                started = time.perf_counter()
                rows = self._rows(decoded) | (self._kept(shard, retry) if retry else {})
                ordered = [row for name in self.run.members(shard) for row in rows[name]]
                deduplicate_shared_maps(ordered, self.run.metadata.shared_columns)
                yield self.run.commit(shard, ordered, time.perf_counter() - started)

    def _items(self, shards: Sequence[int], retry: Collection[str]) -> Iterator[tuple[tuple[int, Sample], Source]]:
        for shard in shards:
            kept = self._kept(shard, retry) if retry else {}
            for name in self.run.members(shard):
                if name not in kept:
                    sample = sample_of(self.dataset, name, self.config.captions or "all", self.config.protocols)
                    yield (shard, sample), sample.image if sample.requests else None

    def _kept(self, shard: int, retry: Collection[str]) -> dict[str, list[Row]]:
        """The stored rows of the images that are not computed again, by image."""
        rows: dict[str, list[Row]] = {}
        for row in self.run.table(shard).to_pylist():
            rows.setdefault(row["image"], []).append(row)
        return {name: own for name, own in rows.items() if not any(row["status"] in retry for row in own)}

    def _rows(self, decoded: Iterator[DecodedItem]) -> dict[str, list[Row]]:
        """Rows by image, of one shard."""
        made: dict[str, list[Row]] = {}
        batch: list[ImageJob] = []
        for (_, sample), image in decoded:
            failures = [_failure(sample, f.line, f.text or None, INPUT, f.error) for f in sample.failures]
            if sample.requests and isinstance(image, Picture):
                batch.append(ImageJob(sample.id, image, sample.requests))
            elif sample.requests and isinstance(image, ImageError):
                why = image.status, str(image)
                failures += [_failure(sample, request.line, request.caption, *why) for request in sample.requests]
            made[sample.id] = failures
            self._count(failures, 0 if batch and batch[-1].sample == sample.id else 1)
            if len(batch) == self.config.batch_size:
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
        self.on_rows(rows, images)
        self.failure_limit.add(rows)


def _failure(sample: Sample, line: int, caption: str | None, status: str, error: str) -> Row:
    # The id of a row that belongs to no image is its own name.
    name = None if sample.listed else sample.id
    return failed_row(sample.id, line, caption, status, error, name)
