"""The commands with a target that no text can change."""

import json
from pathlib import Path

from grounding import Explanation
from tests.support import batch

ONE_LINE = "warning: --caption, --phrase are not read: no text can change the target norm"


def test_no_caption_is_needed(ground, photo):
    code, out, err = ground("--target", "norm", "--image", photo, "--per-token", "--output", "out", "--inspect", "2")
    assert code == 0
    assert "read" not in err
    row = out.splitlines()[3].split()
    assert row[:2] == ["image", "image"]
    assert "leave-one-out" not in out
    names = {path.name for path in Path("out").iterdir()}
    assert {"00_image-gradcam.png", "00_image-rollout.png", "inspect.png", "figure.png"} <= names
    made = Explanation.load("out")
    assert [entry.kind for entry in made.entries] == ["image"]
    document = json.loads(Path("out/explanation.json").read_text())
    assert document["entries"][0]["label"] == "image"
    assert document["token_target"] is None


def test_a_caption_is_not_read_and_the_command_says_so(ground, photo):
    given = ("--target", "norm", "--image", photo, "--format", "json", "--write")
    code, out, err = ground(*given, "--caption", "red car", "--phrase", "red")
    assert code == 0
    assert [line for line in err.splitlines() if "read" in line] == [ONE_LINE]
    assert json.loads(out) == json.loads(ground(*given)[1])
    assert ground(*given, "--caption", "red car", "-q")[2] == ""


def test_a_target_about_a_text_still_needs_one(ground, photo):
    code, _, err = ground("--target", "similarity", "--image", photo)
    assert code == 2
    assert "give --caption TEXT" in err


def test_a_run_says_which_options_are_not_read_and_cannot_be_scored(command, tmp_path):
    data = batch.data(tmp_path / "data", 2)
    given = ("--data", data, "--target", "norm", "--workers", "0", "--output", "run")
    code, out, err = command("ground_flickr30k", *given, "--captions", "first")
    assert code == 0
    assert "2: 2 ok" in out
    assert "warning: --captions is not read: no text can change the target norm" in err
    assert "not read" not in command("ground_flickr30k", *given)[2]
    code, out, _ = command("ground_flickr30k", "--output", "run", "--render", "png")
    assert (code, out.split()[1]) == (0, "2")


def test_phrases_are_scored_by_one_map_for_all(command):
    code, out, _ = command("evaluate", "--target", "norm", "--limit", "1", "--format", "json", "--methods", "gradcam")
    assert code == 0
    document = json.loads(out)
    assert document["phrases"] > 1
    assert document["methods"]["gradcam"]["caption_swap_correlation"] > 0.999


def test_an_unknown_target_is_named_before_the_missing_caption(ground, photo):
    code, _, err = ground("--target", "norms", "--image", photo)
    assert code == 2
    assert "has no target 'norms'; did you mean 'norm'?" in err
    assert "--caption" not in err
