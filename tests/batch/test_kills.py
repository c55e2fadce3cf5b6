"""Runs in real processes that are killed by real signals: the next run computes exactly the missing shards."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grounding.batch.run_folder import RunFolder
from tests.support import batch
from tests.support.forked import SCRIPT
from tests.support.tolerances import COMMAND, SOON

ROOT = SCRIPT.parent.parent
ENV = os.environ | {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    # Two workers on any machine, and paths short enough for sockets.
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}', "RAY_TMPDIR": "/tmp",
}  # fmt: skip
for name in ("RAY_ADDRESS", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
    ENV.pop(name, None)
# Arrow's own memory pool has a thread, and a process that forks must have none.
FORKED = ENV | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
IMAGES = 14
RUN = ["--limit", str(IMAGES), "--shard-size", "1", "--threads", "1", "--no-tokens", "--workers", "2", "--device"]
RUN += ["cpu", "--batch-size", "2"]
pytestmark = pytest.mark.slow


class Forks:
    """A process of `tests.support.forked`. Use as a context manager: it ends all processes, also if a test fails."""

    def __init__(self, folder):
        self.out, self.err = folder / "out", folder / "err"
        self.running = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            cwd=ROOT, env=FORKED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        self.process.kill()
        self.process.communicate(timeout=SOON)

    def end(self):
        """End the run of a test that failed."""
        if self.running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)
            self.answer("exit")
            self.running = None

    def answer(self, label):
        """The number of the next line, which must have this label."""
        found, number = self.process.stdout.readline().split()
        assert found == label
        return int(number)

    def start(self, output, *argv, **request):
        self.end()
        for path in (self.out, self.err):
            path.write_bytes(b"")
        what = {"argv": [*RUN, "--output", str(output), *argv], "out": str(self.out), "err": str(self.err), **request}
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        self.running = self.answer("pid")
        assert self.running > 1
        return self.running

    def wait(self, pid):
        """The exit code; no process of the run may be left."""
        code = self.answer("exit")
        self.running = None
        assert "Traceback" not in self.err.read_text(), self.err.read_text()
        until(lambda: not session(pid), "processes of a run that ended are still alive")
        return code

    def run(self, *args, **request):
        return self.wait(self.start(*args, **request))


def until(happened, otherwise, seconds=SOON):
    """Wait until `happened()`; fail with the message `otherwise`."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, otherwise
        time.sleep(0.02)


def processes():
    """(pid, parent, session, state) of all processes."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, own, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        yield int(path.parent.name), int(parent), int(own), state


def session(pid):
    """Processes of a fork that are alive."""
    return [one for one, _, own, state in processes() if own == pid and state not in "ZX"]


def below(pid):
    """All descendants of a process."""
    tree, found = [(one, parent) for one, parent, _, _ in processes()], {pid}
    while more := {one for one, parent in tree if parent in found} - found:
        found |= more
    return found - {pid}


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def equal(path, whole):
    """The run has every byte of the uninterrupted one, no temporary file, and each id once."""
    found = batch.content(path)
    assert {name: data for name, data in found.items() if ".damaged-" not in name} == whole
    assert batch.leftovers(path) == []
    run = RunFolder.open(path)
    merged = pq.read_table(run.merge())
    names = merged["id"].to_pylist()
    assert len(names) == len(set(names))
    assert list(dict.fromkeys(merged["image"].to_pylist())) == list(run.ids)
    (path / "merged.parquet").unlink()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as made:
        yield made


@pytest.fixture(scope="module")
def uninterrupted(forks, tmp_path_factory):
    """(files of a run without interruption, its table)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forks.run(folder) == 0, forks.err.read_text()
    whole = batch.content(folder)
    return whole, pq.read_table(RunFolder.open(folder).merge())


def test_a_run_killed_ten_times_equals_an_uninterrupted_one(forks, uninterrupted, tmp_path):
    whole, table = uninterrupted
    chance, folder = random.Random(20), tmp_path / "run"
    # Kills at fault points, most with a decode worker killed before; then two at random times.
    points = ["load", "begin", "decode", "explain", "written", "table", "renamed", "share"]
    done = []
    for point in points:
        number = 1 if point in ("load", "begin") else 3 if point == "written" else chance.choice((2, 4))
        worker = None if point in ("load", "begin") else chance.randint(1, 3)
        assert forks.run(folder, die=(point, number), worker=worker) == -signal.SIGKILL, point
        done.append(len(list(folder.glob("part-*.json"))))
    for _ in range(2):
        assert forks.run(folder, after=chance.uniform(0.6, 1.6), worker=2) in (-signal.SIGKILL, 0)
        done.append(len(list(folder.glob("part-*.json"))))
    assert done == sorted(done)  # finished shards stay
    assert 0 < done[4] < IMAGES
    assert forks.run(folder, worker=1) == 0
    equal(folder, whole)
    merged = pq.read_table(RunFolder.open(folder).merge())
    assert merged == table
    for key in RunFolder.open(folder).metadata.methods:
        for one, other in zip(merged[key].to_pylist(), table[key].to_pylist(), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert np.array_equal(np.frombuffer(one["values"], "<f2"), np.frombuffer(other["values"], "<f2"))


@pytest.mark.parametrize(
    ("sent", "times", "codes"),
    [(signal.SIGINT, 1, {130}), (signal.SIGINT, 4, {130, -signal.SIGINT}), (signal.SIGTERM, 1, {143})],
)
def test_a_signal_stops_the_run_with_the_command_that_resumes(forks, uninterrupted, tmp_path, sent, times, codes):
    folder = tmp_path / "run"
    pid = forks.start(folder)
    until((folder / "part-00001.json").exists, "no shard was done")
    for _ in range(times):
        with suppress(ProcessLookupError):
            os.killpg(pid, sent)  # as a terminal does: to the workers, too
        time.sleep(0.05)
    assert forks.wait(pid) in codes
    err = forks.err.read_text()
    assert "stopped; finished shards are kept. To resume: python " in err
    assert f"--output {folder}" in err
    assert forks.out.read_text() == ""
    assert len(list(folder.glob("part-*.json"))) < IMAGES
    assert forks.run(folder) == 0
    equal(folder, uninterrupted[0])


def test_a_second_run_in_the_folder_is_an_error_and_the_first_continues(forks, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    pid = forks.start(folder)
    until((folder / "part-00000.json").exists, "no shard was done")
    os.kill(pid, signal.SIGSTOP)
    try:
        second = subprocess.run(
            [sys.executable, str(SCRIPT), *RUN, "--output", str(folder)],
            env=ENV, capture_output=True, text=True, check=False, timeout=COMMAND,
        )  # fmt: skip
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith(f"error: another run is writing into {folder}: wait for it")
    assert forks.wait(pid) == 0
    equal(folder, uninterrupted[0])


def test_ray_replaces_a_killed_worker(uninterrupted, tmp_path):
    pytest.importorskip("ray")
    folder = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *RUN, "--output", str(folder), "--engine", "ray"]
    with (tmp_path / "err").open("w") as err:
        driver = subprocess.Popen(
            command, env=ENV, stdout=subprocess.PIPE, stderr=err, text=True, start_new_session=True
        )
    try:
        done = (folder / "part-00000.json").exists
        until(lambda: done() or driver.poll() is not None, "no shard was done", COMMAND)
        workers = [pid for pid in below(driver.pid) if name_of(pid).startswith("ray::RayWorker")]
        os.kill(random.Random(1).choice(sorted(workers)), signal.SIGKILL)
        children = below(driver.pid)
        out, _ = driver.communicate(timeout=COMMAND)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.communicate(timeout=SOON)
    assert driver.returncode == 0, (tmp_path / "err").read_text()
    assert f"images    {IMAGES} of {IMAGES} done" in out
    equal(folder, uninterrupted[0])
    until(lambda: not any(name_of(pid).startswith("ray::") for pid in children), "workers are still alive")


LEAVING = """
import functools, sys, threading
from pathlib import Path
import ray.cluster_utils
import adapters
from grounding.batch.run import run_batch
from grounding.batch.ray import RayExecutor
from tests.support import batch

if __name__ == "__main__":
    home = Path(sys.argv[1])
    machines = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    leaving = machines.add_node(num_cpus=1)

    class Leaving(batch.Progress):
        done = 0

        def on_shard(self, sidecar):
            Leaving.done += 1
            if Leaving.done == 1:
                threading.Timer(0.2, machines.remove_node, [leaving]).start()

    config = batch.run_config(batch.data(home / "data", 240), threads=1)
    data = config.dataset()
    load = functools.partial(adapters.load, None, device="cpu")
    with RayExecutor(load, config, machines.address) as cluster:
        run = run_batch(home / "run", config, data, data.ids, cluster, progress=Leaving())
    print("rows", run.counts().total(), "machines", len(machines.list_all_nodes()))
    machines.shutdown()
"""


def test_a_cluster_continues_when_a_machine_leaves(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=ENV, capture_output=True, text=True, check=False, timeout=COMMAND, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rows 480 machines 1" in done.stdout


def test_processes_of_accelerate_divide_the_shards(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    argv = [*RUN, "--output", str(folder)]
    argv[argv.index("cpu")] = "auto"
    done = subprocess.run(
        [*launch, str(SCRIPT), *argv], env=ENV, capture_output=True, text=True, check=False, timeout=COMMAND
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shards ") == 1  # only one process prints
    assert done.stderr.count(f"{IMAGES // 2} images to do in {IMAGES // 2} of {IMAGES} shards") == 2
    equal(folder, uninterrupted[0])
