"""Saving and loading explanations: round trips, formats, atomic writes, damaged folders, file names."""

import dataclasses
import hashlib
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grounding.core import files
from grounding.core.errors import GroundingError, OptionError
from grounding.explanation.explanation import Entry
from grounding.explanation.serialization import dumps, to_builtin
from grounding.explanation.storage import OutputError, check_output, load, save, slug, to_json
from tests.support.explanations import column, explanation, noise, whole
from tests.support.stored import edited, names, same_as, strict

ALL = ["explanation.json", "figure.png", "maps.npz"]
DATA = ("npz", "json")


@pytest.fixture
def on_disk(tmp_path):
    """An explanation of an image that has a file."""
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    noise(96, 96).save(path)
    return explanation(str(path))


# ---------------------------------------------------------------- round trip


def test_what_is_saved_is_loaded_bit_for_bit(on_disk, tmp_path):
    written = save(on_disk, tmp_path / "a" / "b")
    assert {kind: path.name for kind, path in written.items()} == {"png": ALL[1], "npz": ALL[2], "json": ALL[0]}
    assert all(path.is_file() for path in written.values())
    assert names(tmp_path / "a" / "b") == ALL
    result = load(tmp_path / "a" / "b")
    same_as(result, on_disk)
    assert result.image.pil.tobytes() == on_disk.image.pil.tobytes()
    assert (result.image.path, result.image.sha256) == (on_disk.image.path, on_disk.image.sha256)
    assert np.array_equal(np.asarray(result.figure().axes[0].images[1].get_array()),
                          np.asarray(on_disk.figure().axes[0].images[1].get_array()))  # fmt: skip


HOSTILE = ["\udc80", "a\u2028b\u2029", "\x1b[31m", "$x$", "</script>", "\0", "猫", "-x", "../..", "😀", "\\u0041"]


def test_hostile_text_comes_back_as_it_was(tmp_path):
    made = explanation(labels=HOSTILE, caption=" ".join(HOSTILE), warnings=HOSTILE, provenance={h: h for h in HOSTILE})
    save(made, tmp_path / "out", DATA)
    same_as(load(tmp_path / "out"), made)
    text = (tmp_path / "out" / "explanation.json").read_text(encoding="ascii")
    assert all(c.isprintable() or c == "\n" for c in text)
    strict(text)


@pytest.mark.parametrize(
    "key", ["gradcam@-1.in", "gradcam@fusion:-1.in", "a/../../b", "x.npy", "猫", "..", "%2F", "a b"]
)
def test_any_method_key_survives(key, tmp_path):
    geometry = whole(96, 96)
    made = explanation(columns=[column(key, np.random.default_rng(0).normal(size=(3, 4, 4)), geometry)])
    save(made, tmp_path / "out", DATA)
    same_as(load(tmp_path / "out"), made)
    assert names(tmp_path) == ["out"]


def test_special_values_survive(tmp_path):
    geometry = whole(96, 96, 1, 3)
    maps = np.array([[[0.0, -0.0, np.float32(1e-45)]], [[3.4e38, -1, 0]], [[0, 0, 0]]], np.float32)
    made = explanation(geometry=geometry, columns=[column("gradcam", maps, geometry, threshold=0.1, layer=None)])
    save(made, tmp_path / "out", DATA)
    result = load(tmp_path / "out")
    same_as(result, made)
    assert [bool(s) for s in result.methods["gradcam"].status] == [True, True, False]


def test_an_image_without_a_file_is_saved_beside(tmp_path):
    made = explanation()
    save(made, tmp_path / "out")
    assert names(tmp_path / "out") == sorted([*ALL, "picture.png"])
    result = load(tmp_path / "out")
    assert result.image.pil.tobytes() == made.image.pil.tobytes()
    assert result.image.path is None
    save(result, tmp_path / "again", DATA)
    assert (tmp_path / "again" / "maps.npz").read_bytes() == (tmp_path / "out" / "maps.npz").read_bytes()


def test_image_and_results_are_found_when_moved_together(on_disk, tmp_path):
    made = dataclasses.replace(on_disk)
    save(made, tmp_path / "in" / "out", DATA)
    (tmp_path / "in").rename(tmp_path / "moved")
    assert load(tmp_path / "moved" / "out").image.pil.size == (96, 96)


@pytest.mark.parametrize(("fault", "message"), [("gone", "there is no such file"), ("changed", "has changed since")])
def test_without_its_image_a_result_still_has_its_maps(on_disk, tmp_path, fault, message):
    save(on_disk, tmp_path / "out", DATA)
    path = Path(on_disk.image.path)
    path.unlink() if fault == "gone" else noise(96, 96, seed=1).save(path)
    result = load(tmp_path / "out")
    same_as(result, on_disk)
    assert message in repr(result.image)
    for use in (result.figure, lambda: result.image.pil.size):
        with pytest.raises(GroundingError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    save(result, tmp_path / "copy", DATA)
    same_as(load(tmp_path / "copy"), on_disk)


def test_the_same_explanation_gives_the_same_bytes(on_disk, tmp_path):
    for name in ("a", "b"):
        save(on_disk, tmp_path / name)
    for name in ALL:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# ---------------------------------------------------------------- NPZ and JSON


def test_the_npz_is_useful_alone(on_disk, tmp_path):
    save(on_disk, tmp_path / "out", ("npz",))
    with np.load(tmp_path / "out" / "maps.npz", allow_pickle=False) as arrays:
        assert arrays["maps/gradcam"].shape == (3, 4, 4)
        assert arrays["maps/gradcam"].dtype == np.float32
        assert arrays["maps/rollout"].shape == (1, 4, 4)
        assert arrays["labels"].tolist() == ["man in red", "man", "red"]
        assert arrays["token_ids"].tolist() == [-1, 41, 42]
        assert arrays["scores"].tolist() == [e.score for e in on_disk.entries]
        assert dict(zip(arrays["keys"].tolist(), arrays["text_conditioned"].tolist(), strict=True)) == {
            "gradcam": True, "rollout": False, "relevance": True,
        }  # fmt: skip
        assert arrays["geometry/scale"].tolist() == list(on_disk.geometry.scale)
        assert arrays["seen"].tolist() == [0, 0, 96, 96]
        assert not any(arrays[name].dtype.hasobject for name in arrays.files)


def test_keys_of_the_json(on_disk):
    content = to_json(on_disk, {"figure": "figure.png"})
    assert {"schema_version", "image", "model", "caption", "target", "score", "entries", "warnings", "files"} <= set(
        content
    )
    assert {"path", "width", "height", "seen"} <= set(content["image"])
    assert content["model"] == {"id": "some/model", "type": "clip"}
    entry = content["entries"][1]
    assert set(entry) == {"label", "kind", "start", "end", "token_id", "score", "probability", "alternatives", "maps"}
    found = entry["maps"]["gradcam"]
    assert set(found) == {"peak", "box", "min", "max", "status", "reason", "layer", "text_conditioned"}
    made = on_disk.map(1, "gradcam")
    assert (tuple(found["peak"]), tuple(found["box"])) == (made.peak, made.box)
    assert (found["min"], found["max"]) == made.range
    assert entry["maps"]["rollout"] == content["entries"][0]["maps"]["rollout"]
    assert content["files"] == {"figure": "figure.png"}
    assert strict(dumps(content)) == content


def test_a_degenerate_map_has_neither_peak_nor_box():
    geometry = whole(96, 96)
    content = to_json(explanation(columns=[column("gradcam", np.zeros((3, 4, 4)), geometry)]))
    found = content["entries"][0]["maps"]["gradcam"]
    assert (found["peak"], found["box"], found["status"]) == (None, None, "degenerate")
    assert "zero everywhere" in found["reason"]


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    made = explanation(provenance={"a": float("inf"), "b": np.float32("nan"), "c": (np.int64(3), Path("x"))})
    made = dataclasses.replace(made, entries=(Entry("x", "token", 0, 1, float("nan")), *made.entries[1:]))
    content = to_json(made)
    assert content["provenance"] == {"a": None, "b": None, "c": [3, "x"]}
    assert strict(dumps(content))["entries"][0]["score"] is None
    save(made, tmp_path / "out", DATA)
    assert np.isnan(load(tmp_path / "out").entries[0].score)
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"x": float("nan")})
    assert to_builtin({frozenset({2, 1}): True}) == {"frozenset({1, 2})": True}


# ---------------------------------------------------------------- atomic writes


class Fault:
    """Fails at the n-th call of a method of Path."""

    def __init__(self, monkeypatch, method, call, error):
        self.left, original = call, getattr(Path, method)

        def failing(path, *args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise error
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, method, failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("method", "call"), [("open", 1), ("open", 2), ("replace", 1), ("replace", 2), ("replace", 3)])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_changes_nothing(on_disk, tmp_path, monkeypatch, error, method, call, before):
    folder = tmp_path / "deep" / "out"
    if before:
        save(on_disk, folder, ("npz", "json", "png"))
        (folder / "notes.txt").write_text("mine")
    earlier = {p.name: p.read_bytes() for p in folder.iterdir()} if before else None
    newer = dataclasses.replace(on_disk, caption="another", warnings=("w",))
    with monkeypatch.context() as patch:
        fault = Fault(patch, method, call, error)
        failed = False
        try:
            save(newer, folder, DATA)
        except KeyboardInterrupt:
            failed = isinstance(error, KeyboardInterrupt)
        except OutputError:
            failed = isinstance(error, OSError)
    assert failed == (fault.left <= 0)
    if before:
        if failed:
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == earlier
            same_as(load(folder), on_disk)
        else:
            same_as(load(folder), newer)
    else:
        assert failed != folder.exists()
        assert (tmp_path / "deep").exists() == folder.exists(), "new parent folders are removed again"
    left = [p for p in tmp_path.rglob("*") if p.name.startswith(files.STAGING)]
    assert left == []


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    made = explanation()
    save(made, tmp_path / "old", DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        for name in ("old", "new"):
            try:
                save(made, tmp_path / name)
            except OutputError as error:
                messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(messages) == 2
    assert all("cannot write into" in m and "File too large" in m for m in messages), messages
    assert names(tmp_path) == ["old"]
    assert names(tmp_path / "old") == ["explanation.json", "maps.npz", "picture.png"]
    same_as(load(tmp_path / "old"), made)


def test_files_of_an_earlier_result_are_removed(tmp_path, on_disk):
    save(explanation(), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save(on_disk, tmp_path / "out", ("json",))
    assert names(tmp_path / "out") == ["explanation.json", "notes.txt"]
    save(on_disk, tmp_path / "out", "png")
    assert names(tmp_path / "out") == ["figure.png", "notes.txt"]


def test_permissions_are_those_of_the_user(tmp_path, on_disk):
    save(on_disk, tmp_path / "out", DATA)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "maps.npz").stat().st_mode) == 0o666 & ~umask


# ---------------------------------------------------------------- output folders


def test_good_folders_are_left_as_they_are(tmp_path, on_disk):
    (tmp_path / "empty").mkdir()
    save(on_disk, tmp_path / "ours", ("png",))
    for name in ("new", "deep/er/new", "empty", "ours"):
        assert check_output(tmp_path / name) == tmp_path / name
    assert names(tmp_path) == ["empty", "in", "ours"]
    assert names(tmp_path / "empty") == []


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: p.write_text("x"), "is a file, not a folder"),
    (lambda p: p.symlink_to("nowhere"), "is a file, not a folder"),
    (lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x")), "holds other files and no results"),
    (lambda p: (p.mkdir(), (p / "figure.png").write_text("x")), "was not written by grounding"),
    (lambda p: (p.mkdir(), Image.new("L", (2, 2)).save(p / "figure.png")), "was not written by grounding"),
    (lambda p: (p.mkdir(), (p / "explanation.json").write_text("{}")), "was not written by grounding"),
    (lambda p: (p.mkdir(), (p / "explanation.json").write_text("[" * 10**5)), "was not written by grounding"),
    (lambda p: (p.mkdir(), np.savez(p / "maps.npz", a=1)), "was not written by grounding"),
    (lambda p: (p.mkdir(), (p / "maps.npz").mkdir()), "was not written by grounding"),
])  # fmt: skip
def test_foreign_folders_raise_and_are_left_alone(tmp_path, make, message, monkeypatch):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("grounding.explanation.storage.to_json", None)  # no work is done before the refusal
    for use in (check_output, lambda d: save(explanation(), d)):
        with pytest.raises(OutputError, match=message) as caught:
            use(tmp_path / "out")
        assert isinstance(caught.value, GroundingError)
        assert isinstance(caught.value, OSError)
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_among_the_parents_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file is a file, not a folder"):
        check_output(tmp_path / "file" / "a" / "b")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write into .*: Permission denied"):
        check_output(tmp_path / "out")


def test_strange_folder_names_are_one_line(tmp_path):
    (tmp_path / "a\nb").write_text("x")
    with pytest.raises(OutputError, match=r"a\\nb is a file"):
        check_output(tmp_path / "a\nb")
    with pytest.raises(OutputError, match="cannot write into"):
        check_output("a\0b")


@pytest.mark.parametrize(("write", "message"), [(("pgn",), "'pgn'; did you mean 'png'"), ((), "nothing to write")])
def test_unknown_kinds_are_refused_before_any_work(tmp_path, write, message):
    with pytest.raises(OptionError, match=message):
        save(explanation(), tmp_path / "out", write)
    assert names(tmp_path) == []


def test_figure_options_reach_the_figure(tmp_path):
    with pytest.raises(OptionError, match="magma"):
        save(explanation(), tmp_path / "out", cmap="magna")
    assert names(tmp_path) == []
    save(explanation(), tmp_path / "a", ("png",), cmap="viridis")
    save(explanation(), tmp_path / "b", ("png",))
    digests = {hashlib.sha256((tmp_path / d / "figure.png").read_bytes()).hexdigest() for d in "ab"}
    assert len(digests) == 2


# ---------------------------------------------------------------- damaged folders


def cut(name, size=50):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return lambda folder: edited(folder, change)


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return lambda folder: edited(folder, change)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "explanation.json").unlink(), "is not a result folder of grounding"),
    (lambda f: (f / "maps.npz").unlink(), "maps.npz: No such file"),
    (cut("explanation.json"), "is damaged"),
    (cut("maps.npz"), "is damaged or belongs to another result"),
    (lambda f: (f / "explanation.json").write_text("[1]"), "was not written by grounding"),
    (lambda f: (f / "explanation.json").write_text('{"schema_version": 1}'), "was not written by grounding"),
    (put(2, "schema_version"), "schema version 2.*newer version"),
    (put("x", "schema_version"), "schema version 'x'"),
    (drop("entries"), "is damaged: no 'entries'"),
    (drop("entries", 1), r"\(3, 4, 4\), not floating point \(2, 4, 4\)"),
    (drop("entries", 0, "maps", "gradcam"), "is damaged: no 'gradcam'"),
    (put(5, "geometry", "rows"), "not floating point"),
    (put(0, "geometry", "rows"), "rows"),
    (put([1.0, -1.0], "geometry", "scale"), "scale"),
    (put([], "methods"), "is damaged"),
    (put(None, "image"), "is damaged"),
    (drop("files", "maps"), "was saved without maps"),
])  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(on_disk, tmp_path, damage, message):
    save(on_disk, tmp_path / "out", DATA)
    damage(tmp_path / "out")
    with pytest.raises(GroundingError, match=message) as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_mixture_of_two_results_raises(on_disk, tmp_path):
    save(on_disk, tmp_path / "a", DATA)
    save(explanation(), tmp_path / "b", DATA)
    other = on_disk.methods["gradcam"]
    newer = dataclasses.replace(other, maps=other.maps + 1)
    save(dataclasses.replace(on_disk, methods={"gradcam": newer}), tmp_path / "b", DATA)
    (tmp_path / "b" / "maps.npz").replace(tmp_path / "a" / "maps.npz")
    with pytest.raises(GroundingError, match="belongs to another result"):
        load(tmp_path / "a")


@pytest.mark.parametrize("place", ["missing", "file", "empty"])
def test_a_folder_without_a_result_raises(tmp_path, place):
    if place == "file":
        (tmp_path / place).write_text("x")
    if place == "empty":
        (tmp_path / place).mkdir()
    with pytest.raises(GroundingError, match="is not a result folder"):
        load(tmp_path / place)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("text", "name"), [
    ("Red Jacket", "red_jacket"), ("../../etc/passwd", "etc_passwd"), ("-rf", "rf"), (".hidden", "hidden"),
    ("", "entry"), ("\udc80", "entry"),
    ("😀", "entry"), ("a\nb\0c", "a_b_c"), ("mother-in-law's", "mother-in-law_s"), ("猫 が", "猫_が"),
    ("<b>|:*?\"\\", "b"), ("--", "entry"), ("한" * 200, "한" * 21), ("e\u0301", "é"),
])  # fmt: skip
def test_slugs(text, name):
    assert slug(text) == name


@given(st.text())
def test_slugs_are_always_good_file_names(text):
    name = slug(text)
    assert name
    assert len(name.encode("utf-8")) <= 64
    assert not set(name) & set('/\\:*?"<>|\0\n .')
    assert name[0] not in "-._"
    assert name.isprintable()
