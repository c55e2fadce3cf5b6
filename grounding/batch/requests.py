"""What a batch run asks of each picture: which captions, which of their phrases, and which texts about those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from grounding.core.errors import DataError, TextError
from grounding.core.text import Generate, check_text
from grounding.datasets.records import Caption, Dataset, Failure, normal

Captions = Literal["first", "all", "none"]
CAPTIONS: tuple[Captions, ...] = ("first", "all", "none")
# The published protocols of the pointing game, and the text about a phrase that each of them explains: the phrase as a
# text of its own, or a sentence about it.
PHRASE_ALONE, UNION_BOX = "mention-anybox", "chain-unionbox"
PROTOCOLS = (PHRASE_ALONE, UNION_BOX)
SENTENCE = "image of {}"


@dataclass(frozen=True)
class TextRequest:
    """One text of a picture: what to explain of it. `phrases` and `prompts` are about characters [start, end)."""

    line: int
    text: str | Generate
    phrases: tuple[tuple[int, int], ...] = ()
    prompts: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @property
    def caption(self) -> str | None:
        """The text, if it is given."""
        return self.text if isinstance(self.text, str) else None


@dataclass(frozen=True)
class Sample:
    """A picture and what is asked of it; `failures` are rows that cannot be explained whatever the model does. A row of
    the data set that is not `listed` under a picture has its own name as id."""

    id: str
    image: Path | bytes | None
    asks: tuple[TextRequest, ...]
    failures: tuple[Failure, ...] = ()
    listed: bool = True


def sample_of(dataset: Dataset, name: str, captions: Captions, protocols: Sequence[str]) -> Sample:
    """What is asked of a picture, or of a broken row of the data set, which has a failure and nothing else."""
    if name in dataset.broken:
        return Sample(name, None, (), (Failure(0, dataset.broken[name]),), listed=False)
    try:
        record = dataset.read(name)
    except DataError as error:
        return Sample(name, None, (), (Failure(0, str(error)),))
    if record.image is None:
        return Sample(name, None, (), record.failures if captions == "all" else record.failures[:1])
    if captions == "none":
        return Sample(name, record.image, (TextRequest(0, Generate()),))
    asks, failures = [], list(record.failures)
    for caption in record.captions:
        try:
            asks.append(_ask(caption, protocols))
        except TextError as error:
            failures.append(Failure(caption.line, str(error), caption.text))
    if captions == "first":
        asks, failures = asks[:1], [] if asks else failures[:1]
    if not asks and not failures:
        failures = [Failure(0, "the picture has no caption")]
    return Sample(name, record.image, tuple(asks), tuple(failures))


def _ask(caption: Caption, protocols: Sequence[str]) -> TextRequest:
    places = tuple(dict.fromkeys((phrase.start, phrase.end) for phrase in caption.phrases))
    about = {(p.start, p.end): SENTENCE.format(normal(p.text)) for p in caption.phrases}
    return TextRequest(
        caption.line,
        check_text(caption.text),
        places if PHRASE_ALONE in protocols else (),
        about if UNION_BOX in protocols else {},
    )
