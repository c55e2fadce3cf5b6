"""Methods and their options on the command line: those that need passes of their own, with figure and files."""

import json
from pathlib import Path

from PIL import Image

from grounding import Explanation

CAPTION = "man in red jacket"


def test_new_passes_in_one_request(ground):
    methods = ["gae", "legrad", "grad_eclip", "occlusion", "rise"]
    options = ["gae.norm_rule=detach", "occlusion.window=4", "occlusion.stride=4", "rise.masks=8", "legrad.pooling=own"]
    asked = [part for option in options for part in ("--option", option)]
    code, out, _ = ground("--caption", CAPTION, "--tokens", "--methods", *methods, *asked, "--output", "made")
    assert code == 0
    document = json.loads(Path("made/explanation.json").read_text())
    assert list(document["methods"]) == ["relevance", *methods[1:]]
    stored = {name: own["options"] for name, own in document["methods"].items()}
    assert stored["relevance"] == {"start_layer": 0, "encoder": None, "norm_rule": "detach"}
    assert stored["legrad"] == {"pooling": "own", "start_layer": 0, "norm_rule": "none"}
    assert stored["grad_eclip"] == {"form": "model", "norm_rule": "none", "threshold": 0.0}
    assert stored["occlusion"] == {"window": 4, "stride": 4, "baseline": "mean", "threshold": 0.0}
    assert stored["rise"]["masks"] == 8
    assert all(own["text_conditioned"] for own in document["methods"].values())
    with Image.open("made/figure.png") as figure:
        assert figure.height > 100
    assert list(Explanation.load("made").methods) == ["relevance", *methods[1:]]
    assert all(name in out for name in ("legrad", "occlusion"))


def test_wrong_options_are_one_line(ground):
    code, _, err = ground("--caption", CAPTION, "--methods", "occlusion", "--option", "occlusion.stride=2")
    assert code != 0
    assert err.strip().splitlines() == [
        "error: option occlusion.stride: 2 patches leave gaps between windows of 1: use a stride of at most the window"
    ]
