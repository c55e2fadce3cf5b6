"""Batch runs of targets that no text can change, and of images with a second view."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from grounding.batch import figures
from grounding.batch.rows import from_row
from grounding.core.errors import DifferentRunError, GroundingError, OptionError
from grounding.core.images import open_image
from grounding.engine.explain import explain
from grounding.engine.selection import Selection
from grounding.evaluation.runs import evaluate_run
from tests.support import batch, models
from tests.support.images import noise
from tests.support.tiled import TiledAdapter
from tests.support.tolerances import close


def test_a_target_without_text_has_one_row_per_image(tmp_path):
    folder = batch.data(tmp_path / "data", 3)
    config = batch.run_config(folder, target="norm")
    run = batch.run(tmp_path / "run", config)
    rows = batch.rows(run)
    assert [row["id"] for row in rows] == ["0.png#0", "1.png#0", "2.png#0"]
    assert {(row["caption"], row["status"], len(row["entries"])) for row in rows} == {("", "ok", 1)}
    assert all(row["entries"][0]["kind"] == "image" for row in rows)
    assert run.metadata.token_target is None
    assert (run.manifest["fingerprint"]["captions"], run.manifest["fingerprint"]["protocols"]) == ("image", [])
    clip = models.clip_adapter()
    for number, (name, made) in enumerate(figures.explanations(run, config.dataset(), None, pytest.fail)):
        expected = explain(clip, noise(40 + number, 30, seed=number), target="norm", methods=["gradcam", "rollout"])
        assert name == f"{number}.png#0"
        assert made.score == pytest.approx(expected.score)
        assert np.abs(made["image"].raw - expected["image"].raw).max() <= 1e-3 * np.abs(expected["image"].raw).max()
    drawn = list(figures.draw(run, config.dataset(), None, {}, pytest.fail))
    assert [path.name for path in drawn] == ["0_png_0.png", "1_png_0.png", "2_png_0.png"]


def test_options_about_texts_change_nothing_of_such_a_run(tmp_path):
    config = batch.run_config(batch.data(tmp_path / "data", 3), target="norm")
    first = batch.run(tmp_path / "run", config)
    before = batch.content(first.path)
    load = batch.Counting()
    others = {"captions": "first", "protocols": ("mention-anybox",)}
    request = replace(config.request, select=Selection(words=True), token_target="alone")
    batch.run(tmp_path / "run", replace(config, request=request, **others), load)
    assert load.seen == []  # it is the same run, and complete
    again = batch.run(tmp_path / "again", replace(config, captions="all"))
    assert batch.content(again.path) == before
    with pytest.raises(DifferentRunError, match="captions"):
        batch.run(tmp_path / "run", replace(config, request=replace(config.request, target="similarity")))


def test_a_broken_run_of_images_is_resumed_to_the_same_files(tmp_path):
    config = batch.run_config(batch.data(tmp_path / "data", 5), target="norm")
    whole = batch.content(batch.run(tmp_path / "whole", config).path)
    run = batch.run(tmp_path / "run", config)
    run.table_path(1).unlink()
    batch.run(tmp_path / "run", config)
    found = batch.content(tmp_path / "run")
    assert found == whole


def test_no_phrase_of_such_a_run_can_be_scored(tmp_path):
    config = batch.run_config(batch.data(tmp_path / "data", 2), target="norm")
    run = batch.run(tmp_path / "run", config)
    with pytest.raises(GroundingError, match="norm, which no text can change: no phrase was explained"):
        evaluate_run(run, config.dataset())


def test_captions_image_needs_such_a_target(tmp_path):
    config = batch.run_config(batch.data(tmp_path / "data", 2), captions="image")
    with pytest.raises(OptionError, match="'image' need a target that no text can change; similarity is about a text"):
        batch.run(tmp_path / "run", config)


# ---------------------------------------------------------------- a second view


@pytest.fixture
def tiled(tmp_path):
    """A run of four images in two shards: without a second view in the first, with and without in the second."""
    folder = tmp_path / "data"
    (folder / "Images").mkdir(parents=True)
    sizes = ((30, 24), (36, 30), (90, 70), (32, 32))
    for i, size in enumerate(sizes):
        noise(*size, seed=i).save(folder / "Images" / f"{i}.png")
    batch.listing(folder, [(f"{i}.png", text) for i in range(4) for text in ("red car", "two dogs")])
    config = batch.run_config(folder)
    return batch.run(tmp_path / "run", config, batch.Counting(TiledAdapter())), config, sizes


def test_the_second_view_is_stored_in_columns_of_its_own(tiled):
    run, config, sizes = tiled
    assert not [name for name in run.table(0).column_names if "overview" in name]
    assert run.table(1).column_names[-3:] == ["overview", "gradcam/overview", "rollout/overview"]
    adapter = TiledAdapter()
    made = list(figures.explanations(run, config.dataset(), None, pytest.fail))
    assert len(made) == 8
    for number, (_, one) in enumerate(made):
        image = noise(*sizes[number // 2], seed=number // 2)
        expected = explain(adapter, image, one.caption, methods=["gradcam", "rollout"])
        assert one.views == expected.views
        for key, own in one.methods.items():
            assert close(own.maps, expected.methods[key].maps, 1e-3)
            assert (own.overview is None) == (number not in (4, 5))
            if own.overview is not None:
                assert close(own.overview, expected.methods[key].overview, 1e-3)
                assert own.overview_status == expected.methods[key].overview_status
    # One map per image of a method that does not depend on the text, in each view.
    rows = run.table(1).to_pylist()
    assert [row["rollout/overview"] is not None for row in rows] == [True, False, False, False]
    assert run.sidecar(1)["maps_bytes"] > run.sidecar(0)["maps_bytes"]


def test_shards_with_and_without_a_second_view_are_merged(tiled):
    run, *_ = tiled
    table = pq.read_table(run.merge())
    rows = table.to_pylist()
    assert [row["overview"] is not None for row in rows] == [False] * 4 + [True, True, False, False]
    shared = run.shared(rows[4:6])
    stored = [from_row(row, run.metadata, same_size(row), shared) for row in rows[4:6]]
    assert [one.overview.rows for one in stored] == [3, 3]


def same_size(row):
    """Another image of the row's size."""
    return open_image(noise(row["geometry"]["width"], row["geometry"]["height"]))
