"""Options of batch runs, and what they ask for. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.cli import options as common
from grounding.core.errors import OptionError
from grounding.core.printable import escape
from grounding.core.streams import say

if TYPE_CHECKING:
    from grounding.batch.config import RunConfig
    from grounding.batch.progress import ProgressBar
    from grounding.batch.run_folder import RunFolder
    from grounding.datasets.records import Dataset

if TYPE_CHECKING:
    from grounding.batch.config import RunConfig


def add_options(made: argparse.ArgumentParser) -> None:
    """All options of a batch run."""
    data = made.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DIR|NAME", help="a folder, or hf:owner/name of a data set (default: the demo's)"
    )
    data.add_argument("--split", help="of the data set (default: all of it)")
    data.add_argument(
        "--captions",
        choices=["first", "all", "none"],
        help="none: what the model writes itself (default: all; none for a model that writes)",
    )
    data.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    data.add_argument("--random", type=int, metavar="N", help="N pictures drawn with --seed, and their figures")
    data.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger pictures (default: 100 million)")
    common.model_options(made)
    maps = made.add_argument_group("what is explained")
    maps.add_argument("--target", help="the scalar that is explained; a wrong one names those the model has")
    maps.add_argument("--token-target", choices=["leave-one-out", "alone"], help="as in ground.py")
    maps.add_argument("--no-tokens", action="store_true", help="captions and phrases alone")
    maps.add_argument("--words", action="store_true", help="words in place of tokens")
    maps.add_argument(
        "--protocols",
        nargs="*",
        metavar="NAME",
        help="whose texts about annotated phrases are explained: mention-anybox (the phrase), chain-unionbox (image of "
        "<phrase>) (default: both; none after it: no phrases)",
    )
    maps.add_argument("--methods", nargs="+", metavar="NAME", help="default: gradcam rollout; OCR: the model's")
    maps.add_argument("--option", action="append", default=[], metavar="METHOD.OPTION=VALUE", help="repeatable")
    maps.add_argument("--layer", action="append", default=[], metavar="LAYER", help="as in ground.py; repeatable")
    maps.add_argument("--average-layers", action="store_true", help="join repeated --layer into one column")
    run = made.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/<data>-<model>)")
    run.add_argument("--shard-size", type=int, metavar="N", help="pictures per shard (default: 64)")
    run.add_argument("--batch-size", type=int, metavar="N", help="pictures per forward pass (default: 8)")
    run.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures (default: 1)")
    run.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own)")
    run.add_argument(
        "--max-failed", type=float, metavar="SHARE", help="stop when more of the rows fail (default: 0.05; 1: never)"
    )
    run.add_argument("--retry", nargs="+", default=[], metavar="STATUS", help="compute rows of this status again")
    run.add_argument("--engine", choices=["local", "ray"], default="local", help="who computes (default: local)")
    run.add_argument("--address", default="local", help="--engine ray: of a cluster, or auto (default: one of its own)")
    look = made.add_argument_group("instead of computing")
    look.add_argument("--status", action="store_true", help="say how far the run in --output is")
    look.add_argument("--merge", action="store_true", help="join the shards into merged.parquet")
    look.add_argument("--render", choices=["png"], help="figures of stored maps (--limit, --random: of some pictures)")
    common.figure_options(made)
    out = made.add_argument_group("output")
    out.add_argument("--format", choices=["text", "json"], default="text", help="of the summary on stdout")
    out.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    out.add_argument("-q", "--quiet", action="store_true", help="no warnings and no progress on stderr")
    made.set_defaults(tokens=None, phrase=[], attention_layer=None, head=None, target_class=None)


def work_of(args: argparse.Namespace) -> RunConfig:
    """What is to be computed. Raises OptionError."""
    from grounding.batch.config import RunConfig
    from grounding.batch.requests import PROTOCOLS
    from grounding.core.demo import demo_scenes

    request = common.request_of(args)
    if args.no_tokens:
        request = replace(request, select=replace(request.select, tokens=False))
    names = ("captions", "shard_size", "batch_size", "workers", "threads", "max_pixels", "max_failed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    data = Path(args.data or demo_scenes())
    return RunConfig(
        # Other processes, and later ones, may run in another folder.
        data=str(data.resolve() if data.exists() else args.data),
        split=args.split,
        protocols=PROTOCOLS if args.protocols is None else tuple(args.protocols),
        request=request,
        **given,
    )


def folder_of(args: argparse.Namespace) -> Path:
    """The run's folder: `--output`, or one that is named after data, model and selection."""
    from grounding.core.demo import DEMO_NAME
    from grounding.core.errors import OptionError
    from grounding.core.files import slug

    if args.output is not None:
        if not args.output.strip():
            raise OptionError("--output is empty: name a folder")
        return Path(args.output)
    data = slug(Path(args.data).resolve().name, "data") if args.data else "demo-scenes"
    parts = [data, slug(Path(args.model).name, "model") if args.model else DEMO_NAME]
    parts += [f"limit-{args.limit}"] if args.limit is not None else []
    parts += [f"random-{args.random}-{args.seed}"] if args.random is not None else []
    return Path("runs") / "-".join([*parts, *([args.split] if args.split else [])])


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
    from grounding.batch.executors import ProcessRank
    from grounding.batch.progress import ProgressBar, print_status
    from grounding.batch.run import exit_code, run_batch
    from grounding.datasets.subset import chosen_ids
    from grounding.explanation.figures.options import check_options

    check_options(**common.figure_keywords(args))
    work = work_of(args)
    dataset = work.dataset()
    ids = chosen_ids(dataset, args.limit, args.random, args.seed)
    rank = ProcessRank.of_launch(args.device)
    make = partial(load, args.model, device=rank.device(args.device), dtype=args.dtype, revision=args.revision)
    if not args.quiet and not rank.index:
        _warn(dataset)
    name = f"process {rank.index} of {rank.count}" if rank.count > 1 else ""
    bar = ProgressBar(quiet=args.quiet, by_shard=args.engine == "ray", name=name)
    try:
        # In this order: Ray has a handler of its own, which must not be the last.
        with _hands(args, make, work, bar) as hands, _terminable():
            run = run_batch(folder, work, dataset, ids, hands, rank=rank, retry=args.retry, watch=bar)
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
def _hands(args: argparse.Namespace, make: Callable[[], Any], work: RunConfig, bar: ProgressBar) -> Iterator[Any]:
    from grounding.batch.executors import LocalExecutor
    from grounding.batch.ray import RayExecutor

    if args.engine == "local":
        if args.address != "local":
            raise OptionError("--address belongs to --engine ray")
        yield LocalExecutor(make, work, bar.rows)
        return
    with RayExecutor(make, work, args.address) as cluster:
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


def _render(args: argparse.Namespace, run: RunFolder) -> int:
    """Figures of stored maps: of all pictures, the first ones or some at random."""
    from grounding.datasets.open import open_dataset
    from grounding.datasets.subset import picked
    from grounding.explanation.figures.options import check_options

    check_options(**common.figure_keywords(args))
    data = run.manifest["data"]
    dataset = open_dataset(args.data or data["folder"], data["split"])
    images = picked([name for name in run.ids if name not in dataset.broken], args.limit, args.random, args.seed)
    return _draw(args, run, dataset, set(images))


def _draw(args: argparse.Namespace, run: RunFolder, dataset: Dataset, images: set[str] | None) -> int:
    """Write figures, say where; 1 where a row has none."""
    from grounding.batch.figures import FIGURES, draw
    from grounding.batch.progress import Meter, failures

    lacking: list[str] = []
    made = draw(run, dataset, images, common.figure_keywords(args), lacking.append)
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
