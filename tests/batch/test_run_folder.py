"""Run folders: damaged shards, resuming, folders of other programs, merging, status."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from grounding.batch.progress import run_status
from grounding.batch.rows import metadata_of
from grounding.batch.run import exit_code
from grounding.batch.run_folder import LOCK, MANIFEST, RunFolder, check_folder, locked
from grounding.core.errors import DataError, DifferentRunError, GroundingError, OutputError
from grounding.core.files import STAGING
from tests.support import batch
from tests.support.batch import Executor, RecordedProgress


@pytest.fixture
def go(tmp_path):
    """Begin or resume a run of five images in three shards, without a model."""
    return batch.modelless(tmp_path)


# ---------------------------------------------------------------- resuming


def test_a_finished_run_is_resumed_without_computing_or_writing(go):
    run = go(executor=Executor({"0.png"}))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.glob("part-*")}
    executor, progress = Executor({"0.png"}), RecordedProgress()
    assert exit_code(go(executor=executor, progress=progress)) == exit_code(run) == 3
    assert (executor.done, progress.shards, progress.images) == ([], [], 0)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.glob("part-*")} == before


def edit(path, **changed):
    document = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "table cut": lambda table, side: os.truncate(table, table.stat().st_size - 5),
    "table empty": lambda table, side: table.write_bytes(b""),
    "one bit of the table": lambda table, side: flip(table),
    "another table of the same size": lambda table, side: table.write_bytes(b"PAR1" * (table.stat().st_size // 4)),
    "table gone": lambda table, side: table.unlink(),
    "sidecar gone": lambda table, side: side.unlink(),
    "sidecar empty": lambda table, side: side.write_bytes(b""),
    "sidecar cut": lambda table, side: os.truncate(side, 40),
    "sidecar no text": lambda table, side: side.write_bytes(b"\xff\xfe{}"),
    "sidecar a list": lambda table, side: side.write_text("[]"),
    "sidecar of another shard": lambda table, side: side.write_bytes(table.with_name("part-00000.json").read_bytes()),
    "sidecar without failures": lambda table, side: edit(side, failures=None),
    "sidecar without counts": lambda table, side: edit(side, counts=None),
    "sidecar with other counts": lambda table, side: edit(side, counts={"ok": 3}),
    "sidecar with counts of no kind": lambda table, side: edit(side, counts=[4]),
    "sidecar with another sum": lambda table, side: edit(side, sha256="0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_set_aside_computed_again_and_reported(go, damage):
    run = go()
    whole = batch.content(run.path)
    table, side = run.table_path(1), run.sidecar_path(1)
    DAMAGE[damage](table, side)
    had = table.read_bytes() if table.exists() else None
    executor, progress = Executor(), RecordedProgress()
    go(executor=executor, progress=progress)
    assert executor.done == [1]
    left = batch.content(run.path)
    aside = {name: left.pop(name) for name in list(left) if ".damaged-" in name}
    assert left == whole
    assert progress.damaged == list(aside)
    assert list(aside.values()) == ([] if had is None else [had])


@pytest.mark.parametrize("damage", ["table cut", "table empty", "another table of the same size"])
def test_a_shard_with_a_damaged_table_is_not_done(go, damage):
    run = go()
    DAMAGE[damage](run.table_path(1), run.sidecar_path(1))
    assert [shard for shard in run.shards if run.sidecar(shard) is None] == [1]
    assert exit_code(run) == 1
    assert run_status(run)["shards"]["done"] == 2


def test_damaged_tables_do_not_overwrite_each_other(go):
    run = go()
    for _ in range(2):
        run.sidecar_path(2).unlink()
        go()
    names = [p.name for p in run.path.glob("*.damaged-*")]
    assert sorted(names) == ["part-00002.parquet.damaged-1", "part-00002.parquet.damaged-2"]


def test_a_table_that_does_not_match_its_sidecar_is_an_error(go):
    run = go()
    flip(run.table_path(1))
    with pytest.raises(DataError, match=r"part-00001.parquet is damaged .*run again"):
        list(run.images())
    with pytest.raises(DataError, match=r"part-00001.parquet is damaged"):
        run.merge()
    assert not (run.path / "merged.parquet").exists()
    assert batch.leftovers(run.path) == []


def test_failures_are_listed_again_after_each_run(go):
    run = go(executor=Executor({"1.png", "4.png"}))
    listed = [json.loads(line) for line in (run.path / "failures.jsonl").read_text().splitlines()]
    assert [one["id"] for one in listed] == ["1.png#1", "4.png#1"]
    assert listed[0] == {"id": "1.png#1", "image": "1.png", "status": "failed_model", "error": "why"}
    (run.path / "failures.jsonl").write_text("lost\n")
    progress = RecordedProgress()
    go(executor=Executor(), retry=["failed_model"], progress=progress)
    assert (progress.shards, progress.images) == ([0, 2], 2)
    assert (run.path / "failures.jsonl").read_text() == ""
    assert exit_code(run) == 0


def test_another_run_in_the_folder_is_an_error_with_the_differences(go):
    go(executor=Executor(model="a", captions="all", batch_size=8))
    with pytest.raises(DifferentRunError) as error:
        go(executor=Executor(model="b" * 99, captions="first", batch_size=8, extra=1))
    assert error.value.exit_code == 2
    message = str(error.value)
    assert f'model: "a" there, "{"b" * 49}... now' in message
    assert 'captions: "all" there, "first" now' in message
    assert "extra: null there, 1 now" in message
    assert "batch_size" not in message
    assert "\n" not in message


# ---------------------------------------------------------------- locks and folders of other programs


def test_two_runs_cannot_write_into_one_folder(go, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / LOCK):
        executor = Executor()
        with pytest.raises(OutputError, match=r"another run is writing into .*run: wait for it") as error:
            go(executor=executor)
    assert error.value.exit_code == 1
    assert executor.described == 0
    assert exit_code(go()) == 0


def test_a_lock_file_without_a_process_is_no_lock(tmp_path):
    with locked(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": "mine"}, "holds other files and no batch run"),
        ({"part-00000.parquet": "x"}, "holds other files and no batch run"),
        ({MANIFEST: "{"}, "is damaged"),
        ({MANIFEST: '{"format": "other"}'}, "was not written by a batch run"),
        ({MANIFEST: "[]"}, "was not written by a batch run"),
        ({MANIFEST: '{"format": "grounding.run", "schema_version": 2}'}, "has schema version 2, this version reads 1"),
        ({MANIFEST: "\udcff"}, "is damaged"),
    ],
)
def test_a_folder_of_another_program_is_an_error_and_unchanged(tmp_path, content, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(OutputError, match=message) as error:
        check_folder(folder)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_files_of_a_killed_run_do_not_block_its_folder(tmp_path):
    for name in (LOCK, f"{MANIFEST}.tmp-00"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f"{STAGING}0a").mkdir()  # killed during the write test of check_folder
    assert check_folder(tmp_path) == tmp_path
    RunFolder(tmp_path, {}).remove_partial_files()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_file_or_a_read_only_parent_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file, not a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot write into .*file is a file"):
        check_folder(tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="cannot write into"):
        check_folder(tmp_path / "a\0b")

    def refused(self, *args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)  # as root no folder is read-only
    with pytest.raises(OutputError, match=r"cannot write into .*new: Permission denied"):
        check_folder(tmp_path / "new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- merging, status


def test_merged_is_the_concatenation_of_all_shards(go):
    run = go()
    merged = pq.read_table(run.merge())
    assert merged == pa.concat_tables([pq.read_table(run.table_path(shard)) for shard in run.shards])
    assert metadata_of(merged) == run.metadata
    names = merged["id"].to_pylist()
    assert names == [f"{i}.png#{line}" for i in range(5) for line in (0, 1)]


def test_an_incomplete_run_is_not_merged(go):
    run = go()
    run.sidecar_path(1).unlink()
    with pytest.raises(GroundingError, match="1 of 3 shards are not done: run again, then merge") as error:
        run.merge()
    assert error.value.exit_code == 1
    assert not (run.path / "merged.parquet").exists()


def test_merging_duplicate_ids_or_other_images_is_an_error(go):
    run = go()
    own = Executor().rows(run, 1)
    run.commit(1, [*own, own[-1]], 0.0)
    with pytest.raises(DataError, match=r"the id '3.png#1' is in the run twice"):
        run.merge()
    run.commit(1, Executor().rows(run, 0), 0.0)
    with pytest.raises(DataError, match=r"part-00001.parquet has other images than the manifest"):
        run.merge()
    assert batch.leftovers(run.path) == []


def test_status_counts_finished_shards(go):
    run = go(executor=Executor({"0.png"}))
    run.sidecar_path(2).unlink()
    found = run_status(run)
    assert found["shards"] == {"done": 2, "of": 3}
    assert found["pictures"] == {"done": 4, "of": 5}
    assert found["statuses"] == {"failed_model": 1, "ok": 7}
    assert (found["rows"], found["failed"], found["seconds"]) == (8, 1, 1.0)
    # Per pair three maps of each of two methods that depend on the text, per image one of the third: 4 x 4 cells.
    bare = (7 * 3 * 2 + 4) * (16 * 2 + 4)
    assert found["maps_mb_per_1000_pictures"] == round(bare / 4 / 1e3, 3)
    assert exit_code(run) == 1


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match=f"holds no run: {MANIFEST}: No such file"):
        RunFolder.open(tmp_path)
