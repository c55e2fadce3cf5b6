"""inspect.png: written with the other files or not at all, by every command and family."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounding.core import files
from grounding.explanation import storage
from grounding.explanation.figures.inspection import figure
from grounding.explanation.storage import OutputError, load
from tests.engine.test_inspect import made
from tests.support.explanations import explanation

ROOT = Path(__file__).parents[2]
PLAIN = ["explanation.json", "figure.png", "maps.npz", "picture.png"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Figures of few pixels: what is in them is tested elsewhere."""
    monkeypatch.setattr("grounding.explanation.figures.sheet.DPI", 30)
    monkeypatch.setattr("grounding.explanation.figures.comparison.OVERSAMPLING", 0.2)
    monkeypatch.setattr("grounding.explanation.figures.inspection.OVERSAMPLING", 0.2)


def run(script, *argv):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(script).main([str(a) for a in argv])
    except SystemExit as error:  # argparse
        return error.code
    finally:
        sys.path.pop(0)


def test_it_is_written_and_listed_and_the_rest_is_the_same(tmp_path):
    shown = explanation()
    plain = shown.save(tmp_path / "plain")
    written = shown.save(tmp_path / "with", inspections=[made()], channels=2)
    assert names(tmp_path / "with") == sorted([*PLAIN, "inspect.png"])
    assert written["inspect"] == tmp_path / "with" / "inspect.png"
    assert "inspect" not in plain
    content = json.loads((tmp_path / "with/explanation.json").read_text())
    assert content["files"]["inspect"] == "inspect.png"
    assert set(content["sha256"]) == {"figure.png", "inspect.png", "maps.npz", "picture.png"}
    for name in ("figure.png", "maps.npz"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert load(tmp_path / "with").caption == shown.caption
    with Image.open(tmp_path / "with/inspect.png") as drawn:
        assert drawn.info["Software"].startswith("grounding")
        assert drawn.size == figure([made()], 2).canvas.get_width_height()


def test_an_earlier_one_is_replaced_or_removed(tmp_path):
    shown = explanation()
    shown.save(tmp_path / "out", inspections=[made()], channels=2)
    first = (tmp_path / "out/inspect.png").read_bytes()
    shown.save(tmp_path / "out", inspections=[made()], channels=3)
    assert (tmp_path / "out/inspect.png").read_bytes() != first
    shown.save(tmp_path / "out", ["png", "npz", "json"])
    assert names(tmp_path / "out") == PLAIN
    shown.save(tmp_path / "out", ["npz", "json"], inspections=[made()])
    assert "inspect.png" not in names(tmp_path / "out")


def test_somebody_elses_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "out/inspect.png")
    before = (tmp_path / "out/inspect.png").read_bytes()
    with pytest.raises(OutputError, match=r"inspect.png was not written by grounding"):
        explanation().save(tmp_path / "out", inspections=[made()])
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
        explanation().save(tmp_path / "out", inspections=[made()], channels=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ValueError, match="channels to show must be from 1 to 64, got 99"):
        explanation().save(tmp_path / "out", inspections=[made()], channels=99)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_colour_map_of_the_figure_is_that_of_the_map(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(storage.pngs, "printed", lambda made: b"")
    monkeypatch.setattr(
        "grounding.explanation.figures.inspection.figure",
        lambda inspections, channels, **options: asked.append((channels, options)),
    )
    storage.pngs.inspection_png([made()], 5, {"cmap": "jet", "grid": True})
    storage.pngs.inspection_png([made()], 8, {"grid": True})
    assert asked == [(5, {"cmap": "jet"}), (8, {})]


@pytest.mark.parametrize(
    ("script", "argv", "sections"),
    [
        ("ground", ["--caption", "man in red jacket", "--tokens", "red", "--layer", "-1.in", "--layer", "-2"], 4),
        ("ground", ["--caption", "red jacket", "--tokens", "--model", ROOT / "data/demo/models/flava"], 1),
        ("inspect_ocr", ["--tokens", "@0", "@1", "--methods", "cross_attention", "rollout"], 2),
        ("ground", ["--caption", "a 5", "--model", ROOT / "data/demo/models/trocr", "--tokens", "@0"], 2),
    ],
)
def test_every_command_and_family(script, argv, sections, tmp_path, monkeypatch, capsys):
    asked = []

    def count(inspections, channels, **options):
        asked.append((len(inspections), channels))
        return figure(inspections, channels, **options)

    monkeypatch.setattr("grounding.explanation.figures.inspection.figure", count)
    out = tmp_path / "out"
    image = ["--image", ROOT / "data/demo/line.png"] if "trocr" in str(argv) else []
    assert run(script, *argv, *image, "--inspect", "2", "--output", out) == 0
    assert asked == [(sections, 2)]
    assert str(out / "inspect.png") in capsys.readouterr().out.splitlines()[-1]
    with Image.open(out / "inspect.png") as drawn:
        assert np.asarray(drawn).std() > 0


def test_the_number_of_channels_is_eight_unless_told(tmp_path, monkeypatch):
    asked = []

    def count(inspections, channels, **options):
        asked.append(channels)
        return figure(inspections, channels, **options)

    monkeypatch.setattr("grounding.explanation.figures.inspection.figure", count)
    argv = ("--caption", "man", "--tokens", "--methods", "gradcam", "--output", tmp_path / "out")
    assert run("ground", *argv, "--inspect") == 0
    assert run("ground", *argv) == 0
    assert asked == [8]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--inspect", "0"], "channels to show must be from 1 to 64, got 0"),
        (["--inspect", "many"], "invalid int value: 'many'"),
        (["--inspect", "--write", "json"], "--inspect writes a picture, but --write leaves png out"),
        (["--inspect", "--methods", "rollout"], "'rollout' has no channel weights to inspect"),
        (["--inspect", "--methods", "gradcam", "--layer", "-1"], "is dead"),
    ],
)
def test_what_makes_no_sense_is_refused(argv, words, tmp_path, capsys, monkeypatch):
    if "--methods" not in argv:  # before any work
        monkeypatch.setattr("adapters.load", lambda *_, **__: pytest.fail("a model was loaded"))
    code = run("ground", "--caption", "man", "--output", tmp_path / "out", *argv)
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
