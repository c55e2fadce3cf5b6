"""Executors that compute shards: this process, `accelerate launch`, or Ray.

An executor only assigns shard numbers. A shard that a process did not commit is computed again by the next run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from grounding.adapter.base import Adapter
from grounding.batch.config import LoadAdapter, RunConfig, RunDescription, describe
from grounding.batch.run_folder import RunFolder
from grounding.batch.shards import OnRows, ShardRunner
from grounding.core.errors import GroundingError, OptionError
from grounding.datasets.records import Dataset

# Environment variables that a launcher sets beside WORLD_SIZE.
LAUNCHER_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.5


@runtime_checkable
class Executor(Protocol):
    """Computes shards of a run, in this process (LocalExecutor) or on a cluster (RayExecutor)."""

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """Describe the run in the process that computes it. Raises errors of the request."""

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Compute and commit shards; yield each sidecar when its shard is committed."""


@dataclass(frozen=True)
class ProcessRank:
    """Rank of this process among `count` processes launched together; without a launcher 0 of 1."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls, device: str) -> ProcessRank:
        """Join the processes of `accelerate launch` or torchrun, if WORLD_SIZE is set.

        Raises OptionError for incomplete environment variables, GroundingError if the processes do not connect.
        """
        size = os.environ.get("WORLD_SIZE", "").strip() or "1"
        if not size.isdecimal():
            raise OptionError(f"the environment variable WORLD_SIZE must be a number of processes, got {size!r}")
        launched = int(size)
        if launched < 2:
            return cls()
        if missing := [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]:
            raise OptionError(
                f"the environment sets WORLD_SIZE={launched}, but not {', '.join(missing)}: start the processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE"
            )
        import torch
        from accelerate import PartialState

        # Without an accelerator the processes only connect if PartialState is set to the CPU explicitly.
        state = PartialState(cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()))
        if state.num_processes != launched:
            raise GroundingError(f"{launched} processes were launched, but they do not connect on {device!r}")
        return cls(state.process_index, state.num_processes)

    def device(self, requested: str) -> str:
        """The device of this process: the requested one, or its own if several processes were launched."""
        if self.count == 1 or requested not in ("auto", "cuda"):
            return requested
        from accelerate import PartialState

        return str(PartialState().device)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def share(self, shards: Sequence[int]) -> list[int]:
        """The shards of this process: by number, so that shards committed meanwhile do not change the division."""
        return [shard for shard in shards if shard % self.count == self.index]

    def wait_for(self, run: RunFolder, stamps: Mapping[int, int]) -> None:
        """Wait until every shard of `stamps` was committed since its stamp was taken.

        A process that exits with an error makes the launcher end all others: none may exit before all have committed.
        """
        left = set(stamps) if self.count > 1 else set()
        while left := {shard for shard in left if run.sidecar(shard) is None or run.stamp(shard) == stamps[shard]}:
            time.sleep(POLL_SECONDS)


class LocalExecutor:
    """Compute shards in this process. The model is loaded on first use."""

    def __init__(self, load: LoadAdapter, config: RunConfig, on_rows: OnRows) -> None:
        self._load, self._config, self._on_rows = load, config, on_rows
        self._failure_limit = config.failure_limit()

    @cached_property
    def adapter(self) -> Adapter:
        """The model."""
        return self._load()

    @cached_property
    def dataset(self) -> Dataset:
        """The data set. Raises DataError."""
        return self._config.dataset()

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """Describe the run as this process computes it."""
        return describe(self._config.resolve(self.adapter), self.adapter, self.dataset, ids)

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Compute and commit shards; yield their sidecars. Raises as `ShardRunner.compute`."""
        runner = ShardRunner(
            run,
            self._config,
            self.adapter,
            self.dataset,
            failure_limit=self._failure_limit,
            on_rows=self._on_rows,
        )
        yield from runner.compute(shards, retry)
