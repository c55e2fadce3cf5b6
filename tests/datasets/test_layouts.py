"""Listings of images and captions: every layout, each with its irregular cases."""

import csv
import hashlib
import json
import os
import pickle

import pytest
from PIL import Image

from grounding.core.demo import demo_lines, demo_scenes
from grounding.core.errors import DataError
from grounding.core.images import ImageError, open_image
from grounding.datasets.caption_files import token
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Caption, Dataset, Record
from grounding.evaluation.kinds import LINES, PHRASES, evaluation_of

SIGN = "A man stands behind a sign that says \" Mark ' Mom ' Finley \" ."


def images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 6)).save(folder / name)


def texts(record):
    return [(caption.line, caption.text) for caption in record.captions]


def release(folder, rows, name="captions.txt"):
    """The layout of the release: a CSV file as in RFC 4180, beside the images."""
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


# ---------------------------------------------------------------- captions.txt


def test_captions_txt_groups_rows_by_image_whatever_their_order(tmp_path):
    images(tmp_path / "Images", "a.jpg", "b.jpg")
    release(tmp_path, [("a.jpg", "one , two"), ("b.jpg", SIGN), ("a.jpg", "three"), ("b.jpg", "two\nlines")])
    data = open_dataset(tmp_path)
    assert isinstance(data, Dataset)
    assert (data.layout, data.split, data.ids, data.boxes) == ("csv", "all", ("a.jpg", "b.jpg"), False)
    assert data.root == tmp_path / "Images"
    record = data.read("a.jpg")
    assert record == Record("a.jpg", tmp_path / "Images" / "a.jpg", (Caption("one , two", 0), Caption("three", 1)))
    assert texts(data.read("b.jpg")) == [(0, SIGN), (1, "two\nlines")]
    assert open_image(record.image, root=data.root).width == 8
    assert (data.problems, data.broken) == ((), {})


def test_an_empty_caption_is_a_failure_and_keeps_its_line(tmp_path):
    release(tmp_path, [("a.jpg", "one"), ("a.jpg", ""), ("a.jpg", "  "), ("a.jpg", "four"), ("b.jpg", "")])
    data = open_dataset(tmp_path)
    record = data.read("a.jpg")
    assert texts(record) == [(0, "one"), (3, "four")]
    assert [(f.line, f.text) for f in record.failures] == [(1, ""), (2, "  ")]
    assert "empty" in record.failures[0].error
    assert len(data.read("b.jpg").failures) == 1


@pytest.mark.parametrize(
    "place",
    ["Images", "images", "flickr30k_images", "flickr30k-images", "flickr30k_images/flickr30k_images", "."],
)
def test_images_are_found_where_copies_have_them(tmp_path, place):
    images(tmp_path / place, "a.jpg")
    data = open_dataset(release(tmp_path, [("missing.jpg", "x"), ("a.jpg", "y")]))
    assert data.read("a.jpg").image.is_file()
    assert data.root.samefile(tmp_path / place)
    assert not data.read("missing.jpg").image.exists()  # whoever opens it will say so


def test_a_listing_may_name_the_folder_of_its_images(tmp_path):
    images(tmp_path / "Images", "a.jpg")
    data = open_dataset(release(tmp_path, [("Images/a.jpg", "x")]))
    assert data.read("Images/a.jpg").image.is_file()
    assert data.root == tmp_path


def test_a_relative_folder_gives_absolute_paths(tmp_path, monkeypatch):
    images(tmp_path / "data" / "Images", "a.jpg")
    release(tmp_path / "data", [("a.jpg", "x")])
    monkeypatch.chdir(tmp_path)
    data = open_dataset("data")
    assert open_image(data.read("a.jpg").image, root=data.root).height == 6


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.jpg,two, fields", "3 fields, the header has 2; a caption with the separator in it must be quoted"),
        ("a.jpg", "1 fields, the header has 2"),
        (",no picture", "it names no image"),
        ('a.jpg,"never closed', "its quotes are broken"),
        ('a.jpg,"closed" too early', "its quotes are broken"),
        ("a.jpg,\"['one', 'two']\"", "none in JSON"),
    ],
)
def test_rows_that_cannot_be_read_are_named_and_the_others_count(tmp_path, row, words):
    lines = ["image,caption", "a.jpg,first", row, "b.jpg,second", 'b.jpg,"third , last"', ""]
    (tmp_path / "captions.txt").write_text("\r\n".join(lines))
    data = open_dataset(tmp_path)
    assert [texts(data.read(name)) for name in data.ids] == [[(0, "first")], [(0, "second"), (1, "third , last")]]
    assert list(data.broken) == ["captions.txt:3"]
    assert words in data.broken["captions.txt:3"]
    assert "\n" not in data.broken["captions.txt:3"]


def test_a_broken_quote_does_not_swallow_thousands_of_rows(tmp_path):
    rows = [f"{i}.jpg,caption {i}" for i in range(5000)]
    rows[10] = '10.jpg,"an open quote'
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    data = open_dataset(tmp_path)
    assert len(data.ids) == 4999
    assert list(data.broken) == ["captions.txt:12"]


@pytest.mark.parametrize("name", ["two\nlines.jpg", 'quo"te.jpg', "it's.jpg", "dog 🐕.jpg", "-rf.jpg", "<script>.jpg"])
def test_strange_names_of_images_work(tmp_path, name):
    images(tmp_path / "Images", "plain.jpg")
    (tmp_path / "Images" / "plain.jpg").rename(tmp_path / "Images" / name)
    data = open_dataset(release(tmp_path, [(name, "x")]))
    assert data.ids == (name,)
    assert data.read(name).image.is_file()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../secret.jpg", "link.jpg", "a\0.jpg", "\0"])
def test_paths_that_leave_the_folder_are_never_given_out(tmp_path, name):
    images(tmp_path, "secret.jpg")
    home = tmp_path / "data"
    images(home / "Images", "a.jpg")
    (home / "Images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    data = open_dataset(release(home, [(name, "x"), ("a.jpg", "y")]))
    assert data.root == home / "Images"
    record = data.read(name)
    assert (record.image, record.captions) == (None, ())
    [failure] = record.failures
    assert (failure.line, failure.text) == (0, "x")  # its content is not lost
    assert len(failure.error.splitlines()) == 1
    assert data.read("a.jpg").image.is_file()


def test_absolute_paths_inside_the_folder_and_a_folder_that_is_a_link_work(tmp_path):
    images(tmp_path / "disk", "a.jpg")
    home = tmp_path / "data"
    home.mkdir()
    (home / "Images").symlink_to(tmp_path / "disk")
    inside = str(home / "Images" / "a.jpg")
    data = open_dataset(release(home, [("a.jpg", "x"), (inside, "y")]))
    for name in ("a.jpg", inside):
        assert open_image(data.read(name).image, root=data.root).width == 8


def test_a_path_that_turns_into_a_way_out_later_is_refused_on_opening(tmp_path):
    images(tmp_path, "secret.jpg")
    home = tmp_path / "data"
    images(home / "Images", "a.jpg")
    data = open_dataset(release(home, [("a.jpg", "x")]))
    path = data.read("a.jpg").image
    path.unlink()
    path.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ImageError, match="outside of") as caught:
        open_image(path, root=data.root)
    assert caught.value.status == "failed_input"


def test_encodings(tmp_path):
    (tmp_path / "captions.txt").write_bytes("image,caption\na.jpg,Bär \u2028 👍\n".encode("utf-8-sig"))
    assert texts(open_dataset(tmp_path).read("a.jpg")) == [(0, "Bär \u2028 👍")]
    (tmp_path / "captions.txt").write_bytes("image,caption\na.jpg,Bär\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"captions\.txt' is not UTF-8 \(byte 21\)"):
        open_dataset(tmp_path)
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\n", encoding="utf-16")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_dataset(tmp_path)


def test_a_listing_that_lists_nothing_says_so(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n\n")
    with pytest.raises(DataError, match=r"lists no images$"):
        open_dataset(tmp_path)
    (tmp_path / "captions.txt").write_text("image,caption\n,x\n")
    with pytest.raises(DataError, match=r"lists no images: captions\.txt:2: it names no image"):
        open_dataset(tmp_path)
    (tmp_path / "captions.txt").write_text("a.jpg,A dog .\n")
    with pytest.raises(DataError, match=r"begins with 'a\.jpg,A dog \.': expected a header"):
        open_dataset(tmp_path)


def test_ids_that_are_not_listed(tmp_path):
    with pytest.raises(DataError, match=r"'b\.jpg' is not listed"):
        open_dataset(release(tmp_path, [("a.jpg", "x")])).read("b.jpg")


def test_the_digest_is_that_of_the_file_and_data_sets_can_be_sent_to_workers(tmp_path):
    release(tmp_path, [("a.jpg", "x")])
    data = open_dataset(tmp_path)
    assert data.digest() == hashlib.sha256((tmp_path / "captions.txt").read_bytes()).hexdigest()
    again = pickle.loads(pickle.dumps(data))
    assert (again.ids, again.read("a.jpg"), again.digest()) == (data.ids, data.read("a.jpg"), data.digest())
    release(tmp_path, [("a.jpg", "y")])
    assert open_dataset(tmp_path).digest() != data.digest()


# ---------------------------------------------------------------- results.csv


KAGGLE = "image_name| comment_number| comment\n"


def kaggle(folder, *rows):
    (folder / "results.csv").write_text(KAGGLE + "\n".join(rows) + "\n", encoding="utf-8")
    return open_dataset(folder)


def test_results_csv_takes_the_number_of_a_comment_as_its_line(tmp_path):
    images(tmp_path / "flickr30k_images" / "flickr30k_images", "a.jpg")
    rows = ["a.jpg| 1| second , with a comma .", 'a.jpg| 0| " Quoted " | and barred', 'a.jpg|2|"Go" he says']
    data = kaggle(tmp_path, *rows, "b.jpg| 4| late")
    record = data.read("a.jpg")
    assert data.layout == "kaggle-csv"
    assert texts(record) == [(0, '" Quoted " | and barred'), (1, "second , with a comma ."), (2, '"Go" he says')]
    assert texts(data.read("b.jpg")) == [(4, "late")]
    assert record.image.is_file()
    assert data.problems == ()


def test_the_row_without_a_separator_is_mended_and_reported(tmp_path):
    data = kaggle(tmp_path, "2199200615.jpg| 3| A dog .", "2199200615.jpg| 4   A dog runs across the grass .")
    assert texts(data.read("2199200615.jpg")) == [(3, "A dog ."), (4, "A dog runs across the grass .")]
    assert data.broken == {}
    [problem] = data.problems
    assert problem.startswith("results.csv:3: ")
    assert "read as caption 4 of '2199200615.jpg'" in problem


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("b.jpg| A dog runs", "2 fields, the header has 3"),
        ("b.jpg 4 A dog runs", "1 fields"),
        ("b.jpg| four| A dog runs", "'four' is no number"),
        ("b.jpg| 4", "2 fields"),
        ("a.jpg| 0| again", "'a.jpg' has a caption number 0 already (results.csv:2"),
    ],
)
def test_rows_that_cannot_be_mended_are_broken(tmp_path, row, words):
    data = kaggle(tmp_path, "a.jpg| 0| A dog", row)
    assert data.ids == ("a.jpg",)
    assert words in data.broken["results.csv:3"]
    assert data.problems == ()


# ---------------------------------------------------------------- token


def test_token_with_tab_or_blank(tmp_path):
    rows = [
        "a.jpg#1\tsecond",
        "a.jpg#0 first one",
        "b#2.jpg#0\tA #1 dog\u2028",
        "c d.jpg#0\t#3 of",
        "e.jpg#0\t",
        "e.jpg#1",
    ]
    (tmp_path / "results_20130124.token").write_text("\r\n".join([*rows, "nonsense", ""]), encoding="utf-8-sig")
    data = open_dataset(tmp_path)
    assert (data.layout, data.ids) == ("token", ("a.jpg", "b#2.jpg", "c d.jpg", "e.jpg"))
    assert texts(data.read("a.jpg")) == [(0, "first one"), (1, "second")]
    assert texts(data.read("c d.jpg")) == [(0, "#3 of")]
    assert [f.line for f in data.read("e.jpg").failures] == [0, 1]
    assert list(data.broken) == ["results_20130124.token:7"]


def test_token_files_by_other_names(tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_text("a.jpg#0\tA dog , a cat .\n")
    assert texts(open_dataset(tmp_path).read("a.jpg")) == [(0, "A dog , a cat .")]
    assert token("a.jpg#0\tx\na.jpg#0\ty", "t").entries[1].number == 0


# ---------------------------------------------------------------- Karpathy's JSON


def karpathy(folder, *images, name="dataset_flickr30k.json"):
    (folder / name).write_text(json.dumps({"images": list(images), "dataset": "flickr30k"}))


def image(name, split, *raw, **more):
    sentences = [{"tokens": text.lower().split() if text else [], "raw": text, "sentid": 9} for text in raw]
    return {"filename": name, "split": split, "sentences": sentences, "imgid": 0, **more}


def test_karpathy_splits_and_raw_text(tmp_path):
    karpathy(
        tmp_path,
        image("a.jpg", "train", "Two young, White males.", None, ""),
        image("b.jpg", "test", "x"),
        image("c.jpg", "restval", "y"),
        image("d.jpg", "val"),
    )
    data = open_dataset(tmp_path)
    assert (data.layout, data.split, data.ids) == ("karpathy-json", "all", ("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    assert texts(data.read("a.jpg")) == [(0, "Two young, White males.")]
    assert [f.line for f in data.read("a.jpg").failures] == [1, 2]
    assert data.read("d.jpg").captions == ()
    assert open_dataset(tmp_path, "all").ids == data.ids
    assert open_dataset(tmp_path, "restval").ids == ("c.jpg",)
    assert open_dataset(tmp_path, "train").split == "train"
    with pytest.raises(DataError, match=r"no split 'dev' .*there are: train, test, restval, val; or all\)"):
        open_dataset(tmp_path, "dev")
    with pytest.raises(DataError, match="no split ''"):
        open_dataset(tmp_path, "")


def test_karpathy_entries_that_cannot_be_used(tmp_path):
    images(tmp_path / "val2014", "a.jpg")
    karpathy(tmp_path, image("a.jpg", "val", "x", filepath="val2014"), image("a.jpg", "val", "y"), {"split": "val"}, 3)
    data = open_dataset(tmp_path)
    assert data.ids == ("val2014/a.jpg", "a.jpg")  # the names of two files
    assert data.read("val2014/a.jpg").image.is_file()
    assert list(data.broken) == ["dataset_flickr30k.json:images[2]", "dataset_flickr30k.json:images[3]"]
    karpathy(tmp_path, image("a.jpg", "val", "x"), image("a.jpg", "val", "y"))
    data = open_dataset(tmp_path)
    assert texts(data.read("a.jpg")) == [(0, "x")]
    assert "'a.jpg' is listed already" in data.broken["dataset_flickr30k.json:images[1]"]


def test_several_listings_of_one_kind_must_be_told_apart(tmp_path):
    karpathy(tmp_path, image("a.jpg", "test", "x"))
    karpathy(tmp_path, image("c.jpg", "test", "y"), name="dataset_coco.json")
    with pytest.raises(DataError, match=r"'dataset_coco\.json', 'dataset_flickr30k\.json'\): name one of them"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, captions_file="dataset_coco.json").ids == ("c.jpg",)
    assert open_dataset(tmp_path / "dataset_coco.json").ids == ("c.jpg",)


@pytest.mark.parametrize("text", ["{", '{"images": 3}', "3", "[" * 100_000])
def test_broken_json_is_one_line(tmp_path, text):
    (tmp_path / "dataset_flickr30k.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset_flickr30k\.json") as caught:
        open_dataset(tmp_path)
    assert len(str(caught.value)) < 300


# ---------------------------------------------------------------- tables and lines of JSON


@pytest.mark.parametrize("image", ["image", "file", "file_name", "filename", "image_path", "IMAGE"])
@pytest.mark.parametrize("caption", ["caption", "text", "sentence", "captions", "raw"])
def test_columns_by_any_of_their_names(tmp_path, image, caption):
    (tmp_path / "list.csv").write_text(f'id,{caption},{image}\n7,"x , y",a.jpg\n')
    assert texts(open_dataset(tmp_path).read("a.jpg")) == [(0, "x , y")]


def test_the_delimiter_is_that_of_the_header(tmp_path):
    (tmp_path / "list.tsv").write_text("image\tcaption\na.jpg\tone , two | three\n")
    assert texts(open_dataset(tmp_path).read("a.jpg")) == [(0, "one , two | three")]
    (tmp_path / "list.tsv").write_text('image;caption\na.jpg;"one , ""two"" ; three"\n')
    assert texts(open_dataset(tmp_path).read("a.jpg")) == [(0, 'one , "two" ; three')]
    (tmp_path / "list.tsv").write_text("image:caption\na.jpg:x\n")
    with pytest.raises(DataError, match="expected a header"):
        open_dataset(tmp_path, captions_file="list.tsv")


def test_json_lists_in_quoted_cells_with_a_split_column(tmp_path):
    rows = [["raw", "sentids", "split", "filename", "img_id"]]
    rows += [[json.dumps(['Says "hi" , twice.', "Two"]), "[0, 1]", "train", "a.jpg", "0"]]
    rows += [[json.dumps(["Three", None]), "[2, 3]", "test", "b.jpg", "1"], ["[ bone ]", "[4]", "test", "c.jpg", "2"]]
    with (tmp_path / "annotations.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert texts(open_dataset(tmp_path, "train").read("a.jpg")) == [(0, 'Says "hi" , twice.'), (1, "Two")]
    data = open_dataset(tmp_path, "test")
    assert data.ids == ("b.jpg", "c.jpg")
    assert [f.line for f in data.read("b.jpg").failures] == [1]
    assert texts(data.read("c.jpg")) == [(0, "[ bone ]")]


def test_lines_of_json(tmp_path):
    images(tmp_path, "a.jpg")
    lines = [
        {"image": "a.jpg", "caption": ["one", "two"]},
        {"image": "a.jpg", "caption": "three\u2028four"},
        {"file_name": "b.jpg", "text": None},
        {"image": "c.jpg"},
        {"caption": "of nothing"},
        {"image": 3, "caption": "x"},
        [],
        {"image": "d.jpg", "caption": {"raw": "taken"}},
        {"image": "d.jpg", "caption": [7]},
        {"image": "e.jpg", "caption": "\ud800"},
        {"image": "\ud800.jpg", "caption": "x"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join([json.dumps(line) for line in lines] + ["{", "", " "]))
    data = open_dataset(tmp_path)
    assert data.ids == ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    assert texts(data.read("a.jpg")) == [(0, "one"), (1, "two"), (2, "three\u2028four")]
    assert [len(data.read(name).failures) for name in data.ids] == [0, 1, 0, 1, 1]
    assert "got NoneType" in data.read("b.jpg").failures[0].error
    assert texts(data.read("d.jpg")) == [(0, "taken")]
    assert data.read("e.jpg").failures[0].text == "\\ud800"
    assert sorted(int(place.split(":")[1]) for place in data.broken) == [5, 6, 7, 11, 12]


def test_a_list_of_objects(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([{"image": "images/a.jpg", "caption": ["x", "y"]}]))
    assert texts(open_dataset(tmp_path, captions_file="test.json").read("images/a.jpg")) == [(0, "x"), (1, "y")]


def test_splits_of_lists_that_have_none(tmp_path):
    release(tmp_path, [("a.jpg", "x")])
    assert open_dataset(tmp_path, "all").ids == ("a.jpg",)
    with pytest.raises(DataError, match=r"no split 'test' .*it has no splits"):
        open_dataset(tmp_path, "test")


def test_a_image_in_two_splits_is_reported(tmp_path):
    (tmp_path / "list.csv").write_text("image,caption,split\na.jpg,x,train\na.jpg,y,test\n")
    data = open_dataset(tmp_path)
    assert data.split == "train"
    assert "is listed already, in split 'train'" in data.broken["list.csv:3"]


def test_captions_from_elsewhere(tmp_path):
    images(tmp_path / "pictures", "a.jpg")
    release(tmp_path / "pictures", [("a.jpg", "near")])
    release(tmp_path, [("a.jpg", "far")], name="mine.csv")
    data = open_dataset(tmp_path / "pictures", captions_file=tmp_path / "mine.csv")
    assert texts(data.read("a.jpg")) == [(0, "far")]
    assert data.read("a.jpg").image.is_file()
    with pytest.raises(DataError, match=r"none\.csv': there is no such file"):
        open_dataset(tmp_path / "pictures", captions_file="none.csv")
    with pytest.raises(DataError, match="no such folder for the images of"):
        open_dataset(tmp_path / "nowhere", captions_file=tmp_path / "mine.csv")


# ---------------------------------------------------------------- labels of text lines


def test_text_lines_are_images_with_one_caption_each():
    data = open_dataset(demo_lines(), "val")
    record = data.read(data.ids[0])
    assert data.ids[0].startswith("val/")
    assert len(record.captions) == 1
    assert record.image.is_file()
    assert {name.split("/")[0] for name in open_dataset(demo_lines()).ids} == {"test", "val"}
    assert open_dataset(demo_lines() / "val").read("000.jpg").captions == record.captions
    with pytest.raises(DataError, match=r"no split 'train' .*there are: test, val"):
        open_dataset(demo_lines(), "train")


def test_a_broken_line_of_one_split_is_named_with_it(tmp_path):
    for split in ("test", "val"):
        images(tmp_path / split, "0.png")
        (tmp_path / split / "labels.jsonl").write_text('{"file": "0.png", "text": "a"}\n{"text": "b"}\n')
    data = open_dataset(tmp_path)
    assert data.ids == ("test/0.png", "val/0.png")
    assert list(data.broken) == ["test/labels.jsonl:2", "val/labels.jsonl:2"]
    digest = data.digest()
    (tmp_path / "val" / "labels.jsonl").write_text('{"file": "0.png", "text": "c"}\n')
    assert open_dataset(tmp_path).digest() != digest


# ---------------------------------------------------------------- images alone


@pytest.mark.parametrize("place", [".", "images"])
def test_a_folder_of_images_alone(tmp_path, place):
    images(tmp_path / place, "b.png", "a.JPG", ".hidden.png")
    (tmp_path / "notes.txt").write_text("nothing")
    data = open_dataset(tmp_path)
    assert (data.layout, data.ids) == ("pictures", ("a.JPG", "b.png"))
    record = data.read("b.png")
    assert (record.captions, record.failures) == ((), ())
    assert record.image.is_file()
    assert data.problems == ()
    images(tmp_path / place, "c.png")
    assert open_dataset(tmp_path).digest() != data.digest()


def test_a_table_that_could_not_be_used_is_told(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "labels.tsv").write_text("a.png\tA dog\n")
    [problem] = open_dataset(tmp_path).problems
    assert problem.startswith("'labels.tsv' is not read")


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    images(tmp_path, "a.png")
    try:
        (tmp_path / os.fsdecode(b"b\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    data = open_dataset(tmp_path)
    assert data.ids == ("a.png",)
    assert list(data.broken.values()) == ["its name is not valid Unicode"]


# ---------------------------------------------------------------- folders without a known layout


def test_an_unknown_folder_is_told_what_was_seen_and_what_is_read(tmp_path):
    for name in "abcdefg":
        (tmp_path / f"{name}.txt").write_text("")
    (tmp_path / "list.csv").write_text("name,value\n")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    message = str(caught.value)
    for words in (
        "'a.txt', 'b.txt'",
        "and 3 more",
        "captions.txt",
        "results.csv",
        "*.token",
        "dataset_*.json",
        "Parquet",
    ):
        assert words in message
    for words in ("Annotations/", "JSONL", "labels.jsonl", "images alone", "save_to_disk"):
        assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "n" * 5000, "\0", ""])
def test_what_is_no_folder_is_one_short_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        open_dataset(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    with pytest.raises(DataError):
        open_dataset(tmp_path, captions_file=name)


def test_only_data_with_boxes_are_scored(tmp_path):
    assert evaluation_of(demo_scenes()) is PHRASES
    assert evaluation_of(demo_lines()) is LINES
    images(tmp_path, "a.png")
    with pytest.raises(DataError, match="has images but no captions and no boxes"):
        evaluation_of(tmp_path)
    release(tmp_path, [("a.png", "x")])
    with pytest.raises(DataError, match="has captions but no boxes, so nothing can be scored; expected") as caught:
        evaluation_of(tmp_path)
    assert "\n" not in str(caught.value)
    assert not PHRASES.recognises(tmp_path)


def test_a_line_without_a_caption_beside_others_of_its_image_is_told(tmp_path):
    lines = [{"image": "a.jpg", "caption": "one"}, {"image": "a.jpg"}, {"image": "b.jpg"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = open_dataset(tmp_path)
    assert data.broken == {"list.jsonl:2": "no caption of 'a.jpg'"}
    assert texts(data.read("a.jpg")) == [(0, "one")]
    assert texts(data.read("b.jpg")) == []  # a row of its own: it has none at all


def test_images_in_a_folder_of_any_name_are_found(tmp_path):
    images(tmp_path / "img", "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("image,caption\na.jpg,one\n")
    data = open_dataset(tmp_path)
    assert data.root == tmp_path / "img"
    assert data.read("a.jpg").image.is_file()
