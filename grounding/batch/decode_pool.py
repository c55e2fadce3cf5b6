"""Decode images ahead in worker processes while the model computes. Imports no torch: workers start fast and small.

Each worker has its own pipe and opens one image at a time. When a worker dies (a fault in a decoder, lack of memory),
the image it was opening is known: it is opened once more in a new worker, and given up if that dies, too. No other
image is affected. With `concurrent.futures` the death of one process breaks the whole pool, and a task submitted at
that moment, or the shutdown of the pool, may wait for ever (Python 3.11). When the parent process is gone, however it
ended, the pipes end and the workers exit.
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

# Workers that may die of one image before it is given up.
MAX_DEATHS = 2
# Workers in a row that may die before their first image until starting more is given up.
MAX_FAILED_STARTS = 4
# Seconds for one image; between checks that its worker is alive; for a killed worker to exit.
DECODE_TIMEOUT, POLL_SECONDS, EXIT_TIMEOUT = 600.0, 1.0, 5.0
T = TypeVar("T")
# None: no image to open, for items that only keep their place in the order.
Source = Path | bytes | None
Opened = Picture | ImageError


@dataclass(frozen=True)
class ImageOpener:
    """Open images: only files inside the folder `root` (None: any), of at most `max_pixels` (width x height)."""

    root: Path | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: Source) -> Opened:
        """Open an image; return the error if that fails."""
        if source is None:
            return ImageError("there is no image", "failed_input")
        try:
            if isinstance(source, bytes):
                return open_image(io.BytesIO(source), max_pixels=self.max_pixels)
            return open_image(source, max_pixels=self.max_pixels, root=self.root)
        except ImageError as error:
            return error
        except MemoryError:
            name = "an image of the data set" if isinstance(source, bytes) else quote(source)
            return ImageError(f"{name}: not enough memory to open it", "failed_oom")


class Decoders(Generic[T]):
    """A pool of `workers` processes that open images, up to `ahead` images before they are needed.

    With `workers=0`, images are opened in this process. An image that takes longer than `timeout` seconds counts as the
    death of its worker. Use as a context manager. Each worker has a thread that starts it at its first image, waits for
    it, and replaces it when it dies.
    """

    def __init__(self, opener: ImageOpener, workers: int, ahead: int, *, timeout: float = DECODE_TIMEOUT) -> None:
        self.opener, self.workers, self.ahead, self.timeout = opener, workers, max(ahead, 1), timeout
        self._threads = ThreadPoolExecutor(max(workers, 1), initializer=_block_interrupts)
        self._own = threading.local()
        self._lock = threading.Lock()  # of the two below
        self._alive: set[DecodeWorker] = set()
        self._closed = False

    def __enter__(self) -> Decoders[T]:
        return self

    def __exit__(self, *_: object) -> None:
        with _defer_signals():
            with self._lock:
                self._closed = True
                for worker in self._alive:
                    worker.kill()
            self._threads.shutdown(cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        """Ids of the worker processes that exist now."""
        with self._lock:
            return sorted(worker.pid for worker in self._alive)

    def decode(self, items: Iterable[tuple[T, Source]]) -> Iterator[tuple[T, Opened]]:
        """Yield (item, image or error) in order; items are taken ahead of what is yielded.

        Raises GroundingError if no worker starts, and any error of the opener that is no ImageError.
        """
        if not self.workers:
            yield from ((item, self.opener(source)) for item, source in items)
            return
        waiting: deque[tuple[T, Future[Opened]]] = deque()
        for item, source in items:
            waiting.append((item, self.submit(source)))
            if len(waiting) > self.ahead:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())

    def submit(self, source: Source) -> Future[Opened]:
        """Open one image in a worker, without waiting."""
        return self._threads.submit(self._open, source)

    def _open(self, source: Source) -> Opened:
        """Open an image in this thread's worker, and in a new one if that dies."""
        for _ in range(MAX_DEATHS):
            worker = self._ready_worker()
            try:
                found = worker.open(source)
            except (EOFError, OSError):
                self._discard(worker)
                continue
            if isinstance(found, Exception) and not isinstance(found, ImageError):
                raise found
            return found
        name = "an image of the data set" if isinstance(source, bytes) else repr(str(source))
        return CrashError(f"{name}: {MAX_DEATHS} processes died or did not answer while they decoded it")

    def _ready_worker(self) -> DecodeWorker:
        """This thread's worker, ready for an image."""
        for _ in range(MAX_FAILED_STARTS):
            worker: DecodeWorker | None = getattr(self._own, "worker", None)
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise CancelledError
                    worker = self._own.worker = DecodeWorker(self.opener, self.timeout)
                    self._alive.add(worker)
            with suppress(EOFError, OSError):
                worker.wait()
                return worker
            self._discard(worker)
        raise GroundingError(
            f"{MAX_FAILED_STARTS} processes for decoding images died before their first image. Each of them imports "
            'the script that was started: its code must be under `if __name__ == "__main__":`. --workers 0 (or '
            "workers=0) needs no such processes"
        )

    def _discard(self, worker: DecodeWorker) -> None:
        worker.kill()
        worker.join()
        self._own.worker = None
        with self._lock:
            self._alive.discard(worker)


def _block_interrupts() -> None:
    """Block SIGINT in this thread, and so in the workers it starts from their first moment: the main thread handles
    Ctrl-C."""
    resource_tracker.ensure_running()  # else the first worker's start would start it, and unblock the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def _defer_signals() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block: in between they would leave workers, and threads waiting for
    them. (Blocking the signals is not enough: any other thread of the process would receive them.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda found, _frame: received.append(found)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in received:
            signal.raise_signal(late)


def _result(item: T, future: Future[Opened]) -> tuple[T, Opened]:
    return item, future.result()


class DecodeWorker:
    """A process that opens images, and this process's end of its pipe."""

    def __init__(self, opener: ImageOpener, timeout: float) -> None:
        # Spawn: a fork of a process with threads (torch has them) may hang.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, opener), daemon=True)
        try:
            self._process.start()
        finally:
            theirs.close()  # with the only other end in the worker, its death ends the pipe
        self.pid = self._process.pid or 0
        self._timeout = timeout
        self._ready = False

    def wait(self) -> None:
        """Wait until the worker is ready for an image. Raises EOFError or OSError if it died."""
        if not self._ready:
            self._answer()
            self._ready = True

    def open(self, source: Source) -> Picture | Exception:
        """Return the image, or the exception that opening it raised. Raises EOFError or OSError if the worker died."""
        self._pipe.send(source)
        found: Picture | Exception = self._answer()
        return found

    def _answer(self) -> Any:
        # Not `recv` alone: a process that another library forked meanwhile may hold the other end as well, so that it
        # does not end with the worker; and a file system that is gone makes a worker wait for ever.
        end = time.monotonic() + self._timeout
        while not self._pipe.poll(POLL_SECONDS):
            if not self._process.is_alive() or time.monotonic() > end:
                raise EOFError
        return self._pipe.recv()

    def kill(self) -> None:
        """Kill the process: a worker has nothing to clean up."""
        self._process.kill()

    def join(self) -> None:
        """Wait for the process to exit, but not for ever: one blocked in a file system call cannot be killed."""
        self._process.join(EXIT_TIMEOUT)


def _work(pipe: Connection, opener: ImageOpener) -> None:
    """Main loop of a worker: open images until the pipe ends because the parent is gone or done."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    with suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            found = _try_open(opener, pipe.recv())
            try:
                pipe.send(found)
            except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
                pipe.send(ImageError(f"the image cannot be sent between processes: {error}", "failed_decode"))


def _exit_with(sentinel: int) -> None:
    """Exit with the parent process, also in the middle of an image that never finishes."""
    wait([sentinel])
    os._exit(1)


def _try_open(opener: ImageOpener, source: Source) -> Picture | Exception:
    try:
        return opener(source)
    except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
        sent = RuntimeError(f"{type(error).__name__}: {error}")  # a type that every process can unpickle
        sent.add_note(traceback.format_exc())
        return sent
