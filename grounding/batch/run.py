"""A batch run from its beginning, or from where it was left, to its end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from grounding.batch.config import RunConfig, RunDescription, begin, check_same
from grounding.batch.executors import ProcessRank
from grounding.batch.progress import Progress, failures
from grounding.batch.rows import STATUSES
from grounding.batch.run_folder import RunFolder, locked
from grounding.core.errors import EXIT_BUDGET, BudgetError, GroundingError, OptionError
from grounding.core.registry import did_you_mean
from grounding.datasets.records import Dataset

EXIT_FAILURES = 3


@runtime_checkable
class Executor(Protocol):
    """Who computes: see `engines`."""

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """The run as the process sees it that computes it."""

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Compute and commit shards; their sidecars as they come."""


def run_batch(
    folder: Path,
    work: RunConfig,
    dataset: Dataset,
    ids: Sequence[str],
    hands: Executor,
    *,
    rank: ProcessRank | None = None,
    retry: Collection[str] = (),
    watch: Progress | None = None,
) -> RunFolder:
    """Begin or resume the run in `folder` and compute what is left; pictures with a row of a status in `retry` again.

    Raises OutputError (another run holds the folder, nothing can be written), DifferentRunError, BudgetError, and what
    is wrong with every picture alike. Whatever was committed stays.
    """
    # A process of `decode_ahead` that imports a script without the usual guard would compute the run all over.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise GroundingError('a run begins while a script is imported: put it under `if __name__ == "__main__":`')
    rank, watch = rank or ProcessRank(), watch or Progress()
    check_statuses(retry)
    main = rank.index == 0
    with locked(folder) if main else nullcontext():
        if main:
            run = begin(folder, work, hands.describe(ids), dataset, ids)
            _tidy(run, watch)
        rank.wait()
        run = RunFolder.open(folder)
        if not main:
            check_same(run, hands.describe(ids).fingerprint)
        there = {shard: run.said(shard) for shard in run.shards}
        missing = [shard for shard, said in there.items() if said is None]
        again = [shard for shard, said in there.items() if said is not None and set(retry) & said["counts"].keys()]
        stamps = {shard: run.stamp(shard) for shard in [*missing, *again]}
        rank.wait()  # nobody commits before all have seen what there is
        own, own_again = rank.share(missing), rank.share(again)
        watch.begins(run, [*own, *own_again], _left(run, own, own_again, retry))
        for statuses, shards in (((), own), (retry, own_again)):
            if shards:
                for said in hands.compute(run, shards, statuses):
                    watch.shard(said)
        rank.wait_for(run, stamps)
        run.finish()
    _check_hopeless(run)
    return run


def exit_code(run: RunFolder) -> int:
    """0: all rows are there and explained; 3: all are there, some failed; 1: some are missing."""
    if any(run.said(shard) is None for shard in run.shards):
        return 1
    return EXIT_FAILURES if failures(run) else 0


def check_statuses(statuses: Collection[str]) -> None:
    """Raises OptionError for a status that no row has."""
    for status in statuses:
        if status not in STATUSES:
            raise OptionError(
                f"no status {status!r}{did_you_mean(status, list(STATUSES))} (there are: {', '.join(STATUSES)})"
            )


def _tidy(run: RunFolder, watch: Progress) -> None:
    """Remove what was half-written, set aside what is damaged."""
    run.clear_parts()
    for shard in run.shards:
        if run.damaged(shard) and (path := run.set_aside(shard)) is not None:
            watch.damaged(path)


def _left(run: RunFolder, missing: Sequence[int], again: Sequence[int], retry: Collection[str]) -> int:
    """How many pictures are to be computed."""
    failed = {one["image"] for shard in again for one in (run.said(shard) or {})["failures"] if one["status"] in retry}
    return sum(len(run.members(shard)) for shard in missing) + len(failed)


def _check_hopeless(run: RunFolder) -> None:
    counts = run.counts()
    if counts and all(status.startswith("failed") for status in counts):
        first = next(one for shard in run.shards for one in (run.said(shard) or {"failures": ()})["failures"])
        raise BudgetError(f"every row failed ({counts.total()}); the first: {first['error']}")


__all__ = [
    "EXIT_BUDGET",
    "EXIT_FAILURES",
    "Executor",
    "Progress",
    "check_statuses",
    "exit_code",
    "failures",
    "run_batch",
]
