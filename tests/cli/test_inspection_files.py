"""inspect.png: written atomically with the other files, by every command and family."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from grounding.core import files
from grounding.explanation.figures.inspection import draw, figure
from grounding.explanation.figures.options import FigureOptions
from grounding.explanation.inspection import CHANNELS
from grounding.explanation.storage import OutputError, load
from tests.support.commands import ROOT
from tests.support.explanations import explanation
from tests.support.inspections import inspection

PLAIN = ["explanation.json", "figure.png", "maps.npz", "picture.png"]


COARSE = {"oversampling": 0.2}  # figures of few pixels


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def drawn(monkeypatch):
    """Calls of the inspection figure: (number of sections, channels, options); its panels have few pixels."""
    calls = []

    def record(inspections, channels, options):
        calls.append((len(inspections), channels, options))
        return draw(inspections, channels, replace(options, **COARSE))

    monkeypatch.setattr("grounding.explanation.figures.inspection.draw", record)
    return calls


def test_it_is_written_and_listed_and_the_rest_is_the_same(tmp_path):
    shown = explanation()
    plain = shown.save(tmp_path / "plain")
    written = shown.save(tmp_path / "with", inspections=[inspection()], channels=2)
    assert names(tmp_path / "with") == sorted([*PLAIN, "inspect.png"])
    assert written["inspect"] == tmp_path / "with" / "inspect.png"
    assert "inspect" not in plain
    content = json.loads((tmp_path / "with/explanation.json").read_text())
    assert content["files"]["inspect"] == "inspect.png"
    assert set(content["sha256"]) == {"figure.png", "inspect.png", "maps.npz", "picture.png"}
    for name in ("figure.png", "maps.npz"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert load(tmp_path / "with").caption == shown.caption
    with Image.open(tmp_path / "with/inspect.png") as image:
        assert image.info["Software"].startswith("grounding")
        assert image.size == figure([inspection()], 2).canvas.get_width_height()


def test_an_earlier_one_is_replaced_or_removed(tmp_path):
    shown = explanation()
    shown.save(tmp_path / "out", inspections=[inspection()], channels=2)
    first = (tmp_path / "out/inspect.png").read_bytes()
    shown.save(tmp_path / "out", inspections=[inspection()], channels=3)
    assert (tmp_path / "out/inspect.png").read_bytes() != first
    shown.save(tmp_path / "out", ["png", "npz", "json"])
    assert names(tmp_path / "out") == PLAIN
    shown.save(tmp_path / "out", ["npz", "json"], inspections=[inspection()])
    assert "inspect.png" not in names(tmp_path / "out")


def test_a_foreign_file_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "out/inspect.png")
    before = (tmp_path / "out/inspect.png").read_bytes()
    with pytest.raises(OutputError, match=r"inspect.png was not written by grounding"):
        explanation().save(tmp_path / "out", inspections=[inspection()])
    assert names(tmp_path / "out") == ["inspect.png"]
    assert (tmp_path / "out/inspect.png").read_bytes() == before


def test_a_failure_changes_nothing(tmp_path, monkeypatch):
    explanation().save(tmp_path / "out")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in PLAIN}
    fill = files._fill

    def full(folder, contents):
        if "inspect.png" in contents:
            raise OSError(28, "No space left on device")
        fill(folder, contents)

    monkeypatch.setattr(files, "_fill", full)
    with pytest.raises(OutputError, match="No space left"):
        explanation().save(tmp_path / "out", inspections=[inspection()], channels=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="channels to show must be from 1 to 64, got 99"):
        explanation().save(tmp_path / "out", inspections=[inspection()], channels=99)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_options_of_the_figure_are_those_of_the_inspection(tmp_path, drawn):
    explanation().save(
        tmp_path / "out", ["png"], inspections=[inspection()], channels=5, cmap="jet", grid=True, **COARSE
    )
    assert drawn == [(1, 5, FigureOptions(cmap="jet", grid=True, **COARSE))]


@pytest.mark.parametrize(
    ("name", "argv", "sections"),
    [
        ("ground", ["--caption", "man in red jacket", "--tokens", "red", "--layer", "-1.in", "--layer", "-2"], 4),
        ("ground", ["--caption", "red jacket", "--tokens", "--model", ROOT / "data/demo/models/flava"], 1),
        ("inspect_ocr", ["--tokens", "@0", "@1", "--methods", "cross_attention", "rollout"], 2),
        ("ground", ["--caption", "a 5", "--model", ROOT / "data/demo/models/trocr", "--tokens", "@0"], 2),
    ],
)
def test_every_command_and_family(command, name, argv, sections, tmp_path, drawn):
    out = tmp_path / "out"
    source = ["--image", ROOT / "data/demo/line.png"] if "trocr" in str(argv) else []
    code, printed, _ = command(name, *argv, *source, "--inspect", "2", "--output", out)
    assert code == 0
    assert [call[:2] for call in drawn] == [(sections, 2)]
    assert str(out / "inspect.png") in printed.splitlines()[-1]
    with Image.open(out / "inspect.png") as image:
        assert np.asarray(image).std() > 0


def test_eight_channels_by_default(ground, tmp_path, drawn):
    argv = ("--caption", "man", "--tokens", "--methods", "gradcam", "--output", tmp_path / "out")
    assert ground(*argv, "--inspect")[0] == 0
    assert ground(*argv)[0] == 0
    assert [channels for _, channels, _ in drawn] == [CHANNELS] == [8]
