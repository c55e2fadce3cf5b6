"""Options of commands whose model writes the text itself. Imports no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grounding.core.text import Generate
    from grounding.engine.request import Request


def reading_options(parser: argparse.ArgumentParser) -> None:
    """What the model writes, and questions about what it did not write."""
    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="TEXT", help="make the model write this text (default: what it reads)")
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens to write (default: the checkpoint's)")
    group.add_argument("--beams", type=int, metavar="N", help="beams of the search (default: the checkpoint's)")
    group.add_argument("--special", action="store_true", help="special tokens too: why does the text end here?")
    group.add_argument(
        "--where",
        metavar="TOKEN",
        help="is there evidence for this token in place of each chosen one (--tokens; default: all)?",
    )
    group.add_argument(
        "--contrast",
        nargs=2,
        metavar=("A", "B"),
        help="why A and not B: logit(A) - logit(B), where --tokens says, or else where the text has A, or B",
    )


def reading_request(args: argparse.Namespace, request: Request) -> tuple[str | Generate, Request]:
    """The text that is forced on the model (or `Generate`), and the request with the options above.

    Tokens are explained without the caption. Raises OptionError for options that exclude each other.
    """
    from dataclasses import replace

    from grounding.core.errors import OptionError
    from grounding.core.text import Generate, check_text

    if args.text is not None and (args.max_length is not None or args.beams is not None):
        raise OptionError("--max-length and --beams are for a text that the model writes, --text forces one on it")
    if any(token is not None and not token for token in (args.where, *(args.contrast or ()))):
        raise OptionError("--where and --contrast want tokens, one was empty")
    if args.special and args.words:
        raise OptionError("--special is about single tokens: not with --words")
    if (args.where or args.contrast) and (args.words or args.phrase):
        raise OptionError("--where and --contrast ask about single tokens: not with --words or --phrase")
    select = replace(
        request.select,
        caption=False,
        special=args.special,
        where=args.where or "",
        contrast=tuple(args.contrast) if args.contrast else None,
    )
    text = Generate(args.max_length, args.beams) if args.text is None else check_text(args.text)
    return text, replace(request, select=select)
