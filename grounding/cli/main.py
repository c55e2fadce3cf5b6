"""Run a command: parse arguments, print one line per failure, return the exit code. Imports no torch."""

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
    """Parse the arguments (None: those of the process).

    `--layer -1.in` is parsed as `--layer=-1.in`: argparse alone would take -1.in for an option.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    joined: list[str] = []
    for item in given:
        if joined and joined[-1] == "--layer" and item[:1] == "-" and item[1:2].isdecimal():
            joined[-1] = f"--layer={item}"
        else:
            joined.append(item)
    return parser.parse_args(joined)


def run(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Call `work` and return the exit code. A failure is one line on stderr, after its traceback with `--verbose`."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows escapes instead of raising an error
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty() or args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        status = work(args)
        sys.stdout.flush()
    except KeyboardInterrupt as stopped:
        # A second Ctrl-C, while Python shuts down, ends the process at once and without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        return int(getattr(stopped, "exit_code", EXIT_INTERRUPTED))
    except BrokenPipeError:
        # The reader closed the pipe (`| head`): Python must not flush to it at shutdown either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        return fail(error, verbose=args.verbose)
    return status


def fail(error: BaseException, *, verbose: bool = False, about: str = "") -> int:
    """Print an error as one line on stderr, with `verbose` after its traceback; return its exit code.

    `about` is printed before the message.
    """
    if verbose:
        traceback.print_exception(error)
    print(f"error: {escape(about)}{one_line(error, LONGEST_ERROR)}", file=sys.stderr)
    return int(getattr(error, "exit_code", 1))
