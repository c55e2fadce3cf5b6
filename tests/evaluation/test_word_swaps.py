"""Captions with one word swapped, and whether the true one scores higher: cases known on paper."""

import json
from pathlib import Path

import pytest

from grounding.core.errors import DataError
from grounding.core.images import open_image
from grounding.datasets.records import Caption, Phrase, Record
from grounding.evaluation.word_swaps import SWAPS_FILE, Swaps, swap_test, swapped_captions
from tests.support.images import noise
from tests.support.linear import LinearAdapter

CONTENT = {
    "groups": [["red", "blue", "orange"], ["man", "woman"], ["jacket", "hat"]],
    "combinations": ["man red jacket", "man blue jacket", "woman red jacket", "man orange jacket", "woman red hat"],
}


@pytest.fixture
def swaps(tmp_path):
    (tmp_path / SWAPS_FILE).write_text(json.dumps(CONTENT))
    return Swaps.read(tmp_path)


def record(image=Path("x.png")):
    caption = Caption(
        "A man in a red jacket and a dog", 0,
        (Phrase("A man in a red jacket", 0, 21, "1", ()), Phrase("a dog", 26, 31, "2", ())),
    )  # fmt: skip
    other = Caption("a woman in a red jacket", 1, (Phrase("a woman in a red jacket", 0, 23, "3", ()),))
    return Record("x", image, (caption, other), {}, {})


def test_one_word_changes_at_a_time_and_combinations_occur(swaps):
    assert list(swaps.variants("man in red jacket")) == [
        "woman in red jacket",
        "man in blue jacket",
        "man in orange jacket",
    ]
    assert list(swaps.variants("a dog")) == []
    assert "an orange jacket" in list(swaps.variants("man in a red jacket"))[2]  # "a orange" would give the swap away


def test_what_is_true_of_the_image_or_held_out_is_left_out(swaps):
    made = swapped_captions(record().captions[0], record(), swaps, frozenset({"a man in a blue jacket"}))
    assert made == ["A man in an orange jacket and a dog"]
    assert len(swapped_captions(record().captions[0], record(), swaps, frozenset())) == 2


def test_the_true_caption_must_score_higher(swaps, tmp_path):
    image = open_image(noise(20, 20))
    true, blue, orange = (
        "A man in a red jacket and a dog",
        "A man in a blue jacket and a dog",
        "A man in an orange jacket and a dog",
    )
    for low, high, expected in ((0, 2, [1.0, 0.0]), (2, 3, [0.0, 0.0]), (0, 0.5, [1.0, 1.0])):
        weights = {true: [[1.0] * 5] * 4, blue: [[low] * 5] * 4, orange: [[high] * 5] * 4}
        adapter = LinearAdapter(weights)
        assert swap_test(adapter, image, record(), swaps, frozenset(), None) == expected


def test_a_data_set_without_swaps_and_one_with_broken_ones(tmp_path):
    assert Swaps.read(tmp_path) is None
    for text in ("{", '{"groups": 3}', '{"groups": [], "combinations": [7]}'):
        (tmp_path / SWAPS_FILE).write_text(text)
        with pytest.raises(DataError, match=r"swaps\.json' cannot be read"):
            Swaps.read(tmp_path)
