"""Scores whose values are known on paper: hand-made maps over hand-made boxes, intervals, correlations."""

from pathlib import Path

import numpy as np
import pytest

from grounding.core.boxes import inside, overlap, pixel_mask, seen_points
from grounding.core.geometry import Geometry
from grounding.datasets.records import Caption, Phrase, Record
from grounding.evaluation.pointing import Mention, best_threshold, mentions_of, score_image, summary
from grounding.evaluation.statistics import mean, pearson, ratio
from tests.support.explanations import column, explanation, noise, whole

# A image of 80 x 80 pixels under 4 x 4 patches of 20 pixels; boxes are whole patches.
BOXES = {"1": ((0, 0, 40, 20),), "2": ((40, 40, 80, 80),), "3": ((0, 60, 20, 80),)}
CELLS = {"1": np.s_[0, :2], "2": np.s_[2:, 2:], "3": np.s_[3, 0]}
MENTIONS = [
    Mention("dog", "1", ("animals",)),
    Mention("a man", "2", ("people",), heldout=True),
    Mention("ball", "3", ("other", "animals")),
]


def patches(*cells, low=0.0, grid=(4, 4)):
    made = np.full(grid, low)
    for cell in cells:
        made[cell] = 1
    return made


def score(maps, *, boxes=BOXES, mentions=MENTIONS, geometry=None, shared=False, signed=True, **options):
    """`maps`: text -> raw map."""
    geometry = geometry or whole(80, 80)
    made = {
        text: explanation(
            noise(geometry.width, geometry.height),
            labels=(text,),
            geometry=geometry,
            columns=(column("map", [raw], geometry, signed=signed, shared=shared),),
        )
        for text, raw in maps.items()
    }
    return score_image(boxes, mentions, made, **options)


def perfect():
    return {mention.text: patches(CELLS[mention.chain]) for mention in MENTIONS}


def test_perfect_maps_score_one():
    found = summary([score(perfect())["map"]], 0.5, seed=0)
    for key in ("pointing", "entity", "iou50", "swap"):
        assert found[key] == 1, key
    assert found["mean_iou"] > 0.95
    assert found["degenerate"] == 0
    assert (found["phrases"], found["swap_pairs"]) == (3, 3)
    assert {kind: part["phrases"] for kind, part in found["by_type"].items()} == {"animals": 2, "people": 1, "other": 1}
    assert found["heldout"] == {"pointing": 1.0, "ci": None, "phrases": 1}
    assert found["not_heldout"]["phrases"] == 2
    # Disjoint indicator maps: r = -sqrt(p q / ((1 - p)(1 - q))) for shares p, q of the patches.
    shares = [2 / 16, 4 / 16, 1 / 16]
    expected = [
        -np.sqrt(p * q / ((1 - p) * (1 - q)))
        for p, q in [(shares[0], shares[1]), (shares[0], shares[2]), (shares[1], shares[2])]
    ]
    assert found["caption_swap_correlation"] == pytest.approx(np.mean(expected))


def test_each_others_maps_score_zero():
    maps = perfect()
    wrong = dict(zip(maps, [*list(maps.values())[1:], maps["dog"]], strict=True))
    found = summary([score(wrong)["map"]], 0.5, seed=0)
    assert [found[key] for key in ("pointing", "entity", "iou50", "swap")] == [0, 0, 0, 0]


def test_one_map_for_all_phrases_swaps_never_and_correlates_wholly():
    found = score({mention.text: patches(CELLS["2"], low=0.1) for mention in MENTIONS}, shared=True)["map"]
    assert found.correlations == (1.0, 1.0, 1.0)
    numbers = summary([found], 0.5, seed=0)
    assert numbers["pointing"] == pytest.approx(1 / 3)
    assert numbers["swap"] == 0


def test_swap_counts_pairs_of_different_chains_and_words_once():
    twice = [*MENTIONS[:2], MENTIONS[0], Mention("a man", "3"), Mention("the dog", "1")]
    maps = perfect() | {"the dog": patches(CELLS["1"])}
    found = score(maps, mentions=twice)["map"]
    # dog+man(2), dog+man(3), man(2)+the dog, man(3)+the dog; not the two dogs, not the two men.
    assert found.swaps == (1, 0, 1, 0)
    assert len(found.phrases) == 5


def test_a_map_without_evidence_is_a_miss_and_counted():
    maps = perfect() | {"dog": -patches(CELLS["1"], low=0.5), "ball": np.ones((4, 4))}
    found = score(maps)["map"]
    assert [p.degenerate for p in found.phrases] == [True, False, True]
    assert [(p.hit, p.entity, p.overlaps[0.5], p.area) for p in found.phrases[::2]] == [(0, 0, 0, None)] * 2
    numbers = summary([found], 0.5, seed=0)
    assert numbers["degenerate"] == 2
    assert numbers["pointing"] == pytest.approx(1 / 3)
    assert numbers["swap"] == 0


def test_energy_is_the_part_of_the_heat_in_the_boxes():
    """Blocks of equal rows, so that sampling between patch centres moves nothing across y = 40."""
    upper = {"1": ((0, 0, 80, 40),), "2": ((0, 0, 40, 80), (20, 0, 60, 80))}
    mentions = [Mention("dog", "1"), Mention("a man", "2"), Mention("ball", "1"), Mention("sky", "1")]
    stripes = np.repeat([[3.0, 1.0, 0.0, 0.0]], 4, 0)  # by column
    maps = {"dog": np.full((4, 4), 2.0), "a man": stripes, "ball": -np.ones((4, 4)), "sky": stripes}
    maps["dog"][2:] = 2.0 / 3
    found = score(maps, boxes=upper, mentions=mentions)
    # Rows 3 : 1 above and below; the step between them is symmetric about y = 40: 1 / 2 + (3 / 4 - 1 / 2) * 7 / 8.
    across = np.interp((np.arange(80) + 0.5) / 20 - 0.5, np.arange(4), [3, 3, 1, 1])
    assert found["map"].phrases[0].energy == pytest.approx(across[:40].sum() / across.sum())
    assert across[:40].sum() / across.sum() == pytest.approx(1 / 2 + 1 / 4 * 7 / 8)
    along = np.interp((np.arange(80) + 0.5) / 20 - 0.5, np.arange(4), [3, 1, 0, 0])
    assert found["map"].phrases[1].energy == pytest.approx(along[:60].sum() / along.sum())  # the overlap counts once
    assert found["map"].phrases[2].energy == 0  # no evidence at all: a miss
    assert found["map"].phrases[3].energy == pytest.approx(0.5)
    assert [p.energy for p in found["random"].phrases] == [0.5, 0.75, 0.5, 0.5]
    assert [p.energy for p in found["centre"].phrases] == [None] * 4
    numbers = summary([found["map"]], 0.5, seed=0)
    assert numbers["energy"] == pytest.approx(np.mean([p.energy for p in found["map"].phrases]))
    assert summary([found["random"]], None, seed=0)["energy"] == pytest.approx(0.5625)


def test_energy_is_of_positive_heat_and_of_what_was_seen():
    geometry = Geometry.from_steps(80, 40, resized=(128, 64), crop=(32, 0, 64, 64), grid=(4, 4))  # x from 20 to 60
    boxes = {"1": ((0, 0, 40, 40),), "2": ((0, 0, 20, 40),)}
    mentions = [Mention("dog", "1"), Mention("a man", "2")]
    raw = np.repeat([[1.0, 1.0, 1.0, 1.0]], 4, 0)
    raw[3] = -5
    found = score({"dog": raw, "a man": raw}, boxes=boxes, mentions=mentions, geometry=geometry)
    assert [p.energy for p in found["map"].phrases] == [0.5, 0]
    assert [p.energy for p in found["random"].phrases] == [0.5, 0]


def test_centre_and_random_are_exact():
    boxes = {"1": ((30, 30, 50, 50),), "2": ((0, 0, 40, 20), (60, 60, 80, 80))}
    mentions = [Mention("dog", "1"), Mention("a man", "2")]
    maps = {"dog": patches((0, 0)), "a man": patches((1, 1))}
    found = score(maps, boxes=boxes, mentions=mentions)
    assert [p.hit for p in found["centre"].phrases] == [1, 0]
    # No patch centre lies strictly inside the first box (10, 30, 50, 70 are centres), three do in the second's.
    assert [p.hit for p in found["random"].phrases] == [0, 3 / 16]
    pixel = score(maps, boxes=boxes, mentions=mentions, peak="pixel")["random"]
    # Strictly inside, pixels 31 to 48 of the first box.
    assert pixel.phrases[0].hit == pytest.approx(18 * 18 / 80**2)
    assert pixel.swaps == pytest.approx([18 * 18 / 80**2 * (38 * 18 + 18 * 18) / 80**2])
    numbers = summary([found["centre"]], None, seed=0)
    assert [numbers[key] for key in ("entity", "iou50", "mean_iou", "area", "degenerate", "threshold")] == [None] * 6


def test_random_is_over_seen_patches_only():
    geometry = Geometry.from_steps(80, 40, resized=(64, 32), pad=(0, 16, 64, 64), grid=(4, 4))
    assert geometry.seen_cells.sum() == 8
    found = score({"dog": patches((1, 0))}, boxes={"1": ((0, 0, 20, 20),)}, mentions=MENTIONS[:1], geometry=geometry)
    assert found["random"].phrases[0].hit == 1 / 8
    assert found["map"].phrases[0].hit == 1
    assert found["map"].phrases[0].entity is None  # one entity is always the hottest


def test_an_entity_outside_of_what_was_seen_is_never_the_hottest():
    geometry = Geometry.from_steps(80, 40, resized=(128, 64), crop=(32, 0, 64, 64), grid=(4, 4))  # x from 20 to 60
    boxes = {"1": ((0, 0, 15, 20),), "2": ((25, 0, 35, 20),)}
    maps = {"dog": patches((0, 0)), "a man": patches((0, 0))}
    found = score(maps, boxes=boxes, mentions=[Mention("dog", "1"), Mention("a man", "2")], geometry=geometry)["map"]
    assert [p.entity for p in found.phrases] == [0, 1]


def test_area_is_the_part_of_what_was_seen_above_half_the_maximum():
    half = score({"dog": patches(np.s_[:, :2])}, mentions=MENTIONS[:1])["map"]
    assert half.phrases[0].area == 0.5
    assert score({"dog": patches((0, 0), low=0.6)}, mentions=MENTIONS[:1])["map"].phrases[0].area == 1


def test_the_pixel_peak_is_the_first_maximum():
    """Values are held constant beyond the outermost patch centres: the first maximum is the corner pixel."""
    corner = {"1": ((0, 0, 2, 2),)}
    maps, mentions = {"dog": patches((0, 0))}, [Mention("dog", "1")]
    assert score(maps, boxes=corner, mentions=mentions)["map"].phrases[0].hit == 0  # patch centre (10, 10)
    # Strictly inside: pixel 0 is on the edge of a box that starts there.
    assert score(maps, boxes=corner, mentions=mentions, peak="pixel")["map"].phrases[0].hit == 0
    lower = {"dog": patches(np.s_[2:, 2:])}
    box = {"1": ((49, 49, 52, 52),)}
    assert score(lower, boxes=box, mentions=mentions, peak="pixel")["map"].phrases[0].hit == 1  # pixel 50, 50


def test_inside_is_strict_and_for_pixels_as_published():
    boxes = [(10, 10, 20, 20), (30, 30, 40, 40)]
    points = np.array([[10, 15], [10.1, 15], [19.9, 19.9], [20, 15], [35, 35], [25, 25]])
    assert inside(points, boxes).tolist() == [False, True, True, False, True, False]
    # In the file the first box is (11, 11, 20, 20); published code tests 10 < x < 19 on pixel indices.
    pixels = np.arange(5, 25)
    found = inside(np.stack([pixels + 0.5, np.full(20, 15.5)], 1), boxes, "pixel")
    assert found.tolist() == [10 < x < 19 for x in pixels]


def test_closed_boxes_hold_their_edges():
    boxes = [(10, 10, 20, 20)]
    points = np.array([[10, 15], [20, 20], [20.1, 15], [9.9, 15]])
    assert inside(points, boxes, closed=True).tolist() == [True, True, False, False]
    # In the file the box is (11, 11, 20, 20); published code tests 10 <= x <= 19 on pixel indices.
    pixels = np.arange(5, 25)
    found = inside(np.stack([pixels + 0.5, np.full(20, 10.5)], 1), boxes, "pixel", closed=True)
    assert found.tolist() == [10 <= x <= 19 for x in pixels]
    # A box that was rescaled: every pixel whose centre lies in it.
    assert inside(np.array([[10.5, 15], [10.5, 10.5]]), [(10.3, 10, 20, 20)], "pixel", closed=True).all()


def test_overlap_and_masks():
    assert overlap((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    geometry = whole(80, 80)
    assert pixel_mask([(0, 0, 10, 10), (5, 0, 15, 10)], geometry).sum() == 150
    assert pixel_mask([(3.2, 3.2, 3.3, 3.3)], geometry).sum() == 1
    assert pixel_mask([(79.9, 79.9, 80, 80)], geometry)[79, 79]
    assert len(seen_points(geometry, "patch")) == 16
    assert len(seen_points(geometry, "pixel")) == 6400


def test_thresholds_are_chosen_by_boxes_found():
    maps = {"dog": patches(CELLS["1"]) + 0.6 * patches(CELLS["2"])}
    box = {"1": BOXES["1"], "2": ((0, 0, 80, 80),)}
    found = score(maps, boxes=box, mentions=[MENTIONS[0]], thresholds=(0.2, 0.5, 0.8))
    overlaps = found["map"].phrases[0].overlaps
    assert overlaps[0.8] > 0.5 > overlaps[0.5]
    assert best_threshold([found], "map", (0.2, 0.5, 0.8)) == 0.8
    assert summary([found["map"]], 0.2, seed=0)["iou50"] == float(overlaps[0.2] >= 0.5)


# ---------------------------------------------------------------- mentions


def test_mentions_and_why_others_are_skipped():
    def phrase(text, chain):
        return Phrase(text, 0, len(text), chain, ("people",))

    first = Caption("...", 0, (phrase("A Man", "1"), phrase("each other", "0"), phrase("the beach", "7")))
    second = Caption("...", 1, (phrase("a man", "1"), phrase("someone", "9")))
    no_box = {"0": "notvisual", "7": "scene", "9": "missing"}
    record = Record("one", Path("one.jpg"), (first, second), {"1": ((0, 0, 1, 1),)}, no_box)
    kept, skipped = mentions_of(record, "first", frozenset({"a man"}))
    assert kept == [Mention("a man", "1", ("people",), heldout=True)]
    assert skipped == {"notvisual": 1, "scene": 1}
    kept, skipped = mentions_of(record, "all")
    assert [m.heldout for m in kept] == [False, False]
    assert skipped == {"notvisual": 1, "scene": 1, "missing": 1}


# ---------------------------------------------------------------- statistics


def test_the_interval_of_a_constant_is_the_constant():
    found = mean([[0.25] * n for n in (1, 4, 2)])
    assert (found.value, found.interval, found.count) == (0.25, (0.25, 0.25), 7)


def test_the_interval_of_one_image_is_unknown_and_of_none_there_is_no_mean():
    assert mean([[1.0, 0.0]]).interval is None
    assert mean([[1.0, 0.0]]).value == 0.5
    assert mean([]) == mean([[], [None]])
    assert mean([]).value is None


def test_none_is_no_value():
    assert mean([[1.0, None], [None], [0.0]]).value == 0.5


def test_intervals_are_those_of_the_bootstrap_on_paper():
    # Two images, 1 and 0: draws are 0, 1/2, 1 with 1/4, 1/2, 1/4, so the 2.5 % and 97.5 % points are 0 and 1.
    assert mean([[1.0], [0.0]]).interval == (0, 1)
    # Many images: the normal interval, half-width 1.96 sqrt(p (1 - p) / n).
    low, high = mean([[float(i % 2)] for i in range(400)]).interval
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 400), rel=0.1)
    assert (high + low) / 2 == pytest.approx(0.5, abs=0.005)


def test_images_are_resampled_not_phrases():
    """Phrases that say the same five times over make nothing surer."""
    hits = [float(i % 3 == 0) for i in range(60)]
    assert mean([[h] * 5 for h in hits]).interval == pytest.approx(mean([[h] for h in hits]).interval)
    assert mean([[h] for h in hits], seed=1).interval != mean([[h] for h in hits], seed=2).interval


def test_ratio_of_sums():
    assert ratio([1, 2], [2, 8]).value == pytest.approx(0.3)
    assert ratio([1, 2], [2, -2]).value is None


def test_correlation():
    a = np.random.default_rng(0).normal(size=(7, 7))
    b = a + np.random.default_rng(1).normal(size=(7, 7))
    assert pearson(a, a) == 1.0
    assert pearson(a, -2 * a + 3) == pytest.approx(-1)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert pearson(a, np.full((7, 7), 0.1)) is None
