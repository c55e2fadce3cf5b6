"""A run killed at any file operation leaves only complete shards, and the next run computes the missing ones."""

import os
import resource
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grounding.batch.run_folder import LOCK, MANIFEST
from grounding.core.errors import OutputError
from tests.support import batch
from tests.support.batch import Executor


@pytest.fixture
def go(tmp_path):
    """Begin or resume a run of five images in three shards, without a model."""
    return batch.modelless(tmp_path)


class Crash(BaseException):
    """Stands for the death of the process."""


class Disk:
    """Let the first `at` file operations reach the disk and no later one; data not yet synced are cut in half."""

    def __init__(self, at):
        self.at, self.steps = at, 0
        self.whole = {name: getattr(Path, name) for name in ("open", "replace", "unlink")}
        self.sync = os.fsync

    def step(self):
        self.steps += 1
        if self.steps > self.at:
            raise Crash

    def opened(self, path, mode="r", *args, **options):
        if mode == "xb":
            self.step()
        return self.whole["open"](path, mode, *args, **options)

    def replaced(self, path, target):
        self.step()
        return self.whole["replace"](path, target)

    def unlinked(self, path, missing_ok=False):
        self.step()
        return self.whole["unlink"](path, missing_ok)

    def synced(self, handle):
        try:
            self.step()
        except Crash:
            if self.steps == self.at + 1 and Path(f"/proc/self/fd/{handle}").is_file():
                os.truncate(handle, os.fstat(handle).st_size // 2)
            raise
        return self.sync(handle)


@contextmanager
def dying(monkeypatch, at):
    """Die at file operation number `at`."""
    disk = Disk(at)
    with monkeypatch.context() as patch:
        for name, function in (("open", disk.opened), ("replace", disk.replaced), ("unlink", disk.unlinked)):
            # A function: a bound method would not receive the path.
            patch.setattr(
                Path, name, lambda path, *args, function=function, **options: function(path, *args, **options)
            )
        patch.setattr(os, "fsync", disk.synced)
        yield


def killed(monkeypatch, at, do):
    """Whether `do` died, at that file operation."""
    with dying(monkeypatch, at):
        try:
            do()
        except Crash:
            return True
    return False


def test_a_run_killed_at_any_step_and_resumed_equals_an_uninterrupted_run(go, tmp_path, monkeypatch):
    whole = batch.content(go("whole", Executor({"3.png"})).path)
    step, half, aside = 0, 0, 0
    while killed(monkeypatch, step, partial(go, f"at-{step}", Executor({"3.png"}))):
        folder = tmp_path / f"at-{step}"
        half += bool(batch.leftovers(folder))
        for file in folder.glob("part-*.parquet"):
            assert file.read_bytes() == whole[file.name]  # under its final name a table is complete
        go(f"at-{step}", Executor({"3.png"}))
        left = batch.content(folder)
        damaged = [name for name in left if ".damaged-" in name]
        aside += len(damaged)
        assert {name: data for name, data in left.items() if name not in damaged} == whole, step
        step += 1
    # Manifest, three tables with sidecars, failures: open, sync, replace, sync the folder; each shard one unlink.
    assert step == 8 * 4 + 3
    assert half >= 2 * 8  # open and synced under a temporary name
    assert aside >= 3  # a table without its sidecar yet


def test_a_retry_killed_at_any_step_and_resumed_equals_an_uninterrupted_run(go, tmp_path, monkeypatch):
    go("whole")
    whole = batch.content(tmp_path / "whole")
    step = 0
    while True:
        go(f"at-{step}", Executor({"3.png"}))
        if not killed(monkeypatch, step, partial(go, f"at-{step}", Executor(), retry=["failed_model"])):
            break
        go(f"at-{step}", Executor(), retry=["failed_model"])
        left = batch.content(tmp_path / f"at-{step}")
        assert {name: data for name, data in left.items() if ".damaged-" not in name} == whole, step
        step += 1
    assert step > 10


def test_a_killed_merge_leaves_no_partial_table(go, tmp_path, monkeypatch):
    run = go()
    assert killed(monkeypatch, 0, run.merge)
    assert not (run.path / "merged.parquet").exists()
    assert batch.leftovers(run.path)
    go()
    assert batch.leftovers(run.path) == []
    assert pq.read_table(run.merge()).num_rows == 10


def test_a_full_disk_is_an_error_and_leaves_no_partial_file(go, tmp_path):
    whole = batch.content(go("whole").path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "whole" / "part-00001.parquet").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*part-00000.parquet: File too large; resume later") as at:
            go()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert at.value.exit_code == 1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [MANIFEST, LOCK]
    assert batch.content(go().path) == whole
