"""What a command prints and writes: each explanation as it comes, files at once, the paths last. Imports no torch."""

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

if TYPE_CHECKING:
    from grounding.core.errors import GroundingError
    from grounding.explanation.explanation import Explanation
    from grounding.explanation.inspection import Inspection


class Report:
    """What a command prints and writes: each explanation as it comes, files at once, the paths last."""

    def __init__(self, args: argparse.Namespace, *, several: bool) -> None:
        self.args = args
        self.several = several
        self.status = 0
        self.written: list[Path] = []
        self.overlays = 0
        self.documents: list[dict[str, Any]] = []
        self.compared: list[Explanation] = []

    def add(self, explanation: Explanation, folder: Path, inspections: Sequence[Inspection] = ()) -> None:
        """Write the files of one explanation and print its table (or keep its JSON for the end)."""
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
        options = figure_keywords(self.args)
        if inspections:
            options |= {"inspections": inspections, "channels": self.args.inspect}
        return explanation.save(folder, self.args.write, per_token=self.args.per_token, **options)

    @contextlib.contextmanager
    def guarded(self, image: str, *, own_text: bool = False) -> Iterator[None]:
        """Work on one picture: where it cannot be explained, say so and go on with the others.

        What was asked for and does not exist, no other picture will have: that error goes on, unless every picture has
        a text of its own (`own_text`) and it is that which does not hold it.
        """
        from grounding.core.errors import CropError, GroundingError, TextError

        try:
            yield
        except GroundingError as error:
            own = isinstance(error, CropError) or (own_text and isinstance(error, TextError))
            if error.exit_code != 1 and not (own and self.several):
                raise
            self.failed(image, error)

    def failed(self, image: str, error: GroundingError) -> None:
        """One picture could not be explained: say so."""
        named = f"{image}: " if self.several and image not in str(error) else ""
        self.status = max(self.status, fail(error, verbose=self.args.verbose, about=named))
        self.documents.append({"image": {"path": image}, "status": error.status, "error": str(error)})

    def _together(self) -> None:
        """Classes on several pictures stand in one figure, too."""
        from grounding.explanation.figures.class_comparison import save

        self.written.append(save(self.compared, together_folder(self.args), **figure_keywords(self.args)))

    def end(self) -> int:
        """Print what remains; return the exit code."""
        if len(self.compared) > 1:
            self._together()
        if self.args.format == "json":
            if self.several:
                print(json.dumps(self.documents, indent=2, allow_nan=False))
            elif not self.status:
                print(json.dumps(self.documents[0], indent=2, allow_nan=False))
        elif self.written:
            overlays = [f"and {self.overlays} overlays"] if self.overlays else []
            print("wrote", *self.written, *overlays)
        return self.status


def together_folder(args: argparse.Namespace) -> Path:
    """Where the figure of several pictures goes."""
    from grounding.explanation.storage import slug

    return (
        Path(args.output) / "together" if args.output else Path("outputs") / f"together-{slug(Path(args.model).name)}"
    )


def warn(explanation: Explanation, *, named: bool = False) -> None:
    """What the reader of an explanation must know, on stderr; `named`: with the picture's name."""
    name = f"{escape(explanation.image.path or 'picture')}: " if named else ""
    for warning in explanation.warnings:
        print(f"warning: {name}{escape(warning)}", file=sys.stderr)
