"""The OCR command as a user meets it: what was read, what is asked, what goes wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding import Explanation
from grounding.core.demo import demo_line, demo_model
from tests.conftest import noise
from tests.support.commands import ROOT, script

TEXT = "Total $12.50"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, name="inspect_ocr"):
        try:
            code = script(ROOT / "scripts" / f"{name}.py").main([str(a) for a in argv])
        except SystemExit as error:  # argparse
            code = error.code
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return code, out.out, out.err

    return run


def document(found):
    code, out, _ = found
    assert code == 0
    return json.loads(out)


def test_the_default_command_reads_the_shipped_line(command, tmp_path):
    code, out, err = command()
    assert code == 0
    assert "read by the model" in out.splitlines()[0]
    assert "<activation, gradient> = 0" in err
    assert "meaningless" not in err
    folder = tmp_path / "outputs/line-demo-trocr"
    written = json.loads((folder / "explanation.json").read_text())
    assert written["caption"] == TEXT
    assert written["model"] == {"id": "demo-trocr", "type": "vision-encoder-decoder"}
    assert (written["origin"], written["target"], written["token_target"]) == ("generated", "logit", None)
    assert [entry["label"] for entry in written["entries"]] == list(TEXT)
    assert list(written["entries"][0]["maps"]) == ["gradcam", "gradcam_ln", "rollout", "gradient_x_cross_attention"]
    for entry in written["entries"]:
        assert entry["probability"] > 0.5 > entry["alternatives"][0]["probability"]
        assert len(entry["alternatives"]) == 3
        assert all(found["text_conditioned"] for found in entry["maps"].values())
    for name in ("figure.png", "strip.png"):
        with Image.open(folder / name) as image:
            assert image.width > 600
    assert Explanation.load(folder).entries[0].alternatives[0].label != "T"


def test_what_is_read_is_where_it_stands(command):
    """The shipped line has its boxes beside it: gradient x cross-attention and the LN-rule find their characters."""
    boxes = json.loads(demo_line().with_suffix(".json").read_text())["chars"]
    found = document(command("--format", "json", "--write"))
    for key, least in (("gradient_x_cross_attention", 0.9), ("gradcam_ln", 0.7)):
        hits = []
        for entry, (x0, y0, x1, y1) in zip(found["entries"], boxes, strict=True):
            if entry["label"].strip():
                x, y = entry["maps"][key]["peak"] or (-1, -1)
                hits.append(x0 <= x < x1 and y0 <= y < y1)
        assert np.mean(hits) >= least, (key, hits)


def test_one_overlay_per_token(command):
    found = document(command("--per-token", "--methods", "cross_attention", "--format", "json", "--output", "out"))
    overlays = found["files"]["overlays"]
    assert list(overlays) == [str(i) for i in range(len(TEXT))]
    for name in overlays.values():
        with Image.open(Path("out") / Path(name).name) as image:
            assert image.width >= 768


def test_a_forced_text(command):
    found = document(command("--text", "Total $17.50", "--format", "json", "--write"))
    assert found["origin"] == "forced"
    assert [entry["label"] for entry in found["entries"]] == list("Total $17.50")
    wrong, right = found["entries"][8], found["entries"][9]
    assert wrong["probability"] < 0.5 < right["probability"]
    assert wrong["alternatives"][0]["label"] == "2"


def test_questions_about_other_tokens(command):
    found = document(
        command("--where", "5", "--tokens", "@0", "--format", "json", "--write", "--methods", "gradcam_ln")
    )
    [entry] = found["entries"]
    assert (entry["kind"], entry["label"], entry["start"], entry["end"]) == ("where", "5?", 0, 1)
    found = document(command("--contrast", "5", "6", "--format", "json", "--write"))
    [entry] = found["entries"]
    assert (entry["kind"], entry["start"]) == ("contrast", TEXT.index("5"))
    assert entry["score"] > 0
    found = document(command("--words", "--format", "json", "--write", "--methods", "cross_attention"))
    assert [entry["label"] for entry in found["entries"]] == ["Total", "$", "12", ".", "50"]
    found = document(command("--special", "--tokens", "T", "12", "--format", "json", "--write"))
    assert [(entry["label"], entry["start"]) for entry in found["entries"]] == [("T", 0), ("", len(TEXT))]


def test_the_attention_maps_say_that_they_cannot_tell_tokens_apart(command):
    code, _, err = command("--where", "5", "--tokens", "@0", "--write", "--methods", "gradcam_ln", "cross_attention")
    assert code == 0
    assert "Cross-attention shows where the model attended at this position of the text" in err
    assert "LN-rule" not in err


def test_length_and_beams(command):
    code, _, err = command("--max-length", "3", "--write", "--methods", "cross_attention")
    assert code == 0
    assert "stopped_by_length: the text was cut at 3 tokens" in err
    found = document(command("--beams", "3", "--format", "json", "--write", "--methods", "cross_attention"))
    assert found["caption"] == TEXT


def test_a_blank_image_and_a_page(command, tmp_path):
    Image.new("RGB", (300, 40), "white").save(tmp_path / "blank.png")
    code, _, err = command("--image", "blank.png")
    assert code == 0
    assert "trained on rendered lines of text alone" in err
    assert "microsoft/trocr-base-printed" in err
    noise(300, 400).save(tmp_path / "page.png")
    code, _, err = command("--image", "page.png", "--write", "--methods", "cross_attention")
    assert code == 0
    assert "300 x 400 pixels, width : height = 0.75: this model reads one line" in err


def test_a_image_that_fails_costs_its_own_line(command):
    code, out, err = command("--image", "missing.png", demo_line(), "--methods", "cross_attention", "--write")
    assert code == 1
    assert "missing.png" in err
    assert "T " in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text", "a", "--beams", "2"], "--text forces one on it"),
        (["--where", "a", "--words"], "not with --words or --phrase"),
        (["--max-length", "0"], "max-length must be a whole number, 1 or more"),
        (["--text", "  "], "the caption is empty"),
        (["--tokens", "@99"], "'@99' is not in the caption"),
        (["--beams", "1000"], "beams must be a whole number, from 1 to 64"),
        (["--where", ""], "want tokens, one was empty"),
        (["--words", "--special"], "not with --words"),
        (["--output", ""], "--output is empty"),
        (["--tokens"], "nothing to explain"),
        (["--where", "ab"], "'ab' is 2 tokens of this model"),
        (["--where", "\u732b"], "is no token of this model"),
        (["--tokens", "z"], "'z' is not in the caption"),
        (["--contrast", "x", "z"], "neither 'x' nor 'z' is in"),
        (["--model", demo_model("clip")], "clip writes no text: use scripts/ground.py"),
        (["--token-target", "alone"], "has no token target 'alone'"),
        (["--option", "cross_attention.layer=9", "--methods", "cross_attention"], "9 is not in -2 to 1"),
        (["--revision", "main"], "--revision belongs to --model"),
        (["--per-token", "--write", "npz"], "--per-token"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_code_2(command, argv, words):
    code, _, err = command(*argv)
    assert code == 2
    assert words in err.splitlines()[-1]
    assert not list(Path("outputs").glob("*/*"))


def test_every_image_has_a_text_of_its_own(command, tmp_path):
    """What one of them does not hold costs that one alone, and the message names it."""
    Image.new("RGB", (300, 40), "white").save(tmp_path / "blank.png")
    argv = ["--image", "blank.png", demo_line(), "--tokens", "T", "--methods", "cross_attention", "--output", "out"]
    code, out, err = command(*argv)
    assert code == 2
    assert "blank.png: 'T' is not in the caption" in err
    assert [path.name for path in Path("out").iterdir()] == ["line-demo-trocr"]
    assert "T " in out


def test_blanks_may_be_named_as_they_are_shown(command):
    found = document(command("--tokens", "\u2423", "--where", "\u2423", "--format", "json", "--write"))
    assert [(entry["kind"], entry["start"]) for entry in found["entries"]] == [("where", TEXT.index(" "))]


def test_a_scene_is_no_line(command):
    code, _, err = command("--model", demo_model("trocr"), "--write", "--methods", "cross_attention", name="ground")
    assert code == 0
    assert "trained on rendered lines" in err


def test_layers_are_listed(command):
    code, out, _ = command("--list-layers")
    assert code == 0
    assert "default" in next(line for line in out.splitlines() if line.startswith("encoder.layers.3 "))


def test_ground_takes_a_model_that_writes(command):
    """With a caption it is forced, without one it is generated."""
    model = ["--model", demo_model("trocr"), "--image", demo_line(), "--format", "json", "--write"]
    written = document(command(*model, name="ground"))
    assert (written["origin"], written["caption"]) == ("generated", TEXT)
    assert [entry["kind"] for entry in written["entries"][:2]] == ["caption", "token"]
    forced = document(command(*model, "--caption", "Tofal", name="ground"))
    assert (forced["origin"], forced["caption"]) == ("forced", "Tofal")
    code, _, err = command("--model", demo_model("clip"), name="ground")
    assert code == 2
    assert "this model writes no text itself" in err


def test_ascii_terminals_and_pipes(tmp_path):
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, ROOT / "scripts/inspect_ocr.py", "--methods", "cross_attention", "--write", "-q"],
        capture_output=True, check=False, cwd=tmp_path, env={"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert b"Error" not in found.stderr
