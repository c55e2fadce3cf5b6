"""What a batch run explains of each image: its captions, their phrases, and protocol texts about the phrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from grounding.core.errors import DataError, TextError
from grounding.core.text import Generate, check_text
from grounding.datasets.records import Caption, Dataset, Failure, normal

# none: the model generates the text. image: there is no text, the target is about the image alone.
Captions = Literal["first", "all", "none", "image"]
IMAGE_ALONE: Captions = "image"
CAPTIONS: tuple[Captions, ...] = ("first", "all", "none", IMAGE_ALONE)
# The published protocols of the pointing game. Each explains another text about a phrase: the phrase as a text of its
# own, or a sentence about it.
PHRASE_ALONE, UNION_BOX = "mention-anybox", "chain-unionbox"
PROTOCOLS = (PHRASE_ALONE, UNION_BOX)
SENTENCE = "image of {}"


@dataclass(frozen=True)
class TextRequest:
    """One text of an image, and what to explain of it.

    `line` is the caption's number within its image. `phrases` are spans of the text, and `prompts` map a span to a text
    about it. Spans are characters [start, end).
    """

    line: int
    text: str | Generate | None
    phrases: tuple[tuple[int, int], ...] = ()
    prompts: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @property
    def caption(self) -> str | None:
        """The text; None if the model generates it, or if there is none."""
        return self.text if isinstance(self.text, str) else None


@dataclass(frozen=True)
class Sample:
    """One image and the texts to explain of it.

    `failures` become rows without running the model. `listed` is false for a row of the data set that belongs to no
    image: its id is its own name.
    """

    id: str
    image: Path | bytes | None
    requests: tuple[TextRequest, ...]
    failures: tuple[Failure, ...] = ()
    listed: bool = True


def sample_of(dataset: Dataset, name: str, captions: Captions, protocols: Sequence[str]) -> Sample:
    """The sample of an id of the data set; an id that cannot be read gives a sample with one failure."""
    if name in dataset.broken:
        return Sample(name, None, (), (Failure(0, dataset.broken[name]),), listed=False)
    try:
        record = dataset.read(name)
    except DataError as error:
        return Sample(name, None, (), (Failure(0, str(error)),))
    if record.image is None:
        return Sample(name, None, (), record.failures if captions == "all" else record.failures[:1])
    if captions in ("none", IMAGE_ALONE):
        return Sample(name, record.image, (TextRequest(0, Generate() if captions == "none" else None),))
    requests, failures = [], list(record.failures)
    for caption in record.captions:
        try:
            requests.append(_text_request(caption, protocols))
        except TextError as error:
            failures.append(Failure(caption.line, str(error), caption.text))
    if captions == "first":
        requests, failures = requests[:1], [] if requests else failures[:1]
    if not requests and not failures:
        failures = [Failure(0, "the image has no caption")]
    return Sample(name, record.image, tuple(requests), tuple(failures))


def _text_request(caption: Caption, protocols: Sequence[str]) -> TextRequest:
    spans = tuple(dict.fromkeys((phrase.start, phrase.end) for phrase in caption.phrases))
    prompts = {(p.start, p.end): SENTENCE.format(normal(p.text)) for p in caption.phrases}
    return TextRequest(
        caption.line,
        check_text(caption.text),
        spans if PHRASE_ALONE in protocols else (),
        prompts if UNION_BOX in protocols else {},
    )
