"""Scores of a batch run: runs made by hand, so that every number is known on paper."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from adapters import load
from grounding.batch.rows import RunMetadata, deduplicate_shared_maps, failed_row, to_row
from grounding.batch.run_folder import RunFolder, write_manifest
from grounding.core.errors import DataError, GroundingError, OptionError
from grounding.datasets.flickr30k_entities import Entities
from grounding.datasets.open import open_dataset
from grounding.engine.explain import explain
from grounding.engine.plan import plan_methods
from grounding.engine.request import Request
from grounding.engine.selection import Selection
from grounding.evaluation.phrases import PhraseConfig, evaluate
from grounding.evaluation.protocols import average_maps, enclosing_box
from grounding.evaluation.runs import RunScoreConfig, evaluate_run, run_dataset
from grounding.explanation.explanation import Entry
from tests.support.explanations import column, explanation, noise, whole
from tests.support.tolerances import HALF_ENERGY, close

GEOMETRY = whole(80, 80)  # 4 x 4 patches of 20 pixels, their centres at 10, 30, 50, 70
COMMON = {"layer": "vision.11", "options": {"threshold": 0.0}, "signed": True, "text_conditioned": True}
ABOUT = RunMetadata(
    {"gradcam": {"method": "gradcam", "title": "Gradcam", **COMMON}},
    "similarity",
    "leave-one-out",
    {"id": "some/model", "type": "clip"},
    {"seed": 0},
)
ANY, UNION = "mention-anybox", "chain-unionbox"


def delta(*cells, low=0.0):
    made = np.full((4, 4), low)
    for cell in cells:
        made[cell] = 1
    return made


# ---------------------------------------------------------------- data sets and runs


def marked(*phrases):
    """A sentence; a phrase is its text, its chain, and types (default: people)."""
    parts = [f"[/EN#{chain}/{'/'.join(types) or 'people'} {text}]" for text, chain, *types in phrases]
    return " and ".join(parts)


def thing(chain, *boxes):
    """The objects of a chain: a box (x0, y0, x1, y1), half-open, or the name of a flag."""
    made = []
    for box in boxes:
        inner = f"<{box}>1</{box}>"
        if not isinstance(box, str):
            x0, y0, x1, y1 = box
            inner = f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        made.append(f"<object><name>{chain}</name>{inner}</object>")
    return "".join(made)


def write_image(folder, name, sentences, things, split="test"):
    for part in ("Images", "Sentences", "Annotations"):
        (folder / part).mkdir(exist_ok=True, parents=True)
    with (folder / f"{split}.txt").open("a") as listing:
        listing.write(f"{name}\n")
    noise(80, 80).save(folder / "Images" / f"{name}.png")
    (folder / "Sentences" / f"{name}.txt").write_text("\n".join(sentences) + "\n")
    size = "<size><width>80</width><height>80</height></size>"
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(things)}</annotation>")


def found(label, kind, places, maps, *, signed=True, **fields):
    """An explanation: the caption's entry, then one per place, or the caption alone."""
    entries = [Entry(label, "caption", 0, len(label), 0.5)]
    entries += [Entry(label[start:end], kind, start, end, 0.5) for start, end in places]
    made = explanation(
        noise(80, 80),
        labels=(label,),
        geometry=GEOMETRY,
        columns=(column("gradcam", maps, GEOMETRY, signed=signed, threshold=0.0),),
        **fields,
    )
    return dataclasses.replace(made, entries=tuple(entries))


def rows_of(data, name, maps=None, prompts=None, *, signed=True, **fields):
    """The rows of an image; `maps` and `prompts` by the text of the phrase."""
    made = []
    for caption in data.read(name).captions:
        own, about = {}, {}
        for phrase in caption.phrases:
            place = (phrase.start, phrase.end)
            for given, kept in ((maps or {}, own), (prompts or {}, about)):
                if phrase.text in given:
                    kept[place] = given[phrase.text]
        text = caption.text
        one = found(text, "phrase", own, [np.eye(4), *own.values()], signed=signed, **fields)
        about_phrases = {
            place: found(f"image of {text[slice(*place)]}", "", (), [raw], signed=signed)
            for place, raw in about.items()
        }
        made.append(to_row(name, caption.line, one, about_phrases))
    return made


def write_run(path, data, rows, about=ABOUT, shards=None, source=None):
    """A run of these rows by image, two images a shard; of `shards` only, where given."""
    path.mkdir(exist_ok=True)
    written = {
        "ids": list(rows),
        "about": dataclasses.asdict(about),
        "fingerprint": {"shard_size": 2, "data": data.digest()},
        "data": {"folder": str(data.folder), "split": data.split} if source is None else source,
    }
    write_manifest(path, written)
    run = RunFolder.open(path)
    for shard in run.shards if shards is None else shards:
        members = [row for name in run.members(shard) for row in rows[name]]
        deduplicate_shared_maps(members, about.shared)
        run.commit(shard, members, 0.0)
    return run


# Two boxes with a gap, one box of one patch, a chain of a large box after a small one, and chains without boxes.
TWO, PATCH = ((0, 0, 20, 20), (60, 0, 80, 20)), ((20, 40, 40, 60),)
THINGS = [thing(1, *TWO), thing(2, *PATCH), thing(3, "nobndbox"), thing(4, "scene")]


@pytest.fixture
def data(tmp_path):
    """One image with one caption: a dog in two boxes, a ball in one patch, and four phrases without a box."""
    phrases = [("A Dog", 1, "animals"), ("the ball", 2, "other"), ("a thought", 3), ("a beach", 4, "scene")]
    phrases += [("each other", 0, "notvisual"), ("a ghost", 9)]
    write_image(tmp_path / "data", "one", [marked(*phrases)], THINGS)
    return open_dataset(tmp_path / "data", "test")


BOXLESS = {"nobndbox": 1, "scene": 1, "notvisual": 1, "missing": 1}


def hits(documents, column="gradcam", key="pointing"):
    return {name: document["methods"][column][key] for name, document in documents.items()}


def run_of(tmp_path, data, dog, ball, name="one", **options):
    maps = {"A Dog": dog, "the ball": ball}
    return write_run(tmp_path / "run", data, {name: rows_of(data, name, maps, maps, **options)})


# ---------------------------------------------------------------- hits on paper


@pytest.mark.parametrize(
    ("dog", "anybox", "unionbox"),
    [
        (delta((0, 0)), 1, 1),  # in the first box
        (delta((0, 3)), 1, 1),  # in the second
        (delta((0, 1)), 0, 1),  # between the two
        (delta((3, 0)), 0, 0),  # outside
        (np.ones((4, 4)), 0, 0),  # constant
        (-delta((0, 1), low=0.5), 0, 0),  # nowhere positive
    ],
)
def test_any_box_and_the_box_around_all(tmp_path, data, dog, anybox, unionbox):
    run = run_of(tmp_path, data, dog, delta((2, 1)))
    documents = evaluate_run(run, data)
    assert hits(documents) == {ANY: (anybox + 1) / 2, UNION: (unionbox + 1) / 2}
    blank = 0 if dog.min() == 0 else 1
    assert hits(documents, key="degenerate") == {ANY: blank, UNION: blank}
    for name, document in documents.items():
        by_type = document["methods"]["gradcam"]["by_type"]
        assert {kind: part["phrases"] for kind, part in by_type.items()} == {"animals": 1, "other": 1}
        assert by_type["animals"]["pointing"] == {ANY: anybox, UNION: unionbox}[name]
        assert document["skipped"] == BOXLESS
        assert (document["protocol"], document["pictures"], document["cases"], document["phrases"]) == (name, 1, 2, 2)


def test_energy_overlap_and_baselines_on_paper(tmp_path, data):
    """Heat in the topmost row of patches falls to 0 at y = 30: 17.5 of 20 pixels' worth of it lie above y = 20."""
    documents = evaluate_run(run_of(tmp_path, data, delta(np.s_[0, :]), -np.ones((4, 4))), data)
    assert hits(documents, key="energy") == {ANY: pytest.approx(0.875 / 2 / 2), UNION: pytest.approx(0.875 / 2)}
    # Its box is the upper 20 rows: the box around both is found, each alone is a quarter of it.
    assert hits(documents, key="mean_iou") == {ANY: pytest.approx(0.25 / 2), UNION: pytest.approx(0.5)}
    # Centres of patches: 2 of 16 in the boxes, 4 of 16 in the one around them, 1 of 16 in the other chain's.
    assert hits(documents, "random") == {ANY: (2 / 16 + 1 / 16) / 2, UNION: (4 / 16 + 1 / 16) / 2}
    assert hits(documents, "random", "energy") == hits(documents, "random")
    # The centre (40, 40) is a corner of the ball's box: outside of the open one, inside of the closed one.
    assert hits(documents, "centre") == {ANY: 0, UNION: 0.5}


def test_pixels_count_to_the_edge_of_the_box_around(tmp_path):
    """The first maximum is the corner pixel, which the strict protocol does not count."""
    write_image(tmp_path / "data", "one", [marked(("a dog", 1))], [thing(1, (0, 0, 20, 20))])
    data = open_dataset(tmp_path / "data", "test")
    maps = {"a dog": delta((0, 0))}
    documents = evaluate_run(
        write_run(tmp_path / "run", data, {"one": rows_of(data, "one", maps, maps)}), data, RunScoreConfig(peak="pixel")
    )
    assert hits(documents) == {ANY: 0, UNION: 1}
    assert hits(documents, "random") == {ANY: pytest.approx(18**2 / 6400), UNION: pytest.approx(20**2 / 6400)}


@pytest.mark.parametrize(
    ("boxes", "scored"),
    [
        (((0, 0, 16, 20),), False),  # exactly 5 %
        (((0, 0, 17, 20),), True),
        (((0, 0, 15, 15), (20, 20, 80, 80)), False),  # the first one decides
        (((20, 20, 80, 80), (0, 0, 15, 15)), True),
    ],
)
def test_chains_whose_first_box_is_small_are_skipped(tmp_path, boxes, scored):
    write_image(tmp_path / "data", "one", [marked(("a dog", 1), ("a cat", 2))], [thing(1, *boxes), thing(2, *PATCH)])
    data = open_dataset(tmp_path / "data", "test")
    maps = dict.fromkeys(("a dog", "a cat"), delta((0, 0)))
    documents = evaluate_run(write_run(tmp_path / "run", data, {"one": rows_of(data, "one", maps, maps)}), data)
    assert documents[ANY]["phrases"] == 2
    assert documents[UNION]["cases"] == 1 + scored
    assert documents[UNION]["skipped"] == ({} if scored else {"small": 1})


# ---------------------------------------------------------------- averages


@pytest.fixture
def twice(tmp_path):
    """A chain that two captions name, in the box of patch (1, 1)."""
    sentences = [marked(("a dog", 1, "animals")), marked(("an old dog", 1, "animals", "other"))]
    write_image(tmp_path / "data", "one", sentences, [thing(1, (20, 20, 40, 40))])
    return open_dataset(tmp_path / "data", "test")


def peaked(cell):
    made = delta(cell)
    made[1, 1] = 0.6
    return made


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1000, 0), (1, 10)])
def test_averaged_maps_hit_where_each_alone_misses(tmp_path, twice, scale, shift):
    """Each map is rescaled to its own range: neither size nor a floor gives it more weight."""
    maps = {"a dog": peaked((0, 0)), "an old dog": scale * peaked((3, 3)) + shift}
    documents = evaluate_run(write_run(tmp_path / "run", twice, {"one": rows_of(twice, "one", maps, maps)}), twice)
    assert hits(documents) == {ANY: 0, UNION: 1}
    chain = documents[UNION]
    assert (chain["cases"], chain["phrases"]) == (1, 2)
    assert {kind: part["phrases"] for kind, part in chain["methods"]["gradcam"]["by_type"].items()} == {
        "animals": 1,
        "other": 1,
    }


def test_a_mention_without_evidence_adds_nothing(tmp_path, twice):
    one = {"a dog": delta((1, 1)), "an old dog": -np.ones((4, 4))}
    for number, (maps, hit) in enumerate([(one, 1), (dict.fromkeys(one, -np.ones((4, 4))), 0)]):
        run = write_run(tmp_path / f"run{number}", twice, {"one": rows_of(twice, "one", maps, maps)})
        scores = evaluate_run(run, twice)[UNION]["methods"]["gradcam"]
        assert (scores["pointing"], scores["degenerate"]) == (hit, 1 - hit)


def entry_maps(*raws, threshold):
    """Of a signed method, which cuts what lies below a part of the maximum."""
    columns = [(column("gradcam", [raw], GEOMETRY, threshold=threshold),) for raw in raws]
    return [explanation(noise(80, 80), labels=("a",), geometry=GEOMETRY, columns=own).map(0) for own in columns]


def test_averages_are_from_zero_to_one_and_never_thresholded_again():
    raw = np.arange(16.0).reshape(4, 4) - 4
    mean = average_maps(entry_maps(raw, -raw, threshold=0.5))
    # Views: 11 downwards to 6 (half of 11 cuts 5), and 4 downwards to 2.
    first, second = np.where(raw >= 5.5, raw / 11, 0), np.where(-raw >= 2, -raw / 4, 0)
    assert mean.view == pytest.approx((first + second) / 2)
    assert mean.peak == GEOMETRY.cell_centre(0, 0)  # 0.5 there and in the last patch
    again = average_maps(entry_maps(delta((0, 0)) + 0.6 * delta((3, 3)), delta((0, 0)), threshold=0.5))
    assert (again.view[0, 0], again.view[3, 3]) == (1, pytest.approx(0.3))
    assert average_maps(entry_maps(-raw - 20, -raw - 30, threshold=0)).status.reason.startswith("all negative")


def test_the_box_around_others():
    assert enclosing_box([(5, 6, 7, 8), (1, 7, 6, 20)]) == (1, 6, 7, 20)


def test_a_chain_is_averaged_over_the_captions_that_are_read(tmp_path, twice):
    maps = {"a dog": delta((1, 1)), "an old dog": 2 * delta((0, 0)) + delta((1, 1))}
    run = write_run(tmp_path / "run", twice, {"one": rows_of(twice, "one", maps, maps)})
    assert evaluate_run(run, twice, RunScoreConfig(captions="first"))[UNION]["phrases"] == 1
    first = evaluate_run(run, twice, RunScoreConfig(captions="first", protocol=(ANY,)))
    assert (list(first), first[ANY]["phrases"]) == ([ANY], 1)
    # The second map's peak is elsewhere, but the mean has (1 + 1 / 2) / 2 in the box against 1 / 2 there.
    assert hits(evaluate_run(run, twice))[UNION] == 1


# ---------------------------------------------------------------- storage


def test_float16_moves_no_peak(tmp_path, twice):
    """Patches a thousandth of the maximum apart keep their order, whatever the size of the map."""
    rng = np.random.default_rng(0)
    for number, scale in enumerate((1e-9, 1, 1e9)):
        raw = rng.permutation(np.linspace(0.984, 1, 16)).reshape(4, 4)
        raw[1, 1], raw[raw == 1] = 1.001, 1
        run = write_run(
            tmp_path / f"run{number}",
            twice,
            {"one": rows_of(twice, "one", *[dict.fromkeys(("a dog", "an old dog"), scale * raw)] * 2)},
        )
        assert hits(evaluate_run(run, twice)) == {ANY: 1, UNION: 1}


# ---------------------------------------------------------------- what is not scored


@pytest.fixture
def several(tmp_path):
    """Five images of two captions, two phrases each: a red one and a blue one, with a patch as box for each."""
    for name in ("fine", "broken", "cut", "changed", "poor"):
        sentences = [marked(("a red dot", 1), ("a blue dot", 2)), marked(("red", 1), ("blue", 2))]
        things = [thing(1, (0, 0, 20, 20)), thing(2, (60, 60, 80, 80) if name != "poor" else "nobndbox")]
        write_image(tmp_path / "data", name, sentences, things)
    return open_dataset(tmp_path / "data", "test")


def several_rows(data):
    maps = {"a red dot": delta((0, 0)), "red": delta((0, 0)), "a blue dot": delta((0, 0)), "blue": delta((3, 3))}
    rows = {name: rows_of(data, name, maps, maps) for name in data.ids}
    rows["broken"][1] = failed_row("broken", 1, "red and blue", "failed_oom", "no memory left")
    for row in rows["cut"]:
        row["truncated"] = True
        row["entries"] = [
            e if e["label"] not in ("blue", "image of blue") else e | {"start": 70, "end": 74} for e in row["entries"]
        ]
    rows["changed"][0]["caption"] = "a green dot and a blue dot"
    del rows["changed"][1]
    return rows


def test_every_phrase_is_scored_or_counted(tmp_path, several):
    run = write_run(tmp_path / "run", several, several_rows(several))
    documents = evaluate_run(run, several, RunScoreConfig(min_entities=2))
    common = {"failed_oom": 2, "other_caption": 2, "min_entities": 4}
    assert documents[ANY]["skipped"] == common | {"not_read": 1, "not_in_run": 2}
    assert documents[UNION]["skipped"] == common | {"not_in_run": 3}
    for name, document in documents.items():
        assert document["phrases"] + sum(document["skipped"].values()) == 20
        assert (document["pictures"], document["skipped_pictures"]) == (3, {"min_entities": 1, "other_caption": 1})
        # fine 3 of 4, broken 1 of 2, cut 2 of 3; of the two maxima of fine's blue chain the first one counts, a miss.
        assert document["methods"]["gradcam"]["pointing"] == {ANY: 6 / 9, UNION: 3 / 6}[name]
    poor = evaluate_run(run, several)
    assert poor[ANY]["skipped"]["nobndbox"] == 2
    assert poor[ANY]["phrases"] == 11


def test_images_that_the_data_set_lost_are_named(tmp_path, several):
    run = write_run(tmp_path / "run", several, several_rows(several))
    (several.folder / "Annotations" / "fine.xml").unlink()
    documents = evaluate_run(run, open_dataset(several.folder, "test"))
    assert documents[ANY]["skipped_pictures"]["failed_input"] == 1
    problems = documents[ANY]["problems"]
    assert problems == documents[UNION]["problems"]
    assert "captions or boxes changed" in problems[0]
    assert "fine.xml" in problems[1]


def test_runs_that_are_not_done_say_so(tmp_path, several):
    run = write_run(tmp_path / "run", several, several_rows(several), shards=[0, 2])
    documents = evaluate_run(run, several)
    assert documents[ANY]["problems"] == ["1 of 3 shards of the run are not done: their images are not scored"]
    assert documents[ANY]["pictures"] == 3
    (tmp_path / "run" / "part-00000.parquet").write_bytes(b"")
    assert "2 of 3 shards" in evaluate_run(run, several)[ANY]["problems"][0]
    none = write_run(tmp_path / "none", several, several_rows(several), shards=[])
    with pytest.raises(GroundingError, match="no maps to score: no shard is done"):
        evaluate_run(none, several)


def test_runs_of_one_protocol(tmp_path, data):
    maps = {"A Dog": delta((0, 0)), "the ball": delta((0, 0))}
    rows = {"phrases": {"one": rows_of(data, "one", maps)}, "prompts": {"one": rows_of(data, "one", None, maps)}}
    for kind, name, other in (("phrases", ANY, UNION), ("prompts", UNION, ANY)):
        run = write_run(tmp_path / kind, data, rows[kind])
        documents = evaluate_run(run, data)
        assert list(documents) == [name]
        [problem] = documents[name]["problems"]
        assert f"{other} cannot be scored" in problem
        assert problem.endswith(f"ground_flickr30k.py computes them with --protocols {other}")
        with pytest.raises(GroundingError, match=f"{other} cannot be scored"):
            evaluate_run(run, data, RunScoreConfig(protocol=(ANY, UNION)))
    with pytest.raises(GroundingError, match="mention-anybox cannot be scored"):
        evaluate_run(write_run(tmp_path / "neither", data, {"one": rows_of(data, "one")}), data)


def test_runs_with_nothing_to_score(tmp_path, data):
    row = failed_row("one", 0, "...", "failed_decode", "not an image")
    with pytest.raises(GroundingError, match="no maps to score: failed_decode 1"):
        evaluate_run(write_run(tmp_path / "failed", data, {"one": [row]}), data)
    run = run_of(tmp_path, data, delta((0, 0)), delta((0, 0)))
    with pytest.raises(GroundingError, match=r"mention-anybox scored nothing .*images: min_entities 1"):
        evaluate_run(run, data, RunScoreConfig(min_entities=3))
    for path in data.folder.glob("Annotations/*"):
        path.unlink()
    with pytest.raises(GroundingError, match=r"scored nothing .*images: failed_input 1\); first problem: .*changed"):
        evaluate_run(run, open_dataset(data.folder, "test"))


def test_the_data_of_a_run(tmp_path, data):
    run = run_of(tmp_path, data, delta((0, 0)), delta((0, 0)))
    assert isinstance(run_dataset(run), Entities)
    moved = data.folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="name the folder with --data"):
        run_dataset(run)
    there = run_dataset(run, moved)
    assert (there.folder, there.split) == (moved, "test")
    assert evaluate_run(run, there)[ANY]["problems"] == []
    nameless = write_run(tmp_path / "nameless", there, {"one": rows_of(there, "one")}, source={})
    with pytest.raises(DataError, match="does not name the folder"):
        run_dataset(nameless)
    (tmp_path / "list").mkdir()
    noise(8, 8).save(tmp_path / "list" / "a.png")
    (tmp_path / "list" / "captions.txt").write_text("image,caption\na.png,a dog\n")
    plain = write_run(tmp_path / "plain", there, {"one": []}, shards=[], source={"folder": str(tmp_path / "list")})
    with pytest.raises(DataError, match="no boxes for phrases"):
        run_dataset(plain)


def test_invalid_configurations_raise():
    for wrong in ({"threshold": 0}, {"threshold": 1.1}, {"min_entities": 0}):
        with pytest.raises(OptionError):
            RunScoreConfig(**wrong)


# ---------------------------------------------------------------- as with the model


def test_a_run_scores_as_the_model_does(tmp_path, several):
    """The same phrases explained by the engine, stored as float16, and scored by `evaluate`; a tokenizer of words."""
    clip = load(None, device="cpu")
    plan = plan_methods(clip, Request(["gradcam", "rollout"])).calls
    rows = {}
    for name in several.ids:
        record = several.read(name)
        texts = [caption.text for caption in record.captions]
        places = [tuple((p.start, p.end) for p in caption.phrases) for caption in record.captions]
        select = [[Selection(tokens=False, phrases=own) for own in places]]
        [made] = explain(clip, [str(record.image)], [texts], select=select, methods=["gradcam", "rollout"])
        rows[name] = [to_row(name, line, one, {}) for line, one in enumerate(made)]
    about = RunMetadata.of(clip, plan, "similarity", "leave-one-out", 0)
    run = write_run(tmp_path / "run", several, rows, about)
    stored = evaluate_run(run, several)[ANY]
    direct = evaluate(clip, several, PhraseConfig(captions="all"), Request(["gradcam", "rollout"]))
    assert run.table(0)["rollout"].null_count == 2  # one map per image
    for key in ("pictures", "phrases", "skipped", "split", "data", "model"):
        assert stored[key] == direct[key], key
    for name, scores in direct["methods"].items():
        for key in ("pointing", "ci", "entity", "iou50", "swap", "swap_pairs", "degenerate", "by_type"):
            assert stored["methods"][name][key] == scores[key], (name, key)
        assert (stored["methods"][name]["energy"] is None) == (scores["energy"] is None)
        if scores["energy"]:
            assert close(stored["methods"][name]["energy"], scores["energy"], HALF_ENERGY)
    same = direct["rules"].keys() - {"text", "options", "layers"}
    assert {key: stored["rules"][key] for key in same} == {key: direct["rules"][key] for key in same}


# ---------------------------------------------------------------- the command


def test_two_protocols_are_two_tables(tmp_path, data, command):
    run_of(tmp_path, data, delta((0, 1)), delta((2, 1)))
    code, out, err = command("--run", tmp_path / "run", "--output", "scores.json")
    assert (code, err) == (0, "")
    first, second = out.split("Protocol chain-unionbox: `image of <phrase>`")
    assert first.startswith("Protocol mention-anybox: the phrase alone, by its tokens in the caption")
    for part, numbers in ((first, "| gradcam | 50.0 |"), (second, "| gradcam | 100.0 |")):
        assert numbers in part
        assert "| type | number | gradcam % | centre % | random % |" in part
        assert "phrases skipped: nobndbox 1, scene 1, notvisual 1, missing 1" in part
    assert "1 images, 2 phrases scored" in first
    assert "1 images, 2 chains whose first box covers more than 5 % of the image (2 phrases) scored" in second
    document = json.loads(Path("scores.json").read_text())
    assert list(document) == [ANY, UNION]
    # The same again, replacing a file of ours; and one protocol as one document.
    assert json.loads(command("--run", tmp_path / "run", "--output", "scores.json", "--format", "json")[1]) == document
    one = json.loads(command("--run", tmp_path / "run", "--protocol", UNION, "--format", "json")[1])
    assert one == document[UNION]


def test_choices_reach_the_document(tmp_path, data, command):
    run_of(tmp_path, data, delta((0, 1)), delta((2, 1)))
    moved = data.folder.rename(tmp_path / "moved")
    choices = ("--captions", "first", "--peak", "pixel", "--threshold", 0.4, "--min-entities", 2, "--data", moved)
    code, out, _ = command("--run", tmp_path / "run", *choices, "--protocol", ANY, "--format", "json", "--seed", 3)
    document = json.loads(out)
    assert code == 0
    rules = document["rules"]
    assert [rules[key] for key in ("captions", "peak", "threshold", "min_entities")] == ["first", "pixel", 0.4, 2]
    assert document["methods"]["gradcam"]["threshold"] == 0.4
    assert (document["data"], document["model"]) == (str(moved), "some/model")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--run", "RUN", "--model", "x"], 2, "--model needs a model"),
        (["--run", "RUN", "--tune-threshold"], 2, "--tune-threshold needs a model"),
        (["--run", "RUN", "--methods", "gradcam"], 2, "--methods needs a model"),
        (["--run", "RUN", "--layer", "-2"], 2, "--layer needs a model"),
        (["--run", "RUN", "--split", "val"], 2, "--split needs a model"),
        (["--run", "RUN", "--limit", "0"], 2, "--limit needs a model"),
        (["--run", "RUN", "--threshold", "0"], 2, "above 0"),
        (["--run", "RUN", "--protocol", "unionbox"], 2, "invalid choice"),
        (["--protocol", ANY], 2, "--protocol is for --run"),
        (["--run", "nowhere"], 1, "holds no run"),
        (["--run", "RUN", "--data", "nowhere"], 1, "nowhere"),
        (["--run", "RUN", "--output", "."], 1, "is a folder"),
        (["--run", "RUN", "--min-entities", "9"], 1, "scored nothing"),
    ],
)
def test_bad_requests_cost_one_line(tmp_path, data, command, argv, code, words):
    run_of(tmp_path, data, delta((0, 1)), delta((2, 1)))
    done, out, err = command(*[tmp_path / "run" if word == "RUN" else word for word in argv])
    assert (done, out) == (code, "")
    assert err.strip().splitlines()[-1].split(": ")[0] in ("error", "evaluate.py") or "invalid choice" in err
    assert words in err


def test_warnings_are_printed_once(tmp_path, several, command):
    write_run(tmp_path / "run", several, several_rows(several), shards=[0, 2])
    code, _, err = command("--run", tmp_path / "run")
    assert code == 0
    assert err == "warning: 1 of 3 shards of the run are not done: their images are not scored\n"
    assert command("--run", tmp_path / "run", "-q")[2] == ""
