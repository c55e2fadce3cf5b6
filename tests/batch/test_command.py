"""`ground_flickr30k.py` on the command line: stdout, stderr, exit codes, one line per failure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from grounding import Explanation
from grounding.batch import progress
from grounding.batch.figures import explanations
from grounding.batch.run_folder import RunFolder
from grounding.core.demo import demo_lines, demo_scenes
from grounding.datasets.open import open_dataset
from grounding.datasets.subset import picked
from tests.support import batch
from tests.support import models as tiny
from tests.support.batch import data
from tests.support.commands import answer, script
from tests.support.forked import SCRIPT
from tests.support.images import noise
from tests.support.tolerances import HALF_BATCH, TUTORIAL, close, close_each

FAST = ["--workers", "0", "--threads", "1", "--no-tokens", "--shard-size", "2", "--batch-size", "2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder, with a tiny model: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    module = script(SCRIPT)
    loads = []

    def load(name, **options):
        loads.append(name)
        return tiny.clip_adapter()

    def run(*argv, model=load):
        monkeypatch.setattr(module, "load", model or module.load)
        return answer(module, argv, capsys)

    run.loads, run.real = loads, module.load
    return run


@pytest.fixture
def made(command, tmp_path):
    """A finished run of five images, in `run`."""
    folder = data(tmp_path / "data", 5)
    assert command("--data", folder, "--output", "run", *FAST)[0] == 0
    return folder


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def process(*argv, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, check=False, env=env, **options
    )


# ---------------------------------------------------------------- output


def test_results_go_to_stdout_and_messages_to_stderr(command, tmp_path):
    folder = data(tmp_path / "data", 5)
    code, out, err = command("--data", folder, "--output", "run", *FAST)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "model", "shards", "images", "rows", "stored"]
    assert "images    5 of 5 done" in out
    assert "rows      10: 10 ok" in out
    assert err == "run: 5 images to do in 3 of 3 shards\n"  # no bar outside of a terminal
    code, out, err = command("--data", folder, "--output", "run", "--format", "json", "-q", *FAST)
    assert (code, err) == (0, "")
    assert json.loads(out)["statuses"] == {"ok": 10}


def test_a_log_has_lines_of_progress(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = progress.ProgressBar(name="process 1 of 2")
    run = RunFolder(Path("run"), {"ids": ["a"] * 250, "fingerprint": {"shard_size": 50}})
    bar.on_start(run, [1, 3], 100)
    failed = [{"status": "failed_read"}, {"status": "ok"}]
    for rows, images in ((failed, 10), (failed, 10), (failed[1:], 20)):
        now[0] += 40
        bar.on_rows(rows, images)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run: 100 images to do in 2 of 5 shards (process 1 of 2)"
    # 20 images after 80 seconds: 80 are left. Nothing after 40, and nothing yet at 120.
    assert lines[1:] == ["process 1 of 2:  20% 20/100 [01:20<05:20,  4.00s/image, 2 rows failed]"]
    quiet = progress.ProgressBar(quiet=True)
    quiet.on_start(run, [1], 100)
    now[0] += 400
    quiet.on_rows(failed, 10)
    assert capsys.readouterr().err == ""


def test_the_same_command_again_computes_nothing_and_has_the_same_result(command, tmp_path):
    folder = data(tmp_path / "data", 4)
    (folder / "Images" / "2.png").write_bytes(b"")
    first = command("--data", folder, "--output", "run", *FAST)
    second = command("--data", folder, "--output", "run", *FAST)
    assert (first[0], second[0]) == (3, 3)
    assert first[1] == second[1]
    assert "run: 0 images to do in 0 of 2 shards" in second[2]
    assert re.search(r"warning: 2.png#0: failed_decode: .*2.png.*0 bytes", second[2])
    assert len(second[2].splitlines()) == 3


def test_many_failures_are_counted(command, tmp_path):
    folder = data(tmp_path / "data", 6)
    for i in range(1, 6):
        (folder / "Images" / f"{i}.png").write_bytes(b"x")
    code, _, err = command("--data", folder, "--output", "run", *FAST)
    assert code == 3
    assert err.count("failed_decode") == 5
    assert "warning: and 5 more, in failures.jsonl" in err


def test_a_wrong_folder_of_images_ends_with_4(command, tmp_path):
    folder = data(tmp_path / "data", 60)
    shutil.rmtree(folder / "Images")
    (folder / "Images").mkdir()
    code, out, err = command("--data", folder, "--output", "run", *FAST)
    assert (code, out) == (4, "")
    assert re.search(r"^error: stopped: 100 rows in a row failed \(100 failed_read\); the first: .*0\.png", err, re.M)


# ---------------------------------------------------------------- errors before the model is loaded


def test_an_unusable_output_folder_ends_with_1_before_the_model_is_loaded(command, tmp_path, made):
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    command.loads.clear()
    for output, message in (
        ("file", "is a file, not a folder"),
        ("foreign", "holds other files and no batch run"),
        ("file/below", "is a file, not a folder"),
        ("x" * 300, "File name too long"),
    ):
        code, out, err = command("--data", made, "--output", output)
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert command.loads == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file", "foreign", "run"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--output", ""], 2, "--output is empty: name a folder"),
        (["--output", " "], 2, "--output is empty: name a folder"),
        (["--limit", "0"], 2, "limit must be at least 1 image, got 0"),
        (["--limit", "1", "--random", "1"], 2, "choose one"),
        (["--batch-size", "0"], 2, "batch_size must be at least 1"),
        (["--status", "--merge"], 2, "--status or --merge: choose one"),
        (["--address", "auto"], 2, "--address belongs to --engine ray"),
        (["--retry", "failed_decod"], 2, "no status 'failed_decod'"),
        (["--protocols", "mine"], 2, "no protocol 'mine'"),
        (["--option", "gradcam"], 2, "expected METHOD.OPTION=VALUE"),
        (["--opacity", "7"], 2, "opacity"),
        (["--data", "nowhere"], 1, "nowhere"),
        (["--status", "--output", "nowhere"], 1, "holds no run"),
        (["--merge", "--output", "nowhere"], 1, "holds no run"),
        (["--render", "png", "--output", "nowhere"], 1, "holds no run"),
        (["--captions", "some"], 2, "invalid choice"),
    ],
)
def test_option_errors_come_before_the_model_is_loaded(command, tmp_path, argv, code, message):
    found, out, err = command(*argv)
    assert (found, out) == (code, "")
    assert message in err
    assert command.loads == []
    assert list(tmp_path.iterdir()) == []


def test_another_run_ends_with_2_and_the_differences(command, made):
    before = batch.content(RunFolder.open("run").path)
    code, out, err = command("--data", made, "--output", "run", *FAST, "--methods", "rollout", "--captions", "first")
    assert (code, out) == (2, "")
    assert "error: run holds another run, which differs in captions: " in err
    assert "methods: " in err
    assert batch.content(RunFolder.open("run").path) == before


# ---------------------------------------------------------------- status, merging, figures


def test_status_and_merge_of_an_incomplete_run(command, made, tmp_path):
    code, out, err = command("--status", "--output", "run")
    assert (code, err) == (0, "")
    assert "shards    3 of 3 done" in out
    (tmp_path / "run" / "part-00001.json").unlink()
    code, out, _ = command("--status", "--output", "run", "--format", "json")
    assert (code, json.loads(out)["pictures"]) == (0, {"done": 3, "of": 5})
    code, out, err = command("--merge", "--output", "run")
    assert (code, out) == (1, "")
    assert err == "error: 1 of 3 shards are not done: run again, then merge\n"
    code, _, err = command("--data", made, "--output", "run", *FAST)
    assert code == 0
    assert "warning: a damaged shard was set aside as run/part-00001.parquet.damaged-1 and is computed again" in err
    code, out, err = command("--merge", "--output", "run")
    assert (code, out, err) == (0, "run/merged.parquet\n", "")
    assert pq.read_table("run/merged.parquet").num_rows == 10


def test_figures_are_drawn_from_stored_maps(command, made, tmp_path):
    command.loads.clear()
    code, out, _ = command("--render", "png", "--output", "run", "--limit", "2", "--cmap", "viridis")
    assert (code, out) == (0, "wrote 4 figures into run/figures\n")
    names = sorted(p.name for p in (tmp_path / "run" / "figures").iterdir())
    assert names == ["0_png_0.png", "0_png_1.png", "1_png_0.png", "1_png_1.png"]
    with Image.open(tmp_path / "run" / "figures" / names[0]) as image:
        assert image.width > 100
    assert command.loads == []
    shutil.rmtree(tmp_path / "run" / "figures")
    (made / "Images" / "1.png").unlink()
    code, out, err = command("--render", "png", "--output", "run", "--limit", "2")
    assert (code, out) == (1, "wrote 2 figures into run/figures\n")
    assert err.startswith("warning: no figure of 1.png: ")


def test_a_figure_is_never_overwritten_by_that_of_another_image(command, tmp_path):
    names = ["a b.png", "a_b.png", "A b.png", "c.png", f"{'d' * 70}1.png", f"{'d' * 70}2.png", f"{'e' * 70}.png"]
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(names):
        noise(40, 30, seed).save(tmp_path / "data" / name)
    batch.listing(tmp_path / "data", [(name, text) for name in names for text in ("a man", "a dog")])
    assert command("--data", "data", "--output", "run", *FAST)[0] == 0
    assert command("--render", "png", "--output", "run")[1] == "wrote 14 figures into run/figures\n"
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run" / "figures").iterdir()}
    assert len(whole) == 14
    assert {"c_png_0.png", "c_png_1.png"} < whole.keys()
    for seed in range(4):
        assert command("--render", "png", "--output", "run", "--random", "1", "--seed", seed)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "figures").iterdir()} == whole


def test_random_images_are_drawn_by_the_seed_and_get_figures(command, tmp_path):
    folder = data(tmp_path / "data", 9, ["a man"])
    code, out, _ = command("--data", folder, "--random", "2", "--seed", "3", *FAST)
    assert code == 0
    run = RunFolder.open("runs/data-demo-clip-random-2-3")
    assert run.ids == picked(tuple(f"{i}.png" for i in range(9)), None, 2, 3)
    assert out.startswith("wrote 2 figures into runs/data-demo-clip-random-2-3/figures\n")
    names = [f"{name.replace('.', '_')}_0.png" for name in run.ids]
    assert sorted(path.name for path in (run.path / "figures").iterdir()) == names


def test_retry_computes_rows_of_a_status_again(command, tmp_path):
    folder = data(tmp_path / "data", 3)
    whole = (folder / "Images" / "1.png").read_bytes()
    (folder / "Images" / "1.png").write_bytes(b"")
    assert command("--data", folder, "--output", "run", *FAST)[0] == 3
    (folder / "Images" / "1.png").write_bytes(whole)
    code, out, err = command("--data", folder, "--output", "run", *FAST, "--retry", "failed_decode")
    assert code == 0
    assert "run: 1 images to do in 1 of 2 shards" in err
    assert "6 ok" in out


def test_text_is_generated_by_trocr_and_not_by_clip(command):
    def reader(_, **options):
        return tiny.trocr_adapter()

    code, out, _ = command("--data", demo_lines(), "--limit", "3", "--output", "lines", *FAST[:4], model=reader)
    assert code == 0, out
    rows = batch.rows(RunFolder.open("lines"))
    assert {row["origin"] for row in rows} == {"generated"}
    assert len(rows) == 3
    code, _, err = command("--limit", "1", "--captions", "none", "--output", "clip", *FAST)
    assert code == 2
    assert "error: captions 'none' needs a model that generates text; clip does not" in err


# ---------------------------------------------------------------- separate processes


NO_MODEL = """
import sys
sys.path.insert(0, sys.argv[1])
import ground_flickr30k
for action in (["--status"], ["--merge"], ["--render", "png", "--limit", "1"]):
    code = ground_flickr30k.main([*action, "--output", sys.argv[2]])
    heavy = ("torch", "adapters", "transformers.models.clip.modeling_clip")
    print(code, *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


def test_status_and_merge_need_neither_torch_nor_a_model(made, tmp_path):
    argv = [sys.executable, "-c", NO_MODEL, str(SCRIPT.parent), str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    # Threads of pyarrow 26 may abort Python at exit, after everything was done: once in six runs of all tests.
    assert done.returncode in (0, -signal.SIGABRT), done.stderr
    assert done.stderr.splitlines()[:3] == ["0", "0", "0 torch"]  # figures: type annotations of the maps import torch


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>/dev/full"])
def test_closed_or_full_streams_do_not_stop_a_run(tmp_path, closed):
    folder = data(tmp_path / "data", 2)
    command = [sys.executable, str(SCRIPT), "--data", str(folder), "--output", str(tmp_path / "run"), *FAST]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *command], capture_output=True, text=True, check=False, env=ENV
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert RunFolder.open(tmp_path / "run").counts().total() == 4


def test_reading_a_run_starts_no_threads_of_arrow(made, monkeypatch):
    """Threads of pyarrow 26 that exist when Python ends may abort it."""
    calls, real = [], pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda *args, **options: calls.append(options) or real(*args, **options))
    assert sum(1 for _ in RunFolder.open("run").images()) == 5
    assert calls == [{"use_threads": False}] * 3


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "two"}, "the environment variable WORLD_SIZE must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "sets WORLD_SIZE=2, but not MASTER_ADDR, MASTER_PORT: start the processes"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_an_error(command, tmp_path, monkeypatch, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, err = command("--data", data(tmp_path / "data", 2), "--output", "run", *FAST)
    assert (code, out) == (2, "")
    assert message in err
    monkeypatch.setenv("WORLD_SIZE", "")
    assert command("--data", tmp_path / "data", "--output", "run", *FAST)[0] == 0


@pytest.mark.slow
def test_a_script_without_main_guard_starts_no_run_in_its_workers(tmp_path):
    folder = data(tmp_path / "data", 2)
    script = tmp_path / "mine.py"
    script.write_text(
        "from pathlib import Path\nfrom tests.support.batch import run, run_config\n"
        f"print(run(Path({str(tmp_path / 'run')!r}), run_config({str(folder)!r}, workers=1)))\n"
    )
    env = ENV | {"PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert 'a run begins while a script is imported: put it under `if __name__ == "__main__":`' in done.stderr
    assert "4 processes for decoding images died before their first image" in done.stderr.splitlines()[-1]


def test_a_closed_pipe_and_an_ascii_terminal(made, tmp_path):
    folder = tmp_path / "run \u00e9"
    shutil.move(tmp_path / "run", folder)
    done = process("--status", "--output", str(folder), env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "run \\xe9" in done.stdout
    piped = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" "$1" --status --output "$2" | head -n 0', sys.executable, SCRIPT, folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (piped.returncode, piped.stderr) == (0, "")


@pytest.mark.slow
def test_demo_data_with_every_demo_model(command, tmp_path):
    models = demo_scenes().parent / "models"
    argv = ["--limit", "2", "--workers", "0", "--threads", "1"]
    assert command(*argv, "--output", "clip", model=command.real)[0] == 0
    rows = batch.rows(RunFolder.open("clip"))
    assert {e["kind"] for row in rows for e in row["entries"]} == {"caption", "token", "phrase", "prompt"}
    assert command(*argv, "--output", "flava", "--model", models / "flava", model=command.real)[0] == 0
    assert len(batch.rows(RunFolder.open("flava"))) == len(rows)
    trocr = ["--model", models / "trocr", "--data", demo_lines()]
    assert command(*argv, *trocr, "--output", "trocr", model=command.real)[0] == 0
    read = batch.rows(RunFolder.open("trocr"))
    assert [row["origin"] for row in read] == ["generated"] * 2
    assert all(np.isfinite(e["score"]) for row in read for e in row["entries"])


@pytest.mark.slow
def test_a_run_equals_the_command_for_single_images(command, tmp_path):
    argv = ["--limit", "4", "--workers", "1", "--threads", "1", "--captions", "all", "--protocols", "--output", "run"]
    assert command(*argv, model=command.real)[0] == 0
    run = RunFolder.open("run")
    dataset = open_dataset(demo_scenes())
    found = dict(explanations(run, dataset, None, pytest.fail))
    assert len(found) == 20
    single = script(SCRIPT.parent / "ground.py")
    for name in list(found)[::3]:
        one = found[name]
        file = dataset.read(name.rpartition("#")[0]).image
        command_line = ["--image", str(file), "--caption", one.caption, "--methods", "gradcam", "rollout"]
        assert single.main([*command_line, "--output", str(tmp_path / "one"), "--write", "npz", "json"]) == 0
        wanted = Explanation.load(tmp_path / "one")
        kept = [e.kind in ("caption", "token") for e in one.entries]
        assert [e.label for e, keep in zip(one.entries, kept, strict=True) if keep] == [e.label for e in wanted.entries]
        scores = [e.score for e, keep in zip(one.entries, kept, strict=True) if keep]
        assert close(scores, [e.score for e in wanted.entries], TUTORIAL)
        for key in ("gradcam", "rollout"):
            a, b = one.methods[key].maps, wanted.methods[key].maps
            assert close_each(a[kept] if len(a) > 1 else a, b, HALF_BATCH), (name, key)
