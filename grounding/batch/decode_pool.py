"""Pictures decoded ahead in worker processes while the model works. Imports no torch: the workers stay small.

Each worker has a pipe of its own and opens one picture at a time, so a worker that dies of a picture (a fault in a
decoder, memory) is noticed at once and names the picture: it is tried again in a new one, and one that kills two is
given up. No other picture notices. A pool of the standard library cannot do that: one death ends all its workers, and
a task handed in at that moment, or the wait for the pool's end, may never come back (Python 3.11). Workers leave by
themselves when the process that started them is gone, however it went, as their pipe ends then.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from grounding.core.errors import CrashError, GroundingError, ImageError
from grounding.core.image_decoding import MAX_PIXELS
from grounding.core.images import Picture, open_image
from grounding.core.printable import quote

# Deaths of processes that were opening it after which a picture is given up.
DEATHS = 2
# Processes in a row that died before they were ready for a picture after which none will be.
STARTS = 4
# Seconds: for one picture; between looks whether the process is there; for the end of one that was killed.
PATIENCE, POLL, GRACE = 600.0, 1.0, 5.0
T = TypeVar("T")
# None: nothing to open, for items that only keep their place.
Source = Path | bytes | None
Opened = Picture | ImageError


@dataclass(frozen=True)
class Opening:
    """How pictures are opened: `root` is the folder they must lie in, `max_pixels` the largest."""

    root: Path | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: Source) -> Opened:
        """The picture, or why there is none."""
        if source is None:
            return ImageError("there is no picture", "failed_input")
        try:
            if isinstance(source, bytes):
                return open_image(io.BytesIO(source), max_pixels=self.max_pixels)
            return open_image(source, max_pixels=self.max_pixels, root=self.root)
        except ImageError as error:
            return error
        except MemoryError:
            name = "a picture of the data set" if isinstance(source, bytes) else quote(source)
            return ImageError(f"{name}: there is not enough memory to open it", "failed_oom")


class Decoders(Generic[T]):
    """`workers` processes that open pictures, at most `ahead` beyond the one that is asked for; 0: none, in this one.

    Use as a context manager. One thread each waits for a worker, starts it at its first picture and replaces it when it
    dies.
    """

    def __init__(self, opening: Opening, workers: int, ahead: int) -> None:
        self.opening, self.workers, self.ahead = opening, workers, max(ahead, 1)
        self._threads = ThreadPoolExecutor(max(workers, 1), initializer=_uninterrupted)
        self._own = threading.local()
        self._lock = threading.Lock()  # of the two below
        self._alive: set[_Worker] = set()
        self._closed = False

    def __enter__(self) -> Decoders[T]:
        return self

    def __exit__(self, *_: object) -> None:
        with _signals_later():
            with self._lock:
                self._closed = True
                for worker in self._alive:
                    worker.kill()
            self._threads.shutdown(cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        """The processes that there are at the moment."""
        with self._lock:
            return sorted(worker.pid for worker in self._alive)

    def opened(self, items: Iterable[tuple[T, Source]]) -> Iterator[tuple[T, Opened]]:
        """(item, picture or why there is none) in order; items are drawn ahead of what is yielded.

        Raises GroundingError where no worker starts, and whatever opening a picture raised that it should not.
        """
        if not self.workers:
            yield from ((item, self.opening(source)) for item, source in items)
            return
        waiting: deque[tuple[T, Future[Opened]]] = deque()
        for item, source in items:
            waiting.append((item, self._submit(source)))
            if len(waiting) > self.ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())

    def _submit(self, source: Source) -> Future[Opened]:
        return self._threads.submit(self._open, source)

    def _open(self, source: Source) -> Opened:
        """Open a picture in this thread's worker; in a new one where that dies of it."""
        for _ in range(DEATHS):
            worker = self._worker()
            try:
                found = worker.open(source)
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if isinstance(found, Exception) and not isinstance(found, ImageError):
                raise found
            return found
        name = "a picture of the data set" if isinstance(source, bytes) else repr(str(source))
        return CrashError(f"{name}: {DEATHS} processes that decoded it died or did not come back")

    def _worker(self) -> _Worker:
        """This thread's worker, ready for a picture."""
        for _ in range(STARTS):
            worker: _Worker | None = getattr(self._own, "worker", None)
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise CancelledError
                    worker = self._own.worker = _Worker(self.opening)
                    self._alive.add(worker)
            with suppress(EOFError, OSError):
                worker.wait()
                return worker
            self._bury(worker)
        raise GroundingError(
            f"{STARTS} processes for decoding pictures died before they had one: they begin by importing the script "
            'that was started, so all that it does must stand under `if __name__ == "__main__":`; --workers 0 (or '
            "workers=0) needs no such processes"
        )

    def _bury(self, worker: _Worker) -> None:
        worker.kill()
        worker.join()
        self._own.worker = None
        with self._lock:
            self._alive.discard(worker)


def _uninterrupted() -> None:
    """Ctrl-C is the main thread's to answer; what this thread starts has it blocked from its first moment on."""
    resource_tracker.ensure_running()  # which would be started with the first worker, and unblock it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def _signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM have their effect afterwards: in between they would leave workers, and threads that wait for
    them. (To block them is not enough: any other thread of the process would take them.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    asked = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda found, _frame: came.append(found)) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in came:
            signal.raise_signal(late)


def _finished(item: T, future: Future[Opened]) -> tuple[T, Opened]:
    return item, future.result()


class _Worker:
    """A process that opens pictures, and this process's end of the pipe to it."""

    def __init__(self, opening: Opening) -> None:
        # Spawn, as a fork of a process with threads (torch has them) may hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, opening), daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()  # with the only other end in the worker, its death ends the pipe
        self.pid = self._process.pid or 0
        self._ready = False

    def wait(self) -> None:
        """Until it is ready for a picture. Raises EOFError or OSError where it died."""
        if not self._ready:
            self._answer()
            self._ready = True

    def open(self, source: Source) -> Picture | Exception:
        """What opening gave or raised. Raises EOFError or OSError where the worker died."""
        self._pipe.send(source)
        found: Picture | Exception = self._answer()
        return found

    def _answer(self) -> Any:
        # Not `recv` alone: a process that another library forked meanwhile may hold the other end, too, so that it does
        # not end with the worker; and a file system that is gone lets a worker wait for ever.
        end = time.monotonic() + PATIENCE
        while not self._pipe.poll(POLL):
            if not self._process.is_alive() or time.monotonic() > end:
                raise EOFError
        return self._pipe.recv()

    def kill(self) -> None:
        """End it at once: a worker holds nothing that has to be put away."""
        self._process.kill()

    def join(self) -> None:
        """Wait until it is gone; not for one that the system cannot end (a file system that does not answer)."""
        self._process.join(GRACE)


def _work(pipe: Connection, opening: Opening) -> None:
    """What a worker does until the pipe ends: the process that started it is gone, or has no more pictures."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_leave_with, args=(driver.sentinel,), daemon=True).start()
    with suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            found = _tried(opening, pipe.recv())
            try:
                pipe.send(found)
            except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
                pipe.send(ImageError(f"the picture cannot be handed over: {error}", "failed_decode"))


def _leave_with(sentinel: int) -> None:
    """End this process with the other one, also in the middle of a picture that takes for ever."""
    wait([sentinel])
    os._exit(1)


def _tried(opening: Opening, source: Source) -> Picture | Exception:
    try:
        return opening(source)
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that asked gets it
        told = RuntimeError(f"{type(error).__name__}: {error}")  # of a type that every process knows
        told.add_note(traceback.format_exc())
        return told
