"""Compute shards on a Ray cluster: one worker per device, the shard of a dead worker goes to another."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.batch.config import LoadAdapter, RunConfig, RunDescription, check_same
from grounding.batch.executors import LocalExecutor
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import GroundingError, OptionError
from grounding.core.printable import one_line

# Workers that may die of one shard, or before they are ready, until the run fails.
MAX_DEATHS = 3
# Seconds until a worker must be ready while no other is busy: the cluster may have to free resources for it.
START_TIMEOUT = 900


class RayWorker:
    """A process of the cluster with its own model; data and run folder have the same paths on every machine."""

    def __init__(self, load: LoadAdapter, config: RunConfig, folder: str) -> None:
        os.chdir(folder)  # the driver's working directory, for relative paths
        self.executor = LocalExecutor(load, config, lambda _rows, _images: None)
        self.checked = False

    def ready(self) -> None:
        """Return when the process has started."""

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """Describe the run as this process computes it."""
        return self.executor.describe(ids)

    def compute(self, folder: str, shard: int, retry: Collection[str]) -> dict[str, Any] | None:
        """Compute and commit a shard; return its sidecar. None: there was nothing to compute."""
        run = RunFolder.open(folder)
        if not self.checked:
            check_same(run, self.executor.describe(run.ids).fingerprint)
            self.checked = True
        return next(self.executor.compute(run, [shard], retry), None)


def worker_slots(machines: Sequence[Mapping[str, float]], threads: int) -> tuple[int, dict[str, float]]:
    """Number of workers that fit on machines with these resources, and the resources of each: one GPU if the cluster
    has any, else one CPU per thread.

    Raises OptionError if none fits: Ray would wait for a larger machine to join.
    """
    if gpus := sum(int(machine.get("GPU", 0)) for machine in machines):
        return gpus, {"num_gpus": 1}
    cpus = [int(machine.get("CPU", 0)) for machine in machines] or [0]
    if fitting := sum(count // threads for count in cpus):
        return fitting, {"num_cpus": threads}
    raise OptionError(
        f"a worker needs one CPU for each of {threads} threads, but no machine of the Ray cluster has more than "
        f"{max(cpus)}: use --threads {max(*cpus, 1)}"
    )


class RayExecutor:
    """Assign shards to workers on a Ray cluster. `address`: of a running cluster, "auto", or "local" to start one.

    Use as a context manager. Raises OptionError if Ray is not installed, GroundingError if it does not respond.
    """

    def __init__(self, load: LoadAdapter, config: RunConfig, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise OptionError("--engine ray needs Ray: pip install 'grounding-maps[ray]'") from None
        self.ray, self.load, self.config = ray, load, config
        self.failure_limit = config.failure_limit()
        self.idle, self.starting = list[Any](), dict[Any, Any]()
        # Always given: without an address Ray searches the environment, and the files of earlier clusters.
        options: dict[str, Any] = {"address": address} | ({"include_dashboard": False} if address == "local" else {})
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise GroundingError(f"Ray does not respond at {address!r}: {' '.join(str(error).split())}") from None
        try:
            self.slots, self.resources = worker_slots(
                [node["Resources"] for node in ray.nodes() if node["Alive"]], config.threads or 1
            )
        except OptionError:
            ray.shutdown()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def start(self) -> None:
        """Start a worker. It may have to wait for resources, so it counts as idle only once it is ready."""
        remote = self.ray.remote(RayWorker).options(max_restarts=0, **self.resources)
        worker: Any = remote.remote(self.load, self.config, str(Path.cwd()))
        self.starting[worker.ready.remote()] = worker

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """Describe the run in a worker: the driver may have neither model nor accelerator."""
        self.start()
        deaths = 0
        while not self.idle:
            deaths += self._wait({})
            self._check_starts(deaths)
        try:
            found: RunDescription = self._get(self.idle[0].describe.remote(list(ids)))
        except self._death_errors as error:
            raise GroundingError(
                f"a worker of the Ray cluster died while it loaded the model ({one_line(error)})"
            ) from None
        return found

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Compute and commit shards; yield their sidecars. Raises GroundingError for a shard that kills its workers,
        FailureLimitError, and errors of a worker."""
        left, deaths, starts = deque(shards), Counter[int](), 0
        busy: dict[Any, tuple[int, Any]] = {}
        # Workers of an earlier call are still there, and hold a CPU or GPU each.
        for _ in range(min(self.slots, len(left)) - len(self.idle) - len(self.starting)):
            self.start()
        folder = str(run.path.resolve())
        while left or busy:
            while left and self.idle:
                shard, worker = left.popleft(), self.idle.pop()
                busy[worker.compute.remote(folder, shard, list(retry))] = (shard, worker)
            starts += self._wait(busy)
            self._check_starts(starts)
            for reference in self.ray.wait(list(busy), timeout=0)[0] if busy else []:
                shard, worker = busy.pop(reference)
                try:
                    sidecar = self._get(reference)
                except self._death_errors as error:
                    deaths[shard] += 1
                    if deaths[shard] == MAX_DEATHS:
                        why = f"shard {shard}: {MAX_DEATHS} workers that computed it died ({one_line(error)})"
                        raise GroundingError(why) from None
                    left.appendleft(shard)  # for any idle worker: the cluster may have no resources left for a new one
                    self.start()
                else:
                    self.idle.append(worker)
                    if sidecar:
                        self.failure_limit.add_shard(sidecar)
                        yield sidecar

    def _wait(self, busy: Mapping[Any, Any]) -> int:
        """Wait until a worker is ready or a busy one is done; return how many died before they were ready.

        Raises GroundingError if no worker is busy and none is ready in time.
        """
        ready, _ = self.ray.wait([*busy, *self.starting], timeout=None if busy else START_TIMEOUT)
        if not ready:
            raise GroundingError(
                f"no worker of the Ray cluster was ready after {START_TIMEOUT / 60:.0f} minutes: each needs "
                f"{self.resources}, which other jobs may hold (see `ray status`)"
            )
        died = 0
        for reference in ready:
            if (worker := self.starting.pop(reference, None)) is None:
                continue
            try:
                self._get(reference)
                self.idle.append(worker)
            except self._death_errors:
                died += 1
                self.start()
        return died

    def _check_starts(self, deaths: int) -> None:
        if deaths >= MAX_DEATHS:
            raise GroundingError(f"{deaths} workers of the Ray cluster died before they were ready; see Ray's logs")

    @property
    def _death_errors(self) -> tuple[type[Exception], ...]:
        """Errors of Ray for a worker that died, or was killed for lack of memory."""
        return self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError

    def _get(self, reference: Any) -> Any:
        """Return a result; a GroundingError of the worker is raised unchanged."""
        try:
            return self.ray.get(reference)
        except self._death_errors:
            raise
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GroundingError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise GroundingError(f"Ray: {one_line(error)}") from None
