"""The standard streams of a command: there even where the caller closed them, and stderr never worth a failure."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(line: str) -> None:
    """Print a line to stderr at once. What only informs stops no work: nobody may be able to take it (a full disk)."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def open_standard_streams() -> None:
    """Where the caller closed one of them it leads nowhere, and no file that is opened later takes its place."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
