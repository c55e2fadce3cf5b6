"""Options of commands whose model generates the text, and the request made from them. Imports no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grounding.core.text import Generate
    from grounding.engine.request import Request


def reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the generated text, and of tokens that were not generated."""
    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="TEXT", help="force this text on the model (default: the text it generates)")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="longest text to generate, in tokens (default: the checkpoint's)"
    )
    group.add_argument(
        "--beams", type=int, metavar="N", help="number of beams of beam search (default: the checkpoint's)"
    )
    group.add_argument(
        "--special", action="store_true", help="explain special tokens, too: why does the text end here?"
    )
    group.add_argument(
        "--where",
        metavar="TOKEN",
        help="evidence for this token at the position of each token of --tokens (default: all)",
    )
    group.add_argument(
        "--contrast",
        nargs=2,
        metavar=("A", "B"),
        help="why A and not B: logit(A) - logit(B) at the position of --tokens (default: where the text has A, else B)",
    )


def reading_request(args: argparse.Namespace, request: Request) -> tuple[str | Generate, Request]:
    """Return the text that is forced on the model, or `Generate`, and the request with the options above.

    The request explains tokens, not the caption as a whole. Raises OptionError for options that exclude each other,
    TextError for a text without visible characters.
    """
    from dataclasses import replace

    from grounding.core.errors import OptionError
    from grounding.core.text import Generate, check_text

    if args.text is not None and (args.max_length is not None or args.beams is not None):
        raise OptionError("--max-length and --beams are for generated text, --text forces a given one: choose one")
    if any(token is not None and not token for token in (args.where, *(args.contrast or ()))):
        raise OptionError("--where and --contrast expect tokens, got an empty one")
    if args.special and args.words:
        raise OptionError("--special explains single tokens: not with --words")
    if (args.where or args.contrast) and (args.words or args.phrase):
        raise OptionError("--where and --contrast explain single tokens: not with --words or --phrase")
    select = replace(
        request.select,
        caption=False,
        special=args.special,
        where=args.where or "",
        contrast=tuple(args.contrast) if args.contrast else None,
    )
    text = Generate(args.max_length, args.beams) if args.text is None else check_text(args.text)
    return text, replace(request, select=select)
