"""Command-line options that the commands share, and the values made from them. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.core.text import WORD_RULE

if TYPE_CHECKING:
    from grounding.engine.request import Request
    from grounding.explanation.inspection import Inspection

DEFAULT_CHANNELS = 8  # of --inspect


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="ID|DIR", help="Hugging Face id or folder (default: the embedded demo model)")
    group.add_argument("--revision", help="branch, tag or commit of --model on the hub")
    group.add_argument(
        "--device", default="auto", help="auto (cuda, mps, cpu), or a torch device (default: %(default)s)"
    )
    group.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="default: float32 on a CPU")
    group.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")


def explain_options(parser: argparse.ArgumentParser) -> None:
    """Add what is explained, and by which methods."""
    group = parser.add_argument_group("what is explained")
    group.add_argument("--target", help="the scalar that is explained; an unknown name lists those of the model")
    group.add_argument(
        "--target-class",
        action="append",
        default=[],
        metavar="NAME|INDEX",
        help="a class of a classifier, repeatable (default: the predicted one)",
    )
    group.add_argument(
        "--token-target",
        choices=["leave-one-out", "alone"],
        help="score of a part of the caption: what the caption's score loses without it (default), or its score as a "
        "separate text; for models that compare image and text",
    )
    group.add_argument(
        "--tokens",
        nargs="*",
        metavar="TOKEN",
        help="only these tokens, by text or by index as @0; without a value: no tokens (default: all)",
    )
    group.add_argument("--words", action="store_true", help=f"words instead of tokens: {WORD_RULE}")
    group.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="TEXT",
        help="part of the text, scored as a separate text if the model compares image and text; repeatable",
    )
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--methods", nargs="+", metavar="NAME", help="default: default, the default methods of the architecture"
    )
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.OPTION=VALUE",
        help="e.g. gradcam.threshold=0.1 (of the maximum) or rollout.fusion=max; repeatable",
    )
    group.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="LAYER",
        help="layer of Grad-CAM: block index (-2: its output; -1.in: input of its attention) or a module path; "
        "repeatable: one map per layer",
    )
    group.add_argument("--average-layers", action="store_true", help="average the maps of repeated --layer into one")
    group.add_argument("--attention-layer", type=int, metavar="N", help="block of the method `attention`")
    group.add_argument("--head", type=int, metavar="N", help="head of the method `attention` (default: their mean)")
    group.add_argument("--list-layers", action="store_true", help="list the layers with their output shapes, and stop")


def figure_options(parser: argparse.ArgumentParser) -> None:
    """Add how maps are drawn."""
    group = parser.add_argument_group("figure")
    group.add_argument(
        "--layout",
        choices=["rows", "panels"],
        help="maps side by side, or original | heat map | overlay (default: rows)",
    )
    group.add_argument("--scale", choices=["entry", "caption", "fixed"], help="which maps share a colour scale")
    group.add_argument("--fixed", nargs=2, type=float, metavar=("LOW", "HIGH"), help="limits of --scale fixed")
    group.add_argument("--cmap", metavar="NAME", help="matplotlib colour map (default: magma)")
    group.add_argument("--opacity", type=float, help="of the heat map over the image, 0 to 1")
    group.add_argument("--background", choices=["picture", "edges"], help="what is drawn under the heat map")
    group.add_argument("--grid", action="store_true", help="draw the patch grid")
    group.add_argument("--cells", action="store_true", help="one flat colour per patch, not interpolated")
    group.add_argument("--signed", action="store_true", help="raw signed maps in diverging colours, zero in the middle")


def image_options(parser: argparse.ArgumentParser) -> None:
    """Add which images are explained, and how they may be opened."""
    group = parser.add_argument_group("images")
    group.add_argument("--image", nargs="+", action="extend", metavar="FILE", help="images (default: the embedded one)")
    group.add_argument(
        "--crop", type=_crop, metavar="X0,Y0,X1,Y1", help="use only this part of every image, in its pixels"
    )
    group.add_argument("--allow-url", action="store_true", help="fetch images given as http(s) addresses")
    group.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images (default: 100 million)")


def image_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `open_image`."""
    given = {name: getattr(args, name) for name in ("max_pixels", "crop") if getattr(args, name) is not None}
    return {"allow_url": args.allow_url} | given


def _crop(text: str) -> tuple[int, ...]:
    """Parse X0,Y0,X1,Y1 in original pixels. Raises ArgumentTypeError for anything but four whole numbers."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().lstrip("-").isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected four whole numbers X0,Y0,X1,Y1, got {text!r}")
    return tuple(int(part) for part in parts)


def output_options(parser: argparse.ArgumentParser) -> None:
    """Add where results go, and in which form."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", metavar="DIR", help="default: outputs/<image>-<model>/; an earlier result there is replaced"
    )
    group.add_argument(
        "--write",
        nargs="*",
        choices=["png", "npz", "json"],
        default=["png", "npz", "json"],
        help="files to write (default: all; without a value: none)",
    )
    group.add_argument("--per-token", action="store_true", help="write one overlay per entry and method, too")
    group.add_argument(
        "--inspect",
        nargs="?",
        type=int,
        const=DEFAULT_CHANNELS,
        metavar="K",
        help="write inspect.png, too: per entry and --layer the K strongest channels (default: %(const)s) with their "
        "gradients, the channel weights, the map before and after the ReLU",
    )
    group.add_argument("--format", choices=["text", "json"], default="text", help="what is printed")
    group.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    group.add_argument("-q", "--quiet", action="store_true", help="no warnings on stderr")


def figure_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given figure options as keyword arguments, validated; the defaults are those of FigureOptions.

    Raises OptionError.
    """
    from grounding.explanation.figures.options import FigureOptions

    names = ("layout", "scale", "cmap", "opacity", "background")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.fixed is not None:
        given = {"scale": "fixed"} | given | {"fixed": tuple(args.fixed)}
    given |= {name: True for name in ("grid", "signed", "cells") if getattr(args, name)}
    FigureOptions.of(given)
    return given


def request_of(args: argparse.Namespace) -> Request:
    """Return the request made from the options.

    `--attention-layer` and `--head` add the method `attention`, and take precedence over its `--option`.
    Raises OptionError for a malformed `--option`, UnknownNameError for an unknown method.
    """
    from grounding.core.errors import OptionError
    from grounding.engine.request import DEFAULT, Request
    from grounding.engine.selection import Selection

    options: dict[str, Any] = {}
    for item in args.option:
        key, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"--option {item!r}: expected METHOD.OPTION=VALUE, e.g. gradcam.threshold=0.1")
        options[key] = value
    attention = {"attention.layer": args.attention_layer, "attention.head": args.head}
    attention = {key: value for key, value in attention.items() if value is not None}
    methods = args.methods
    if attention:
        methods = list(dict.fromkeys([*(args.methods or [DEFAULT]), "attention"]))
    tokens = True if args.tokens is None else args.tokens
    return Request(
        methods,
        Selection(tokens=tokens, words=args.words, phrases=args.phrase),
        _target(args),
        args.token_target,
        args.layer,
        args.average_layers,
        options | attention,
        args.seed,
    )


def _target(args: argparse.Namespace) -> Any:
    """Return the kind of target, or the requested classes. Raises OptionError for both."""
    from grounding.core.errors import OptionError

    if args.target_class and args.target not in (None, "class"):
        raise OptionError(f"--target-class is for the target class, not for --target {args.target}")
    return args.target_class or args.target


def output_folders(args: argparse.Namespace, images: Sequence[str], demo: str = "") -> list[Path]:
    """Return one output folder per image, checked before any work. `demo` names the model if `--model` is not given.

    Images of the same name are numbered. With `--output`, several images get one folder each inside it.
    Raises OSError or GroundingError.
    """
    from grounding.core.demo import DEMO_NAME
    from grounding.core.errors import OptionError
    from grounding.explanation.storage import check_output, slug

    if args.output is not None and not args.output.strip():
        raise OptionError("--output is empty: name a folder")
    if args.per_token and "png" not in args.write:
        raise OptionError("--per-token needs png among the values of --write")
    if args.inspect is not None:
        _check_inspect(args)
    model = slug(Path(args.model).name if args.model else demo or DEMO_NAME)
    names: list[str] = []
    for image in images:
        stem, number = slug(Path(image).stem, "picture"), 1
        while f"{stem}{'' if number == 1 else f'-{number}'}-{model}" in names:
            number += 1
        names.append(f"{stem}{'' if number == 1 else f'-{number}'}-{model}")
    root = Path(args.output or "outputs")
    folders = [root] if args.output and len(images) == 1 else [root / name for name in names]
    if args.write:
        for folder in folders:
            check_output(folder)
    return folders


def _check_inspect(args: argparse.Namespace) -> None:
    from grounding.core.errors import OptionError
    from grounding.explanation.figures.inspection import check_channels

    check_channels(args.inspect)
    if "png" not in args.write:
        raise OptionError("--inspect needs png among the values of --write")


def inspected(args: argparse.Namespace, adapter: Any, image: Any, text: Any, request: Request) -> list[Inspection]:
    """Return the inspections of `--inspect`; an empty list without it."""
    if args.inspect is None:
        return []
    from grounding.engine.inspect import inspect_request

    return inspect_request(adapter, image, text, request)
