"""Flickr30k Entities: sentences, annotations and lists of ids, each with its irregular cases."""

from pathlib import Path

import pytest
from PIL import Image

from grounding.core.demo import demo_folder
from grounding.core.errors import DataError
from grounding.core.images import open_image
from grounding.datasets.flickr30k_entities import Entities, parse_sentence, read_annotation
from grounding.datasets.open import open_dataset
from grounding.datasets.records import normal

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(*names, box=None, scene=None, nobndbox=None):
    inner = "".join(f"<name>{name}</name>" for name in names)
    inner += BOX.format(*box) if box else ""
    inner += f"<scene>{scene}</scene>" if scene is not None else ""
    inner += f"<nobndbox>{nobndbox}</nobndbox>" if nobndbox is not None else ""
    return f"<object>{inner}</object>"


def xml(*things, size=(80, 60)):
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{shape}{''.join(things)}</annotation>"


@pytest.fixture
def folder(tmp_path):
    """A data set of one image, 80 x 60; `write` replaces parts of it."""
    for part in ("Images", "Sentences", "Annotations"):
        (tmp_path / part).mkdir()
    (tmp_path / "test.txt").write_text("one\n")
    Image.new("RGB", (80, 60)).save(tmp_path / "Images" / "one.jpg")
    (tmp_path / "Sentences" / "one.txt").write_text("[/EN#1/people A man] sits .\n")
    (tmp_path / "Annotations" / "one.xml").write_text(xml(thing(1, box=(11, 21, 30, 40))))
    return tmp_path


def one(folder):
    return open_dataset(folder).read("one")


def annotate(folder, *things, **options):
    (folder / "Annotations" / "one.xml").write_text(xml(*things, **options))
    return one(folder)


# ---------------------------------------------------------------- sentences


def test_phrases_are_spans_of_the_plain_caption():
    line = "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] in [/EN#6729/vehicles/scene the subway] ."
    caption = parse_sentence(line, 3)
    assert caption.text == "Two young guys with shaggy hair in the subway ."
    assert caption.line == 3
    assert [p.text for p in caption.phrases] == ["Two young guys", "shaggy hair", "the subway"]
    assert [caption.text[p.start : p.end] for p in caption.phrases] == [p.text for p in caption.phrases]
    assert [p.chain for p in caption.phrases] == ["1", "2", "6729"]
    assert caption.phrases[2].types == ("vehicles", "scene")


@pytest.mark.parametrize("text", ["a dog's [ bone ]", "über 5 [x] \u2028 emoji 👍", "no marks at all"])
def test_brackets_and_strange_signs_that_are_no_marks_stay(text):
    assert parse_sentence(text).text == text


@pytest.mark.parametrize(
    "line",
    [
        "[/EN#1/people A man sits",
        "[/EN#1/people A man [/EN#2/other hat]",
        "[/EN#x/people A man]",
        "[/EN#1 A man]",
        "[/EN#1/people ] sits",
        "[/EN#1/people  ] sits",
        "",
    ],
)
def test_broken_lines_are_refused(line):
    with pytest.raises(DataError):
        parse_sentence(line)


def test_a_broken_line_is_reported_with_its_place_and_the_others_count(folder):
    lines = ["[/EN#1/people A man] sits .", "[/EN#1/people A man sits .", "", "[/EN#1/people He] sits ."]
    (folder / "Sentences" / "one.txt").write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))
    record = one(folder)
    assert [(c.line, c.text) for c in record.captions] == [(0, "A man sits ."), (3, "He sits .")]
    assert [p.split(":")[0] for p in record.problems] == ["one.txt line 2", "one.txt line 3"]
    assert [(f.line, f.text) for f in record.failures] == [(1, "[/EN#1/people A man sits ."), (2, "")]
    assert "a broken mark" in record.failures[0].error


def test_normal_is_lower_case_with_single_blanks():
    assert normal(" A  Man\u00a0in RED ") == "a man in red"


# ---------------------------------------------------------------- boxes


def test_boxes_are_one_based_and_inclusive_in_the_file(folder):
    assert one(folder).boxes == {"1": ((10, 20, 30, 40),)}
    # A box of one pixel: the first of the image, and the last.
    assert annotate(folder, thing(1, box=(1, 1, 1, 1))).boxes == {"1": ((0, 0, 1, 1),)}
    record = annotate(folder, thing(1, box=(80, 60, 80, 60)))
    assert record.boxes == {"1": ((79, 59, 80, 60),)}
    assert record.problems == ()


def test_several_names_per_object_and_several_objects_per_chain(folder):
    record = annotate(folder, thing(1, 2, box=(1, 1, 10, 10)), thing(2, box=(21, 1, 30, 10)))
    assert record.boxes == {"1": ((0, 0, 10, 10),), "2": ((0, 0, 10, 10), (20, 0, 30, 10))}


def test_every_chain_without_a_box_has_a_reason(folder):
    marks = "[/EN#1/people a] [/EN#2/scene b] [/EN#3/other c] [/EN#4/other d] [/EN#0/notvisual e] [/EN#5/other f]"
    (folder / "Sentences" / "one.txt").write_text(marks)
    record = annotate(
        folder,
        thing(1, box=(1, 1, 5, 5)),
        thing(2, scene=1, nobndbox=0),
        thing(3, scene=0, nobndbox=1),
        thing(5, nobndbox=1, scene=0),
        thing(5, box=(3, 3, 9, 9)),  # a box outweighs a flag
    )
    assert set(record.boxes) == {"1", "5"}
    assert record.no_box == {"2": "scene", "3": "nobndbox", "4": "missing", "0": "notvisual"}


def test_another_size_than_the_image_rescales_with_a_warning(folder):
    record = annotate(folder, thing(1, box=(11, 21, 30, 40)), size=(160, 120))
    assert record.boxes == {"1": ((5, 10, 15, 20),)}
    [problem] = record.problems
    assert "160 x 120" in problem
    assert "80 x 60" in problem
    assert "another shape" in annotate(folder, thing(1, box=(11, 21, 30, 40)), size=(60, 80)).problems[0]


def test_the_upright_size_counts(folder):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (60, 80)).save(folder / "Images" / "one.jpg", exif=turned)
    assert one(folder).problems == ()


def test_no_size_is_said(folder):
    record = annotate(folder, thing(1, box=(11, 21, 30, 40)), size=None)
    assert record.boxes == {"1": ((10, 20, 30, 40),)}
    assert "gives no size" in record.problems[0]


@pytest.mark.parametrize(
    ("box", "words", "kept"),
    [
        (("a", 1, 2, 2), "is not four numbers", ()),
        ((9, 9, 3, 3), "ends before it begins", ()),
        ((200, 1, 220, 10), "is outside of", ()),
        ((71, 51, 90, 70), "exceeds", ((70, 50, 80, 60),)),
    ],
)
def test_boxes_that_cannot_be_right_are_reported(folder, box, words, kept):
    record = annotate(folder, thing(1, box=box))
    assert words in record.problems[0]
    assert record.boxes.get("1", ()) == kept
    assert (record.no_box == {}) == bool(kept)


def test_an_object_without_a_name_is_reported(folder):
    record = annotate(folder, thing(box=(1, 1, 5, 5)), thing(1, box=(1, 1, 5, 5)))
    assert record.problems == ("one.xml object 1: it has no name",)
    assert set(record.boxes) == {"1"}


# ---------------------------------------------------------------- files


def test_missing_and_broken_files_cost_one_line_each(folder):
    (folder / "Annotations" / "one.xml").write_text("<annotation><object>")
    with pytest.raises(DataError, match=r"one\.xml' is no XML"):
        one(folder)
    (folder / "Annotations" / "one.xml").unlink()
    with pytest.raises(DataError, match=r"one\.xml': there is no such file"):
        one(folder)
    (folder / "Sentences" / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"one\.txt' is not UTF-8 \(byte 3\)"):
        one(folder)
    (folder / "Sentences" / "one.txt").write_text("[/EN#1/people")
    with pytest.raises(DataError, match=r"no caption that can be read.*line 1"):
        one(folder)
    with pytest.raises(DataError, match="no id"):
        open_dataset(folder).read("../one")


def test_a_missing_image_is_left_to_whoever_opens_it(folder):
    (folder / "Images" / "one.jpg").unlink()
    record = one(folder)
    assert record.image == folder / "Images" / "one.jpg"
    assert record.boxes == {"1": ((10, 20, 30, 40),)}
    Image.new("RGB", (80, 60)).save(folder / "Images" / "one.png")
    assert one(folder).image.suffix == ".png"


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    Image.new("RGB", (80, 60)).save(outside)
    (folder / "Images" / "one.jpg").unlink()
    (folder / "Images" / "one.jpg").symlink_to(outside)
    with pytest.raises(DataError, match="is outside of"):
        one(folder)


def test_splits(folder):
    (folder / "test.txt").write_text("one\n\ntwo\none\n../../etc/passwd\n")
    dataset = open_dataset(folder)
    assert dataset.ids == ("one", "two")
    assert ["is no id" in dataset.problems[0], "twice" in dataset.problems[1]] == [True, True]
    (folder / "heldout.txt").write_text("Pink  Umbrella\n\n")
    assert open_dataset(folder).heldout == {"pink umbrella"}
    (folder / "val.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no ids"):
        open_dataset(folder, "val")
    with pytest.raises(DataError, match=r"no split 'train' .*there are: test, val\)"):
        open_dataset(folder, "train")
    with pytest.raises(DataError, match="no split"):
        open_dataset(folder, "../test")


def ids(folder, **lists):
    for name, names in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(names))


def test_all_splits_are_train_val_and_test_in_this_order(folder):
    ids(folder, test=["one", "two"], train=["four", "three"], val=["five"], mine=["six"])
    (folder / "UNRELATED_CAPTIONS").write_text("three 4\n")
    (folder / "UNRELATED_CAPTIONS.txt").write_text("three 4\n")
    data = open_dataset(folder)
    assert (data.split, data.ids) == ("all", ("four", "three", "five", "one", "two"))
    assert open_dataset(folder, "all").ids == data.ids
    assert open_dataset(folder, "mine").ids == ("six",)
    with pytest.raises(DataError, match=r"no split 'dev' .*there are: mine, test, train, val\)"):
        open_dataset(folder, "dev")
    ids(folder, val=["five", "one"])
    data = open_dataset(folder)
    assert data.ids == ("four", "three", "five", "one", "two")
    assert data.problems == ("train.txt, val.txt, test.txt: 1 ids are listed twice and count once",)


def test_without_a_list_the_sentences_count(folder):
    (folder / "test.txt").unlink()
    ids(folder, mine=["zero"])
    for name in ("b", "a", "..hidden"):
        (folder / "Sentences" / f"{name}.txt").write_text("x")
    data = open_dataset(folder)
    assert (data.split, data.ids) == ("all", ("a", "b", "one"))
    assert data.problems == ("Sentences/: '..hidden' is no id",)
    for path in (folder / "Sentences").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no list of ids \(train, val, test\) and no Sentences"):
        open_dataset(folder)


def test_a_single_list_answers_by_its_name(folder):
    assert open_dataset(folder).split == "test"
    assert open_dataset(folder, "all").split == "all"


def test_the_digest_changes_with_ids_sentences_and_boxes_alone(folder):
    seen = [open_dataset(folder).digest()]
    Image.new("RGB", (8, 6)).save(folder / "Images" / "one.jpg")
    assert open_dataset(folder).digest() == seen[0]
    annotate(folder, thing(1, box=(11, 21, 30, 41)))
    seen.append(open_dataset(folder).digest())
    (folder / "Sentences" / "one.txt").write_text("[/EN#1/people A man] stands .\n")
    seen.append(open_dataset(folder).digest())
    (folder / "Annotations" / "one.xml").unlink()
    seen.append(open_dataset(folder).digest())
    (folder / "Annotations" / "one.xml").write_bytes(b"")
    seen.append(open_dataset(folder).digest())
    ids(folder, test=["one", "two"])
    seen.append(open_dataset(folder).digest())
    (folder / "heldout.txt").write_text("a man\n")
    seen.append(open_dataset(folder).digest())
    assert len(set(seen)) == len(seen)


def test_images_open_from_the_root_wherever_the_command_runs(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    data = open_dataset(folder.name)
    assert data.boxes
    assert open_image(data.read("one").image, root=data.root).width == 80


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no layout that can be read"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nothing")


def test_the_demo_world_is_whole():
    dataset = open_dataset(demo_folder() / "scenes", "val")
    assert isinstance(dataset, Entities)
    assert len(dataset.ids) == 120
    assert dataset.heldout
    records = [dataset.read(name) for name in dataset.ids[:20]]
    assert not any(record.problems or record.no_box for record in records)
    assert all(len(record.captions) == 5 and record.image.is_file() for record in records)
    assert isinstance(records[0].image, Path)


def test_an_annotation_can_be_read_alone(folder):
    found = read_annotation(folder / "Annotations" / "one.xml")
    assert found.size == (80, 60)
