"""Character spans of words, phrases and chosen tokens, also of unusual texts."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.shared.tokenization import pad, tokenize
from grounding.core.errors import ModelError, TextError
from grounding.core.printable import escape
from grounding.core.text import TokenizedText, check_text, word_spans
from tests.support import models

TOKENIZER = models.tokenizer()
CASES = {
    "man in red jacket": ["man", "in", "red", "jacket"],
    "the dog's well-known ball, red!": ["the", "dog's", "well-known", "ball", ",", "red", "!"],
    "  two   dogs ": ["two", "dogs"],
    "rock-'n'-roll": ["rock", "-'", "n", "'-", "roll"],
    "ein Mädchen läuft": ["ein", "Mädchen", "läuft"],
    "cafe\u0301 bar": ["cafe\u0301", "bar"],  # a combining accent belongs to its letter
    "红色的车": ["红色的车"],  # no blanks: one run
    "a 👩‍👩‍👧 b": ["a", "👩‍👩‍👧", "b"],  # joined by zero-width joiners
    "zero\u200bwidth": ["zero\u200bwidth"],
    "\u200bx": ["x"],
    "": [],
}


@pytest.mark.parametrize(("text", "words"), CASES.items())
def test_words_by_the_stated_rule(text, words):
    assert [text[a:b] for a, b in word_spans(text)] == words


@given(st.text(max_size=60))
def test_words_are_disjoint_in_order_and_cover_every_letter(text):
    spans = word_spans(text)
    assert all(a < b for a, b in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    covered = {i for a, b in spans for i in range(a, b)}
    assert all(i in covered for i, c in enumerate(text) if c.isalnum())
    assert not any(text[a].isspace() or text[b - 1].isspace() for a, b in spans)


def usable(text):
    """Texts that `check_text` lets through."""
    return any(c.isprintable() and not c.isspace() for c in text)


@given(st.text(min_size=1, max_size=40).filter(usable))
def test_offsets_are_spans_of_what_was_typed(text):
    tokens = tokenize(TOKENIZER, text, 400)
    for start, end in (tokens.offsets[i] for i in tokens.visible):
        assert 0 <= start < end <= len(text)
    assert tokens.ids[0] == 0
    assert tokens.ids[-1] == 1
    assert tokens.caption().positions == tokens.visible


@pytest.mark.parametrize(
    "text",
    [
        "man in red jacket",
        "unbelievably photogenic women",
        "a 👩‍👩‍👧 family",
        "cafe\u0301 红色的车",
        "</script><img onerror=x>",
        "{{7*7}} 'quoted' \"twice\"",
        "line\u2028end",
        "\x1b[31mred\x1b[0m",
    ],
)
def test_every_piece_belongs_to_the_word_it_stands_in(text):
    tokens = tokenize(TOKENIZER, text, 400)
    words = tokens.words()
    assert [text[w.start : w.end] for w in words] == [w.label for w in words]
    pieces = [i for w in words for i in w.positions]
    assert len(pieces) == len(set(pieces))
    for word in words:
        for i in word.positions:
            assert word.start <= tokens.offsets[i][0] < word.end


def test_sub_word_pieces_join_and_stay_viewable():
    tokens = tokenize(TOKENIZER, "unbelievably red", 24)
    word = tokens.words()[0]
    assert word.label == "unbelievably"
    assert word.token_id is None or len(word.positions) == 1
    assert "".join(t.label for t in tokens.tokens() if t.start < 12) == "unbelievably"


def test_phrases_are_found_whatever_their_case():
    tokens = tokenize(TOKENIZER, "Red car and red car", 24)
    first = tokens.phrase("red CAR")
    assert (first.start, first.end, first.label) == (0, 7, "Red car")
    assert first.alone
    with pytest.raises(TextError, match="is empty"):
        tokens.phrase("  ")


def test_phrases_are_whole_words():
    tokens = tokenize(TOKENIZER, "woman and man", 24)
    assert tokens.phrase("man").start == 10
    assert tokens.phrase("and man").start == 6
    with pytest.raises(TextError, match="as whole words"):
        tokens.phrase("wo")
    chinese = tokenize(TOKENIZER, "红色的车", 24)
    assert chinese.phrase("的车").start == 2


def test_phrases_behind_the_limit_are_refused():
    tokens = tokenize(TOKENIZER, "red car and red jackets", 5)
    assert tokens.read < len(tokens.text)
    with pytest.raises(TextError, match="does not read"):
        tokens.phrase("red jackets")
    assert all(word.end <= tokens.read for word in tokens.words())


def test_lower_case_that_changes_the_length_moves_nothing():
    tokens = TokenizedText("İstanbul red", (1,), ((9, 12),), (False,))
    assert tokens.phrase("RED").start == 9


def test_choice_by_text_or_index():
    tokens = tokenize(TOKENIZER, "red car and red bus", 24)
    words = tokens.words()
    assert [w.start for w in tokens.choose(["red"], words)] == [0, 12]
    assert [w.label for w in tokens.choose(["4", "car"], words)] == ["car", "bus"]
    with pytest.raises(TextError, match=r"'blue' is not in the caption; it has 0:'red', 1:'car'"):
        tokens.choose(["blue"], words)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "got NoneType"), (7, "got int"), ("\ud800", "not valid Unicode"), ("\u200b\u200b", "is empty")],
)
def test_what_is_no_text_is_refused(text, words):
    with pytest.raises(TextError, match=words):
        check_text(text)


@pytest.mark.parametrize("limit", [5, 8, 24])
@given(st.lists(st.sampled_from(["red", "car", "man", "jacket", "dogs", "unbelievably"]), min_size=1, max_size=40))
def test_cutting_keeps_both_ends_and_names_what_is_lost(limit, words):
    text = " ".join(words)
    full = tokenize(TOKENIZER, text, 10_000)
    tokens = tokenize(TOKENIZER, text, limit)
    assert len(tokens) == min(limit, len(full))
    assert (tokens.ids[0], tokens.ids[-1]) == (full.ids[0], full.ids[-1])
    assert tokens.ids[:-1] == full.ids[: len(tokens) - 1]
    if len(full) > limit:
        assert tokens.dropped
        assert text.endswith(tokens.dropped)
        assert any("cut off" in w for w in tokens.warnings)
    else:
        assert not tokens.dropped
        assert not tokens.warnings


def test_a_slow_tokenizer_is_refused():
    from adapters.shared.tokenization import check_tokenizer

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="fast tokenizer"):
        check_tokenizer(Slow())


def test_padding_is_to_the_longest_only():
    import torch

    ids, mask = pad([[0, 5, 1], [0, 1]], 9, torch.device("cpu"))
    assert ids.tolist() == [[0, 5, 1], [0, 1, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_text_shown_on_a_terminal_is_harmless():
    assert escape("\x1b[31mred\n") == "\\x1b[31mred\\n"
    assert escape("\u202egnp") == "\\u202egnp"
    assert escape("👩‍👧 é") == "👩‍👧 é"
