"""CPU time and peak memory of a piece of work, in this process."""

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
# Where the time of all threads counts, a watch that looks seldom.
SLOW_INTERVAL = 0.05


@dataclass(frozen=True)
class Cost:
    """`seconds` of CPU time (median of the runs) and `peak_mb`, the most memory held above the start (largest run)."""

    seconds: float
    peak_mb: float


def cost(work: Callable[[], object], repeats: int) -> Cost:
    """Run once to warm up, then `repeats` times."""
    work()
    runs = [_one(work) for _ in range(repeats)]
    return Cost(statistics.median(r.seconds for r in runs), max(r.peak_mb for r in runs))


@dataclass(frozen=True)
class Ratio:
    """CPU time of a piece of work in units of another one's, both as medians, and the most memory it held."""

    value: float
    peak_mb: float


def ratio(
    work: Callable[[], object],
    unit: Callable[[], object],
    repeats: int,
    warm_up: Callable[[], object],
    enough: float = 8.0,
) -> Ratio:
    """Run `work` `repeats` times, or fewer once it took `enough` seconds of CPU, and `unit` before and after each."""
    warm_up()
    units, runs = [_one(unit)], []
    while len(runs) < repeats and sum(run.seconds for run in runs) < enough:
        runs.append(_one(work))
        units.append(_one(unit))
    value = statistics.median(r.seconds for r in runs) / statistics.median(u.seconds for u in units)
    return Ratio(value, max(r.peak_mb for r in runs))


class Peak:
    """The most memory that this process held since it was entered, `mb`, all of it counted. A context manager."""

    def __enter__(self) -> Peak:
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
        """So far."""
        self._peak = max(self._peak, _resident())
        return self._peak / 2**20

    def _watch(self) -> None:
        while not self._done.wait(SLOW_INTERVAL):
            self._peak = max(self._peak, _resident())


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr)


def quietly(_text: str) -> None:
    """No progress."""


def _one(work: Callable[[], object]) -> Cost:
    _trim()
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # Of this thread alone: the watcher's own time is not the work's. With one torch thread that is all there is.
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
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs freed must not hide what this one takes


def _resident() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
