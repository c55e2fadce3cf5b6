"""Explain images in batches; a batch that fails is halved until each error is attributed to a single text.

Out of memory, a number that is not finite, a text that the model cannot process: each costs one row.
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

# Errors of the request, not of an image: every image would raise them.
REQUEST_ERRORS = (LayerError, OptionError, TargetError, UnknownNameError)
# Errors that a model may raise for an input it cannot process; KeyboardInterrupt and SystemExit propagate.
INPUT_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    OSError,
)


@dataclass(frozen=True)
class ImageJob:
    """A decoded image and the texts to explain of it; `sample` is the image's id in the data set."""

    sample: str
    image: Picture
    requests: tuple[TextRequest, ...]


class BatchExplainer:
    """Explain images and their texts for one request; `request.select` applies to captions."""

    def __init__(self, adapter: Adapter, request: Request) -> None:
        self.adapter, self.request = adapter, request
        self._succeeded = False

    def rows(self, jobs: Sequence[ImageJob]) -> list[Row]:
        """Explain all texts of all jobs: one row per text, in order.

        Raises errors of the request (REQUEST_ERRORS) until a first batch has succeeded; later they become rows.
        """
        try:
            made = self._explain(jobs)
            self._succeeded = True
            return made
        except REQUEST_ERRORS as error:
            if not self._succeeded:
                raise
            status, message = MODEL, str(error)
        except GroundingError as error:
            status, message = error.status, str(error)
        except (*INPUT_ERRORS, MemoryError) as error:
            short = isinstance(error, MemoryError) or should_reduce_batch_size(error)
            status = OUT_OF_MEMORY if short else MODEL
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # Outside of `except`: the error's traceback would keep the tensors of the failed pass alive.
        if status == OUT_OF_MEMORY:
            clear_device_cache(garbage_collection=True)
        return self._split(jobs, status, message)

    def _split(self, jobs: Sequence[ImageJob], status: str, message: str) -> list[Row]:
        """The rows of jobs that failed together: in halves, down to a single text."""
        if len(jobs) > 1:
            middle = len(jobs) // 2
            return self.rows(jobs[:middle]) + self.rows(jobs[middle:])
        [job] = jobs
        if len(job.requests) > 1:
            middle = len(job.requests) // 2
            halves = job.requests[:middle], job.requests[middle:]
            return [row for half in halves for row in self.rows([replace(job, requests=half)])]
        [request] = job.requests
        return [failed_row(job.sample, request.line, request.caption, status, message)]

    def _explain(self, jobs: Sequence[ImageJob]) -> list[Row]:
        texts = [_texts(job.requests) for job in jobs]
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

    def _selection(self, job: ImageJob, index: int) -> Selection:
        """The entries of a text: the requested ones of a caption, the whole text alone of a prompt."""
        if index >= len(job.requests):
            return Selection(tokens=False)
        return replace(self.request.select, phrases=job.requests[index].phrases)


def _texts(requests: Sequence[TextRequest]) -> list[str | Generate | None]:
    """The captions, then each distinct prompt once."""
    prompts = dict.fromkeys(text for request in requests for text in request.prompts.values())
    return [*(request.text for request in requests), *prompts]


def _rows(job: ImageJob, texts: Sequence[str | Generate | None], found: Sequence[Explanation]) -> list[Row]:
    count = len(job.requests)
    prompts = dict(zip(texts[count:], found[count:], strict=True))
    return [
        to_row(job.sample, request.line, one, {span: prompts[text] for span, text in request.prompts.items()})
        for request, one in zip(job.requests, found, strict=False)
    ]
