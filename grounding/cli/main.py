"""Run a command: parse, one line per failure with its exit code, standard streams. Imports no torch."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from grounding.core.printable import escape, one_line
from grounding.core.streams import open_standard_streams

EXIT_INTERRUPTED = 130


LONGEST_ERROR = 2000  # characters


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; `--layer -1.in` means what it says, which argparse alone would take for an option named -1.in."""
    given = list(sys.argv[1:] if argv is None else argv)
    joined: list[str] = []
    for item in given:
        if joined and joined[-1] == "--layer" and item[:1] == "-" and item[1:2].isdecimal():
            joined[-1] = f"--layer={item}"
        else:
            joined.append(item)
    return parser.parse_args(joined)


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do the work; a failure is one line on stderr and an exit code, with the traceback only where `-v` asks for it."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows escapes in place of an error
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty() or args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = work(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # once more, while Python shuts down: at once, and no traceback
        return int(getattr(stopped, "exit_code", EXIT_INTERRUPTED))
    except BrokenPipeError:
        # The reader left (`| head`): nothing more to say, not even while Python shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        return fail(error, verbose=args.verbose)
    return status


def fail(error: BaseException, *, verbose: bool = False, about: str = "") -> int:
    """Print one line about an error (or its traceback) and return the exit code that goes with it."""
    if verbose:
        traceback.print_exception(error)
    print(f"error: {escape(about)}{one_line(error, LONGEST_ERROR)}", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))
