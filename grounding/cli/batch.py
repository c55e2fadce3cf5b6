"""Command of batch runs: options, configuration, run, figures of stored maps. Imports no torch."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
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

EXIT_TERMINATED = 143
PROBLEMS_SHOWN = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of a batch run."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="DIR|NAME", help="a folder, or hf:owner/name of a data set (default: the demo scenes)"
    )
    data.add_argument("--split", help="of the data set (default: all of it)")
    data.add_argument(
        "--captions",
        choices=["first", "all", "none"],
        help="none: the text that the model generates (default: all; none for a model that generates text)",
    )
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    data.add_argument("--random", type=int, metavar="N", help="N images drawn with --seed, and their figures")
    data.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 100 million)")
    common.model_options(parser)
    maps = parser.add_argument_group("what is explained")
    maps.add_argument("--target", help="the scalar that is explained; an unknown name lists those of the model")
    maps.add_argument("--token-target", choices=["leave-one-out", "alone"], help="as in ground.py")
    maps.add_argument("--no-tokens", action="store_true", help="explain captions and phrases only")
    maps.add_argument("--words", action="store_true", help="words instead of tokens")
    maps.add_argument(
        "--protocols",
        nargs="*",
        metavar="NAME",
        help="texts made from annotated phrases: mention-anybox (the phrase), chain-unionbox (image of <phrase>) "
        "(default: both; without a value: no phrases)",
    )
    maps.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="default: gradcam rollout; OCR: the default methods of the architecture",
    )
    maps.add_argument("--option", action="append", default=[], metavar="METHOD.OPTION=VALUE", help="repeatable")
    maps.add_argument("--layer", action="append", default=[], metavar="LAYER", help="as in ground.py; repeatable")
    maps.add_argument("--average-layers", action="store_true", help="average the maps of repeated --layer into one")
    run = parser.add_argument_group("run")
    run.add_argument("--output", metavar="DIR", help="the run's folder (default: runs/<data>-<model>)")
    run.add_argument("--shard-size", type=int, metavar="N", help="images per shard (default: 64)")
    run.add_argument("--batch-size", type=int, metavar="N", help="images per forward pass (default: 8)")
    run.add_argument("--workers", type=int, metavar="N", help="processes that decode images (default: 1)")
    run.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: chosen by torch)")
    run.add_argument(
        "--max-failed",
        type=float,
        metavar="SHARE",
        help="stop when a larger share of the rows fails (default: 0.05; 1: never)",
    )
    run.add_argument("--retry", nargs="+", default=[], metavar="STATUS", help="compute rows of this status again")
    run.add_argument("--engine", choices=["local", "ray"], default="local", help="who computes (default: local)")
    run.add_argument(
        "--address", default="local", help="--engine ray: address of a cluster, or auto (default: start one)"
    )
    action = parser.add_argument_group("instead of computing")
    action.add_argument("--status", action="store_true", help="print the progress of the run in --output")
    action.add_argument("--merge", action="store_true", help="join the shards into merged.parquet")
    action.add_argument(
        "--render", choices=["png"], help="draw figures of stored maps (--limit, --random: of some images)"
    )
    common.figure_options(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--format", choices=["text", "json"], default="text", help="of the summary on stdout")
    out.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    out.add_argument("-q", "--quiet", action="store_true", help="no warnings and no progress on stderr")
    parser.set_defaults(tokens=None, phrase=[], attention_layer=None, head=None, target_class=None)


def config_of(args: argparse.Namespace) -> RunConfig:
    """Return the configuration of the run. Raises OptionError."""
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
        # Absolute: workers, and a resumed run, may have another current folder.
        data=str(data.resolve() if data.exists() else args.data),
        split=args.split,
        protocols=PROTOCOLS if args.protocols is None else tuple(args.protocols),
        request=request,
        **given,
    )


def folder_of(args: argparse.Namespace) -> Path:
    """Return the run's folder: `--output`, or a name made of data, model and selection. Raises OptionError."""
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


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; handled like Ctrl-C, with its own exit code."""

    exit_code = EXIT_TERMINATED


def ground(args: argparse.Namespace, load: Callable[..., Any]) -> int:
    """Run the command and return its exit code; `load(id, device=..., dtype=..., revision=...)` makes an adapter."""
    from grounding.batch.progress import print_status
    from grounding.batch.run_folder import RunFolder, check_folder

    actions = [name for name in ("status", "merge", "render") if getattr(args, name)]
    if len(actions) > 1:
        raise OptionError(f"--{actions[0]} or --{actions[1]}: choose one")
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
    from grounding.batch.requests import IMAGE_ALONE
    from grounding.batch.run import exit_code, run_batch
    from grounding.datasets.subset import chosen_ids

    figure_options = common.figure_keywords(args)
    config = config_of(args)
    dataset = config.dataset()
    ids = chosen_ids(dataset, args.limit, args.random, args.seed)
    rank = ProcessRank.of_launch(args.device)
    make = partial(load, args.model, device=rank.device(args.device), dtype=args.dtype, revision=args.revision)
    if not args.quiet and not rank.index:
        _warn(dataset)
    name = f"process {rank.index} of {rank.count}" if rank.count > 1 else ""
    bar = ProgressBar(quiet=args.quiet, by_shard=args.engine == "ray", name=name)
    try:
        # In this order: Ray installs a handler of its own, which _terminable replaces.
        with _executor(args, make, config, bar) as executor, _terminable():
            run = run_batch(folder, config, dataset, ids, executor, rank=rank, retry=args.retry, progress=bar)
    except KeyboardInterrupt:
        if rank.index == 0:
            command = f"{shlex.join(['python', *sys.argv])}{', with the same launcher' if rank.count > 1 else ''}"
            say(f"\nstopped; finished shards are kept. To resume: {command}")
        raise
    finally:
        bar.close()
    if run.manifest["fingerprint"]["captions"] == IMAGE_ALONE and not args.quiet and not rank.index:
        _warn_unread(args, run)
    if rank.index:  # a launcher ends all processes as soon as one exits with an error
        return exit_code(run) if exit_code(run) == 1 else 0
    if args.random is not None:
        _draw(args, figure_options, run, dataset, None)
    print_status(run, args.format, quiet=args.quiet)
    return exit_code(run)


@contextmanager
def _executor(args: argparse.Namespace, make: Callable[[], Any], config: RunConfig, bar: ProgressBar) -> Iterator[Any]:
    from grounding.batch.executors import LocalExecutor
    from grounding.batch.ray import RayExecutor

    if args.engine == "local":
        if args.address != "local":
            raise OptionError("--address belongs to --engine ray")
        yield LocalExecutor(make, config, bar.on_rows)
        return
    with RayExecutor(make, config, args.address) as cluster:
        yield cluster


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise Terminated on SIGTERM; restore the previous handler at the end."""

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


def _warn_unread(args: argparse.Namespace, run: RunFolder) -> None:
    """Print one line that names the given options about texts, for a target that no text can change."""
    names = ("captions", "protocols", "token_target", "no_tokens", "words")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]
    if given:
        verb = "is" if len(given) == 1 else "are"
        say(f"warning: {', '.join(given)} {verb} not read: no text can change the target {run.metadata.target}")


def _render(args: argparse.Namespace, run: RunFolder) -> int:
    """Draw figures of stored maps: of all images, the first ones or a random sample."""
    from grounding.datasets.open import open_dataset
    from grounding.datasets.subset import picked

    figure_options = common.figure_keywords(args)
    data = run.manifest["data"]
    dataset = open_dataset(args.data or data["folder"], data["split"])
    images = picked([name for name in run.ids if name not in dataset.broken], args.limit, args.random, args.seed)
    return _draw(args, figure_options, run, dataset, set(images))


def _draw(
    args: argparse.Namespace,
    figure_options: Mapping[str, Any],
    run: RunFolder,
    dataset: Dataset,
    images: set[str] | None,
) -> int:
    """Write figures of these images (None: all) and print their folder; return 1 if a row has no figure, else 0."""
    from grounding.batch.figures import FIGURES, draw
    from grounding.batch.progress import Meter, failures

    skipped: list[str] = []
    figures = draw(run, dataset, images, figure_options, skipped.append)
    total = run.counts().total() - failures(run) if images is None else None
    meter = Meter(total, "figure", quiet=args.quiet)
    for _ in figures:
        meter.advance()
    meter.close()
    count = meter.done
    for line in [] if args.quiet else skipped[:PROBLEMS_SHOWN]:
        say(f"warning: no figure of {escape(line)}")
    if len(skipped) > PROBLEMS_SHOWN and not args.quiet:
        say(f"warning: and {len(skipped) - PROBLEMS_SHOWN} more without a figure")
    if args.format == "text":
        print(f"wrote {count} figures into {escape(str(run.path / FIGURES))}")
    return 1 if skipped or not count else 0
