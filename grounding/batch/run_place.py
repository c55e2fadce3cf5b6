"""Whether a run may have a folder, and that it has it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grounding.batch.run_folder import MANIFEST, RunFolder
from grounding.core.errors import DataError, OutputError
from grounding.core.files import PART, STAGING, show, try_writing

LOCK = "run.lock"


def check_folder(path: str | Path) -> Path:
    """The folder, if a run can be written into it: made, empty, or holding a run of ours. Raises OutputError."""
    folder = Path(path)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # a name that no file can have says so here
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{show(folder)} is a file, not a folder; choose another --output")
        if folder.is_dir() and not (folder / MANIFEST).exists() and not all(map(_is_left_over, folder.iterdir())):
            raise OutputError(f"{show(folder)} holds other files and no run of grounding; choose another folder")
        if (folder / MANIFEST).exists():
            RunFolder.open(folder)
        try_writing(folder)
    except OutputError:
        raise
    except DataError as error:
        raise OutputError(str(error)) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write into {show(folder)}: {getattr(error, 'strerror', None) or error}") from None
    return folder


def _is_left_over(path: Path) -> bool:
    """Whether a file may be of a run that has no manifest: it was killed, or another process is just beginning it."""
    return path.name == LOCK or PART in path.name or path.name.startswith(STAGING)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system lets go of it when the process ends, however. A folder that was made for it and
    in which no run began is gone afterwards. Raises OutputError."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another run is writing into {show(folder)}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        if missing and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            for place in missing:
                with suppress(OSError):  # somebody else uses it by now
                    place.rmdir()
        lock.release()
