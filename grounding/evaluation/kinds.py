"""Kinds of evaluation, chosen by the layout of a data set: images with boxes for phrases, lines with character boxes.

To add one, define an `Evaluation` and list it in `EVALUATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grounding.adapter.base import Adapter
from grounding.core.demo import demo_lines, demo_scenes
from grounding.core.errors import DataError, OptionError
from grounding.core.printable import quote
from grounding.datasets import flickr30k_entities, text_lines
from grounding.datasets import open as datasets
from grounding.evaluation import ocr, phrases, report


@dataclass(frozen=True)
class Evaluation:
    """A kind of evaluation.

    `about`, `needs`: what its data are and what their folder contains, in words.
    `recognises`: whether a folder has this layout.
    `open`: opens a split of a folder (None: its default).
    `config`: dataclass whose fields are the options that apply.
    `score`: scores an adapter on an opened split.
    `markdown`: formats the document.
    `demo`: returns the folder that is scored by default.
    """

    name: str
    about: str
    needs: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str | None], Any]
    config: type
    score: Callable[..., dict[str, Any]]
    markdown: Callable[[Mapping[str, Any]], str]
    demo: Callable[[], Path]

    @property
    def options(self) -> frozenset[str]:
        """Names of the options that apply."""
        return frozenset(field.name for field in fields(self.config))

    def config_from(self, options: Mapping[str, Any]) -> Any:
        """Return the configuration from options by name; None and False mean that an option was not given.

        Raises OptionError for an option of another kind of evaluation.
        """
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        for name in sorted(given.keys() - self.options):
            others = " and ".join(kind.about for kind in EVALUATIONS if name in kind.options)
            raise OptionError(f"--{name.replace('_', '-')} is for {others}; the data are {self.about}")
        return self.config(**given)


LINES = Evaluation(
    name="lines",
    about="lines of text with character boxes",
    needs=text_lines.NEEDS,
    recognises=text_lines.recognises,
    open=text_lines.open_lines,
    config=ocr.OcrConfig,
    score=ocr.evaluate_lines,
    markdown=report.line_markdown,
    demo=demo_lines,
)
PHRASES = Evaluation(
    name="phrases",
    about="images with boxes for phrases",
    needs=flickr30k_entities.Entities.needs,
    recognises=flickr30k_entities.Entities.recognises,
    open=lambda folder, split: datasets.open_dataset(folder, split or "test"),
    config=phrases.PhraseConfig,
    score=phrases.evaluate,
    markdown=report.phrase_markdown,
    demo=demo_scenes,
)
EVALUATIONS = (LINES, PHRASES)
# Options that apply to at least one kind.
OPTIONS = tuple(dict.fromkeys(field.name for kind in EVALUATIONS for field in fields(kind.config)))


def evaluation_of(folder: str | Path) -> Evaluation:
    """Return the kind of evaluation for a folder. Raises DataError that names the expected contents."""
    folder = Path(folder)
    needs = "; or ".join(kind.needs for kind in EVALUATIONS)
    if not folder.is_dir():
        raise DataError(f"{quote(folder)}: no such folder; a data set is a folder with {needs}")
    found = next((kind for kind in EVALUATIONS if kind.recognises(folder)), None)
    if found is None and (layout := datasets.layout_of(folder)):
        has = "captions but no boxes" if layout.captions else "images but no captions and no boxes"
        raise DataError(f"{quote(folder)} has {has}, so nothing can be scored; expected {needs}")
    if found is None:
        raise DataError(f"{quote(folder)} has no known layout; expected {needs}")
    return found


def evaluation_for(adapter: Adapter | None) -> Evaluation:
    """Return the kind whose demo data fit a model: lines for a model that generates text, else phrases."""
    return LINES if adapter is not None and adapter.generates else PHRASES
