"""Option `cells`: one flat value and colour per patch, without interpolation."""

import numpy as np
import pytest
from PIL import Image

from grounding.core.geometry import Geometry
from grounding.explanation.figures.comparison import figure
from tests.support.explanations import column, explanation, whole
from tests.support.figures import PLAIN, RAMP, images, painted, words

GEOMETRIES = {
    "squashed": Geometry.from_steps(90, 61, resized=(48, 32), grid=(4, 6)),
    "centre crop": Geometry.from_steps(200, 90, resized=(71, 32), crop=(19, 0, 32, 32), grid=(4, 4)),
    "padded": Geometry.from_steps(60, 33, resized=(40, 22), pad=(4, 9, 48, 48), grid=(5, 3)),
    "a rest that no patch reads": Geometry.from_steps(64, 64, resized=(64, 64)).with_grid(4, 4, (15, 15)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", [None, (40, 130), (3, 2)])
def test_every_pixel_has_the_value_of_its_cell(name, size):
    geometry = GEOMETRIES[name]
    raw = np.random.default_rng(0).random((geometry.rows, geometry.columns)).astype(np.float32)
    found = geometry.to_original(raw, size, cells=True)
    height, width = size or (geometry.height, geometry.width)
    for row, column_ in np.ndindex(height, width):
        x, y = (column_ + 0.5) * geometry.width / width, (row + 0.5) * geometry.height / height
        cell = geometry.cell_at(x, y)
        if cell is None:
            assert np.isnan(found[row, column_]) or size == (3, 2)  # a thin part may have no pixel centre
        else:
            assert found[row, column_] == raw[cell], (row, column_, cell)


def test_a_cell_that_is_not_finite_does_not_spread():
    geometry = whole(40, 40, 2, 2)
    found = geometry.to_original(np.array([[1.0, np.nan], [2.0, 3.0]]), cells=True)
    assert (found[:20, :20] == 1).all()
    assert np.isnan(found[:20, 20:]).all()
    assert (found[20:, 20:] == 3).all()


@pytest.mark.parametrize("options", [{}, {"signed": True}])
@pytest.mark.parametrize("opacity", [1.0, 0.6])
def test_a_cell_has_one_colour(options, opacity):
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    made = explanation(
        image, labels=("x",), geometry=whole(64, 64), columns=[column("gradcam", RAMP, whole(64, 64), signed=True)]
    )
    flat = painted(made, cells=True, opacity=opacity, **options)
    smooth = painted(made, opacity=opacity, **options)
    blocks = flat.reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 256, 3)
    assert (blocks == blocks[:, :1]).all()
    # In the middle of a cell both are equal.
    assert np.abs(flat[8::16, 8::16] - smooth[8::16, 8::16]).max() <= 12
    assert len(np.unique(smooth[0], axis=0)) > len(np.unique(flat[0], axis=0))


def test_the_figure_draws_and_names_cells():
    made = explanation(columns=None)
    shown = figure(made, layout="panels", cells=True, **PLAIN)
    heat = images(shown)["heat:gradcam:0"]
    assert len(np.unique(heat.reshape(-1, 3), axis=0)) <= 16
    assert "no interpolation" in words(shown)
    assert "no interpolation" not in words(figure(made, layout="panels", **PLAIN))
