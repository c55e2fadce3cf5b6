"""Begin or resume a batch run, compute the missing shards, and check its result."""

from __future__ import annotations

import multiprocessing
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path

from grounding.batch.config import RunConfig, begin, check_same
from grounding.batch.executors import Executor, ProcessRank
from grounding.batch.progress import Progress, failures
from grounding.batch.rows import STATUSES
from grounding.batch.run_folder import RunFolder, locked
from grounding.core.errors import FailureLimitError, GroundingError, OptionError
from grounding.core.registry import did_you_mean
from grounding.datasets.records import Dataset

EXIT_FAILURES = 3


def run_batch(
    folder: Path,
    config: RunConfig,
    dataset: Dataset,
    ids: Sequence[str],
    executor: Executor,
    *,
    rank: ProcessRank | None = None,
    retry: Collection[str] = (),
    progress: Progress | None = None,
) -> RunFolder:
    """Begin or resume the run in `folder`, compute all missing shards, and return it.

    Images with a row of a status in `retry` are computed again. Raises OutputError (another run holds the folder, or it
    cannot be written), DifferentRunError, FailureLimitError, OptionError for an unknown status, and errors of the
    request. Committed shards stay.
    """
    # A decode worker that imports a script without the guard would start the whole run again.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise GroundingError('a run begins while a script is imported: put it under `if __name__ == "__main__":`')
    rank, progress = rank or ProcessRank(), progress or Progress()
    check_statuses(retry)
    main = rank.index == 0
    with locked(folder) if main else nullcontext():
        if main:
            run = begin(folder, config, executor.describe(ids), dataset, ids)
            _tidy(run, progress)
        rank.wait()
        run = RunFolder.open(folder)
        if not main:
            check_same(run, executor.describe(ids).fingerprint)
        sidecars = {shard: run.sidecar(shard) for shard in run.shards}
        missing = [shard for shard, sidecar in sidecars.items() if sidecar is None]
        again = [shard for shard, sidecar in sidecars.items() if sidecar and set(retry) & sidecar["counts"].keys()]
        stamps = {shard: run.stamp(shard) for shard in [*missing, *again]}
        rank.wait()  # no process commits before all have listed the missing shards
        own, own_again = rank.share(missing), rank.share(again)
        progress.on_start(run, [*own, *own_again], _images_left(run, own, own_again, retry))
        for statuses, shards in (((), own), (retry, own_again)):
            if shards:
                for sidecar in executor.compute(run, shards, statuses):
                    progress.on_shard(sidecar)
        rank.wait_for(run, stamps)
        run.finish()
    _check_any_succeeded(run)
    return run


def exit_code(run: RunFolder) -> int:
    """0: no row failed; 3: some rows failed; 1: some shards are missing."""
    if any(run.sidecar(shard) is None for shard in run.shards):
        return 1
    return EXIT_FAILURES if failures(run) else 0


def check_statuses(statuses: Collection[str]) -> None:
    """Raises OptionError for a status that rows cannot have."""
    for status in statuses:
        if status not in STATUSES:
            raise OptionError(
                f"no status {status!r}{did_you_mean(status, list(STATUSES))} (there are: {', '.join(STATUSES)})"
            )


def _tidy(run: RunFolder, progress: Progress) -> None:
    """Remove partially written files, set damaged tables aside."""
    run.remove_partial_files()
    for shard in run.shards:
        if run.damaged(shard) and (path := run.set_aside(shard)) is not None:
            progress.on_damaged(path)


def _images_left(run: RunFolder, missing: Sequence[int], again: Sequence[int], retry: Collection[str]) -> int:
    """Number of images to compute."""
    failed = [failure for shard in again for failure in (run.sidecar(shard) or {})["failures"]]
    images = {failure["image"] for failure in failed if failure["status"] in retry}
    return sum(len(run.members(shard)) for shard in missing) + len(images)


def _check_any_succeeded(run: RunFolder) -> None:
    counts = run.counts()
    if counts and all(status.startswith("failed") for status in counts):
        first = next(one for shard in run.shards for one in (run.sidecar(shard) or {"failures": ()})["failures"])
        raise FailureLimitError(f"every row failed ({counts.total()}); the first: {first['error']}")
