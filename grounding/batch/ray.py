"""Compute shards on a Ray cluster: one worker per device, a dead worker's shard is given to another."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.batch.config import Load, RunConfig, RunDescription, check_same
from grounding.batch.executors import LocalExecutor
from grounding.batch.run_folder import RunFolder
from grounding.core.errors import GroundingError, OptionError
from grounding.core.printable import one_line

# Deaths of workers after which a shard is given up.
DEATHS = 3


# Seconds that a cluster may take to find a place for the first worker.
PATIENCE = 900


class RayWorker:
    """One process of a cluster with a model of its own; it sees the same data and run folder by the same paths."""

    def __init__(self, load: Load, work: RunConfig, folder: str) -> None:
        os.chdir(folder)  # where the driver stands: paths mean the same here
        self.here = LocalExecutor(load, work, lambda _rows, _images: None)
        self.checked = False

    def ready(self) -> None:
        """Answers when it is there."""

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """The run as this process sees it."""
        return self.here.describe(ids)

    def compute(self, folder: str, shard: int, retry: Collection[str]) -> dict[str, Any] | None:
        """Compute and commit a shard; returns its sidecar. None: there was nothing to do."""
        run = RunFolder.open(folder)
        if not self.checked:
            check_same(run, self.here.describe(run.ids).fingerprint)
            self.checked = True
        return next(self.here.compute(run, [shard], retry), None)


def worker_slots(machines: Sequence[Mapping[str, float]], threads: int) -> tuple[int, dict[str, float]]:
    """How many workers fit on machines with these resources, and what each takes: a GPU where there are some, else a
    CPU per thread.

    Raises OptionError where none fits: Ray would wait for such a machine to join.
    """
    if gpus := sum(int(machine.get("GPU", 0)) for machine in machines):
        return gpus, {"num_gpus": 1}
    cpus = [int(machine.get("CPU", 0)) for machine in machines] or [0]
    if fitting := sum(count // threads for count in cpus):
        return fitting, {"num_cpus": threads}
    raise OptionError(
        f"a worker takes a CPU for each of {threads} threads, but no machine of the Ray cluster has more than "
        f"{max(cpus)}: say --threads {max(*cpus, 1)}"
    )


class RayExecutor:
    """Ray as the scheduler of shard numbers. `address`: of a running cluster, "auto", or "local" for one of its own.

    Use as a context manager. Raises OptionError where Ray is not installed, GroundingError where it does not answer.
    """

    def __init__(self, load: Load, work: RunConfig, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise OptionError("--engine ray needs Ray: pip install 'grounding-maps[ray]'") from None
        self.ray, self.load, self.work = ray, load, work
        self.budget = work.budget()
        self.idle, self.starting = list[Any](), dict[Any, Any]()
        # Not left out: Ray would look for a cluster in the environment, and in what others left in its folder.
        where: dict[str, Any] = {"address": address} | ({"include_dashboard": False} if address == "local" else {})
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
        except (OSError, RuntimeError, ValueError) as error:
            raise GroundingError(f"Ray does not answer at {address!r}: {' '.join(str(error).split())}") from None
        try:
            self.places, self.resources = worker_slots(
                [node["Resources"] for node in ray.nodes() if node["Alive"]], work.threads or 1
            )
        except OptionError:
            ray.shutdown()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def start(self) -> None:
        """Start a worker; it is idle once it answers, for it may have to wait for a place, and load a model."""
        made = self.ray.remote(RayWorker).options(max_restarts=0, **self.resources)
        worker: Any = made.remote(self.load, self.work, str(Path.cwd()))
        self.starting[worker.ready.remote()] = worker

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """The run as a worker sees it: the driver may have neither model nor accelerator."""
        self.start()
        deaths = 0
        while not self.idle:
            deaths += self._wait({})
            self._check_starts(deaths)
        try:
            found: RunDescription = self._get(self.idle[0].describe.remote(list(ids)))
        except self._died as error:
            raise GroundingError(
                f"a worker of the Ray cluster died while it loaded the model ({one_line(error)})"
            ) from None
        return found

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Sidecars as they come. Raises GroundingError for a shard that kills its workers, and what a worker raises."""
        left, deaths, starts = deque(shards), Counter[int](), 0
        busy: dict[Any, tuple[int, Any]] = {}
        # Workers stay for the next call: each holds a CPU or GPU of the cluster.
        for _ in range(min(self.places, len(left)) - len(self.idle) - len(self.starting)):
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
                    said = self._get(reference)
                except self._died as error:
                    deaths[shard] += 1
                    if deaths[shard] == DEATHS:
                        why = f"shard {shard}: {DEATHS} workers that computed it died ({one_line(error)})"
                        raise GroundingError(why) from None
                    left.appendleft(shard)  # for whoever is idle: a new one may find no place any more
                    self.start()
                else:
                    self.idle.append(worker)
                    if said:
                        self.budget.add_shard(said)
                        yield said

    def _wait(self, busy: Mapping[Any, Any]) -> int:
        """Until a worker is ready, or one that is busy has an answer; how many died before they were ready.

        Raises GroundingError where nobody is busy and nobody gets ready.
        """
        ready, _ = self.ray.wait([*busy, *self.starting], timeout=None if busy else PATIENCE)
        if not ready:
            raise GroundingError(
                f"no worker of the Ray cluster was ready after {PATIENCE / 60:.0f} minutes: each takes "
                f"{self.resources}, which others may hold (`ray status` says who)"
            )
        died = 0
        for reference in ready:
            if (worker := self.starting.pop(reference, None)) is None:
                continue
            try:
                self._get(reference)
                self.idle.append(worker)
            except self._died:
                died += 1
                self.start()
        return died

    def _check_starts(self, deaths: int) -> None:
        if deaths >= DEATHS:
            raise GroundingError(f"{deaths} workers of the Ray cluster died before they were ready; see Ray's logs")

    @property
    def _died(self) -> tuple[type[Exception], ...]:
        """What Ray raises where a worker is gone, or was ended for its memory."""
        return self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError

    def _get(self, reference: Any) -> Any:
        """The result; what a worker raised is raised here as it was."""
        try:
            return self.ray.get(reference)
        except self._died:
            raise
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GroundingError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise GroundingError(f"Ray: {one_line(error)}") from None
