"""Who computes which shard of a run: this process, the processes of an `accelerate launch`, or workers of Ray.

They only hand out numbers of shards. Whatever becomes of a process, a shard that it did not commit is computed again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grounding.adapter.base import Adapter
from grounding.batch.config import Load, RunConfig, RunDescription, describe
from grounding.batch.run_folder import RunFolder
from grounding.batch.shards import ShardRunner, Tell
from grounding.core.errors import GroundingError, OptionError
from grounding.datasets.records import Dataset

# What launchers tell their processes.
LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ProcessRank:
    """The place of this process among those that were launched together; alone: 0 of 1."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls, device: str) -> ProcessRank:
        """As `accelerate launch` made it; the processes can then wait for each other. Raises GroundingError."""
        size = os.environ.get("WORLD_SIZE", "").strip() or "1"
        if not size.isdecimal():
            raise OptionError(f"the environment variable WORLD_SIZE is {size!r}, no number of processes")
        launched = int(size)
        if launched < 2:
            return cls()
        if lacking := [name for name in LAUNCHED if not os.environ.get(name)]:
            raise OptionError(
                f"the environment says WORLD_SIZE={launched}, but not {', '.join(lacking)}: start the processes with "
                "accelerate launch or torchrun, or unset WORLD_SIZE"
            )
        import torch
        from accelerate import PartialState

        # Without an accelerator the processes only find each other if they are told to compute on the CPU.
        state = PartialState(cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()))
        if state.num_processes != launched:
            raise GroundingError(f"{launched} processes were launched, but they do not find each other on {device!r}")
        return cls(state.process_index, state.num_processes)

    def device(self, asked: str) -> str:
        """The device of this process: its own where several were launched."""
        if self.count == 1 or asked not in ("auto", "cuda"):
            return asked
        from accelerate import PartialState

        return str(PartialState().device)

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def share(self, shards: Sequence[int]) -> list[int]:
        """The shards of this process: by their number, as the others may have done some by now."""
        return [shard for shard in shards if shard % self.count == self.index]

    def wait_for(self, run: RunFolder, stamps: Mapping[int, int]) -> None:
        """Wait until the others have committed theirs, beyond these stamps: a process that ends in failure makes the
        launcher end them all."""
        left = set(stamps) if self.count > 1 else set()
        while left := {shard for shard in left if run.said(shard) is None or run.stamp(shard) == stamps[shard]}:
            time.sleep(POLL_SECONDS)


class LocalExecutor:
    """This process. The model is loaded when it is first needed."""

    def __init__(self, load: Load, work: RunConfig, tell: Tell) -> None:
        self._load, self._work, self.tell = load, work, tell
        self._budget = work.budget()

    @cached_property
    def adapter(self) -> Adapter:
        """The model."""
        return self._load()

    @cached_property
    def dataset(self) -> Dataset:
        """The data set."""
        return self._work.dataset()

    def describe(self, ids: Sequence[str]) -> RunDescription:
        """The run as this process sees it."""
        return describe(self._work.settled(self.adapter), self.adapter, self.dataset, ids)

    def compute(self, run: RunFolder, shards: Sequence[int], retry: Collection[str]) -> Iterator[dict[str, Any]]:
        """Sidecars as they come."""
        runner = ShardRunner(run, self._work, self.adapter, self.dataset, budget=self._budget, tell=self.tell)
        yield from runner.compute(shards, retry)


# ---------------------------------------------------------------- Ray
