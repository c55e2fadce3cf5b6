"""Files of a generated text: probabilities, the reading strip, and one overlay per token and method."""

import dataclasses
import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grounding.cli.report import Report
from grounding.core.files import MARK, STAGING
from grounding.core.text import Alternative
from grounding.explanation.explanation import Entry
from grounding.explanation.figures.overlays import overlay, overlays
from grounding.explanation.png import OVERLAY, overlay_names
from grounding.explanation.storage import OutputError, check_output, listed, load, save, to_json
from tests.support.explanations import column, explanation, noise, whole
from tests.support.lines import along, line, written
from tests.support.stored import edited, names, same_as, strict

HOSTILE = ["../x", "😀", "", "\n", " ", "\udc80", "a" * 300, "CON", "-rf", "猫", "e\u0301", ".hidden", "</b>\0"]
FILES = ["explanation.json", "figure.png", "maps.npz", "strip.png"]


@pytest.fixture
def generated(tmp_path):
    """Makes an explanation of a generated text whose image has a file."""

    def make(labels=("a", "b", " ", "d"), **options):
        path = tmp_path / "in.png"
        line(256, 32, "ab d").save(path)
        return written(list(labels), along(len(labels), 4, 32), image=str(path), **options)

    return make


def written_overlays(folder):
    return [name for name in names(folder) if OVERLAY.fullmatch(name)]


# ---------------------------------------------------------------- probabilities and alternatives


def test_probabilities_alternatives_and_origin_come_back(generated, tmp_path):
    others = (Alternative("\udc80", 7, 0.25), Alternative("", 2, float("nan")))
    made = generated(origin="forced", probabilities=[0.9, 1.0, 1e-12, 0.5], alternatives=others)
    made = dataclasses.replace(made, entries=(*made.entries[:3], Entry("d", "token", 3, 4, 1.0)))
    save(made, tmp_path / "out", ("npz", "json"))
    result = load(tmp_path / "out")
    assert result.origin == "forced"
    assert [e.probability for e in result.entries] == [0.9, 1.0, 1e-12, None]
    assert result.entries[0].alternatives[0] == others[0]
    assert np.isnan(result.entries[0].alternatives[1].probability)
    assert result.entries[3].alternatives == ()
    content = strict((tmp_path / "out" / "explanation.json").read_text())
    assert content["origin"] == "forced"
    assert content["entries"][0]["alternatives"] == [
        {"label": "\udc80", "token_id": 7, "probability": 0.25}, {"label": "", "token_id": 2, "probability": None},
    ]  # fmt: skip
    assert (content["entries"][3]["probability"], content["entries"][3]["alternatives"]) == (None, [])
    with np.load(tmp_path / "out" / "maps.npz", allow_pickle=False) as arrays:
        assert arrays["probabilities"].tolist()[:3] == [0.9, 1.0, 1e-12]
        assert np.isnan(arrays["probabilities"][3])
        assert arrays["alternatives/labels"].shape == (4, 2)
        assert arrays["alternatives/token_ids"].tolist() == [[7, 2]] * 3 + [[-1, -1]]
        assert arrays["alternatives/probabilities"][0, 0] == 0.25
        assert np.isnan(arrays["alternatives/probabilities"][3]).all()
        assert str(arrays["origin"]) == "forced"


def test_a_round_trip_keeps_every_field(generated, tmp_path):
    made = generated(keys=("gradcam", "gradcam@-1.in"), shared=("rollout",))
    save(made, tmp_path / "out", per_token=True)
    same_as(load(tmp_path / "out"), made)
    save(load(tmp_path / "out"), tmp_path / "again", per_token=True)
    same_as(load(tmp_path / "again"), made)


def test_results_of_earlier_versions_are_loaded(tmp_path):
    made = explanation()
    save(made, tmp_path / "out", ("npz", "json"))

    def age(content):
        del content["origin"]
        for entry in content["entries"]:
            del entry["probability"], entry["alternatives"]

    edited(tmp_path / "out", age)
    same_as(load(tmp_path / "out"), made)


def test_the_npz_has_no_empty_tables(generated, tmp_path):
    save(explanation(), tmp_path / "given", ("npz",))
    with np.load(tmp_path / "given" / "maps.npz") as arrays:
        assert not [name for name in arrays.files if name.startswith(("alternatives", "probabilities"))]
    save(generated(alternatives=()), tmp_path / "alone", ("npz",))
    with np.load(tmp_path / "alone" / "maps.npz") as arrays:
        assert arrays["probabilities"].tolist() == [0.98] * 4
        assert arrays["alternatives/labels"].shape == arrays["alternatives/probabilities"].shape == (4, 0)


# ---------------------------------------------------------------- which files there are


def test_only_a_generated_text_has_a_strip(generated, tmp_path):
    saved = save(generated(), tmp_path / "out")
    assert names(tmp_path / "out") == FILES
    assert {kind: path.name for kind, path in saved.items()} == {
        "png": "figure.png", "strip": "strip.png", "npz": "maps.npz", "json": "explanation.json",
    }  # fmt: skip
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert content["files"] == {"figure": "figure.png", "strip": "strip.png", "maps": "maps.npz"}
    assert set(content["sha256"]) == {"figure.png", "strip.png", "maps.npz"}
    save(dataclasses.replace(generated(), origin="given"), tmp_path / "out")
    assert names(tmp_path / "out") == [n for n in FILES if n != "strip.png"], "the earlier strip is removed"
    none = dataclasses.replace(
        generated(), entries=tuple(dataclasses.replace(e, kind="word") for e in generated().entries)
    )
    assert "strip" not in save(none, tmp_path / "out", "png")
    assert "strip" not in save(generated(), tmp_path / "out", ("npz", "json"), per_token=True)
    assert names(tmp_path / "out") == ["explanation.json", "maps.npz"]


def test_overlays_of_one_method_are_named_by_index_and_label(generated, tmp_path):
    made = generated(shared=("rollout",))
    saved = made.save(tmp_path / "out", per_token=True)
    overlays_there = ["00_a.png", "01_b.png", "02_token.png", "03_d.png"]
    assert written_overlays(tmp_path / "out") == overlays_there
    assert [saved[f"overlay:{i}:gradcam"].name for i in range(4)] == overlays_there
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert content["files"]["overlays"] == {str(i): name for i, name in enumerate(overlays_there)}
    assert set(overlays_there) < set(content["sha256"])


def test_overlays_of_several_methods_are_named_by_method_too(generated, tmp_path):
    made = generated(("a", "b"), keys=("gradcam@-1.in", "gradcam@-1_in", "relevance"), shared=("rollout",))
    saved = save(made, tmp_path / "out", per_token=True)
    first = [f"00_a-{s}.png" for s in ("gradcam_-1_in", "gradcam_-1_in-2", "relevance")]
    assert written_overlays(tmp_path / "out") == sorted([*first, *(f"01_b{name[4:]}" for name in first)])
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert content["files"]["overlays"]["0"] == dict(zip(list(made.methods)[:3], first, strict=True))
    assert listed(saved)["overlays"]["1"]["relevance"] == str(tmp_path / "out" / "01_b-relevance.png")


def test_maps_independent_of_the_text_have_no_overlays(generated, tmp_path):
    made = generated(("a",), keys=(), shared=("rollout",))
    save(made, tmp_path / "out", per_token=True)
    assert written_overlays(tmp_path / "out") == []
    assert "overlays" not in json.loads((tmp_path / "out" / "explanation.json").read_text())["files"]


def test_hostile_labels_make_good_names(generated, tmp_path):
    made = generated(HOSTILE, keys=("gradcam", "a/../../b"))
    save(made, tmp_path / "deep" / "out", per_token=True)
    assert names(tmp_path) == ["deep", "in.png"]
    assert names(tmp_path / "deep") == ["out"]
    found = written_overlays(tmp_path / "deep" / "out")
    assert len(found) == 2 * len(HOSTILE)
    assert found[0].startswith("00_x-")
    assert "02_end-gradcam.png" in found
    assert all(len(name.encode()) < 160 and name.isprintable() for name in found)
    same_as(load(tmp_path / "deep" / "out"), made)


@settings(max_examples=50)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.lists(st.text(), min_size=1, max_size=4, unique=True))
def test_overlay_names_are_all_different_and_recognised(labels, keys):
    geometry = whole(96, 96)
    maps = np.zeros((len(labels), 4, 4))
    made = explanation(labels=labels, geometry=geometry, columns=[column(k, maps, geometry) for k in keys])
    found = list(overlay_names(made).values())
    assert len({name.lower() for name in found}) == len(labels) * len(keys)
    assert all(OVERLAY.fullmatch(name) and "/" not in name for name in found)


def test_more_than_a_hundred_tokens_stay_in_order(generated):
    found = list(overlay_names(generated("a" * 120)).values())
    assert (found[0], found[119]) == ("000_a.png", "119_a.png")
    assert found == sorted(found)


# ---------------------------------------------------------------- content of overlays


@pytest.mark.parametrize(("size", "wanted"), [
    ((256, 32), (768, 96)), ((512, 64), (768, 96)), ((1280, 32), (1600, 40)), ((600, 20), (1600, 53)),
    ((5000, 500), (1600, 160)),
    ((1000, 800), (1000, 800)), ((300, 1200), (300, 1200)), ((2000, 60), (1600, 48)), ((1, 1), (768, 768)),
])  # fmt: skip
def test_small_images_are_enlarged_and_large_ones_reduced(size, wanted):
    made = written(["a"], [(0, 0)], size=size, grid=(2, 2), image=Image.new("RGB", size))
    [(entry, key, image)] = overlays(made)
    assert (entry, key) == (0, "gradcam")
    assert image.size == wanted


def test_saved_overlays_are_those_of_overlay_with_the_options_of_the_figure(tmp_path):
    made = written(list("ab"), along(2, 4, 32), image=noise(900, 120))
    for options in ({}, {"cmap": "jet", "opacity": 0.3, "peak": False}, {"signed": True, "background": "edges"}):
        save(made, tmp_path / "out", per_token=True, layout="panels", **options)
        with Image.open(tmp_path / "out" / "01_b.png") as image:
            assert (np.asarray(image) == np.asarray(overlay(made.map(1), made.image, **options))).all()
            assert image.info["Software"] == MARK


def test_overlays_share_the_scale_of_the_figure(tmp_path):
    made = written(list("ab"), along(2, 4, 32), size=(900, 120))
    maps = made.methods["gradcam"].maps * np.array([1, 4], np.float32)[:, None, None]
    made = dataclasses.replace(made, methods={"gradcam": column("gradcam", maps, made.geometry)})
    plain = {"cmap": "gray", "opacity": 1.0, "peak": False, "box": False}
    own, joint, fixed = (
        [np.asarray(image).max() for _, _, image in overlays(made, scale=s, fixed=f, **plain)]
        for s, f in (("entry", None), ("caption", None), ("fixed", (0, 8)))
    )
    assert own[0] == own[1] == joint[1] > 240
    assert joint[1] > 2 * joint[0]
    assert own[1] > fixed[1] > fixed[0]


# ---------------------------------------------------------------- earlier results and files of the user


def test_overlays_of_an_earlier_result_are_removed(generated, tmp_path):
    save(generated("abcdef"), tmp_path / "out", per_token=True)
    assert len(written_overlays(tmp_path / "out")) == 6
    save(generated("xb"), tmp_path / "out", per_token=True)
    assert written_overlays(tmp_path / "out") == ["00_x.png", "01_b.png"]
    check_output(tmp_path / "out")
    save(generated("xb"), tmp_path / "out", ("json", "npz"), per_token=True)
    assert written_overlays(tmp_path / "out") == []
    save(generated("ab"), tmp_path / "out", "png", per_token=True)
    save(generated("ab"), tmp_path / "out", "png")
    assert names(tmp_path / "out") == ["figure.png", "strip.png"]


def test_files_of_the_user_with_such_names_are_never_touched(generated, tmp_path):
    out = tmp_path / "out"
    saved = save(generated("abc"), out, per_token=True)
    (out / "07_mine.png").write_bytes(b"not even a picture")
    Image.new("L", (2, 2)).save(out / "08_drawn.png")
    (out / "09_copy.png").write_bytes(saved["overlay:1:gradcam"].read_bytes())  # a copy made by the user
    (out / "10_figure.png").write_bytes(saved["png"].read_bytes())
    (out / "11_link.png").symlink_to("01_b.png")
    (out / "12_folder.png").mkdir()
    (out / "holiday.png").write_bytes(b"x")
    before = {
        p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name[:2] in ("07", "08", "09", "10", "ho")
    }
    save(generated("x"), out)
    after = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert before.items() <= after.items()
    assert written_overlays(out) == sorted([*(n for n in before if n[0] != "h"), "11_link.png", "12_folder.png"])


@pytest.mark.parametrize("kind", ["file", "picture", "link", "folder", "copy"])
def test_an_overlay_replaces_no_file_of_the_user(generated, tmp_path, kind):
    out = tmp_path / "out"
    saved = save(generated("ab"), out)
    place = out / "01_b.png"
    {
        "file": lambda: place.write_text("mine"),
        "picture": lambda: Image.new("L", (2, 2)).save(place),
        "link": lambda: place.symlink_to("nowhere"),
        "folder": place.mkdir,
        "copy": lambda: place.write_bytes(saved["png"].read_bytes()),
    }[kind]()
    earlier = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(OutputError, match=r"01_b.png was not written by grounding and is not replaced"):
        save(generated("ab"), out, per_token=True)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == earlier
    assert place.is_symlink() == (kind == "link")


def test_a_foreign_strip_is_not_replaced(generated, tmp_path):
    save(generated("ab"), tmp_path / "out")
    (tmp_path / "out" / "strip.png").write_text("mine")
    with pytest.raises(OutputError, match=r"strip.png was not written by grounding"):
        check_output(tmp_path / "out")


@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(generated, tmp_path, before):
    if before:
        save(generated("abc"), tmp_path / "out", per_token=True)
    earlier = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} if before else {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(OutputError, match="cannot write into"):
            save(generated("xyzw"), tmp_path / "out", per_token=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    there = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else {}
    assert there == earlier
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(STAGING)]


def test_the_same_explanation_gives_the_same_bytes(generated, tmp_path):
    for name in ("a", "b"):
        save(generated(), tmp_path / name, per_token=True)
    assert len(names(tmp_path / "a")) == 8
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_command_counts_overlays_and_lists_them_in_json(generated, tmp_path, monkeypatch, capsys, form):
    from argparse import ArgumentParser

    from grounding.cli.options import figure_options, output_options

    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    output_options(parser)
    figure_options(parser)
    report = Report(parser.parse_args(["--per-token", "--format", form]), several=False)
    report.add(generated("ab", keys=("gradcam", "relevance")), tmp_path / "out")
    assert report.end() == 0
    out = capsys.readouterr().out
    if form == "text":
        folder = tmp_path / "out"
        named = " ".join(str(folder / name) for name in ("figure.png", "strip.png", "maps.npz", "explanation.json"))
        assert out.splitlines()[-1] == f"wrote {named} and 4 overlays"
        return
    found = strict(out)["files"]
    assert found["overlays"]["1"] == {k: str(tmp_path / "out" / f"01_b-{k}.png") for k in ("gradcam", "relevance")}
    assert set(found) == {"figure", "strip", "maps", "json", "overlays"}


def test_the_json_names_nothing_that_was_not_written(generated):
    assert to_json(generated())["files"] == {}
    assert to_json(generated())["entries"][0]["probability"] == 0.98
