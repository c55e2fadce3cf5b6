"""Evaluation of lines: scores known on paper, malformed folders, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grounding.core.demo import demo_lines
from grounding.core.errors import DataError, GroundingError, NumericError, OptionError
from grounding.core.text import TokenizedText
from grounding.datasets.text_lines import Line, open_lines
from grounding.engine.request import Request
from grounding.evaluation import ocr as evaluation
from grounding.evaluation.kinds import LINES, PHRASES, evaluation_for, evaluation_of
from grounding.evaluation.ocr import OcrConfig, evaluate_lines
from grounding.evaluation.ocr_scoring import (
    Hit,
    OtherTokens,
    baseline_hits,
    edit_distance,
    in_boxes,
    occurrences,
    score_line,
    token_cases,
)
from grounding.evaluation.report import as_json, line_markdown, warnings_of
from grounding.explanation.explanation import Entry
from tests.support.explanations import column, explanation, whole
from tests.support.images import noise
from tests.support.linear import LinearAdapter
from tests.support.painted import PaintedAdapter, cell_boxes, painted

GRADCAM = Request(["gradcam"])
# Painted text -> further fields of its label.
TEXTS = {
    "abca": {"unseen_face": False, "polarity": "dark"},
    "b# d": {"unseen_face": True, "polarity": "light"},
    "a0": {"unseen_face": False, "polarity": "dark"},
}


def label(name, text, **more):
    return {"file": f"{name}.png", "text": text, "chars": cell_boxes(text), **more}


def write_lines(folder, texts):
    """A folder of painted lines, without splits."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [label(i, text, **more) for i, (text, more) in enumerate(texts.items())]
    for i, text in enumerate(texts):
        painted(text).save(folder / f"{i}.png")
    (folder / "labels.jsonl").write_text("".join(json.dumps(own) + "\n" for own in labels))
    return folder


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "data" / "test", TEXTS)
    return tmp_path / "data"


def rewrite(folder, number, change):
    """Change the label of one line (from 1) of the split test; `change` gives the new content."""
    path = folder / "test" / "labels.jsonl"
    lines = path.read_text().splitlines()
    new = change(json.loads(lines[number - 1]))
    lines[number - 1] = new if isinstance(new, str) else json.dumps(new)
    path.write_text("\n".join(lines) + "\n")


# ---------------------------------------------------------------- the layout


def test_lines_as_they_stand_in_the_file(folder):
    found = open_lines(folder)
    assert (found.split, [line.text for line in found.lines]) == ("test", list(TEXTS))
    first = found.lines[0]
    assert (first.number, first.image, first.boxes[1]) == (1, folder / "test" / "0.png", (4.0, 0.0, 8.0, 4.0))
    assert [line.groups for line in found.lines] == [
        ("seen faces", "dark on light"),
        ("unseen faces", "light on dark"),
        ("seen faces", "dark on light"),
    ]
    alone = open_lines(folder / "test")
    assert (alone.split, alone.lines) == (None, found.lines)


def test_blanks_around_a_text_count_for_nothing(folder):
    rewrite(folder, 1, lambda own: own | {"text": "  a ", "unseen_face": None, "polarity": None})
    line = open_lines(folder).lines[0]
    assert (line.text, line.boxes, line.groups) == ("a", ((8.0, 0.0, 12.0, 4.0),), ())


NAN = float("nan")
MALFORMED = {
    "no json": (lambda own: '{"file": ', "no JSON that can be read"),
    "no object": (lambda own: [1], "expected a JSON object, got list"),
    "nothing in it": (lambda own: {"file": "0.png"}, "it has no 'text' and no 'chars'"),
    "text is no text": (lambda own: own | {"text": 7}, "must be text, got int"),
    "text is blank": (lambda own: own | {"text": "  "}, "empty"),
    "half a sign": (lambda own: own | {"text": "\ud800bca"}, "not valid Unicode"),
    "chars is no list": (lambda own: own | {"chars": 3}, "chars must be a list"),
    "too few boxes": (lambda own: own | {"chars": own["chars"][:3]}, "3 boxes for the 4 characters of 'abca'"),
    "three numbers": (lambda own: own | {"chars": [[0, 0, 1]] * 4}, "the box of character 0 'a' is not four numbers"),
    "words": (lambda own: own | {"chars": [["0", 0, 1, 1]] * 4}, "not four numbers"),
    "truth": (lambda own: own | {"chars": [[True, 0, 1, 1]] * 4}, "not four numbers"),
    "nan": (lambda own: own | {"chars": [[0, NAN, 1, 1]] * 4}, "is not finite"),
    "huge": (lambda own: own | {"chars": [[0, 0, 1, 10**400]] * 4}, "is not finite"),
    "inside out": (lambda own: own | {"chars": [[2, 0, 1, 1]] * 4}, "ends before it begins"),
    "no width": (lambda own: own | {"chars": [[2, 0, 2, 1]] * 4}, "ends before it begins"),
    "face": (lambda own: own | {"unseen_face": 1}, "unseen_face must be true or false, got 1"),
    "polarity": (lambda own: own | {"polarity": "grey"}, "polarity must be one of dark, light, got 'grey'"),
    "file is no name": (lambda own: own | {"file": 3}, "file must be the name of an image"),
    "outside": (lambda own: own | {"file": "../../secret.png"}, "is outside of"),
    "absolute": (lambda own: own | {"file": "/etc/passwd"}, "is outside of"),
    "twice": (lambda own: own | {"file": "0.png"}, "the file '0.png' is in line 1, too"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_labels_file_is_an_error_that_names_the_line(folder, what):
    change, words = MALFORMED[what]
    number = 2 if what == "twice" else 1
    rewrite(folder, number, change)
    with pytest.raises(DataError) as caught:
        open_lines(folder)
    assert f"labels.jsonl' line {number}: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    painted("a").save(tmp_path / "secret.png")
    (folder / "test" / "0.png").unlink()
    (folder / "test" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"line 1: the file '0\.png' is outside"):
        open_lines(folder)


def test_folders_and_splits_that_are_not_there(folder, tmp_path):
    with pytest.raises(DataError, match=r"no split 'val' .*there are: test"):
        open_lines(folder, "val")
    with pytest.raises(DataError, match="it has no splits"):
        open_lines(folder / "test", "test")
    with pytest.raises(DataError, match="no lines that can be read"):
        open_lines(tmp_path)
    labels = folder / "test" / "labels.jsonl"
    labels.write_text("\n\n")
    with pytest.raises(DataError, match="has no lines"):
        open_lines(folder)
    labels.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_lines(folder)


def test_the_layout_decides_what_is_evaluated(folder, tmp_path):
    assert evaluation_of(folder) is evaluation_of(folder / "test") is LINES
    assert evaluation_of(PHRASES.demo()) is PHRASES
    assert evaluation_for(None) is evaluation_for(LinearAdapter({})) is PHRASES
    assert evaluation_for(PaintedAdapter()) is LINES
    for wrong, words in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no known layout")):
        with pytest.raises(DataError, match=words) as caught:
            evaluation_of(wrong)
        assert "labels.jsonl" in str(caught.value)
        assert "Annotations/" in str(caught.value)
    assert LINES.config_from({"limit": 3, "captions": None, "faithfulness": False, "seed": 0}) == OcrConfig(limit=3)
    with pytest.raises(OptionError, match="--min-entities is for images with boxes for phrases; the data are lines"):
        LINES.config_from({"min_entities": 1})
    with pytest.raises(OptionError, match="--aimed is for lines of text"):
        PHRASES.config_from({"aimed": True})


# ---------------------------------------------------------------- scores of one line


@pytest.mark.parametrize(
    ("one", "two", "edits"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("abc", "abd", 1),
        ("abc", "bc", 1),
        ("ab", "ba", 2),
        ("kitten", "sitting", 3),
        ("rosettacode", "raisethysword", 8),
    ],
)
def test_edit_distance(one, two, edits):
    assert edit_distance(one, two) == edit_distance(two, one) == edits


def test_boxes_are_half_open():
    box = [(0.0, 0.0, 4.0, 4.0)]
    points = np.array([(0.0, 0.0), (3.9, 3.9), (4.0, 2.0), (2.0, 4.0)])
    assert in_boxes(points, box).tolist() == [True, True, False, False]
    assert in_boxes(points, []).tolist() == [False] * 4


def test_where_a_text_stands():
    assert occurrences("abab", "ab") == [(0, 2), (2, 4)]
    assert occurrences("aaa", "aa") == [(0, 2), (1, 3)]
    assert occurrences("abc", "") == []


def line_of(text, width=80, **more):
    """A line whose characters lie side by side over the whole image, 80 x 80 pixels."""
    step = width / len(text)
    return Line(1, Path("x.png"), text, tuple((i * step, 0.0, (i + 1) * step, 80.0) for i in range(len(text))), **more)


def entry(start, end, text, kind="token", name=None):
    return Entry(name or text[start:end], kind, start, end, 1.0, 5)


def test_tokens_of_several_characters_have_all_their_boxes():
    """Four columns of cells, four characters "abab": the tokens are "ab" twice, with a blank one in between."""
    line = line_of("ab ab", 100)
    entries = (entry(0, 2, line.text), entry(2, 3, line.text), entry(3, 5, line.text))
    tokens, aimed = token_cases(line, entries)
    assert [(case.entry, case.position) for case in tokens] == [(0, 0), (2, 2)]
    assert tokens[0].own == tokens[1].elsewhere == line.boxes[:2]
    assert tokens[1].own == tokens[0].elsewhere == line.boxes[3:]
    assert aimed == ()


def test_hits_of_a_line_by_hand():
    """Cells are 20 pixels wide, characters 20: token i of "abca" peaks in column 0, 2, 2, 0; then a blank map."""
    line = line_of("abca")
    maps = np.zeros((5, 4, 4))
    for i, cell in enumerate([0, 2, 2, 0]):
        maps[i, 1, cell] = 1
    geometry = whole(80, 80)
    made = explanation(noise(80, 80), geometry=geometry, caption="abca", columns=[column("gradcam", maps, geometry)])
    questions = entry(1, 2, line.text, "where", "c")
    made = replace(made, entries=(*(entry(i, i + 1, line.text) for i in range(4)), questions))
    found = score_line(line, made)
    assert found.exact
    assert found.hits["gradcam"].tokens == (Hit(1), Hit(0), Hit(1), Hit(0, 1))
    assert found.hits["gradcam"].other_tokens == (Hit(0, degenerate=True),)
    # The prior: token t of 4 lies in column t. Random: 4 of 16 cells per character.
    assert found.hits["position"].tokens == (Hit(1), Hit(1), Hit(1), Hit(1))
    assert found.hits["position"].other_tokens == (Hit(0),)
    assert [hit.own for hit in found.hits["random"].tokens] == [0.25] * 4
    assert [hit.elsewhere for hit in found.hits["random"].tokens] == [0.25, 0, 0, 0.25]
    assert found.hits["random"].other_tokens == (Hit(0.25),)
    misread = score_line(line, replace(made, caption="abcd"))
    assert (misread.exact, misread.distance, misread.hits) == (False, 1, {})


def test_the_position_prior_knows_the_tokens_place_alone():
    """Characters crowded at the left; the prior spreads them over the whole image."""
    line = Line(1, Path("x.png"), "abcd", tuple((i * 5.0, 0.0, (i + 1) * 5.0, 80.0) for i in range(4)))
    tokens, _ = token_cases(line, [entry(i, i + 1, line.text) for i in range(4)])
    found = baseline_hits(tokens, (), whole(80, 80), 4)
    # Centres of cells are 10, 30, 50, 70: only the box [10, 15) of "c" has one of them, but the prior is at 50 there.
    assert [hit.own for hit in found["position"].tokens] == [0, 0, 0, 0]
    assert [hit.own for hit in found["random"].tokens] == [0, 0, 0.25, 0]


def test_questions_follow_from_text_and_seed():
    tokens = TokenizedText("ab ca", tuple(range(6)), tuple((i, i + (i < 5)) for i in range(6)), (*[False] * 5, True))
    spans = OtherTokens(seed=0).spans(tokens)
    own, others = spans[:5], spans[5:]
    assert [span.kind for span in spans] == ["token"] * 5 + ["where"] * 4
    assert [span.positions for span in others] == [own[i].positions for i in (0, 1, 3, 4)]
    for span in others:
        assert span.token == span.label
        assert span.token in "abc"
        assert span.token != tokens.text[span.start]
    assert OtherTokens(seed=0).spans(tokens) == spans
    assert len({tuple(span.token for span in OtherTokens(seed=seed).spans(tokens)[5:]) for seed in range(9)}) > 1
    same = TokenizedText("aa", (0, 0), ((0, 1), (1, 2)), (False, False))
    assert len(OtherTokens().spans(same)) == 2  # no other letter to ask for


# ---------------------------------------------------------------- a whole split


def test_a_split_by_hand(folder):
    """ "abca": the map of the second "a" peaks at the first. "b# d": nothing speaks for "#". "a0" is read as "aO"."""
    adapter = PaintedAdapter()
    found = evaluate_lines(adapter, open_lines(folder), request=GRADCAM)
    assert adapter.calls == 1
    assert (found["lines"], found["characters"], found["split"]) == (3, 7, "test")
    assert (found["cer"], found["exact"]) == (pytest.approx(1 / 10), pytest.approx(2 / 3))
    cam, position, random = (found["methods"][key] for key in ("gradcam", "position", "random"))
    assert (cam["in_box"], cam["elsewhere"], cam["n"], cam["degenerate"]) == (5 / 7, 1 / 7, 7, 1)
    assert 2 / 3 <= cam["ci"][0] <= cam["in_box"] <= cam["ci"][1] <= 3 / 4
    # Of four tokens spread over eight cells only the first of each line is met.
    assert (position["in_box"], position["elsewhere"], position["degenerate"]) == (2 / 7, 0, None)
    assert (random["in_box"], random["elsewhere"]) == (pytest.approx(1 / 16), pytest.approx(2 / 16 / 7))
    seen, unseen = (cam["groups"][f"{name} faces"] for name in ("seen", "unseen"))
    assert (seen["in_box"], seen["n"], unseen["in_box"], unseen["n"]) == (3 / 4, 4, 2 / 3, 3)
    assert found["groups"]["dark on light"]["cer"] == pytest.approx(1 / 6)
    assert found["groups"]["light on dark"]["exact"] == 1
    assert found["recommended"] is None
    assert "aimed" not in cam
    json.loads(as_json(found))
    text = line_markdown(found)
    for words in ("| gradcam | 71.4 [", "| random | 6.2 ", "| all | 3 | 10.0 [", "| unseen faces | 3 | 66.7 | "):
        assert words in text
    assert found["protocol"] in text


def test_what_is_asked_for_elsewhere_is_found_there(tmp_path):
    write_lines(tmp_path, {"abca": {}, "fed": {}})
    found = evaluate_lines(PaintedAdapter(), open_lines(tmp_path), OcrConfig(aimed=True), GRADCAM)
    cam = found["methods"]["gradcam"]
    assert (cam["aimed"], cam["aimed_ci"], cam["aimed_n"]) == (1, (1, 1), 7)
    assert (cam["n"], cam["in_box"]) == (7, 6 / 7)
    assert found["methods"]["random"]["aimed"] >= 1 / 16
    assert found["groups"] == cam["groups"] == {}
    assert found["split"] is None
    assert "| map | in own box % | elsewhere % | aimed % | blank |" in line_markdown(found)


def test_the_method_that_is_recommended_is_the_best_on_the_validation_split(folder):
    write_lines(folder / "val", {"abc": {}, "a# b": {}})
    request = Request(["gradcam", "gradcam_ln"])
    found = evaluate_lines(PaintedAdapter(), open_lines(folder), request=request)
    best = found["recommended"]
    assert (best["method"], best["split"], best["in_box"], best["n"]) == ("gradcam", "val", 5 / 6, 6)
    assert best["of"]["random"] == pytest.approx(1 / 16)
    assert "Recommended, the best on the split val: gradcam, 83.3 [" in line_markdown(found)
    assert evaluate_lines(PaintedAdapter(), open_lines(folder, "val"), request=request)["recommended"] is None
    assert evaluate_lines(PaintedAdapter(), open_lines(folder), OcrConfig(limit=1), request)["recommended"] is None


def test_lines_that_cannot_be_used_are_counted_and_named(folder, monkeypatch):
    (folder / "test" / "0.png").write_bytes(b"not an image")
    (folder / "test" / "2.png").unlink()
    found = evaluate_lines(PaintedAdapter(), open_lines(folder), request=GRADCAM)
    assert (found["lines"], found["skipped"]) == (1, {"failed_decode": 1, "failed_read": 1})
    assert [p.split("labels.jsonl' ")[1].split(":")[0] for p in warnings_of(found)] == ["line 1", "line 3"]
    rewrite(folder, 2, lambda own: own | {"chars": [*own["chars"][:3], [28, 0, 34, 4]]})
    with pytest.raises(GroundingError, match=r"no line could be scored \(1 failed_decode, 1 failed_input, 1 fail"):
        evaluate_lines(PaintedAdapter(), open_lines(folder), request=GRADCAM)
    assert open_lines(folder).lines[1].misfit(32, 8).startswith("the box of character 3 'd' exceeds")
    assert open_lines(folder).lines[1].misfit(33, 8) is None  # a pixel more is rounding


def test_a_line_with_numeric_trouble_costs_itself_alone(folder, monkeypatch):
    real = evaluation.explain_request

    def explain(adapter, images, texts, request, batch_size):
        if any(image.path.endswith("1.png") for image in images):
            raise NumericError("NaN")
        return real(adapter, images, texts, request, batch_size=batch_size)

    monkeypatch.setattr(evaluation, "explain_request", explain)
    found = evaluate_lines(PaintedAdapter(), open_lines(folder), request=GRADCAM)
    assert (found["lines"], found["skipped"]) == (2, {"failed_numeric": 1})
    assert "line 2: NaN" in found["problems"][0]


def test_a_model_without_any_right_line_has_no_figures(tmp_path):
    write_lines(tmp_path, {"0": {}, "a0": {}})
    found = evaluate_lines(PaintedAdapter(), open_lines(tmp_path), request=GRADCAM)
    assert (found["exact"], found["cer"], found["characters"]) == (0, pytest.approx(2 / 3), 0)
    assert (found["methods"]["gradcam"]["in_box"], found["methods"]["gradcam"]["ci"]) == (None, None)
    assert "| gradcam | - |" in line_markdown(found)
    json.loads(as_json(found))


def test_only_models_that_write_read_lines(folder):
    with pytest.raises(OptionError, match="linear generates no text"):
        evaluate_lines(LinearAdapter({}), open_lines(folder))
    with pytest.raises(OptionError, match="at least 1 line"):
        OcrConfig(limit=0)


# ---------------------------------------------------------------- the command


def test_the_command_on_the_demo_lines(command):
    argv = ("--data", demo_lines(), "--limit", 3, "--device", "cpu", "--methods", "cross_attention", "gradcam")
    code, out, err = command(*argv, "--output", "lines.json")
    assert code == 0
    document = json.loads(Path("lines.json").read_text())
    assert (document["lines"], document["data"], document["split"]) == (3, "demo lines", "test")
    assert list(document["methods"]) == ["cross_attention", "gradcam", "position", "random"]
    assert out.startswith("Protocol own box: ")
    assert "| map | in own box % | elsewhere % | blank |" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--captions", "first"], 2, "--captions is for images with boxes for phrases"),
        (["--min-entities", "1"], 2, "--min-entities is for"),
        (["--threshold", "0.5"], 2, "--threshold is for"),
        (["--tune-threshold"], 2, "--tune-threshold is for"),
        (["--faithfulness"], 2, "--faithfulness is for"),
        (["--baseline", "blur"], 2, "--baseline is for"),
        (["--peak", "patch"], 2, "--peak is for"),
        (["--limit", "0"], 2, "at least 1 line"),
        (["--split", "train"], 1, "there are: test"),
        (["--limit", "1", "--methods", "gradcan"], 2, "did you mean 'gradcam'"),
        (["--limit", "1", "--target", "similarity"], 2, "no target 'similarity'"),
    ],
)
def test_options_that_make_no_sense_for_lines(command, folder, argv, code, words):
    found, out, err = command("--data", folder, *argv, "--device", "cpu")
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert words in err


def test_aimed_questions_are_for_lines(command):
    code, _, err = command("--aimed")
    assert (code, "--aimed is for lines of text with character boxes" in err) == (2, True)
