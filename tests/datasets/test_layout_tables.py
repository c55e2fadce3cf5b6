"""Tables of the library `datasets`: Parquet files, saved folders, names on the hub. No test uses the network."""

import io
import json
import pickle

import datasets
import huggingface_hub
import pytest
from PIL import Image

from grounding.core.errors import DataError
from grounding.datasets import huggingface
from grounding.datasets.open import open_dataset
from grounding.datasets.records import Dataset

TEXT = datasets.Value("string")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(width):
    file = io.BytesIO()
    Image.new("RGB", (width, 6)).save(file, "PNG")
    return file.getvalue()


def table(**columns):
    """Three images, 1, 2 and 3 pixels wide; the columns replace those of the usual release (None: left out)."""
    usual = {
        "image": [{"bytes": png(i), "path": None} for i in (1, 2, 3)],
        "caption": [["one", "two"], ["three", None, ""], ["four"]],
        "split": ["train", "test", "test"],
        "filename": ["a.jpg", "b.jpg", "c.jpg"],
        "img_id": ["10", "11", "12"],
    }
    kept = {name: values for name, values in (usual | columns).items() if values is not None}
    made = datasets.Dataset.from_dict(kept)
    return made.cast_column("image", datasets.Image()) if "image" in kept else made


def width(record):
    return Image.open(io.BytesIO(record.image)).width


def texts(record):
    return [(caption.line, caption.text) for caption in record.captions]


def check(data, split="all", ids=("a.jpg", "b.jpg", "c.jpg")):
    assert isinstance(data, Dataset)
    assert (data.layout, data.split, data.ids, data.boxes, data.root) == ("datasets", split, ids, False, None)
    # Read in another order than stored.
    assert [width(data.read(name)) for name in reversed(ids)] == [ord(name[0]) - 96 for name in reversed(ids)]


# ---------------------------------------------------------------- files


def test_a_parquet_file_whose_one_split_holds_everything(tmp_path):
    table().to_parquet(tmp_path / "test-00000-of-00001.parquet")
    for place in (tmp_path, tmp_path / "test-00000-of-00001.parquet"):
        check(open_dataset(place))
        check(open_dataset(place, "test"), "test", ("b.jpg", "c.jpg"))
        check(open_dataset(place, "train"), "train", ("a.jpg",))
        with pytest.raises(DataError, match=r"^no split 'val' .*there are: train, test; or all\)"):
            open_dataset(place, "val")
    data = open_dataset(tmp_path)
    assert texts(data.read("a.jpg")) == [(0, "one"), (1, "two")]
    assert texts(data.read("b.jpg")) == [(0, "three")]
    assert [f.line for f in data.read("b.jpg").failures] == [1, 2]


def test_splits_by_the_names_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-9ae3f")):
        table(split=None).select([i]).to_parquet(tmp_path / "data" / f"{name}.parquet")
    check(open_dataset(tmp_path))
    check(open_dataset(tmp_path, "train"), "train", ("a.jpg", "b.jpg"))
    check(open_dataset(tmp_path, "test"), "test", ("c.jpg",))


def test_a_file_without_a_split(tmp_path):
    table(split=None).to_parquet(tmp_path / "[odd] name.parquet")
    check(open_dataset(tmp_path / "[odd] name.parquet"))
    with pytest.raises(DataError, match="it has no splits"):
        open_dataset(tmp_path, "test")
    table(split=None).to_parquet(tmp_path / "validation.parquet")
    check(open_dataset(tmp_path / "validation.parquet"), "validation")


def test_what_save_to_disk_wrote(tmp_path):
    table().save_to_disk(tmp_path / "one")
    check(open_dataset(tmp_path / "one"))
    whole = table(split=None)
    datasets.DatasetDict(train=whole.select([0]), val=whole.select([1, 2])).save_to_disk(tmp_path / "several")
    check(open_dataset(tmp_path / "several"))
    check(open_dataset(tmp_path / "several", "val"), "val", ("b.jpg", "c.jpg"))


def test_other_parquet_files_below_are_left_alone(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "runs").mkdir()
    table().to_parquet(tmp_path / "runs" / "part-00000.parquet")
    assert open_dataset(tmp_path).layout == "pictures"
    (tmp_path / "captions.txt").write_text("image,caption\na.png,x\n")
    table().to_parquet(tmp_path / "test.parquet")
    assert open_dataset(tmp_path).layout == "csv"


def test_broken_files_are_one_line_each(tmp_path, capfd):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="cannot be opened") as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "test.parquet").unlink()
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be opened"):
        open_dataset(tmp_path)
    assert "Traceback" not in "".join(capfd.readouterr())


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("caption", ["raw", "captions", "sentences", "text", "caption", "sentence"])
def test_captions_by_any_of_their_names_also_as_one_text(tmp_path, caption):
    table(**{"caption": None, caption: ["x", "y", None]}).to_parquet(tmp_path / "test.parquet")
    data = open_dataset(tmp_path)
    assert texts(data.read("b.jpg")) == [(0, "y")]
    assert "got NoneType" in data.read("c.jpg").failures[0].error


def test_rows_with_one_caption_each_are_grouped(tmp_path):
    table(caption=["x", "y", "z"], filename=["a.jpg", "b.jpg", "a.jpg"], split=None).to_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path)
    assert data.ids == ("a.jpg", "b.jpg")
    assert texts(data.read("a.jpg")) == [(0, "x"), (1, "z")]
    assert width(data.read("a.jpg")) == 1


def test_rows_that_repeat_a_image_with_its_captions_are_reported(tmp_path):
    table(filename=["a.jpg", "b.jpg", "a.jpg"]).to_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path)
    assert data.ids == ("a.jpg", "b.jpg")
    assert data.broken == {"row 2": "'a.jpg' is listed already (row 0)"}


def test_ids_without_file_names(tmp_path):
    table(filename=None).to_parquet(tmp_path / "t.parquet")
    assert open_dataset(tmp_path).ids == ("10", "11", "12")
    table(filename=None, img_id=[7, 8, None]).to_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path)
    assert data.ids == ("7", "8")
    assert data.broken == {"row 2": "it names no image"}
    bare = table(filename=None, img_id=None)
    bare.to_parquet(tmp_path / "t.parquet")
    assert open_dataset(tmp_path).ids == ("0", "1", "2")
    assert open_dataset(tmp_path, "test").ids == ("1", "2")  # the same as in the whole
    assert width(open_dataset(tmp_path, "test").read("2")) == 3
    datasets.DatasetDict(train=bare, val=bare).remove_columns("split").save_to_disk(tmp_path / "several")
    assert open_dataset(tmp_path / "several", "val").ids == ("val-0", "val-1", "val-2")


def test_images_as_bytes_alone_and_sentences_as_objects(tmp_path):
    rows = {"image": [png(1)], "filename": ["a.jpg"], "sentences": [[{"raw": "x", "sentid": 3}]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path)
    check(data, ids=("a.jpg",))
    assert texts(data.read("a.jpg")) == [(0, "x")]


def test_images_that_are_only_paths_stay_inside(tmp_path):
    home = tmp_path / "data"
    home.mkdir()
    Image.new("RGB", (5, 6)).save(home / "a.jpg")
    Image.new("RGB", (5, 6)).save(tmp_path / "secret.jpg")
    paths = ["a.jpg", "../secret.jpg", None]
    # As plain structs: writing a column of images would store the bytes of the files in it.
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "caption": ["x", "y", "z"]}
    datasets.Dataset.from_dict(rows | {"filename": ["1", "2", "3"]}).to_parquet(home / "t.parquet")
    data = open_dataset(home)
    assert data.root == home
    assert data.read("1").image == home / "a.jpg"
    for name, words, caption in (("2", "is outside of", "y"), ("3", "has no image in its table", "z")):
        record = data.read(name)
        assert record.image is None
        [failure] = record.failures
        assert words in failure.error
        assert failure.text == caption
    with pytest.raises(DataError, match="is not listed"):
        data.read("4")


def test_images_are_never_decoded(tmp_path):
    features = datasets.Features(image=datasets.Image(), caption=TEXT)
    broken = {"image": [{"bytes": b"no picture", "path": None}], "caption": ["x"]}
    datasets.Dataset.from_dict(broken, features=features).to_parquet(tmp_path / "t.parquet")
    assert open_dataset(tmp_path).read("0").image == b"no picture"


def test_columns_that_are_missing(tmp_path):
    table(caption=None).to_parquet(tmp_path / "t.parquet")
    data = open_dataset(tmp_path)
    assert data.read("a.jpg").captions == ()
    assert data.problems == ("no captions: the columns are image, split, filename, img_id",)
    table(image=None).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no column of images \(there are: caption, split, filename, img_id\)"):
        open_dataset(tmp_path)


def test_the_digest_is_that_of_the_captions_and_workers_get_the_same(tmp_path):
    table().to_parquet(tmp_path / "test.parquet")
    data = open_dataset(tmp_path)
    table().save_to_disk(tmp_path / "saved")
    assert open_dataset(tmp_path / "saved").digest() == data.digest()
    again = pickle.loads(pickle.dumps(data))
    assert again.read("b.jpg") == data.read("b.jpg")
    table(caption=[["one", "two"], ["three", None, ""], ["five"]]).to_parquet(tmp_path / "test.parquet")
    assert open_dataset(tmp_path).digest() != data.digest()
    assert texts(open_dataset(tmp_path).read("c.jpg")) == [(0, "five")]


# ---------------------------------------------------------------- the hub


@pytest.fixture
def answers(monkeypatch):
    """A replacement of `load_dataset`: records its arguments, and returns a table or raises an error."""
    asked = []

    def load_dataset(name, **how):
        asked.append((name, how, huggingface_hub.constants.HF_HUB_OFFLINE))
        if isinstance(answers.found, Exception):
            raise answers.found
        return answers.found

    def answers():
        return asked

    answers.found = datasets.DatasetDict(test=table())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answers


def test_names_on_the_hub(answers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(open_dataset("hf:owner/name"))
    check(open_dataset("owner/name", "train"), "train", ("a.jpg",))
    check(open_dataset("hf:owner/name@refs/convert/parquet"))
    assert [(name, how) for name, how, _ in answers()] == [
        ("owner/name", {"revision": None}),
        ("owner/name", {"revision": None}),
        ("owner/name", {"revision": "refs/convert/parquet"}),
    ]
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match="it is empty"):
        open_dataset("owner/name")  # a folder comes first
    for wrong in ("hf:name", "hf:", "hf:../x/y"):
        with pytest.raises(DataError, match="is no name on the hub"):
            open_dataset(wrong)
    with pytest.raises(DataError, match=r"^no split 'val'"):
        open_dataset("hf:owner/name", "val")
    with pytest.raises(DataError, match="there is no such folder"):
        open_dataset("./nowhere")


def test_a_image_that_is_only_a_path_on_another_machine(answers):
    features = datasets.Features(image=datasets.Image(decode=False), caption=TEXT)
    rows = {"image": [{"bytes": None, "path": "/home/me/a.jpg"}], "caption": ["x"]}
    answers.found = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features))
    [failure] = open_dataset("hf:owner/name").read("0").failures
    assert "only the path '/home/me/a.jpg'" in failure.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "add @refs/convert/parquet"),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "no answer from the hub"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't\nexist on the Hub"), "doesn't exist on the Hub"),
        (ValueError("Config name is missing.\nPlease pick one"), "Config name is missing. Please pick one"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_the_hub_cannot_give_is_one_line(answers, error, words):
    answers.found = error
    with pytest.raises(DataError, match="data set 'owner/name' cannot be opened") as caught:
        open_dataset("hf:owner/name")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_costs_no_retries(answers, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class Session:
        def head(self, *args, **how):
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    open_dataset("hf:owner/name")
    assert answers()[-1][2] is True
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_off_line_without_a_cache_is_one_line():
    with pytest.raises(DataError, match=r"there is no folder 'no/such', and data set .*no answer from the hub"):
        open_dataset("no/such")


def test_the_library_is_left_as_it_was(tmp_path):
    table().to_parquet(tmp_path / "test.parquet")
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    open_dataset(tmp_path)
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before
    assert not huggingface.recognises(tmp_path / "nothing")
    assert json.dumps(open_dataset(tmp_path).ids)
