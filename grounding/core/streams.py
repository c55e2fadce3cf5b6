"""Ensure that stdout and stderr exist even if the caller closed them; a failed write to stderr is ignored."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(line: str) -> None:
    """Print a line to stderr and flush. OSErrors (a full disk, a closed pipe) are ignored: progress is no result."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def open_standard_streams() -> None:
    """Open standard streams that the caller closed on `os.devnull`, so that no later file gets their descriptors."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
