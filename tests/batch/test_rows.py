"""An explanation written to a table and read again is the same, within the precision of float16."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grounding.batch.rows import (
    PROMPT,
    STATUSES,
    RunMetadata,
    count_warnings,
    deduplicate_shared_maps,
    failed_row,
    from_row,
    maps_bytes,
    metadata_of,
    row_status,
    to_row,
    to_table,
)
from grounding.batch.run_folder import encode
from grounding.core.errors import GroundingError
from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import Alternative
from grounding.explanation.explanation import Entry
from tests.support.batch import METADATA
from tests.support.batch import metadata_of as metadata_like
from tests.support.explanations import column, explanation, noise, whole
from tests.support.tolerances import HALF, close_each


@pytest.fixture
def stored(tmp_path):
    """Write rows to a file, and read them."""

    def write_and_read(rows, metadata=METADATA):
        path = tmp_path / "part.parquet"
        path.write_bytes(encode(to_table(rows, metadata)))
        table = pq.read_table(path)
        assert metadata_of(table) == metadata
        return table.to_pylist()

    return write_and_read


def restored(row, image, metadata=METADATA, rows=None, **options):
    shared = {key: one[key] for key in metadata.shared for one in rows or [row] if one[key] is not None}
    return from_row(row, metadata, image, shared, **options)


def equal(found, wanted):
    """All fields are equal, maps within the precision of float16."""
    assert found.caption == wanted.caption
    assert found.entries == wanted.entries
    assert found.geometry == wanted.geometry
    assert (found.target, found.token_target) == (wanted.target, wanted.token_target)
    assert (found.warnings, found.origin, found.truncated) == (wanted.warnings, wanted.origin, wanted.truncated)
    assert dict(found.model) == dict(wanted.model)
    assert found.methods.keys() == wanted.methods.keys()
    for key, made in wanted.methods.items():
        method = found.methods[key]
        for name in ("method", "title", "layer", "options", "signed", "text_conditioned", "status"):
            assert getattr(method, name) == getattr(made, name), (key, name)
        assert method.maps.dtype == np.float32
        assert close_each(method.maps, made.maps, HALF)


def test_an_explanation_comes_back_from_a_table(stored):
    photo = noise(90, 60)
    image = open_image(photo)
    geometry = Geometry.from_steps(90, 60, resized=(96, 64), crop=(16, 0, 64, 64), grid=(4, 4))
    made = explanation(photo, geometry=geometry, warnings=["a", "b"], truncated=True, origin="generated")
    [row] = stored([to_row("a/b.jpg", 3, made, {})])
    assert (row["id"], row["image"], row["line"], row["status"]) == ("a/b.jpg#3", "a/b.jpg", 3, "ok_truncated")
    assert row["image_sha256"] == image.sha256
    assert row["geometry"]["seen"] == [float(v) for v in geometry.seen]
    assert (row["error"], row["score"]) == (None, 0.25)
    equal(restored(row, image), made)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 7.3, 6e4, 1e38])
def test_float16_with_a_scale_keeps_maps_of_any_size(stored, size):
    rng = np.random.default_rng(0)
    geometry = whole(96, 96, 14, 14)
    maps = (rng.standard_normal((3, 14, 14)) * [[[1]], [[1e-3]], [[0]]]).astype(np.float32)
    maps = maps / np.abs(maps).max() * np.float32(size)
    made = explanation(geometry=geometry, columns=[column("gradcam", maps, geometry)])
    metadata = metadata_like(made)
    [row] = stored([to_row("a", 0, made, {})], metadata)
    found = restored(row, made.image, metadata).methods["gradcam"].maps
    assert close_each(found, maps, HALF)
    for one, wanted in zip(found, maps, strict=True):
        assert np.abs(one).max() == np.abs(wanted).max()  # the largest is exact
        assert one.argmax() == wanted.argmax()
    assert (found[2] == 0).all()
    assert [item.status for item in restored(row, made.image, metadata).methods["gradcam"].status][2] == "degenerate"
    assert row["status"] == "ok"  # the caption has evidence
    assert maps_bytes([row], metadata) == 3 * (14 * 14 * 2 + 4)


def test_probabilities_and_numbers_that_are_not_finite(stored):
    entries = (
        Entry("x", "caption", 0, 1, math.nan),
        Entry("y", "token", 1, 2, -0.0, 7, 0.25, (Alternative("z", 8, 0.125), Alternative("\u2028", 9, math.nan))),
        Entry("w", "token", 2, 3, 1e-300, 2**40, 1.0),
    )
    made = explanation(labels=("x", "y", "w"))
    object.__setattr__(made, "entries", entries)
    [row] = stored([to_row("a", 0, made, {})])
    assert (row["score"], row["entries"][0]["score"]) == (None, None)
    found = restored(row, made.image)
    assert math.isnan(found.entries[0].score)
    assert math.isnan(found.entries[1].alternatives[1].probability)
    assert found.entries[2] == entries[2]
    assert found.entries[1].alternatives[0] == entries[1].alternatives[0]


@pytest.mark.parametrize(
    "text",
    [
        "it's \"quoted\", 'twice'",
        "line\u2028separator\u2029and\nnewline\ttab",
        "\U0001f9d1\u200d\U0001f680 emoji",
        "e\u0301 combining",
        "</script><img onerror=alert(1)>",
        "{{7*7}}",
        "\x1b[31mred",
        "中文",
        "<|endoftext|> [SEP]",
    ],
)
def test_odd_captions_and_names_come_back_as_they_were(stored, text):
    made = explanation(labels=(text, text[:1], text[-1:]), warnings=[text])
    rows = stored([to_row(text, 0, made, {}), failed_row(text, 1, text, "failed_model", text)])
    assert [row["caption"] for row in rows] == [text, text]
    assert rows[1] | dict.fromkeys(("id", "image", "error")) == rows[1] | {"id": None, "image": None, "error": None}
    assert (rows[1]["id"], rows[1]["image"], rows[1]["error"]) == (f"{text}#1", text, text)
    equal(restored(rows[0], made.image), made)


def test_maps_that_do_not_depend_on_the_text_are_stored_once_per_image(stored):
    made = [explanation(caption=f"number {i}") for i in range(5)]
    rows = [failed_row("a", 0, "x", "failed_model", "why"), *(to_row("a", i + 1, made[i], {}) for i in range(3))]
    rows += [to_row("b", i, made[3 + i], {}) for i in range(2)]
    bare = maps_bytes(rows, METADATA)
    deduplicate_shared_maps(rows, METADATA.shared)
    rows = stored(rows)
    assert METADATA.shared == ("rollout",)
    assert [row["rollout"] is not None for row in rows] == [False, True, False, False, True, False]
    assert all(row["gradcam"] is not None for row in rows if row["status"] == "ok")
    assert bare - maps_bytes(rows, METADATA) == 3 * (16 * 2 + 4)
    for row, wanted in zip(rows[1:4], made[:3], strict=True):
        equal(restored(row, wanted.image, rows=rows[:4]), wanted)
    equal(restored(rows[5], made[4].image, rows=rows[4:]), made[4])


def test_texts_about_phrases_are_separate_entries(stored):
    made = explanation(caption="man in red")
    about_man = explanation(labels=("image of man",), columns=(
        column("gradcam", np.full((1, 4, 4), 0.5), made.geometry),
        made.methods["rollout"],
        column("relevance", np.eye(4)[None], made.geometry, signed=False),
    ), warnings=["cut"])  # fmt: skip
    [row] = stored([to_row("a", 0, made, {(0, 3): about_man})])
    last = row["entries"][-1]
    assert (last["label"], last["kind"], last["start"], last["end"]) == ("image of man", PROMPT, 0, 3)
    assert row["warnings"] == ["cut"]
    plain = restored(row, made.image)
    assert [entry.kind for entry in plain.entries] == ["caption", "token", "token"]
    assert plain.methods["gradcam"].maps.shape == (3, 4, 4)
    found = restored(row, made.image, prompts=True)
    assert found.entries[-1].label == "image of man"
    assert np.array_equal(found.methods["relevance"].maps[-1], np.eye(4, dtype=np.float32))
    assert found.methods["rollout"].maps.shape == (1, 4, 4)


def test_a_row_is_degenerate_if_its_caption_has_no_evidence():
    geometry = whole(96, 96)
    maps = np.random.default_rng(0).uniform(0.1, 1, (3, 4, 4))
    good, none = column("gradcam", maps, geometry), column("gradcam", maps * [[[0]], [[1]], [[1]]], geometry)
    last = column("gradcam", maps * [[[1]], [[1]], [[0]]], geometry)
    assert row_status(explanation(geometry=geometry, columns=[good])) == "ok"
    assert row_status(explanation(geometry=geometry, columns=[last])) == "ok"
    assert row_status(explanation(geometry=geometry, columns=[none])) == "degenerate"
    assert row_status(explanation(geometry=geometry, columns=[none], truncated=True)) == "degenerate"
    assert row_status(explanation(geometry=geometry, columns=[good], truncated=True)) == "ok_truncated"


def test_a_failed_row_has_no_explanation(stored):
    [row] = stored([failed_row("a", 0, None, "failed_decode", "cut short")])
    assert row["caption"] is None
    assert row["status"] in STATUSES
    with pytest.raises(GroundingError, match=r"row 'a#0' has no maps: failed_decode \(cut short\)"):
        from_row(row, METADATA, open_image(noise(9, 9)), {})


def test_the_bytes_of_a_table_are_the_same_for_the_same_rows():
    first, second = (encode(to_table([to_row("a", 0, explanation(), {})], METADATA)) for _ in range(2))
    assert first == second


def test_a_table_of_another_program_is_an_error():
    with pytest.raises(GroundingError, match="the table was not written by a batch run"):
        metadata_of(pa.table({"a": [1]}))
    with pytest.raises(GroundingError, match="not a table of a batch run"):
        RunMetadata.from_json("{}")
    assert RunMetadata.from_json(METADATA.to_json()) == METADATA
    assert "\n" not in METADATA.to_json()
    json.loads(METADATA.to_json())


def test_warnings_are_counted_by_row_without_those_of_single_maps():
    metadata = RunMetadata({"gradcam": {"title": "Grad-CAM", "layer": "b.1"}}, "similarity", None, {}, {})
    rows = [{"warnings": ["cropped", "cropped", "Grad-CAM of 'a' is no evidence"]}, {"warnings": ["cropped", "blue"]}]
    assert count_warnings([*rows, {"warnings": None}, {}], metadata) == {"cropped": 2, "blue": 1}
    blank = [{"gradcam": {"status": one}} for one in (["degenerate", "ok"], ["degenerate"], ["ok", "degenerate"])]
    assert count_warnings(blank, metadata) == {"Grad-CAM at b.1 has no evidence for the caption": 2}
