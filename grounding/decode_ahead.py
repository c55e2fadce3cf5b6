"""Pictures decoded ahead in worker processes while the model works. Imports no torch: the workers stay small.

A worker may die of a picture (a fault in a decoder, memory). That is noticed, the workers are replaced, and the
pictures that were under way are tried again one at a time; one that kills two processes so is given up. Workers leave
by themselves when the process that started them is gone, however it went.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from grounding.decoding import MAX_PIXELS, ImageError
from grounding.images import Picture, open_image

# Deaths of processes of its own after which a picture is given up.
DEATHS = 2
T = TypeVar("T")
# None: nothing to open, for items that only keep their place.
Source = Path | bytes | None


class CrashError(ImageError):
    """A picture that killed the processes that decoded it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "failed_crash")


@dataclass(frozen=True)
class Opening:
    """How pictures are opened: `root` is the folder they must lie in, `max_pixels` the largest."""

    root: Path | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: Source) -> Picture | ImageError:
        """The picture, or why there is none."""
        if source is None:
            return ImageError("there is no picture", "failed_input")
        try:
            if isinstance(source, bytes):
                return open_image(io.BytesIO(source), max_pixels=self.max_pixels)
            return open_image(source, max_pixels=self.max_pixels, root=self.root)
        except ImageError as error:
            return error


class Decoders(Generic[T]):
    """`workers` processes that open pictures, at most `ahead` beyond the one that is asked for; 0: none, in this one.

    Use as a context manager. Not safe in threads.
    """

    def __init__(self, opening: Opening, workers: int, ahead: int) -> None:
        self.opening, self.workers, self.ahead = opening, workers, max(ahead, 1)
        self._pool: ProcessPoolExecutor | None = None
        self._careful: ProcessPoolExecutor | None = None

    def __enter__(self) -> Decoders[T]:
        return self

    def __exit__(self, *_: object) -> None:
        _stop(self._pool)
        _stop(self._careful)
        self._pool = self._careful = None

    def opened(self, items: Iterable[tuple[T, Source]]) -> Iterator[tuple[T, Picture | ImageError]]:
        """(item, picture or why there is none) in order; items are drawn ahead of what is yielded."""
        if not self.workers:
            yield from ((item, self.opening(source)) for item, source in items)
            return
        waiting: deque[_Waiting[T]] = deque()
        for item, source in items:
            waiting.append(self._submit(item, source))
            if len(waiting) > self.ahead:
                yield self._finished(waiting.popleft())
        while waiting:
            yield self._finished(waiting.popleft())

    def _submit(self, item: T, source: Source) -> _Waiting[T]:
        pool = self._pool = self._pool or _pool(self.workers)
        try:
            return _Waiting(item, source, pool, pool.submit(self.opening, source))
        except BrokenProcessPool:  # just found dead: it will be tried alone
            return _Waiting(item, source, pool, None)

    def _finished(self, one: _Waiting[T]) -> tuple[T, Picture | ImageError]:
        with suppress(BrokenProcessPool):
            if one.future is not None:
                return one.item, one.future.result()
        if self._pool is one.pool:
            _stop(self._pool)
            self._pool = None
        return one.item, self._alone(one.source)

    def _alone(self, source: Source) -> Picture | ImageError:
        """Open a picture in a process that does nothing else meanwhile, as it may have killed others."""
        for _ in range(DEATHS):
            self._careful = self._careful or _pool(1)
            try:
                found: Picture | ImageError = self._careful.submit(self.opening, source).result()
            except BrokenProcessPool:
                _stop(self._careful)
                self._careful = None
            else:
                return found
        name = "a picture of the data set" if isinstance(source, bytes) else repr(str(source))
        return CrashError(f"{name}: {DEATHS} processes that decoded it died")


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    """A picture under way; no future where the workers were found dead."""

    item: T
    source: Source
    pool: ProcessPoolExecutor
    future: Future[Any] | None


def _stop(pool: ProcessPoolExecutor | None) -> None:
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawn, as a fork of a process with threads (torch has them) may hang. Not multiprocessing.Pool: it waits for ever
    # for the result of a worker that was killed.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start)


def _start() -> None:
    """Ctrl-C is the driver's to answer; a worker goes when the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_leave_with, args=(driver.sentinel,), daemon=True).start()


def _leave_with(sentinel: Any) -> None:
    wait([sentinel])
    os._exit(1)
