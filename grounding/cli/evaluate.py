"""Score the stored maps of a batch run without a model, and print scores. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grounding.batch.requests import PROTOCOLS
from grounding.core.errors import OptionError
from grounding.core.printable import escape
from grounding.evaluation import report

__all__ = ["PROTOCOLS", "print_report", "score_run"]

# Options that --run accepts: fields of RunScoreConfig, and the others.
CONFIG_FIELDS = ("captions", "peak", "min_entities", "threshold", "seed", "protocol")
OTHERS = ("run", "data", "format", "output", "verbose", "quiet")
Document = Mapping[str, Any]


def score_run(args: argparse.Namespace) -> int:
    """Score the run in `--run`, print the scores and return the exit code.

    Raises OptionError for options that need a model, GroundingError for a run that cannot be scored.
    """
    given = _config_fields(args)
    from grounding.batch.run_folder import RunFolder
    from grounding.evaluation.runs import RunScoreConfig, evaluate_run, run_dataset

    config = RunScoreConfig(**given)
    path = report.check_file(args.output) if args.output else None
    run = RunFolder.open(args.run)
    progress = sys.stderr.isatty() and not args.quiet
    found = evaluate_run(run, run_dataset(run, args.data), config, progress=progress)
    parts = tuple(found.values())
    return print_report(args, parts[0] if len(config.protocol) == 1 else found, parts, report.phrase_markdown, path)


def print_report(
    args: argparse.Namespace,
    document: Document,
    parts: Sequence[Document],
    markdown: Callable[[Document], str],
    path: Path | None,
) -> int:
    """Print warnings to stderr and scores to stdout, write `document` to `path` (None: nowhere); return 0.

    The scores are the document as JSON, or one Markdown table per part.
    """
    warnings = dict.fromkeys(line for part in parts for line in report.warnings_of(part))
    for line in () if args.quiet else warnings:
        print(f"warning: {escape(line)}", file=sys.stderr)
    print(report.as_json(document) if args.format == "json" else "\n\n".join(map(markdown, parts)))
    if path is not None:
        report.write_file(path, document)
    return 0


def _config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given fields of RunScoreConfig. Raises OptionError for options that need a model."""
    if not args.run:
        raise OptionError("--protocol is for --run; with a model, phrases are scored by mention-anybox")
    for name, value in vars(args).items():
        given = value is not None and value is not False and value not in ([], "auto")
        if given and name not in (*CONFIG_FIELDS, *OTHERS):
            raise OptionError(f"--{name.replace('_', '-')} needs a model; --run scores the stored maps of a run")
    fields = {name: getattr(args, name) for name in CONFIG_FIELDS if getattr(args, name) is not None}
    return fields | {"protocol": tuple(dict.fromkeys(args.protocol or ()))}
