"""What can be evaluated: the layout of a data set decides which scores are counted and which options apply.

A kind of evaluation joins as an `Evaluation` and a place in `EVALUATIONS`.
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
from grounding.datasets import open as flickr30k
from grounding.evaluation import ocr, phrases, report


@dataclass(frozen=True)
class Evaluation:
    """One kind: which folders it reads (`needs` says so in words), by which rules it scores, how it is printed.

    `rules` is a dataclass whose fields are the options that apply; `open` takes folder and split (None: its default),
    `score` what that gave after the adapter, `demo` is the folder that is scored when none is given.
    """

    name: str
    about: str
    needs: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, str | None], Any]
    rules: type
    score: Callable[..., dict[str, Any]]
    markdown: Callable[[Mapping[str, Any]], str]
    demo: Callable[[], Path]

    @property
    def options(self) -> frozenset[str]:
        """The names of the options that apply."""
        return frozenset(field.name for field in fields(self.rules))

    def rules_of(self, given: Mapping[str, Any]) -> Any:
        """The rules from options by name; what is None or False was not given.

        Raises OptionError for an option of another kind of evaluation.
        """
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        for name in sorted(given.keys() - self.options):
            others = " and ".join(kind.about for kind in EVALUATIONS if name in kind.options)
            raise OptionError(f"--{name.replace('_', '-')} is for {others}; the data are {self.about}")
        return self.rules(**given)


LINES = Evaluation(
    "lines",
    "lines of text with character boxes",
    text_lines.NEEDS,
    text_lines.recognises,
    text_lines.open_lines,
    ocr.OcrConfig,
    ocr.evaluate_lines,
    report.line_markdown,
    demo_lines,
)
PHRASES = Evaluation(
    "phrases",
    "pictures with boxes for phrases",
    flickr30k_entities.Entities.needs,
    flickr30k_entities.Entities.recognises,
    lambda folder, split: flickr30k.open_dataset(folder, split or "test"),
    phrases.PhraseConfig,
    phrases.evaluate,
    report.phrase_markdown,
    demo_scenes,
)
EVALUATIONS = (LINES, PHRASES)
# All options that apply to some of them.
OPTIONS = tuple(dict.fromkeys(field.name for kind in EVALUATIONS for field in fields(kind.rules)))


def evaluation_of(folder: str | Path) -> Evaluation:
    """The kind of evaluation that a folder is for. Raises DataError saying what there could be in it."""
    folder = Path(folder)
    needs = "; or ".join(kind.needs for kind in EVALUATIONS)
    if not folder.is_dir():
        raise DataError(f"{quote(folder)}: there is no such folder; a data set is a folder with {needs}")
    found = next((kind for kind in EVALUATIONS if kind.recognises(folder)), None)
    if found is None and (layout := flickr30k.layout_of(folder)):
        has = "captions but no boxes" if layout.captions else "pictures but no captions and no boxes"
        raise DataError(f"{quote(folder)} has {has}, so that nothing can be scored; expected {needs}")
    if found is None:
        raise DataError(f"{quote(folder)} has no layout that can be read; expected {needs}")
    return found


def suited(adapter: Adapter | None) -> Evaluation:
    """The kind whose demo data suit a model: lines for one that writes texts, else phrases."""
    return LINES if adapter is not None and adapter.generates else PHRASES
