"""Wrong options, texts and files: exit code, one line on stderr, nothing on stdout, no files."""

from pathlib import Path

import pytest

from grounding.core.demo import demo_model

CAPTION = "man in red jacket"
COMMANDS = {"ground": ["--caption", CAPTION], "inspect_ocr": [], "evaluate": []}

# Options that several commands share: refused before a model is loaded, by each of them.
SHARED = [
    (["--methods", "gradcan"], 2, "did you mean 'gradcam'"),
    (["--option", "rollout.fusion"], 2, "METHOD.OPTION=VALUE"),
]
# Options of the commands that explain single images.
EXPLAINING = [
    (["--output", ""], 2, "--output is empty"),
    (["--output", " "], 2, "--output is empty"),
    (["--output", "file"], 1, "file"),
    (["--output", "foreign"], 1, "foreign"),
    (["--write", "gif"], 2, "invalid choice"),
    (["--per-token", "--write", "npz"], 2, "--per-token needs png"),
    (["--inspect", "0"], 2, "channels to show must be from 1 to 64, got 0"),
    (["--inspect", "many"], 2, "invalid int value: 'many'"),
    (["--inspect", "--write", "json"], 2, "--inspect needs png"),
    (["--cmap", "magna"], 2, "magma"),
    (["--opacity", "7"], 2, "opacity"),
    (["--scale", "fixed"], 2, "--fixed LOW HIGH"),
    (["--fixed", "2", "1"], 2, "low < high"),
    (["--revision", "main"], 2, "--revision needs --model"),
    (["--target", "similarity", "--target-class", "1"], 2, "--target-class is for the target class"),
    (["--crop", "a,b,c,d"], 2, "expected four whole numbers X0,Y0,X1,Y1, got 'a,b,c,d'"),
]
BEFORE_LOADING = [
    *[(name, *case) for case in SHARED for name in COMMANDS],
    *[(name, *case) for case in EXPLAINING for name in ("ground", "inspect_ocr")],
    ("ground", ["--caption", ""], 2, "caption is empty"),
    ("ground", ["--caption", "   "], 2, "caption is empty"),
    ("inspect_ocr", ["--text", "  "], 2, "the caption is empty"),
    ("inspect_ocr", ["--text", "a", "--beams", "2"], 2, "--text forces a given one"),
    ("inspect_ocr", ["--where", ""], 2, "expect tokens, got an empty one"),
    ("inspect_ocr", ["--where", "a", "--words"], 2, "not with --words or --phrase"),
    ("inspect_ocr", ["--words", "--special"], 2, "not with --words"),
]
AFTER_LOADING = [
    *[
        (name, *case)
        for case in [
            (["--model", "nobody/nothing"], 1, "cannot load the configuration of 'nobody/nothing'"),
            (["--model", "./nothing"], 1, "no model folder"),
            (["--device", "warp"], 1, "device 'warp'"),
            (["--image", "missing.png"], 1, "missing.png"),
            (["--image", "."], 1, "directory"),
            (["--crop", "0,0,9999,10"], 2, "crop 0,0,9999,10 is not a part of"),
            (["--crop=-1,0,5,10"], 2, "is not a part of"),
            (["--crop", "5,5,5,10"], 2, "is not a part of"),
            (["--option", "rollout.fusion=max", "--methods", "gradcam"], 2, "rollout"),
        ]
        for name in ("ground", "inspect_ocr")
    ],
    ("ground", ["--tokens", "blue"], 2, "'blue' is not in the caption; it has 0:'man', 1:'in'"),
    ("ground", ["--phrase", "blue hat"], 2, "does not occur"),
    ("ground", ["--layer", "-1"], 2, "dead"),
    ("ground", ["--target", "logit"], 2, "'logit'; did you mean 'logits'? (it has: similarity, logits, norm)"),
    ("ground", ["--target-class", "dog"], 2, "clip has targets similarity, logits, norm and no classes, got ['dog']"),
    ("ground", ["--inspect", "--methods", "rollout"], 2, "'rollout' has no channel weights to inspect"),
    ("ground", ["--inspect", "--methods", "gradcam", "--layer", "-1"], 2, "is dead"),
    ("inspect_ocr", ["--max-length", "0"], 2, "max-length must be a whole number, 1 or more"),
    ("inspect_ocr", ["--beams", "1000"], 2, "beams must be a whole number, from 1 to 64"),
    ("inspect_ocr", ["--tokens"], 2, "nothing to explain"),
    ("inspect_ocr", ["--tokens", "@99"], 2, "'@99' is not in the caption"),
    ("inspect_ocr", ["--tokens", "z"], 2, "'z' is not in the caption"),
    ("inspect_ocr", ["--where", "ab"], 2, "'ab' is 2 tokens of this model"),
    ("inspect_ocr", ["--where", "\u732b"], 2, "is no token of this model"),
    ("inspect_ocr", ["--contrast", "x", "z"], 2, "neither 'x' nor 'z' is in"),
    ("inspect_ocr", ["--model", demo_model("clip")], 2, "clip generates no text: use scripts/ground.py"),
    ("inspect_ocr", ["--token-target", "alone"], 2, "has no token target 'alone'"),
    ("inspect_ocr", ["--option", "cross_attention.layer=9", "--methods", "cross_attention"], 2, "9 is not in -2 to 1"),
]


def check_refused(command, name, argv, code, message):
    Path("file").touch()
    Path("foreign").mkdir()
    Path("foreign/precious.txt").touch()
    found, out, err = command(name, *COMMANDS[name], *argv)
    assert (found, out) == (code, "")
    last = err.strip().splitlines()[-1]
    assert "error: " in last
    assert message in last
    assert sorted(str(path) for path in Path().rglob("*")) == ["file", "foreign", "foreign/precious.txt"]


@pytest.mark.parametrize(("name", "argv", "code", "message"), BEFORE_LOADING)
def test_wrong_options_are_errors_before_a_model_is_loaded(command, monkeypatch, name, argv, code, message):
    monkeypatch.setattr("adapters.load", lambda *_, **__: pytest.fail("a model was loaded"))
    check_refused(command, name, argv, code, message)


@pytest.mark.parametrize(("name", "argv", "code", "message"), AFTER_LOADING)
def test_requests_that_a_model_or_image_cannot_answer_are_errors(command, name, argv, code, message):
    check_refused(command, name, argv, code, message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --caption TEXT"),
        (["--target-class", "dog"], "give --caption TEXT, or --model of a classifier"),
        (["--model", demo_model("clip")], "this model generates no text, give --caption TEXT"),
    ],
)
def test_ground_needs_a_caption_unless_the_model_generates_or_classifies(command, argv, message):
    code, out, err = command("ground", *argv)
    assert (code, out) == (2, "")
    assert message in err
