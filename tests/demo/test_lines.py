"""The demo's text lines: drawn the same way every time, with boxes that hold their characters."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LINES = Path(__file__).resolve().parents[2] / "data/demo/lines"


def labels(split):
    return [json.loads(line) for line in (LINES / split / "labels.jsonl").read_text(encoding="utf-8").splitlines()]


def plain_style(**changes):
    from scripts.demo.lines.lines import Style

    return Style(**{"face": "DejaVuSans", "height": 64, "size": 20.0} | changes)


def draw(text, **changes):
    from scripts.demo.lines.lines import render

    return render(text, plain_style(**changes), np.random.default_rng(0))


def test_a_seed_gives_the_same_line():
    from scripts.demo.lines.lines import sample_line

    one, two = sample_line("test/1"), sample_line("test/1")
    assert one.text == two.text
    assert one.style == two.style
    assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
    assert sample_line("test/2").text != one.text


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_boxes_lie_in_the_picture_in_reading_order(difficulty):
    from scripts.demo.lines.lines import sample_line

    for number in range(60):
        line = sample_line(f"test/{difficulty}/{number}", difficulty)
        x0, y0, x1, y1 = line.boxes.T
        assert 3 <= len(line.text) == len(line.boxes) <= 16
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= line.image.width).all()
        assert (y1 <= line.image.height).all()
        assert (x1 > x0).all()
        assert (y1 > y0).all()
        assert np.allclose(x1[:-1], x0[1:])  # one begins where the one before it ends


def test_boxes_cover_the_ink():
    from scripts.demo.lines.lines import FIRST_FACES, LATER_FACES, UNSEEN_FACES

    for face in (*FIRST_FACES, *LATER_FACES, *UNSEEN_FACES):
        line = draw("Quay (7.50)", face=face)
        ink = np.asarray(line.image.convert("L")) < 128
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        # Slanted letters lean over the pen, by less than a sixth of the font size.
        lean = 64 / 32 * 20 / 6
        assert line.boxes[0, 0] - lean <= columns.min()
        assert columns.max() + 1 <= line.boxes[-1, 2] + lean
        assert line.boxes[0, 1] - 1 <= rows.min()
        assert rows.max() + 1 <= line.boxes[0, 3] + 1


def test_each_box_holds_its_own_character():
    """The ink of a line less the ink of the same line with one character changed lies in that character's box."""
    whole, changed = draw("HHHHHH", face="DejaVuSansMono"), draw("HHHxHH", face="DejaVuSansMono")
    differs = np.asarray(whole.image.convert("L")) != np.asarray(changed.image.convert("L"))
    columns = np.flatnonzero(differs.any(0))
    x0, _, x1, _ = whole.boxes[3]
    assert x0 <= columns.min()
    assert columns.max() + 1 <= x1


def test_small_text_stands_high_and_low():
    high, low = draw("Tea", size=14.0, top=0.0), draw("Tea", size=14.0, top=1.0)
    middle = high.image.height / 2
    assert high.boxes[0, 3] <= middle + 2  # nearly all in the upper half
    assert low.boxes[0, 1] >= middle - 2


def test_texts_have_no_loose_blanks():
    import random

    from scripts.demo.lines.text import ALPHABET, sample_text

    for number in range(500):
        text = sample_text(random.Random(number))
        assert text == " ".join(text.split())
        assert 3 <= len(text) <= 16
        assert set(text) <= set(ALPHABET)


@pytest.mark.parametrize(("split", "count"), [("val", 120), ("test", 400)])
def test_labels_match_the_pictures(split, count):
    found = labels(split)
    assert len(found) == count
    assert len({label["file"] for label in found}) == count
    for label in found:
        with Image.open(LINES / split / label["file"]) as picture:
            width, height = picture.size
        assert height == label["height"]
        boxes = np.array(label["chars"])
        assert boxes.shape == (len(label["text"]), 4)
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()


def test_shipped_lines_follow_from_their_seeds():
    from scripts.demo.lines.make_lines import split_lines

    for line, label in zip(split_lines("val"), labels("val"), strict=True):
        assert json.loads(json.dumps(line.label())) == {key: value for key, value in label.items() if key != "file"}


def trained(number, row):
    from scripts.demo.lines.batches import training_seed
    from scripts.demo.lines.lines import sample_line

    label = sample_line(training_seed(number, row)).label()
    return label["text"], label["size"], label["left"]


def test_no_seed_of_the_training_is_shipped():
    from scripts.demo.lines.batches import TRAIN_SEED, training_seed
    from scripts.demo.lines.make_lines import SEEDS

    assert TRAIN_SEED not in SEEDS.values()  # every seed begins with one of these numbers and a stroke
    assert len({*SEEDS.values(), TRAIN_SEED}) == 3
    assert training_seed(7, 3).startswith(f"{TRAIN_SEED}/")
    drawn = {(label["text"], label["size"], label["left"]) for split in SEEDS for label in labels(split)}
    assert len(drawn) == 520
    assert not drawn & {trained(number, row) for number in (0, 1) for row in range(48)}


@pytest.mark.parametrize("split", ["val", "test"])
def test_shipped_lines_stand_clear_of_the_border_of_the_rows(split):
    for label in labels(split):
        top, bottom = (label["chars"][0][side] * 32 / label["height"] for side in (1, 3))
        assert top < 16 + 16 / 3 + 0.1
        for row in (0, 16):
            assert top <= row + 8.1 < bottom + 0.2 or min(bottom, row + 16) - max(top, row) < 16 / 3 + 0.1


def test_the_unseen_faces_are_not_trained_on():
    from scripts.demo.lines.lines import FIRST_FACES, LATER_FACES, UNSEEN_FACES

    assert not set(UNSEEN_FACES) & {*FIRST_FACES, *LATER_FACES}
    assert {label["face"] for label in labels("test") if label["unseen_face"]} == set(UNSEEN_FACES)


def test_the_line_for_show_has_its_label():
    label = json.loads((LINES.parent / "line.json").read_text(encoding="utf-8"))
    with Image.open(LINES.parent / label["file"]) as picture:
        assert picture.size != (256, 32)
        assert np.array(label["chars"])[:, 2].max() <= picture.width


def test_the_tokenizer_keeps_every_character():
    from scripts.demo.lines.text import ALPHABET
    from scripts.demo.trocr.model import BOS, EOS, UNK, build_tokenizer

    tokenizer = build_tokenizer()
    for text in (ALPHABET, "Total $12.50", "book, 'n' a/b !", "aa  bb"):
        coded = tokenizer(text, return_offsets_mapping=True)
        ids = coded["input_ids"]
        assert len(ids) == len(text) + 2
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert UNK not in ids
        assert coded["offset_mapping"][1:-1] == [(place, place + 1) for place in range(len(text))]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("é")["input_ids"][1] == UNK


def test_the_shipped_checkpoint_reads_the_line_for_show():
    import torch
    from transformers import VisionEncoderDecoderModel

    from scripts.demo.trocr.model import build_image_processor
    from scripts.demo.trocr.score import recognise

    folder = LINES.parent / "models/trocr"
    model, info = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.demo_world
    label = json.loads((LINES.parent / "line.json").read_text(encoding="utf-8"))
    with Image.open(LINES.parent / label["file"]) as picture:
        pixels = build_image_processor()(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert recognise(model, pixels) == [label["text"]]
