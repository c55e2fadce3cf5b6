"""The decode pool yields all images in order, whichever workers are killed and whichever images kill them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounding.batch import decode_pool
from grounding.batch.decode_pool import Decoders, ImageOpener
from grounding.core.errors import CrashError, GroundingError, ImageError
from grounding.core.images import Picture
from tests.support.deadly import Deadly, DeadlyResult, Faulty, Stuck, Unloadable
from tests.support.images import noise
from tests.support.tolerances import COMMAND, SOON, WORKER


def write(folder, *names):
    for seed, name in enumerate(names):
        noise(20 + seed, 20, seed).save(folder / name, "png")
    return [(name, folder / name) for name in names]


def alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids):
    """Wait until no process is alive."""
    end = time.monotonic() + SOON
    while any(map(alive, pids)):
        assert time.monotonic() < end, "workers are still alive"
        time.sleep(0.02)


def test_images_come_in_order_from_workers_and_without(tmp_path):
    items = [*write(tmp_path, *(f"{i}.png" for i in range(7))), ("none", None), ("bytes", b"no picture")]
    here = list(Decoders(ImageOpener(), 0, 3).decode(iter(items)))
    with Decoders(ImageOpener(), 2, 3) as decoders:
        there = list(decoders.decode(iter(items)))
        pids = decoders.pids
    gone(pids)
    for found in (here, there):
        assert [name for name, _ in found] == [name for name, _ in items]
        assert [p.width for _, p in found[:7]] == list(range(20, 27))
        assert [p.status for _, p in found[7:]] == ["failed_input", "failed_decode"]
    assert [p.sha256 for _, p in here[:7]] == [p.sha256 for _, p in there[:7]]


def test_items_are_taken_ahead_up_to_the_limit(tmp_path):
    drawn = []

    def items():
        for item in write(tmp_path, *(f"{i}.png" for i in range(6))):
            drawn.append(item[0])
            yield item

    with Decoders(ImageOpener(), 1, 2) as decoders:
        stream = decoders.decode(items())
        next(stream)
        assert drawn == ["0.png", "1.png", "2.png"]


def test_an_image_that_kills_its_workers_is_given_up_and_costs_no_other(tmp_path):
    names = ["0.png", "once.png", "1.png", "deadly.png", "2.png", "3.png"]
    items = write(tmp_path, *names)
    with Decoders(Deadly(), 2, 4) as decoders:
        found = dict(decoders.decode(iter(items)))
    assert list(found) == names
    crashed = found.pop("deadly.png")
    assert isinstance(crashed, CrashError)
    assert crashed.status == "failed_crash"
    assert str(crashed) == f"{str(tmp_path / 'deadly.png')!r}: 2 processes died or did not answer while they decoded it"
    assert all(isinstance(one, Picture) for one in found.values())


def test_a_worker_killed_while_it_sends_blocks_no_other(tmp_path):
    """With one pipe and one lock for all workers, the lock is never released and all wait."""
    names = [*(f"{i}.png" for i in range(5)), "deadly.png", *(f"{i}.png" for i in range(5, 10))]
    started = time.monotonic()
    with Decoders(DeadlyResult(), 2, 4) as decoders:
        found = dict(decoders.decode(iter(write(tmp_path, *names))))
    assert time.monotonic() - started < SOON
    assert list(found) == names
    assert [name for name, opened in found.items() if not isinstance(opened, Picture)] == ["deadly.png"]


def test_random_kills_of_workers_lose_no_image(tmp_path):
    items = write(tmp_path, *(f"{i}.png" for i in range(16)))
    chance, killed = random.Random(5), 0
    found = []
    with Decoders(ImageOpener(), 2, 4) as decoders:
        for one in decoders.decode(iter(items)):
            found.append(one)
            if (pids := decoders.pids) and len(found) >= (2, 8, 99)[killed]:
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed += 1
    assert killed == 2
    assert [name for name, _ in found] == [name for name, _ in items]
    assert [image.width for _, image in found] == list(range(20, 36))


@pytest.mark.parametrize("pause", [0, 0.001, 0.02, 0.3])
@pytest.mark.parametrize("dying", [1, 2])
def test_workers_may_die_at_any_moment(tmp_path, pause, dying):
    items = write(tmp_path, *(f"{i}.png" for i in range(8)))
    with Decoders(ImageOpener(), 2, 3) as decoders:
        for turn in range(3):  # starting, before an image, with an image, after it
            stream = decoders.decode(iter(items))
            found = [next(stream)]
            time.sleep(pause)
            for pid in decoders.pids[:dying]:
                os.kill(pid, signal.SIGKILL)
            assert [name for name, _ in [*found, *stream]] == [name for name, _ in items], turn
        pids = decoders.pids
    gone(pids)


def test_leaving_early_does_not_wait_for_images(tmp_path):
    [(_, path), *_] = write(tmp_path, "a.png")
    started = time.monotonic()
    with Decoders(Stuck(), 2, 3) as decoders:
        decoders.submit(path), decoders.submit(path), decoders.submit(path)
        while len(decoders.pids) < 2:
            time.sleep(0.01)
        pids = decoders.pids
    assert time.monotonic() - started < SOON
    gone(pids)


def test_a_worker_that_does_not_answer_is_replaced(tmp_path):
    items = write(tmp_path, "0.png", "1.png")
    with Decoders(ImageOpener(), 1, 1, timeout=WORKER) as decoders:
        stream = decoders.decode(iter(items * 3))
        found = [next(stream)]
        [pid] = decoders.pids
        os.kill(pid, signal.SIGSTOP)
        found += stream
        assert decoders.pids != [pid]
    assert [name for name, _ in found] == ["0.png", "1.png"] * 3
    assert all(isinstance(one, Picture) for _, one in found)
    gone([pid])


def test_lack_of_memory_fails_one_image(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(decode_pool, "open_image", full)
    found = ImageOpener()(tmp_path / "a.png")
    assert (found.status, "not enough memory" in str(found)) == ("failed_oom", True)


def test_a_signal_while_workers_are_killed_leaves_none(tmp_path, monkeypatch):
    """A second Ctrl-C while the workers are killed takes effect when all of them are."""
    [(_, path)] = write(tmp_path, "a.png")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    real = decode_pool.DecodeWorker.kill

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        real(self)

    def start_and_leave():
        with Decoders(Stuck(), 2, 3) as decoders:
            decoders.submit(path), decoders.submit(path)
            while len(decoders.pids) < 2:
                time.sleep(0.01)
            pids.extend(decoders.pids)

    pids = []
    monkeypatch.setattr(decode_pool.DecodeWorker, "kill", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_and_leave()
    finally:
        signal.signal(signal.SIGINT, before)
    gone(pids)


def test_a_stuck_worker_exits_with_its_parent(tmp_path):
    [(_, path)] = write(tmp_path, "a.png")
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, signal, time\nfrom pathlib import Path\n"
        "from grounding.batch.decode_pool import Decoders\nfrom tests.support.deadly import Stuck\n"
        "if __name__ == '__main__':\n"
        "    decoders = Decoders(Stuck(), 1, 1)\n"
        f"    decoders.submit(Path({str(path)!r}))\n"
        "    while not decoders.pids: time.sleep(0.01)\n"
        "    time.sleep(1.5)\n"
        "    print(decoders.pids[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True, check=False, timeout=COMMAND
    )
    assert done.returncode == -signal.SIGKILL
    gone([int(done.stdout)])


def test_ctrl_c_reaches_no_worker(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker would inherit an ignored signal
    items = write(tmp_path, "0.png", "1.png", "2.png")
    with Decoders(ImageOpener(), 1, 1) as decoders:
        stream = decoders.decode(iter(items))
        found = [next(stream)]
        [pid] = decoders.pids
        os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        found += stream
        assert decoders.pids == [pid]
    signal.signal(signal.SIGINT, before)
    assert [name for name, _ in found] == ["0.png", "1.png", "2.png"]


def test_an_unexpected_error_of_the_opener_is_raised(tmp_path):
    with Decoders(Faulty(), 1, 1) as decoders, pytest.raises(RuntimeError, match="a fault in the code") as caught:
        list(decoders.decode([("a", tmp_path / "a.png")]))
    assert any("in __call__" in note for note in caught.value.__notes__)  # the worker's traceback


def test_workers_that_cannot_start_are_an_error_of_the_run(tmp_path):
    items = write(tmp_path, "0.png")
    with Decoders(Unloadable(), 1, 1) as decoders, pytest.raises(GroundingError) as caught:
        list(decoders.decode(iter(items)))
    assert str(caught.value).startswith("4 processes for decoding images died before their first image.")


def test_image_errors_cross_processes(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    items = [(name, tmp_path / name) for name in ("empty.png", "folder.png", "gone.png")]
    with Decoders(ImageOpener(tmp_path), 1, 1) as decoders:
        found = list(decoders.decode(iter(items)))
    assert [(type(one), one.status) for _, one in found] == [
        (ImageError, "failed_decode"),
        (ImageError, "failed_read"),
        (ImageError, "failed_read"),
    ]


@pytest.mark.parametrize("limit", [399, 400])
def test_the_limit_and_the_root_hold_in_workers(tmp_path, limit):
    [(_, path)] = write(tmp_path, "a.png")
    found = ImageOpener(tmp_path, limit)(path)
    assert isinstance(found, Picture) == (limit == 400)
    outside = ImageOpener(tmp_path / "in", limit)(path)
    assert outside.status == "failed_input"
