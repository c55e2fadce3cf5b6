"""CPU time and peak memory of a function in this process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
INTERVAL = 0.002
# For CPU time of all threads: the watching thread must add little to it.
SLOW_INTERVAL = 0.05


@dataclass(frozen=True)
class Cost:
    """Median CPU `seconds` of the runs, and `peak_mb`: the largest increase of resident memory during a run."""

    seconds: float
    peak_mb: float


def cost(work: Callable[[], object], repeats: int) -> Cost:
    """Run `work` once to warm up, then measure it `repeats` times."""
    work()
    runs = [_measure(work) for _ in range(repeats)]
    return Cost(statistics.median(r.seconds for r in runs), max(r.peak_mb for r in runs))


@dataclass(frozen=True)
class Ratio:
    """`value`: median CPU time of one function divided by that of another; `peak_mb`: peak memory of the first."""

    value: float
    peak_mb: float


def ratio(
    work: Callable[[], object],
    unit: Callable[[], object],
    repeats: int,
    warm_up: Callable[[], object],
    enough: float = 8.0,
) -> Ratio:
    """Measure `work` `repeats` times, fewer after `enough` CPU seconds, and `unit` before and after each run."""
    warm_up()
    units, runs = [_measure(unit)], []
    while len(runs) < repeats and sum(run.seconds for run in runs) < enough:
        runs.append(_measure(work))
        units.append(_measure(unit))
    value = statistics.median(r.seconds for r in runs) / statistics.median(u.seconds for u in units)
    return Ratio(value, max(r.peak_mb for r in runs))


class PeakMemory:
    """Context manager that watches the peak resident memory of this process, `mb`."""

    def __enter__(self) -> PeakMemory:
        _trim()
        self._peak, self._done = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    @property
    def mb(self) -> float:
        """Peak since the start, in MB (2**20 bytes)."""
        self._peak = max(self._peak, _resident())
        return self._peak / 2**20

    def _watch(self) -> None:
        while not self._done.wait(SLOW_INTERVAL):
            self._peak = max(self._peak, _resident())


def print_progress(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr)


def no_progress(_text: str) -> None:
    """Print nothing."""


def _measure(work: Callable[[], object]) -> Cost:
    _trim()
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # CPU time of this thread, without the watcher; torch runs on one thread.
    started = time.thread_time()
    work()
    seconds = time.thread_time() - started
    peak[0] = max(peak[0], _resident())
    done.set()
    watcher.join()
    return Cost(seconds, (peak[0] - before) / 2**20)


def _trim() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed by earlier runs would hide the increase of this one


def _resident() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
