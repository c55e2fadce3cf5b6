"""Batches that fail are halved until the error is that of a single row: memory, NaN, texts."""

import pytest
import torch

from grounding.batch.explainer import BatchExplainer, ImageJob
from grounding.batch.requests import TextRequest
from grounding.core.errors import GroundingError, LayerError, NumericError, OptionError
from grounding.core.images import open_image
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from tests.support import models
from tests.support.images import noise

REQUEST = Request(methods=("rollout",), select=Selection(tokens=False))
TEXTS = ("a man", "a red car", "two dogs")


@pytest.fixture(autouse=True)
def cleared(monkeypatch):
    """Calls that clear the device cache, replaced: collecting garbage is slow."""
    calls = []
    monkeypatch.setattr("grounding.batch.explainer.clear_device_cache", lambda **options: calls.append(options))
    return calls


def jobs(count, texts=TEXTS[:2]):
    return [
        ImageJob(
            f"{i}", open_image(noise(30 + i, 30, i)), tuple(TextRequest(line, text) for line, text in enumerate(texts))
        )
        for i in range(count)
    ]


class Watched:
    """An adapter that records the `sizes` of its batches and the number of their `texts`.

    `prepare_images` raises `error` for batches of more than `above` images, or with the image number `of`.
    """

    def __init__(self, error=None, *, above=0, of=None):
        self.adapter, self.sizes = models.clip_adapter(dtype=torch.float32), []
        self.texts = []
        images_of, texts_of = self.adapter.prepare_images, self.adapter.prepare_texts

        def prepare_images(images):
            self.sizes.append(len(images))
            hit = len(images) > above if of is None else any(image.width == 30 + of for image in images)
            if error and hit:
                raise error
            return images_of(images)

        def prepare_texts(inputs, texts):
            self.texts.append(sum(len(own) for own in texts))
            return texts_of(inputs, texts)

        self.adapter.prepare_images, self.adapter.prepare_texts = prepare_images, prepare_texts

    def rows(self, made=None):
        return BatchExplainer(self.adapter, REQUEST).rows(jobs(6) if made is None else made)


def names(rows):
    return [row["id"] for row in rows]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("mps: out of memory.")]
)
def test_out_of_memory_halves_only_that_batch(error):
    watched = Watched(error, above=2)
    rows = watched.rows()
    assert watched.sizes == [6, 3, 1, 2, 3, 1, 2]
    assert {row["status"] for row in rows} == {"ok"}
    assert names(rows) == [f"{i}#{line}" for i in range(6) for line in (0, 1)]


def test_one_image_that_never_fits_costs_only_its_rows():
    watched = Watched(RuntimeError("CUDA out of memory.\nTried to allocate"), of=4)
    rows = watched.rows()
    bad = [row for row in rows if row["status"] != "ok"]
    assert names(bad) == ["4#0", "4#1"]
    assert {row["status"] for row in bad} == {"failed_oom"}
    assert bad[0]["error"] == "RuntimeError: CUDA out of memory. Tried to allocate"
    assert bad[0]["caption"] == "a man"
    assert watched.sizes == [6, 3, 3, 1, 2, 1, 1, 1, 1]
    assert names(rows) == [f"{i}#{line}" for i in range(6) for line in (0, 1)]


def test_an_image_with_too_many_texts_is_halved_by_texts():
    watched = Watched()
    texts_of = watched.adapter.prepare_texts

    def prepare_texts(inputs, texts):
        if sum(map(len, texts)) > 1:
            raise MemoryError
        return texts_of(inputs, texts)

    watched.adapter.prepare_texts = prepare_texts
    rows = watched.rows(jobs(1, TEXTS))
    assert names(rows) == ["0#0", "0#1", "0#2"]
    assert {row["status"] for row in rows} == {"ok"}


def test_without_any_memory_each_row_fails():
    rows = Watched(MemoryError()).rows(jobs(2))
    assert [row["status"] for row in rows] == ["failed_oom"] * 4
    assert rows[0]["error"].startswith("MemoryError")


def test_numbers_that_are_not_finite_cost_one_image():
    watched = Watched()
    images_of = watched.adapter.prepare_images

    def prepare_images(images):
        inputs = images_of(images)
        for i, image in enumerate(images):
            if image.width == 33:
                inputs.tensors["pixel_values"][i] = float("nan")
        return inputs

    watched.adapter.prepare_images = prepare_images
    rows = watched.rows()
    assert [row["id"] for row in rows if row["status"] == "failed_numeric"] == ["3#0", "3#1"]
    assert [row["status"] for row in rows].count("ok") == 10
    assert "entries" not in rows[6]


def test_a_model_with_nan_weights_fails_every_row():
    watched = Watched()
    with torch.no_grad():
        next(watched.adapter.model.vision_model.parameters()).fill_(float("nan"))
    assert {row["status"] for row in watched.rows(jobs(2))} == {"failed_numeric"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("shape"), "failed_model"),
        (IndexError("list"), "failed_model"),
        (ZeroDivisionError(), "failed_model"),
        (NumericError("NaN"), "failed_numeric"),
        (GroundingError("no text"), "failed_input"),
    ],
)
def test_other_errors_cost_their_image_with_their_status(error, status):
    rows = Watched(error, of=1).rows(jobs(3))
    assert [row["status"] for row in rows] == ["ok", "ok", status, status, "ok", "ok"]
    assert rows[2]["error"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_ctrl_c_is_no_failure_of_an_image(error):
    with pytest.raises(type(error)):
        Watched(error, of=1).rows()


@pytest.mark.parametrize("error", [OptionError("no such option"), LayerError("dead")])
def test_an_error_of_the_request_is_raised_unless_a_batch_has_succeeded(error):
    watched = Watched(error, of=2)
    explainer = BatchExplainer(watched.adapter, REQUEST)
    with pytest.raises(type(error)):
        explainer.rows(jobs(3))
    explainer.rows(jobs(2))
    rows = explainer.rows(jobs(3))
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed_model"] * 2


def test_the_device_cache_is_cleared_between_the_halves(cleared):
    Watched(MemoryError(), above=3).rows()
    assert cleared == [{"garbage_collection": True}]


def test_equal_prompts_are_explained_once_and_assigned_to_their_captions():
    requests = (
        TextRequest(0, "a man and a man", ((0, 5), (10, 15)), {(0, 5): "image of a man", (10, 15): "image of a man"}),
        TextRequest(1, "a man", (), {(0, 5): "image of a man"}),
    )
    watched = Watched()
    rows = watched.rows([ImageJob("a", open_image(noise(30, 30)), requests)])
    assert watched.texts == [3]
    kinds = [[(e["kind"], e["label"], e["start"], e["end"]) for e in row["entries"]] for row in rows]
    assert kinds[0] == [
        ("caption", "a man and a man", 0, 15),
        ("phrase", "a man", 0, 5),
        ("phrase", "a man", 10, 15),
        ("prompt", "image of a man", 0, 5),
        ("prompt", "image of a man", 10, 15),
    ]
    assert kinds[1] == [("caption", "a man", 0, 5), ("prompt", "image of a man", 0, 5)]
    assert rows[0]["entries"][3]["score"] == rows[0]["entries"][4]["score"] == rows[1]["entries"][1]["score"]
