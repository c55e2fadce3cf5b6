"""Evaluation with boxes for phrases: maps with known scores, counted failures, the command, and faithfulness."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grounding.core.errors import GroundingError, LayerError, NumericError, OptionError, TargetError, UnknownNameError
from grounding.datasets.open import open_dataset
from grounding.engine.queries import prepare
from grounding.engine.request import Request
from grounding.evaluation import faithfulness as believing
from grounding.evaluation import phrases as evaluation
from grounding.evaluation.deletion import (
    CONTROL,
    FaithfulnessCase,
    cell_numbers,
    deletion_curves_area,
    deletion_order,
)
from grounding.evaluation.faithfulness import ALL_PARAMETERS, cascade, faithfulness, text_sensitivity
from grounding.evaluation.phrases import PhraseConfig, evaluate
from grounding.evaluation.report import as_json, phrase_markdown, warnings_of
from tests.support import models
from tests.support.annotations import IMAGES, write_data
from tests.support.contract import structure
from tests.support.explanations import column, explanation, whole
from tests.support.linear import COLUMNS, ROWS, LinearAdapter

CELLS = ROWS * COLUMNS
METHOD_KEYS = {
    "pointing",
    "ci",
    "energy",
    "energy_ci",
    "entity",
    "iou50",
    "area",
    "swap",
    "by_type",
    "caption_swap_correlation",
}


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data", IMAGES)
    return tmp_path / "data"


@pytest.fixture
def clip():
    return models.clip_adapter(dtype=torch.float32)


@pytest.fixture
def perfect(monkeypatch):
    """Replace the maps by the boxes themselves; returns the calls: image name, texts, request."""
    calls = []

    def explain(adapter, images, texts, request):
        [image], [texts] = images, texts
        name = Path(image.path).stem
        calls.append((name, tuple(texts), request))
        geometry = whole(80, 80)
        boxes = {phrase.lower(): box for phrase, box in IMAGES[name].items()}
        made = []
        for text in texts:
            raw = np.zeros((4, 4))
            x0, y0, x1, y1 = (value // 20 for value in boxes[text])
            raw[y0:y1, x0:x1] = 1
            columns = [column(key, [raw], geometry) for key in ("gradcam", "relevance")]
            made.append(explanation(image.pil, labels=(text,), geometry=geometry, columns=columns))
        return [made]

    monkeypatch.setattr(evaluation, "explain_request", explain)
    return calls


PERFECT = Request(["gradcam", "relevance"])
ROLLOUT = Request(["rollout"])
BOTH = Request(["gradcam", "rollout"])


def test_perfect_maps_score_one_and_the_document_is_complete(folder, clip, perfect):
    found = evaluate(clip, open_dataset(folder), request=PERFECT)
    assert (found["protocol"], found["split"], found["pictures"], found["phrases"]) == ("mention-anybox", "test", 3, 7)
    assert set(found["methods"]) == {"gradcam", "relevance", "centre", "random"}
    for name, scores in found["methods"].items():
        assert set(scores) >= METHOD_KEYS
        wanted = None if name in ("centre", "random") else 1
        assert [scores[key] for key in ("entity", "iou50")] == [wanted, wanted]
    assert found["methods"]["gradcam"]["pointing"] == found["methods"]["gradcam"]["swap"] == 1
    assert found["methods"]["gradcam"]["ci"] == (1, 1)
    assert found["methods"]["gradcam"]["by_type"]["people"]["phrases"] == 7
    # The centre of the image lies inside "dogs" alone: on the edge of the other boxes is no hit.
    assert found["methods"]["centre"]["pointing"] == pytest.approx(1 / 7)
    cells = [4, 4, 4, 1, 1, 1, 2]
    assert found["methods"]["random"]["pointing"] == pytest.approx(sum(cells) / 16 / 7)
    assert found["skipped"] == {}
    assert found["rules"]["min_entities"] == 1
    # One call an image, all its phrases as captions of their own, in lower case.
    assert perfect[0][:2] == ("first", ("a red car", "the man"))
    assert len(perfect) == 3


def test_all_captions_mention_more_and_explain_no_more(folder, clip, perfect):
    found = evaluate(clip, open_dataset(folder), PhraseConfig(captions="all"), PERFECT)
    assert found["phrases"] == 14
    assert found["methods"]["gradcam"]["swap_pairs"] == 1 + 3 + 1
    assert [len(texts) for _, texts, _ in perfect] == [2, 3, 2]


def test_selection_of_images(folder, clip, perfect):
    few = evaluate(clip, open_dataset(folder), PhraseConfig(min_entities=3), PERFECT)
    assert (few["pictures"], few["phrases"]) == (1, 3)
    assert (few["skipped"], few["skipped_pictures"]) == ({"min_entities": 4}, {"min_entities": 2})
    first = evaluate(clip, open_dataset(folder), PhraseConfig(limit=2), PERFECT)
    assert (first["pictures"], first["phrases"], first["skipped"]) == (2, 5, {})


def test_a_failing_image_is_counted_and_named(folder, clip, perfect):
    (folder / "Images" / "first.png").write_bytes(b"")
    (folder / "Annotations" / "third.xml").write_text("<annotation>")
    found = evaluate(clip, open_dataset(folder), request=PERFECT)
    assert found["pictures"] == 1
    assert found["skipped"] == {"failed_decode": 2, "failed_input": 0}
    assert found["skipped_pictures"] == {"failed_decode": 1, "failed_input": 1}
    assert [p.split(":")[0].split("/")[-1] for p in found["problems"]] == [
        "first.png'",
        "third.xml' is no XML that can be read (no element found",
    ]
    (folder / "Images" / "second.png").unlink()
    with pytest.raises(GroundingError, match=r"no phrase .*1 images failed_decode; 1 images failed_read"):
        evaluate(clip, open_dataset(folder), request=PERFECT)


def test_phrases_without_boxes_are_counted_by_reason(folder, clip, perfect):
    path = folder / "Annotations" / "second.xml"
    boxless = path.read_text().replace("<name>2</name><bndbox>", "<name>2</name><nobndbox>1</nobndbox><other>")
    path.write_text(boxless.replace("</bndbox></object><object><name>3", "</other></object><object><name>3"))
    found = evaluate(clip, open_dataset(folder), request=PERFECT)
    assert (found["phrases"], found["skipped"]) == (6, {"nobndbox": 1})


@pytest.mark.parametrize(
    ("request_fields", "error"),
    [
        ({"methods": ["gradcan"]}, UnknownNameError),
        ({"options": {"gradcam.nothing": 1}}, OptionError),
        ({"layers": ["nowhere"]}, LayerError),
        ({"target": "logit"}, TargetError),
        ({"layers": ["-1"], "methods": ["gradcam"]}, LayerError),  # dead: detected at the first image
    ],
)
def test_what_is_wrong_for_every_image_ends_at_once(folder, clip, request_fields, error):
    with pytest.raises(error):
        evaluate(clip, open_dataset(folder), request=Request(**request_fields))


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"min_entities": 0}, {"threshold": 0.0}, {"threshold": 1.5}])
def test_invalid_configurations_raise(wrong):
    with pytest.raises(OptionError):
        PhraseConfig(**wrong)


def test_images_inside_tables_have_no_boxes_to_score(folder, clip, monkeypatch):
    data = open_dataset(folder, "test")
    real = data.read
    monkeypatch.setattr(data, "read", lambda name: dataclasses.replace(real(name), image=b"..."))
    with pytest.raises(GroundingError, match=r"no phrase .*3 images failed_input.*an image inside a table"):
        evaluate(clip, data, request=ROLLOUT)


def test_an_image_with_numeric_trouble_is_counted(folder, clip, monkeypatch):
    real = evaluation.explain_request

    def explain(adapter, images, texts, request):
        if "first" in images[0].path:
            raise NumericError("NaN")
        return real(adapter, images, texts, request)

    monkeypatch.setattr(evaluation, "explain_request", explain)
    assert evaluate(clip, open_dataset(folder), request=ROLLOUT)["skipped"] == {"failed_numeric": 2}


def test_thresholds_are_tuned_on_the_validation_split(folder, clip, perfect):
    write_data(folder, IMAGES, split="val")
    with pytest.raises(OptionError, match="without it"):  # all splits: the validation split too
        evaluate(clip, open_dataset(folder), PhraseConfig(tune_threshold=True), PERFECT)
    found = evaluate(clip, open_dataset(folder, "test"), PhraseConfig(tune_threshold=True), PERFECT)
    assert found["rules"]["threshold"] == "tuned on val"
    assert found["methods"]["gradcam"]["threshold"] in evaluation.TUNING_THRESHOLDS
    assert found["methods"]["gradcam"]["iou50"] == 1
    assert "tuned on val (gradcam 0." in phrase_markdown(found)
    fixed = evaluate(clip, open_dataset(folder), PhraseConfig(threshold=0.9), PERFECT)
    assert fixed["methods"]["gradcam"]["iou50"] < 1


def test_real_maps_of_a_text_blind_method_are_one_and_the_same(folder, clip):
    found = evaluate(clip, open_dataset(folder), request=BOTH)["methods"]
    assert found["rollout"]["caption_swap_correlation"] == 1.0
    assert found["rollout"]["swap"] == 0
    assert found["gradcam"]["caption_swap_correlation"] < 0.999


# ---------------------------------------------------------------- deletion and insertion, a linear model


@pytest.fixture
def white(tmp_path):
    path = tmp_path / "white.png"
    Image.new("RGB", (100, 80), "white").save(path)
    return path


def linear_case(path, maps, adapter, captions=("a",)):
    seen = prepare(adapter, [str(path)], [["a"]]).images.geometry(0).seen_cells
    texts = tuple(dict.fromkeys(text for own in maps.values() for text in own))
    return FaithfulnessCase(
        path, texts, {key: {t: np.asarray(m) for t, m in own.items()} for key, own in maps.items()}, seen, captions
    )


def one_hot(cell=7):
    return np.eye(CELLS)[cell].reshape(ROWS, COLUMNS)


def by_hand(weights, order):
    """Trapezoids under a linear score: the patch at place j falls in the step from j / n to (j + 1) / n."""
    weights = np.ravel(weights)[order]
    places = (np.arange(len(order)) + 0.5) / len(order)
    return float((weights * places).sum()), float((weights * (1 - places)).sum())


def test_areas_of_a_linear_model_in_closed_form(white):
    weights = np.random.default_rng(0).uniform(-0.2, 1, (ROWS, COLUMNS))
    other = np.random.default_rng(1).uniform(0, 1, (ROWS, COLUMNS))
    adapter = LinearAdapter({"a": weights, "b": other})
    case = linear_case(white, {"true": {"a": weights, "b": other}, "shared": {"a": other, "b": other}}, adapter)
    found = deletion_curves_area(adapter, case, "black", None, seed=3)
    for key, maps in case.maps.items():
        expected = [by_hand(w, deletion_order(maps[t], case.seen)) for t, w in (("a", weights), ("b", other))]
        assert found.deletion[key] == pytest.approx(sum(deletion for deletion, _ in expected))
        assert found.insertion[key] == pytest.approx(sum(insertion for _, insertion in expected))
    assert found.full == pytest.approx(weights.sum() + other.sum())
    assert found.empty == pytest.approx(0)
    assert found.deletion["true"] < found.deletion[CONTROL] < found.insertion["true"]


@pytest.mark.parametrize(("weights", "deletion"), [(one_hot(), 0.5 / CELLS), (np.ones((ROWS, COLUMNS)), 0.5)])
def test_scores_of_the_best_and_of_any_order(white, weights, deletion, monkeypatch):
    adapter = LinearAdapter({"a": weights})
    monkeypatch.setattr(believing, "randomisation", lambda *_, **__: ([], {"true": []}))
    monkeypatch.setattr(believing, "text_sensitivity", lambda *_: {"true": {}})
    case = linear_case(white, {"true": {"a": weights}}, adapter)
    found = faithfulness(adapter, [case, case], Request(), "black")
    assert found["methods"]["true"]["deletion"]["auc"] == pytest.approx(deletion)
    assert found["methods"]["true"]["insertion"]["auc"] == pytest.approx(1 - deletion)
    control = found["methods"][CONTROL]["deletion"]["auc"]
    assert found["methods"]["true"]["deletion"]["minus_random"] == pytest.approx(deletion - control)
    assert found["score"] == {"whole": pytest.approx(weights.sum()), "nothing": pytest.approx(0)}
    json.dumps(found, allow_nan=False)


def test_padding_is_never_removed(white):
    """Two columns are padding, with weights of their own: they add to every score alike."""
    weights = np.arange(CELLS, dtype=float).reshape(ROWS, COLUMNS)
    adapter = LinearAdapter({"a": weights}, shown=3)
    case = linear_case(white, {"true": {"a": weights}}, adapter)
    found = deletion_curves_area(adapter, case, "black", None, seed=0)
    padding = weights[:, 3:].sum()
    assert (found.full, found.empty) == (pytest.approx(weights.sum()), pytest.approx(padding))
    deletion, _ = by_hand(weights, deletion_order(weights, case.seen))
    # 12 patches in 20 steps: the curve has plateaus, so the area is that of whole patches only roughly.
    assert found.deletion["true"] == pytest.approx(deletion, rel=0.05)


@pytest.mark.parametrize("baseline", ["blur", "mean"])
def test_areas_are_undefined_where_the_baseline_equals_the_image(white, baseline, monkeypatch):
    adapter = LinearAdapter({"a": one_hot()})
    monkeypatch.setattr(believing, "randomisation", lambda *_, **__: ([], {"true": []}))
    monkeypatch.setattr(believing, "text_sensitivity", lambda *_: {"true": {}})
    case = linear_case(white, {"true": {"a": one_hot()}}, adapter)
    found = faithfulness(adapter, [case], Request(), baseline)
    assert found["methods"]["true"]["deletion"]["auc"] is None


def test_faults_in_faithfulness(white):
    adapter = LinearAdapter({"a": one_hot() * np.nan})
    case = linear_case(white, {"true": {"a": one_hot()}}, adapter)
    with pytest.raises(NumericError, match="NaN or Inf"):
        faithfulness(adapter, [case], Request(), "black")
    with pytest.raises(GroundingError, match="no case"):
        faithfulness(adapter, [], Request(), "black")


def test_cells_of_pixels():
    geometry = whole(80, 80).with_grid(2, 3, (5.0, 4.0))
    numbers = cell_numbers(geometry, 9, 16)
    assert numbers[0, 0] == 0
    assert numbers[7, 14] == 5
    assert (numbers[8] == 6).all()  # a rest that no patch reads
    assert (numbers[:, 15] == 6).all()
    assert [int((numbers == cell).sum()) for cell in range(6)] == [20] * 6


# ---------------------------------------------------------------- what maps depend on


def clip_cases(folder, clip, request):
    config = PhraseConfig(min_entities=1)
    return evaluation._score_split(clip, open_dataset(folder), config, [0.5], request, False, keep_cases=True).cases


def test_text_sensitivity_and_faithfulness_of_a_real_model(folder, clip):
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    found = evaluate(clip, open_dataset(folder), PhraseConfig(faithfulness=True, limit=2), BOTH)
    document = found["faithfulness"]
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    methods = document["methods"]
    assert set(methods) == {"gradcam", "rollout", "random"}
    assert methods["rollout"]["text_sensitivity"] == methods["rollout"]["foreign_text"] == 1.0
    assert methods["gradcam"]["foreign_text"] < 0.999
    assert document["randomised"][-1] == ALL_PARAMETERS
    assert len(methods["gradcam"]["randomisation"]) == len(document["randomised"]) == 4
    assert all(-1 <= value < 0.9999 for value in methods["gradcam"]["randomisation"])
    for table in ("Faithfulness: 2 images, 5 texts", "| down to | gradcam | rollout |", "| every parameter | "):
        assert table in phrase_markdown(found)
    json.loads(as_json(found))


def test_the_cascade_redraws_from_the_top_and_leaves_the_users_model(clip):
    before = copy.deepcopy(clip.model.state_dict())
    changed = []
    for name, redrawn in cascade(clip, seed=0):
        state = redrawn.model.state_dict()
        changed.append((name, {key for key, value in state.items() if not torch.equal(value, before[key])}))
    blocks = structure(clip).stacks["vision"].blocks
    assert [name for name, _ in changed] == [*reversed(blocks), ALL_PARAMETERS]
    assert all(key.startswith(blocks[-1]) for key in changed[0][1])
    assert {key.startswith(tuple(blocks[-2:])) for key in changed[1][1]} == {True}
    assert changed[0][1] < changed[1][1] < changed[-1][1]
    assert any("text_model" in key for key in changed[-1][1])
    assert all(torch.equal(value, before[key]) for key, value in clip.model.state_dict().items())
    again = [redrawn.model.state_dict()[f"{blocks[-1]}.mlp.fc1.weight"].clone() for _, redrawn in cascade(clip, seed=0)]
    other = [redrawn.model.state_dict()[f"{blocks[-1]}.mlp.fc1.weight"].clone() for _, redrawn in cascade(clip, seed=1)]
    assert not torch.equal(again[0], other[0])
    old = before[f"{blocks[-1]}.mlp.fc1.weight"]
    assert float(again[0].std() / old.std()) == pytest.approx(1, abs=0.1)


def test_an_image_with_one_caption_is_compared_with_another_image(folder, clip):
    request = dataclasses.replace(ROLLOUT, select=evaluation.CAPTION_ONLY)
    cases = clip_cases(folder, clip, request)
    single = [FaithfulnessCase(case.image, case.texts, case.maps, case.seen, case.captions[:1]) for case in cases]
    found = text_sensitivity(clip, single, request)["rollout"]
    assert found == {"text_sensitivity": [[]] * 3, "foreign_text": [[1.0]] * 3}


# ---------------------------------------------------------------- the command


def test_the_command_on_the_demo_world(command):
    code, out, err = command("--limit", "4", "--device", "cpu", "--output", "scores.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Protocol mention-anybox")
    assert "images with at least 3 entities" in out
    assert "| map | pointing % |" in out
    document = json.loads(Path("scores.json").read_text())
    assert (document["model"], document["data"]) == ("demo-clip", "demo scenes")
    assert list(document["methods"]) == ["gradcam", "rollout", "relevance", "centre", "random"]
    assert document["methods"]["rollout"]["caption_swap_correlation"] == 1.0
    assert document["methods"]["relevance"]["pointing"] > 2 * document["methods"]["random"]["pointing"]
    assert sorted(p.name for p in Path().iterdir()) == ["scores.json"]
    # The same numbers again, on stdout, replacing a file of ours.
    argv = ("--limit", "4", "--device", "cpu", "--format", "json", "--output", "scores.json")
    assert json.loads(command(*argv)[1]) == document


def test_choices_reach_the_document(command):
    layers = ("--methods", "gradcam", "--layer", "-1.in", "--layer", "-2", "--option", "gradcam.threshold=0.1")
    rules = ("--peak", "pixel", "--captions", "all", "--min-entities", 4, "--split", "val", "--threshold", 0.4)
    code, out, _ = command("--limit", 2, *layers, *rules, "--format", "json", "--device", "cpu")
    document = json.loads(out)
    assert code == 0
    assert list(document["methods"]) == ["gradcam@-1.in", "gradcam@-2", "centre", "random"]
    assert (document["split"], document["rules"]["peak"], document["rules"]["captions"]) == ("val", "pixel", "all")
    assert document["rules"]["interpolation"] == "bilinear"
    assert document["phrases"] > 2 * 4
    assert document["methods"]["gradcam@-2"]["threshold"] == 0.4
    assert document["rules"]["options"] == {"gradcam.threshold": "0.1"}


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--split", "nothing"], 1, "there are: test, val"),
        (["--data", "nowhere"], 1, "no such folder"),
        (["--limit", "0"], 2, "at least 1 image"),
        (["--limit", "1", "--methods", "gradcan"], 2, "did you mean 'gradcam'"),
        (["--limit", "1", "--target", "logit"], 2, "no target 'logit'"),
        (["--limit", "1", "--layer", "-1"], 2, "dead"),
        (["--output", "."], 1, "is a folder"),
        (["--output", "no/scores.json"], 1, "no folder that can be written into"),
        (["--output", "precious.txt"], 1, "was not written by this command"),
        (["--min-entities", "9"], 1, "no phrase of split 'test' could be scored"),
    ],
)
def test_bad_requests_cost_one_line(command, argv, code, words):
    Path("precious.txt").write_text("mine")
    found, out, err = command(*argv, "--device", "cpu")
    assert (found, out) == (code, "")
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert words in err
    assert [p.name for p in Path().iterdir()] == ["precious.txt"]


def evaluation_warnings(counted):
    return warnings_of({"problems": [], "warnings": counted})


def test_a_broken_image_warns_and_the_rest_counts(command, folder):
    (folder / "Images" / "first.png").write_bytes(b"not an image")
    argv = ("--data", folder, "--methods", "rollout", "--device", "cpu")
    code, out, err = command(*argv)
    assert code == 0
    assert "first.png" in err.splitlines()[0]
    assert "vocabulary of this model: 'bus'" in err
    assert "phrases skipped: failed_decode 2" in out
    assert command(*argv, "-q")[2] == ""
    words = evaluation_warnings({"demo advice": 5})
    assert words == ["demo advice (5 of the texts)"]
    assert len(evaluation_warnings({f"unknown {i}": 1 for i in range(9)})) == 6
    for name in ("second", "third"):
        (folder / "Images" / f"{name}.png").unlink()
    code, out, err = command(*argv)
    assert (code, out) == (1, "")
    assert "failed_read" in err
