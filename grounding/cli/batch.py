"""Options of batch runs, and what they ask for. Imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grounding.cli import options as cli

if TYPE_CHECKING:
    from grounding.batch.config import Work


def options(made: argparse.ArgumentParser) -> None:
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
    cli.model_options(made)
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
    cli.figure_options(made)
    out = made.add_argument_group("output")
    out.add_argument("--format", choices=["text", "json"], default="text", help="of the summary on stdout")
    out.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    out.add_argument("-q", "--quiet", action="store_true", help="no warnings and no progress on stderr")
    made.set_defaults(tokens=None, phrase=[], attention_layer=None, head=None, target_class=None)


def work_of(args: argparse.Namespace) -> Work:
    """What is to be computed. Raises OptionError."""
    from grounding.batch.config import Work
    from grounding.batch.requests import PROTOCOLS
    from grounding.core.demo import demo_scenes

    how = cli.explain_keywords(args)
    names = ("captions", "shard_size", "batch_size", "workers", "threads", "max_pixels", "max_failed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    select = replace(how["select"], tokens=False) if args.no_tokens else how["select"]
    methods, layers = tuple(args.methods) if args.methods else None, tuple(args.layer)
    data = Path(args.data or demo_scenes())
    return Work(
        # Other processes, and later ones, may stand in another folder.
        data=str(data.resolve() if data.exists() else args.data),
        split=args.split,
        protocols=PROTOCOLS if args.protocols is None else tuple(args.protocols),
        **{**how, "select": select, "methods": methods, "layers": layers},
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
