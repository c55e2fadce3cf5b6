"""Checks of a checkpoint of an architecture: loading by name, the commands, and a batch run that is killed."""

import os
import signal
import subprocess
import sys
import time

import adapters
from grounding.batch.run_folder import RunFolder
from tests.support import batch
from tests.support.commands import SCRIPT, answer, script
from tests.support.forked import SCRIPT as BATCH
from tests.support.images import noise
from tests.support.tolerances import COMMAND

CAPTION = "a man in a red jacket"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(BATCH.parent.parent)}


def save(adapter, folder):
    """Save the model, the tokenizer and the image processor as Hugging Face does; return the folder."""
    adapter.model.float().save_pretrained(folder)
    adapter.tokenizer.save_pretrained(folder)
    adapter.image_processor.save_pretrained(folder)
    return folder


def loads_by_name(folder, kind):
    """The checkpoint is loaded by `adapters.load` as an adapter of class `kind`; return it."""
    adapter = adapters.load(str(folder), device="cpu")
    assert isinstance(adapter, kind)
    return adapter


def commands_run(folder, tmp_path, capsys, layer):
    """`ground.py` explains an image, and lists the layers, `layer` as the default; return what it printed."""
    image = tmp_path / "image.png"
    noise(50, 40).save(image)
    argv = ["--model", folder, "--image", image, "--caption", CAPTION, "--device", "cpu"]
    code, out, err = answer(script(SCRIPT), [*argv, "--output", tmp_path / "out"], capsys)
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"figure.png", "maps.npz", "explanation.json"}
    code, listed, err = answer(script(SCRIPT), [*argv, "--list-layers"], capsys)
    assert code == 0, err
    [default] = [line for line in listed.splitlines() if "default" in line and layer in line]
    assert layer in default
    return out, listed


def survives_a_kill(folder, tmp_path):
    """A batch run that is killed after its first shard continues, and its files are those of an uninterrupted one."""
    data = batch.data(tmp_path / "data", 6)
    argv = [str(BATCH), "--model", str(folder), "--data", str(data), "--device", "cpu", "--shard-size", "1"]
    argv += ["--batch-size", "2", "--workers", "0", "--threads", "1", "--no-tokens", "--methods", "gradcam", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run(argv, whole)
    with subprocess.Popen([sys.executable, *argv, str(killed)], env=ENV, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + COMMAND
        while not (killed / "part-00000.json").exists():
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < end, "no shard was done"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list(killed.glob("part-*.json"))) < 6
    run(argv, killed)
    assert batch.content(killed) == batch.content(whole)
    assert set(batch.statuses(RunFolder.open(killed)).values()) == {"ok"}


def run(argv, output):
    done = subprocess.run(
        [sys.executable, *argv, str(output)], env=ENV, capture_output=True, text=True, check=False, timeout=COMMAND
    )
    assert done.returncode == 0, done.stderr
