"""Write the files of explanations and print their tables, JSON, warnings and paths. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grounding.cli.main import fail
from grounding.cli.options import figure_keywords
from grounding.core.printable import escape
from grounding.core.streams import say

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter
    from grounding.core.errors import GroundingError
    from grounding.explanation.explanation import Explanation
    from grounding.explanation.inspection import Inspection


class Report:
    """Output of a command: files and table of each explanation at once, JSON and the paths at the end.

    `several`: the command was given more than one image. Raises OptionError for figure options.
    """

    def __init__(self, args: argparse.Namespace, *, several: bool) -> None:
        self.args = args
        self.figure_options = figure_keywords(args)
        self.several = several
        self.status = 0
        self.written: list[Path] = []
        self.overlays = 0
        self.documents: list[dict[str, Any]] = []
        self.compared: list[Explanation] = []

    def add(self, explanation: Explanation, folder: Path, inspections: Sequence[Inspection] = ()) -> None:
        """Write the files of one explanation and print its table (`--format json`: collect its document)."""
        from grounding.explanation.storage import listed, to_json
        from grounding.explanation.text_table import explanation_table, headline

        if not self.args.quiet:
            warn(explanation, named=self.several)
        if self.several and "png" in self.args.write and any(e.kind == "class" for e in explanation.entries):
            self.compared.append(explanation)
        files = self._save(explanation, folder, inspections) if self.args.write else {}
        single = [path for kind, path in files.items() if ":" not in kind]
        self.written += single
        self.overlays += len(files) - len(single)
        if self.args.format == "json":
            self.documents.append(to_json(explanation, listed(files)))
            return
        print(headline(explanation), explanation_table(explanation), "", sep="\n")

    def _save(self, explanation: Explanation, folder: Path, inspections: Sequence[Inspection]) -> dict[str, Path]:
        options: dict[str, Any] = {"per_token": self.args.per_token}
        if inspections:
            options |= {"inspections": inspections, "channels": self.args.inspect}
        return explanation.save(folder, self.args.write, **options, **self.figure_options)

    @contextlib.contextmanager
    def guarded(self, image: str, *, own_text: bool = False) -> Iterator[None]:
        """Report a failure on one image and continue with the others.

        An error in the request (exit code 2) would occur on every image and is raised. Exceptions, with several
        images: a crop outside this image, and a token or phrase that is missing from this image's text, if every
        image has its own (`own_text`).
        """
        from grounding.core.errors import CropError, GroundingError, TextError

        try:
            yield
        except GroundingError as error:
            only_here = isinstance(error, CropError) or (own_text and isinstance(error, TextError))
            if error.exit_code != 1 and not (only_here and self.several):
                raise
            self.failed(image, error)

    def failed(self, image: str, error: GroundingError) -> None:
        """Print why an image could not be explained; the exit code becomes that of the error."""
        named = f"{image}: " if self.several and image not in str(error) else ""
        self.status = max(self.status, fail(error, verbose=self.args.verbose, about=named))
        self.documents.append({"image": {"path": image}, "status": error.status, "error": str(error)})

    def _save_comparison(self) -> None:
        """Write one figure of all images on which classes were explained."""
        from grounding.explanation.figures.class_comparison import save

        self.written.append(save(self.compared, comparison_folder(self.args), **self.figure_options))

    def end(self) -> int:
        """Write the comparison figure, print the JSON or the paths, return the exit code."""
        if len(self.compared) > 1:
            self._save_comparison()
        if self.args.format == "json":
            if self.several:
                print(json.dumps(self.documents, indent=2, allow_nan=False))
            elif not self.status:
                print(json.dumps(self.documents[0], indent=2, allow_nan=False))
        elif self.written:
            overlays = [f"and {self.overlays} overlays"] if self.overlays else []
            print("wrote", *self.written, *overlays)
        return self.status


def warn_unread(args: argparse.Namespace, adapter: Adapter) -> None:
    """Print one line on stderr that names the given options about texts, if no text can change the target."""
    target = args.target or adapter.target_kinds[0]
    if target not in adapter.text_independent:
        return
    names = ("caption", "token_target", "tokens", "words", "phrase")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False, [])]
    if given:
        verb = "is" if len(given) == 1 else "are"
        say(f"warning: {', '.join(given)} {verb} not read: no text can change the target {target}")


def comparison_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the figure that compares several images."""
    from grounding.explanation.storage import slug

    if args.output:
        return Path(args.output) / "together"
    return Path("outputs") / f"together-{slug(Path(args.model).name)}"


def warn(explanation: Explanation, *, named: bool = False) -> None:
    """Print the warnings of an explanation on stderr, with `named` after the image's path."""
    name = f"{escape(explanation.image.path or 'image')}: " if named else ""
    for warning in explanation.warnings:
        print(f"warning: {name}{escape(warning)}", file=sys.stderr)
