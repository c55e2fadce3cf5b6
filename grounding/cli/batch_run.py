"""What `ground_flickr30k.py` does: compute what is left of a run, or look at one. Imports no torch until it must."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.cli import options
from grounding.cli.batch import folder_of, work_of
from grounding.core.errors import OptionError
from grounding.core.printable import escape
from grounding.core.streams import say

if TYPE_CHECKING:
    from grounding.batch.config import Work
    from grounding.batch.progress import Bar
    from grounding.batch.run_folder import RunFolder
    from grounding.datasets.records import Dataset

EXIT_TERMINATED = 143
PROBLEMS_SHOWN = 5


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with another exit code."""

    exit_code = EXIT_TERMINATED


def ground(args: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Do what the options say; `load(id, device=..., dtype=..., revision=...)` makes an adapter. The exit code."""
    from grounding.batch.progress import print_status
    from grounding.batch.run_folder import RunFolder, check_folder

    looking = [name for name in ("status", "merge", "render") if getattr(args, name)]
    if len(looking) > 1:
        raise OptionError(f"--{looking[0]} or --{looking[1]}: choose one")
    folder = folder_of(args)
    if args.status:
        print_status(RunFolder.open(folder), args.format, quiet=args.quiet)
        return 0
    if args.merge:
        print(RunFolder.open(folder).merge())
        return 0
    return _render(args, RunFolder.open(folder)) if args.render else _compute(args, load, check_folder(folder))


def _compute(args: argparse.Namespace, load: Callable[..., Any], folder: Path) -> int:
    from grounding.batch.executors import Rank
    from grounding.batch.progress import Bar, print_status
    from grounding.batch.run import drive, exit_code
    from grounding.datasets.subset import chosen_ids
    from grounding.explanation.figures.options import check_options

    check_options(**options.figure_keywords(args))
    work = work_of(args)
    dataset = work.dataset()
    ids = chosen_ids(dataset, args.limit, args.random, args.seed)
    rank = Rank.of_launch(args.device)
    make = partial(load, args.model, device=rank.device(args.device), dtype=args.dtype, revision=args.revision)
    if not args.quiet and not rank.index:
        _warn(dataset)
    name = f"process {rank.index} of {rank.count}" if rank.count > 1 else ""
    bar = Bar(quiet=args.quiet, by_shard=args.engine == "ray", name=name)
    try:
        # In this order: Ray has a handler of its own, which must not be the last.
        with _hands(args, make, work, bar) as hands, _terminable():
            run = drive(folder, work, dataset, ids, hands, rank=rank, retry=args.retry, watch=bar)
    except KeyboardInterrupt:
        if rank.index == 0:
            again = f"{shlex.join(['python', *sys.argv])}{', launched as it was' if rank.count > 1 else ''}"
            say(f"\nstopped; what is done stays. To resume: {again}")
        raise
    finally:
        bar.close()
    if rank.index:  # a launcher ends the others as soon as one process says that all is not well
        return exit_code(run) if exit_code(run) == 1 else 0
    if args.random is not None:
        _draw(args, run, dataset, None)
    print_status(run, args.format, quiet=args.quiet)
    return exit_code(run)


@contextmanager
def _hands(args: argparse.Namespace, make: Callable[[], Any], work: Work, bar: Bar) -> Iterator[Any]:
    from grounding.batch.executors import Cluster, Here

    if args.engine == "local":
        if args.address != "local":
            raise OptionError("--address belongs to --engine ray")
        yield Here(make, work, bar.rows)
        return
    with Cluster(make, work, args.address) as cluster:
        yield cluster


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops the run as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warn(dataset: Dataset) -> None:
    for problem in dataset.problems[:PROBLEMS_SHOWN]:
        say(f"warning: {escape(problem)}")
    if len(dataset.problems) > PROBLEMS_SHOWN:
        say(f"warning: and {len(dataset.problems) - PROBLEMS_SHOWN} more, in manifest.json")


# ---------------------------------------------------------------- figures


def _render(args: argparse.Namespace, run: RunFolder) -> int:
    """Figures of stored maps: of all pictures, the first ones or some at random."""
    from grounding.datasets.open import open_dataset
    from grounding.datasets.subset import picked
    from grounding.explanation.figures.options import check_options

    check_options(**options.figure_keywords(args))
    data = run.manifest["data"]
    dataset = open_dataset(args.data or data["folder"], data["split"])
    images = picked([name for name in run.ids if name not in dataset.broken], args.limit, args.random, args.seed)
    return _draw(args, run, dataset, set(images))


def _draw(args: argparse.Namespace, run: RunFolder, dataset: Dataset, images: set[str] | None) -> int:
    """Write figures, say where; 1 where a row has none."""
    from grounding.batch.figures import FIGURES, draw
    from grounding.batch.progress import Meter, failures

    lacking: list[str] = []
    made = draw(run, dataset, images, options.figure_keywords(args), lacking.append)
    total = run.counts().total() - failures(run) if images is None else None
    meter = Meter(total, "figure", quiet=args.quiet)
    for _ in made:
        meter.forward()
    meter.close()
    count = meter.done
    for line in [] if args.quiet else lacking[:PROBLEMS_SHOWN]:
        say(f"warning: no figure of {escape(line)}")
    if len(lacking) > PROBLEMS_SHOWN and not args.quiet:
        say(f"warning: and {len(lacking) - PROBLEMS_SHOWN} more without a figure")
    if args.format == "text":
        print(f"wrote {count} figures into {escape(str(run.path / FIGURES))}")
    return 1 if lacking or not count else 0
