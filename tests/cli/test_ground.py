"""scripts/ground.py: results, options, exit codes, one line per failure, no traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from grounding import Explanation
from grounding.core.demo import demo_image
from tests.support.commands import SCRIPT
from tests.support.images import noise
from tests.support.tolerances import COMMAND

CAPTION = "man in red jacket"


def run_process(*argv, **options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, check=False, timeout=COMMAND, **options
    )


def test_the_default_command(ground, tmp_path):
    code, out, err = ground("--caption", CAPTION)
    assert code == 0
    assert "rollout does not depend on the text" in err
    lines = out.splitlines()
    assert "480 x 320" in lines[0]
    assert lines[1].split()[:4] == ["entry", "kind", "score", "gradcam"]
    assert [line.split()[0] for line in lines[4:8]] == ["man", "in", "red", "jacket"]
    folder = Path("outputs/default-demo-clip")
    assert lines[-1] == f"wrote {folder}/figure.png {folder}/maps.npz {folder}/explanation.json"
    document = json.loads((tmp_path / folder / "explanation.json").read_text())
    assert document["image"]["seen"] == [80, 0, 400, 320]
    assert document["schema_version"] == 1
    assert [entry["label"] for entry in document["entries"]] == [CAPTION, "man", "in", "red", "jacket"]
    assert not document["entries"][0]["maps"]["rollout"]["text_conditioned"]
    with Image.open(tmp_path / folder / "figure.png") as figure:
        assert figure.width > 600
    assert Explanation.load(tmp_path / folder).caption == CAPTION


def test_same_command_twice_gives_the_same_files(ground, tmp_path):
    files = []
    for name in ("a", "b"):
        assert ground("--caption", CAPTION, "--output", name)[0] == 0
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    with np.load(tmp_path / "a/maps.npz") as a, np.load(tmp_path / "b/maps.npz") as b:
        assert a.files == b.files
        assert all(np.array_equal(a[k], b[k]) for k in a.files)
    assert files[0]["figure.png"] == files[1]["figure.png"]


def test_json_on_stdout_is_json_and_nothing_else(ground):
    code, out, _ = ground("--caption", CAPTION, "--format", "json", "--write")
    document = json.loads(out)
    assert code == 0
    assert document["files"] == {}
    assert set(document["entries"][1]["maps"]) == {"gradcam", "rollout", "relevance"}
    assert not Path("outputs").exists()


def test_choices_reach_the_result(ground):
    argv = ["--caption", "red car and red bus", "--format", "json", "--write"]

    def entries(*more):
        return json.loads(ground(*argv, *more)[1])["entries"]

    assert [e["label"] for e in entries("--tokens", "red")][1:] == ["red", "red"]
    assert [e["start"] for e in entries("--tokens", "red")][1:] == [0, 12]
    assert [e["kind"] for e in entries("--words")][1:] == ["word"] * 5
    assert [(e["kind"], e["label"]) for e in entries("--tokens", "--phrase", "red bus")][1:] == [("phrase", "red bus")]
    assert entries("--token-target", "alone")[1]["score"] != entries()[1]["score"]
    layers = entries("--methods", "gradcam", "--layer", "-1.in", "--layer", "-2")[0]["maps"]
    assert list(layers) == ["gradcam@-1.in", "gradcam@-2"]
    assert layers["gradcam@-2"]["layer"] == "vision_model.encoder.layers.2"
    attention = entries("--attention-layer", "0", "--head", "1")[0]["maps"]
    assert list(attention) == ["gradcam", "rollout", "relevance", "attention"]
    fused = entries("--option", "rollout.fusion=max", "--methods", "rollout")
    assert fused[0]["maps"]["rollout"]["max"] != entries("--methods", "rollout")[0]["maps"]["rollout"]["max"]


def test_list_layers(ground):
    code, out, _ = ground("--list-layers")
    assert code == 0
    rows = {line.split("  ")[0].strip(): line.split()[-1] for line in out.splitlines()[2:]}
    assert rows["vision_model.encoder.layers.3"] == "dead"
    assert rows["vision_model.encoder.layers.3.layer_norm1"] == "default"
    assert rows["vision_model.encoder.layers.2"] == "live"


def test_figure_options_reach_the_image(ground):
    sizes = set()
    for extra in (
        (),
        ("--layout", "panels"),
        ("--cmap", "jet", "--grid"),
        ("--scale", "caption"),
        ("--fixed", "0", "0.001"),
        ("--signed",),
        ("--background", "edges"),
        ("--opacity", "0.2"),
    ):
        code, _, err = ground("--caption", CAPTION, "--tokens", "--write", "png", "--output", "out", *extra)
        assert code == 0, err
        sizes.add(Path("out/figure.png").read_bytes())
    assert len(sizes) == 8


def test_several_images_and_one_of_them_broken(ground, photo, tmp_path):
    (tmp_path / "empty.jpg").touch()
    code, out, err = ground("--caption", "red car", "--image", tmp_path / "empty.jpg", photo, "--output", "all")
    assert code == 1
    assert err.count("error: ") == 1
    assert "empty.jpg" in err
    assert sorted(p.name for p in Path("all").iterdir()) == ["photo-demo-clip"]
    assert out.splitlines()[-1].startswith("wrote all/photo-demo-clip/figure.png")


def test_the_demo_model_warns_on_a_users_image_and_names_unknown_words(ground, photo):
    code, _, err = ground("--caption", "red zeppelin", "--image", photo)
    assert code == 0
    assert "trained on a cartoon world alone" in err
    assert "--model openai/clip-vit-base-patch16" in err
    assert "vocabulary of this model: 'zeppelin'" in err
    assert ground("--caption", "red zeppelin", "--image", photo, "-q")[2] == ""


def test_a_traceback_with_verbose_only(tmp_path):
    quiet = run_process("--caption", "", cwd=tmp_path)
    loud = run_process("--caption", "", "-v", cwd=tmp_path)
    assert (quiet.returncode, loud.returncode) == (2, 2)
    assert quiet.stderr.count("\n") == 1
    assert "Traceback" in loud.stderr


def test_help_is_instant():
    """Half a second: nothing that takes long is imported."""
    found = run_process("--help", env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert found.returncode == 0
    assert "--list-layers" in found.stdout
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "scipy", "cv2", "matplotlib", "matplotlib.figure", "pyarrow"}


def test_a_closed_pipe_and_an_ascii_terminal(tmp_path):
    command = f"{sys.executable} {SCRIPT} --list-layers | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    found = run_process("--caption", "café 👩‍👧 \x1b[31m", "--write", cwd=tmp_path, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.isascii()
    assert "\x1b" not in found.stdout + found.stderr


def test_hostile_file_names_are_shown_escaped(ground, tmp_path):
    name = "a\nb \x1b[31m'\"👍.png"
    noise(60, 60).save(tmp_path / name)
    code, out, err = ground("--caption", "red car", "--image", tmp_path / name)
    assert code == 0
    assert "\x1b" not in out + err
    assert len([line for line in out.splitlines() if re.match(r".*60 x 60", line)]) == 1
    folder = next(Path("outputs").iterdir()).name
    assert re.fullmatch(r"[\w.-]+", folder, re.ASCII)


def test_default_image_is_shipped():
    assert demo_image().is_file()
