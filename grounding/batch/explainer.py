"""The rows of pictures: explained together, and where that fails, halved until what fails stands alone.

Out of memory, a number that is not finite, a text that the model cannot read: each costs its own row only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from grounding.adapter.base import Adapter
from grounding.batch.requests import TextRequest
from grounding.batch.rows import MODEL, OUT_OF_MEMORY, Row, failed_row, to_row
from grounding.core.errors import GroundingError, LayerError, OptionError, TargetError, UnknownNameError
from grounding.core.images import Picture
from grounding.core.text import Generate
from grounding.engine.explain import explain_request
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from grounding.explanation.explanation import Explanation

# What was asked for is wrong for every picture alike.
REQUEST_ERRORS = (LayerError, OptionError, TargetError, UnknownNameError)
# What a model may raise on an input it cannot take; Ctrl-C and the like go on.
BROKEN = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError)


@dataclass(frozen=True)
class ImageJob:
    """One opened picture and the texts to explain of it."""

    sample: str
    image: Picture
    asks: tuple[TextRequest, ...]


class BatchExplainer:
    """Explain images and their texts for a request, whose selection is that of the captions."""

    def __init__(self, adapter: Adapter, request: Request) -> None:
        self.adapter, self.request = adapter, request
        self._worked = False

    def rows(self, jobs: Sequence[ImageJob]) -> list[Row]:
        """One row per text, in order. Raises what is wrong for every picture alike, as long as none has worked."""
        try:
            made = self._explained(jobs)
            self._worked = True
            return made
        except REQUEST_ERRORS as error:
            if not self._worked:
                raise
            status, words = MODEL, str(error)
        except GroundingError as error:
            status, words = error.status, str(error)
        except (*BROKEN, MemoryError) as error:
            short = isinstance(error, MemoryError) or should_reduce_batch_size(error)
            status, words = OUT_OF_MEMORY if short else MODEL, f"{type(error).__name__}: {' '.join(str(error).split())}"
        # Here, as the error itself would keep what the failed pass had made.
        if status == OUT_OF_MEMORY:
            clear_device_cache(garbage_collection=True)
        return self._apart(jobs, status, words)

    def _apart(self, jobs: Sequence[ImageJob], status: str, words: str) -> list[Row]:
        """The rows of jobs that failed together: in halves, down to a single text."""
        if len(jobs) > 1:
            middle = len(jobs) // 2
            return self.rows(jobs[:middle]) + self.rows(jobs[middle:])
        [job] = jobs
        if len(job.asks) > 1:
            middle = len(job.asks) // 2
            return [
                row for asks in (job.asks[:middle], job.asks[middle:]) for row in self.rows([replace(job, asks=asks)])
            ]
        [ask] = job.asks
        return [failed_row(job.sample, ask.line, ask.caption, status, words)]

    def _explained(self, jobs: Sequence[ImageJob]) -> list[Row]:
        texts = [_texts(job.asks) for job in jobs]
        found = explain_request(
            self.adapter,
            [job.image for job in jobs],
            [list(own) for own in texts],
            self.request,
            selections=[
                [self._selection(job, i) for i in range(len(own))] for job, own in zip(jobs, texts, strict=True)
            ],
            batch_size=len(jobs),
        )
        return [row for job, own, made in zip(jobs, texts, found, strict=True) for row in _rows(job, own, made)]

    def _selection(self, job: ImageJob, place: int) -> Selection:
        """What is explained of a picture's text: of a caption what was asked for, of a text about a phrase itself."""
        if place >= len(job.asks):
            return Selection(tokens=False)
        return replace(self.request.select, phrases=job.asks[place].phrases)


def _texts(asks: Sequence[TextRequest]) -> list[str | Generate]:
    """The captions, then every text about their phrases once."""
    return [*(ask.text for ask in asks), *dict.fromkeys(text for ask in asks for text in ask.prompts.values())]


def _rows(job: ImageJob, texts: Sequence[str | Generate], found: Sequence[Explanation]) -> list[Row]:
    about = dict(zip(texts[len(job.asks) :], found[len(job.asks) :], strict=True))
    return [
        to_row(job.sample, ask.line, one, {place: about[text] for place, text in ask.prompts.items()})
        for ask, one in zip(job.asks, found, strict=False)
    ]
