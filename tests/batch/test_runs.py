"""Runs with a model: rows equal `explain`, broken inputs become rows, differences are named, retries are minimal."""

import json
import os
import random
import re
import shutil
import struct
import zlib

import pytest

from grounding import explain
from grounding.batch.decode_pool import ImageOpener
from grounding.batch.figures import explanations
from grounding.batch.rows import PROMPT, from_row
from grounding.batch.run import exit_code
from grounding.batch.run_folder import MANIFEST, RunFolder
from grounding.core.errors import DataError, DifferentRunError, FailureLimitError, LayerError, OptionError
from grounding.datasets.open import open_dataset
from grounding.engine.selection import Selection
from tests.support import batch, models
from tests.support.annotations import IMAGES, write_data
from tests.support.batch import CAPTIONS, Counting, RecordedProgress, data, listing, run, run_config, statuses
from tests.support.images import noise
from tests.support.tolerances import HALF, close, close_each

LONG = "the quick brown fox jumps over the lazy dog and two dogs playing on the green grass again and again"


def equal_maps(found, wanted, keys):
    for key in keys:
        assert close_each(found.methods[key].maps, wanted.methods[key].maps, HALF), key


@pytest.mark.parametrize("kind", ["CLIPModel", "FlavaForPreTraining", "VisionEncoderDecoderModel"])
def test_rows_of_a_run_equal_explain_one_by_one(tmp_path, kind):
    adapter = models.FACTORIES[kind]()
    folder = data(tmp_path / "data", 5, CAPTIONS)
    config = run_config(folder, shard_size=3, captions="all")
    done = run(tmp_path / "run", config, Counting(adapter))
    rows = batch.rows(done)
    assert len(rows) == 15
    assert {row["status"] for row in rows} <= {"ok", "degenerate"}
    found = dict(explanations(done, config.dataset(), None, pytest.fail))
    assert list(found) == [row["id"] for row in rows]
    for name in random.Random(0).sample(sorted(found), 7):
        one = found[name]
        wanted = explain(
            adapter, folder / "Images" / name.partition("#")[0], one.caption, methods=config.request.methods
        )
        assert one.image.sha256 == wanted.image.sha256
        assert [(e.label, e.kind, e.start, e.end, e.token_id) for e in one.entries] == [
            (e.label, e.kind, e.start, e.end, e.token_id) for e in wanted.entries
        ]
        assert close([e.score for e in one.entries], [e.score for e in wanted.entries])
        assert (one.geometry, one.target, one.token_target) == (wanted.geometry, wanted.target, wanted.token_target)
        assert (one.warnings, one.origin) == (wanted.warnings, wanted.origin)
        equal_maps(one, wanted, ("gradcam", "rollout"))


def test_phrases_of_annotated_captions_are_explained_by_both_protocols(tmp_path):
    write_data(tmp_path / "data", IMAGES)
    config, load = run_config(tmp_path / "data", select=Selection(tokens=False)), Counting()
    rows = batch.rows(run(tmp_path / "run", config, load))
    entries = [(e["kind"], e["label"], e["start"], e["end"]) for e in rows[0]["entries"]]
    text = rows[0]["caption"]
    assert entries == [
        ("caption", text, 0, len(text)),
        ("phrase", "A red car", 0, 9),
        ("phrase", "the man", 14, 21),
        ("prompt", "image of a red car", 0, 9),
        ("prompt", "image of the man", 14, 21),
    ]
    dataset = config.dataset()
    image = ImageOpener(dataset.root)(dataset.read("first").image)
    run_folder = RunFolder.open(tmp_path / "run")
    found = from_row(rows[0], run_folder.metadata, image, run_folder.shared(rows), prompts=True)
    alone = explain(load.adapter, image.path, "image of a red car", methods=config.request.methods)
    index = next(i for i, entry in enumerate(found.entries) if entry.kind == PROMPT)
    assert close(found.entries[index].score, alone.entries[0].score)
    assert close(found.methods["gradcam"].maps[index], alone.methods["gradcam"].maps[0], HALF)
    bare = run(tmp_path / "bare", run_config(tmp_path / "data", select=Selection(tokens=False), protocols=()))
    assert {e["kind"] for row in batch.rows(bare) for e in row["entries"]} == {"caption"}


# ---------------------------------------------------------------- captions


def test_captions_first_takes_one_of_each_image(tmp_path):
    done = run(tmp_path / "run", run_config(data(tmp_path / "data", 3), captions="first"))
    assert statuses(done) == {f"{i}.png#0": "ok" for i in range(3)}


def test_the_text_is_generated_by_a_model_that_can(tmp_path):
    config = run_config(data(tmp_path / "data", 3), methods=None)
    adapter = models.trocr_adapter()
    done = run(tmp_path / "run", config, Counting(adapter))
    rows = batch.rows(done)
    assert [row["id"] for row in rows] == [f"{i}.png#0" for i in range(3)]
    assert {row["origin"] for row in rows} == {"generated"}
    assert done.manifest["fingerprint"]["captions"] == "none"
    assert [method["method"] for method in done.metadata.methods.values()] == list(adapter.default_methods)


def test_a_run_without_captions_needs_a_model_that_generates_text(tmp_path):
    with pytest.raises(OptionError, match="captions 'none' needs a model that generates text; clip does not"):
        run(tmp_path / "run", run_config(data(tmp_path / "data", 2), captions="none"))
    assert not (tmp_path / "run" / MANIFEST).exists()


# ---------------------------------------------------------------- broken inputs


def broken(folder):
    """Write a data set with every kind of fault; return the expected status of each row by id."""
    images = folder / "Images"
    images.mkdir(parents=True)
    wanted, listed = {}, []

    def add(name, status, *captions):
        listed.extend((name, caption) for caption in captions or CAPTIONS[:2])
        wanted.update({f"{name}#{i}": status for i in range(len(captions) or 2)})

    for i in range(3):
        noise(40, 30, i).save(images / f"good{i}.png")
        add(f"good{i}.png", "ok")
    (images / "empty.jpg").write_bytes(b"")
    add("empty.jpg", "failed_decode")
    (images / "text.jpg").write_text("not a picture")
    add("text.jpg", "failed_decode")
    noise(90, 60).save(images / "whole.jpg")
    (images / "cut.jpg").write_bytes(
        (images / "whole.jpg").read_bytes()[: (images / "whole.jpg").stat().st_size * 6 // 10]
    )
    add("cut.jpg", "failed_decode")
    (images / "huge.png").write_bytes(one_colour(20000))
    add("huge.png", "failed_input")
    (images / "folder.png").mkdir()
    add("folder.png", "failed_read")
    os.mkfifo(images / "pipe.png")
    add("pipe.png", "failed_read")
    add("missing.png", "failed_read")
    noise(40, 30).save(folder.parent / "outside.png")
    (images / "link.png").symlink_to(folder.parent / "outside.png")
    listed.append(("link.png", "x"))
    wanted["link.png#0"] = "failed_input"
    add("it's \u2028 \U0001f600.png", "ok")
    noise(40, 30).save(images / "it's \u2028 \U0001f600.png")
    noise(40, 30).save(images / "captions.png")
    add("captions.png", "ok", "", "a man", LONG, "  ")
    wanted |= {"captions.png#0": "failed_input", "captions.png#3": "failed_input", "captions.png#2": "ok_truncated"}
    listed += [("../../etc/passwd", "x"), ("/etc/passwd", "x"), ("a\0b.png", "x"), ("", "nobody's")]
    listing(folder, listed)
    return wanted


def one_colour(side):
    """A black PNG of `side` x `side` pixels, a few kilobytes long."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side + 7) // 8 + 1) * side, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_every_broken_input_is_a_row_and_costs_no_other(tmp_path):
    wanted = broken(tmp_path / "data")
    config = run_config(tmp_path / "data", shard_size=4, workers=1)
    done = run(tmp_path / "run", config)
    assert exit_code(done) == 3
    rows = batch.rows(done)
    found = {row["id"]: row["status"] for row in rows}
    assert len(found) == len(rows)  # no id twice
    others = {name: status for name, status in found.items() if name not in wanted}
    assert {name: found[name] for name in wanted} == wanted
    assert set(others.values()) == {"failed_input"}
    assert len(others) == 4, others
    bad = [json.loads(line) for line in (done.path / "failures.jsonl").read_text().splitlines()]
    assert [one["id"] for one in bad] == [row["id"] for row in rows if row["status"].startswith("failed")]
    assert all(one["error"] and "\n" not in one["error"] for one in bad)
    errors = {one["id"]: one["error"] for one in bad}
    assert "0 bytes" in errors["empty.jpg#0"]
    assert "truncated" in errors["cut.jpg#0"]
    assert "20000 x 20000" in errors["huge.png#1"]
    assert "root:" not in json.dumps(rows, default=str)
    captions = {row["id"]: row["caption"] for row in rows}
    assert captions["cut.jpg#1"] == CAPTIONS[1]
    assert captions["link.png#0"] == captions["../../etc/passwd#0"] == "x"
    assert any("not read" in w or "cut" in w or "dropped" in w for w in _row(rows, "captions.png#2")["warnings"])
    good = {row["id"]: row for row in rows if row["status"] == "ok"}
    assert all(row["gradcam"] is not None for row in good.values())
    merged = done.merge()
    assert merged.exists()


def _row(rows, name):
    return next(row for row in rows if row["id"] == name)


def test_an_image_without_permission_is_a_row(tmp_path, monkeypatch):
    folder = data(tmp_path / "data", 3)
    real = os.open

    def refuse(path, *args, **options):
        if os.fspath(path).endswith("1.png"):
            raise PermissionError(13, "Permission denied", os.fspath(path))  # as root every file is readable
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    done = run(tmp_path / "run", run_config(folder))
    assert statuses(done)["1.png#0"] == "failed_read"
    assert exit_code(done) == 3


def test_a_wrong_folder_of_images_stops_early(tmp_path):
    folder = data(tmp_path / "data", 60)
    shutil.rmtree(folder / "Images")
    (folder / "Images").mkdir()
    load = Counting()
    with pytest.raises(FailureLimitError, match=r"100 rows in a row failed \(100 failed_read\); the first: .*0.png"):
        run(tmp_path / "run", run_config(folder, shard_size=30), load)
    assert load.seen == []
    with pytest.raises(FailureLimitError, match=r"every row failed \(6\)"):
        run(tmp_path / "few", run_config(folder), load, limit=3)


def test_a_broken_row_of_a_list_is_one_row(tmp_path):
    folder = data(tmp_path / "data", 3)
    with (folder / "captions.txt").open("a") as file:
        file.write(",no name\n")
    config = run_config(folder)
    [name] = config.dataset().broken
    for _ in range(2):
        done = run(tmp_path / "run", config)
        assert [row["id"] for row in batch.rows(done)].count(name) == 1
        assert statuses(done)[name] == "failed_input"
        assert exit_code(done) == 3
    assert name not in statuses(run(tmp_path / "few", config, limit=3))


# ---------------------------------------------------------------- resuming


def test_a_finished_run_computes_nothing_and_equal_runs_have_equal_bytes(tmp_path):
    folder = data(tmp_path / "data", 3)
    first = run(tmp_path / "first", run_config(folder))
    load = Counting()
    again = run(tmp_path / "first", run_config(folder, threads=None, workers=0), load)
    assert (exit_code(again), load.seen) == (0, [])
    second = run(tmp_path / "second", run_config(folder))
    assert batch.content(first.path) == batch.content(second.path)


def test_another_run_is_an_error_and_what_differs_is_named(tmp_path):
    folder = data(tmp_path / "data", 3)
    done = run(tmp_path / "run", run_config(folder))
    before = batch.content(done.path)

    def differs(*names, load=None, config=None, **options):
        with pytest.raises(DifferentRunError) as error:
            run(tmp_path / "run", config or run_config(folder), load, **options)
        assert error.value.exit_code == 2
        for name in names:
            assert re.search(rf"(in|;) {name}[:;]", str(error.value))
        return str(error.value)

    assert "differs in weights; " in differs("weights", load=Counting(models.clip_adapter(seed=1)))
    assert "captions" not in differs("methods", config=run_config(folder, methods=("gradcam",)))
    differs("methods", config=run_config(folder, options={"gradcam.threshold": "0.2"}))
    differs("captions", config=run_config(folder, captions="first"))
    differs("batch_size", config=run_config(folder, batch_size=3))
    differs("shard_size", config=run_config(folder, shard_size=3))
    differs("select", config=run_config(folder, select=Selection(tokens=False)))
    differs("seed", config=run_config(folder, seed=4))
    differs("pictures", "ids", limit=2)
    listing(folder, [(f"{i}.png", text) for i in range(3) for text in CAPTIONS[1:]])
    assert "ids: " not in differs("data", config=run_config(folder))
    assert batch.content(done.path) == before


def test_retry_computes_only_images_with_a_row_of_the_status(tmp_path):
    folder = data(tmp_path / "data", 6)
    good = (folder / "Images" / "2.png").read_bytes()
    (folder / "Images" / "2.png").write_bytes(good[:100])
    (folder / "Images" / "5.png").unlink()
    config = run_config(folder, shard_size=3)
    done = run(tmp_path / "run", config)
    assert [s for s in statuses(done).values() if s != "ok"] == ["failed_decode"] * 2 + ["failed_read"] * 2
    before, last = batch.rows(done), done.table_path(1).read_bytes()
    (folder / "Images" / "2.png").write_bytes(good)
    load, progress = Counting(), RecordedProgress()
    run(tmp_path / "run", config, load, retry=["failed_decode"], progress=progress)
    assert load.seen == ["2.png"]
    assert (progress.shards, progress.images) == ([0], 1)
    after = batch.rows(done)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert [row for row in after if row["image"] != "2.png"] == [row for row in before if row["image"] != "2.png"]
    assert [row["status"] for row in after if row["image"] == "2.png"] == ["ok", "ok"]
    assert done.table_path(1).read_bytes() == last
    listed = [json.loads(line)["id"] for line in (done.path / "failures.jsonl").read_text().splitlines()]
    assert listed == ["5.png#0", "5.png#1"]
    load = Counting()
    run(tmp_path / "run", config, load, retry=["failed_decode"])
    assert load.seen == []


def test_an_interrupted_shard_is_computed_again(tmp_path):
    folder = data(tmp_path / "data", 4)
    whole = batch.content(run(tmp_path / "whole", run_config(folder)).path)
    load = Counting()
    prepare_images = load.adapter.prepare_images

    def stopped(images):
        if "3.png" in str(images[-1].path):
            raise KeyboardInterrupt
        return prepare_images(images)

    load.adapter.prepare_images = stopped
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", run_config(folder), load)
    assert sorted(p.name for p in (tmp_path / "run").glob("part-*")) == ["part-00000.json", "part-00000.parquet"]
    load = Counting()
    done = run(tmp_path / "run", run_config(folder), load)
    assert load.seen == ["2.png", "3.png"]
    assert batch.content(done.path) == whole


def test_an_error_of_the_request_creates_no_folder(tmp_path):
    folder = data(tmp_path / "data", 2)
    with pytest.raises(LayerError):
        run(tmp_path / "run", run_config(folder, layers=("nowhere",)))
    with pytest.raises(OptionError, match="gradcam"):
        run(tmp_path / "run", run_config(folder, options={"gradcam.nothing": "1"}))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- figures


def test_a_changed_image_gets_no_figure(tmp_path):
    folder = data(tmp_path / "data", 3)
    config = run_config(folder)
    done = run(tmp_path / "run", config)
    noise(40, 30, 9).save(folder / "Images" / "1.png")
    skipped = []
    found = dict(explanations(done, config.dataset(), {"1.png", "2.png"}, skipped.append))
    assert list(found) == ["2.png#0", "2.png#1"]
    assert skipped == ["1.png: the image has changed since its maps were computed (sha256 differs)"]


def test_a_missing_data_set_is_an_error(tmp_path):
    with pytest.raises(DataError):
        open_dataset(tmp_path / "nowhere")
