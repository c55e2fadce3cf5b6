"""Explanations with a second view: access, files, figures and overlays; those with one view are as before."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from grounding import Selection, explain
from grounding.core.errors import GroundingError
from grounding.explanation.explanation import Explanation
from grounding.explanation.figures import class_comparison
from grounding.explanation.storage import arrays, listed, to_json
from tests.support.explanations import noise
from tests.support.stored import edited, names, strict
from tests.support.tiled import TiledAdapter, one_view
from tests.support.tolerances import close

METHODS = ["gradcam", "rollout", "relevance"]


@pytest.fixture(scope="module")
def found():
    return explain(TiledAdapter(), noise(90, 70), "man in red", methods=METHODS)


def gids(figure):
    return [image.get_gid() for image in figure.axes[0].images]


def test_the_map_of_the_second_view_is_beside_the_first(found):
    assert list(found.views) == ["detail", "overview"]
    small = found.map("red", "relevance").overview
    assert small.raw.shape == (3, 5)
    assert found.map("red", "relevance").raw.shape == (6, 10)
    assert small.heat().shape == (70, 90)
    assert small.entry.label == "red"
    assert small.overview is None
    index = found.index("red")
    assert np.array_equal(small.raw, found.methods["relevance"].overview[index])
    # All entries share one map of rollout, in each view.
    assert np.array_equal(found.map("red", "rollout").overview.raw, found.methods["rollout"].overview[0])
    assert one_view(found)["red"].overview is None


def test_both_views_are_saved_and_loaded(found, tmp_path):
    # A status that the values do not tell: it is stored, not computed again.
    own = found.methods["gradcam"]
    status = (replace(own.overview_status[0], status="degenerate", reason="why"), *own.overview_status[1:])
    made = replace(found, methods={**found.methods, "gradcam": replace(own, overview_status=status)})
    made.save(tmp_path / "out", ["npz", "json"])
    loaded = Explanation.load(tmp_path / "out")
    assert loaded.views == made.views
    for key, one in loaded.methods.items():
        for name in ("maps", "overview"):
            assert getattr(one, name).tobytes() == getattr(made.methods[key], name).tobytes()
        assert (one.status, one.overview_status) == (made.methods[key].status, made.methods[key].overview_status)
    content = strict((tmp_path / "out" / "explanation.json").read_text())
    assert [view["name"] for view in content["views"]] == ["detail", "overview"]
    assert content["views"][0]["geometry"] == content["geometry"]
    assert content["entries"][0]["maps"]["gradcam"]["overview"]["reason"] == "why"
    with np.load(tmp_path / "out" / "maps.npz") as archive:
        assert np.array_equal(archive["maps/relevance/overview"], made.methods["relevance"].overview)
        assert archive["geometry/overview/rows"] == 3
        assert archive["seen/overview"].tolist() == [0, 0, 90, 70]


def test_one_view_leaves_no_trace_in_the_files(found):
    one = one_view(found)
    assert not [name for name in arrays(one) if "overview" in name]
    text = json.dumps(to_json(one))
    assert "views" not in text
    assert "overview" not in text


def test_maps_of_another_size_than_their_view_are_refused(found, tmp_path):
    found.save(tmp_path / "out", ["npz", "json"])
    edited(tmp_path / "out", lambda content: content["views"][1]["geometry"].update(rows=4))
    with pytest.raises(GroundingError, match=r"maps of 'gradcam' are float32 \(4, 3, 5\), not floating point \(4, 4"):
        Explanation.load(tmp_path / "out")


def test_the_overview_is_drawn_in_the_column_beside(found):
    shared = ["image", "overlay:rollout:0", "overview:rollout:0"]
    rows = [
        f"{kind}:{key}:{i}" for i in range(4) for key in ("gradcam", "relevance") for kind in ("overlay", "overview")
    ]
    assert gids(found.figure()) == ["bar", *shared, *rows]
    texts = [text.get_text() for text in found.figure().axes[0].texts]
    assert texts.count("overview") == len(METHODS)
    assert any("low-resolution view" in text for text in texts)
    assert "overview" not in " ".join(text.get_text() for text in one_view(found).figure().axes[0].texts)
    panels = gids(found.figure(layout="panels"))
    assert panels[1:5] == ["image", "heat:rollout:0", "overlay:rollout:0", "overview:rollout:0"]
    assert sum(gid.startswith("overview") for gid in panels) == 1 + 2 * 4


def test_a_scale_per_caption_is_one_per_view(found):
    texts = [text.get_text() for text in found.figure(scale="caption").axes[0].texts]
    scales = [text for text in texts if text.startswith("scale")]
    assert len(scales) == 2 * len(METHODS)
    assert len(set(scales)) > len(METHODS)


def test_the_panel_is_the_heat_of_the_second_view_without_marks(found):
    image = next(one for one in found.figure(opacity=1.0).axes[0].images if one.get_gid() == "overview:gradcam:0")
    drawn = np.asarray(image.get_array())
    marked = next(one for one in found.figure(opacity=1.0).axes[0].images if one.get_gid() == "overlay:gradcam:0")
    white = [(np.asarray(panel) == 255).all(-1).sum() for panel in (drawn, marked.get_array())]
    assert white[0] < white[1]
    heat = found[0].overview.heat(drawn.shape[:2])
    assert np.corrcoef(heat.ravel(), drawn.sum(-1).ravel())[0, 1] > 0.95


def test_images_with_and_without_a_second_view_share_a_figure(found):
    other = explain(TiledAdapter(), noise(30, 24), "man in red", methods=METHODS)
    assert other.overview is None
    drawn = gids(class_comparison.figure([found, other]))
    assert sum(gid.startswith("overview") for gid in drawn) == 3 * 4


def test_overlays_of_both_views_have_their_names(found, tmp_path):
    saved = found.save(tmp_path / "out", ["png", "json"], per_token=True)
    assert saved["overlay:3:gradcam"].name == "03_red-gradcam.png"
    assert saved["overview:3:gradcam"].name == "03_red-gradcam-overview.png"
    assert listed(saved)["overviews"]["3"]["relevance"].endswith("03_red-relevance-overview.png")
    with Image.open(saved["overlay:3:gradcam"]) as one, Image.open(saved["overview:3:gradcam"]) as other:
        assert one.size == other.size
        assert one.tobytes() != other.tobytes()
    # A later result without overlays removes them.
    found.save(tmp_path / "out", ["json"])
    assert names(tmp_path / "out") == ["explanation.json", "picture.png"]


def test_the_only_entry_of_an_image_has_all_overlays(tmp_path):
    made = explain(TiledAdapter(), noise(90, 70), target="norm", methods=METHODS)
    assert [(entry.label, entry.kind) for entry in made.entries] == [("image", "image")]
    assert (made.caption, made.token_target, made.warnings) == ("", None, ())
    saved = made.save(tmp_path / "out", per_token=True)
    assert saved["overlay:0:rollout"].name == "00_image-rollout.png"
    assert saved["overview:0:rollout"].name == "00_image-rollout-overview.png"
    texts = [text.get_text() for text in made.figure().axes[0].texts]
    assert "Score of the image: its norm, which no text can change." in texts
    assert not [text for text in texts if "independent" in text or "all entries" in text or "leave-one-out" in text]
    loaded = Explanation.load(tmp_path / "out")
    assert close(loaded["image"].raw, made["image"].raw)
    # A text is not read.
    given = explain(TiledAdapter(), noise(90, 70), "red car", target="norm", select=Selection(phrases=["red"]))
    assert given.entries == made.entries
