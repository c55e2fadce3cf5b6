"""Measure the cost of maps as ratios to one bare forward pass of the same model, in one process on this machine.

python scripts/benchmark.py clip
python scripts/benchmark.py clip --format json --pictures 1 32 --repeats 3
python scripts/benchmark.py siglip --pictures 1
python scripts/benchmark.py trocr --tokens 20 50
python scripts/benchmark.py flava --words 12
python scripts/benchmark.py batch --dataset 100 1000 --repeats 1
python scripts/benchmark.py classifier --images 16
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from functools import partial

from grounding.cli.main import run
from grounding.explanation.text_table import table

FAMILIES = ("clip", "siglip", "trocr", "flava", "classifier", "batch")


def count(text: str, least: int = 1) -> int:
    """Parse a whole number. Raises ArgumentTypeError for a number below `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    at_least_3 = partial(count, least=3)  # the tutorial loop is measured on 3 tokens
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("family", nargs="+", choices=FAMILIES, help="which architecture, at full size, random weights")
    made.add_argument(
        "--pictures", nargs="+", type=count, default=[1, 32], help="clip, siglip: batch sizes (default: 1 32)"
    )
    made.add_argument("--tokens", nargs="+", type=at_least_3, default=[20, 50], help="trocr: lengths (default: 20 50)")
    made.add_argument("--words", nargs="+", type=at_least_3, default=[12], help="flava: text lengths (default: 12)")
    made.add_argument("--dataset", nargs="+", type=count, default=[100], help="batch: images (default: 100)")
    made.add_argument("--images", nargs="+", type=count, default=[16], help="classifier: batch sizes (default: 16)")
    made.add_argument("--repeats", type=count, default=3, help="runs of each case; the median is reported (default: 3)")
    made.add_argument("--format", choices=["text", "json"], default="text")
    made.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    made.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    return made


def benchmark(args: argparse.Namespace) -> int:
    """Measure every requested family and print its cases."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: CPU time is that of one thread
    found, units = {}, {}
    for family in args.family:
        module = importlib.import_module(f"benchmarks.{family}")
        found[family] = module.measure(getattr(args, module.SIZES), args.repeats, quiet=args.quiet)
        units[family] = module.UNIT
    if args.format == "json":
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0
    for family, cases in found.items():
        print(f"{family}: CPU time in units of {units[family]}")
        shown = [["-" if value is None else str(value) for value in case.values()] for case in cases]
        print(table([list(cases[0]), *shown]), end="\n\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed with one line on stderr."""
    return run(benchmark, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
