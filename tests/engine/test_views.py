"""Images in two views, tiles, ragged grids and packed tokens: explained in one batch as alone."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from grounding import Selection, explain
from grounding.core.errors import ModelError
from grounding.engine.layers import list_layers
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.third_party import COLUMNS, ROWS
from tests.support.tiled import TILE, BrightAdapter, PackedAdapter, TiledAdapter
from tests.support.tolerances import close

CAPTION = "man in red jacket"
# 2 x 2 tiles, 1 x 2 tiles, the whole alone.
SIZES = ((90, 70), (120, 50), (30, 24))
METHODS = ("gradcam", "gradcam_ln", "hirescam", "layercam", "rollout", "gradient_rollout", "relevance", "attention")


def images():
    return [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(params=[TiledAdapter, PackedAdapter])
def adapter(request):
    return request.param()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", [(0.1, 0.15), (0.85, 0.2), (0.3, 0.9), (0.95, 0.95), (0.5, 0.5)])
def test_a_bright_square_is_found_in_each_view(size, where):
    width, height = size
    image = Image.new("RGB", size)
    x, y = where[0] * width, where[1] * height
    half = max(size) / 12
    square = (x - half, y - half, x + half, y + half)
    ImageDraw.Draw(image).rectangle(square, fill="white")
    found = explain(BrightAdapter(), image, target="norm")[0]
    views = [found] if found.overview is None else [found, found.overview]
    assert len(views) == (1 if size == SIZES[2] else 2)
    for one in views:
        # A cell of the grid overlaps the square, and so does the brightest pixel.
        across, down = width / one.geometry.columns / 2, height / one.geometry.rows / 2
        u, v = one.peak
        assert square[0] - across <= u <= square[2] + across
        assert square[1] - down <= v <= square[3] + down
        heat = one.heat()
        assert heat.shape == (height, width)
        row, column = np.unravel_index(np.nanargmax(heat), heat.shape)
        assert square[0] - across <= column <= square[2] + across
        assert square[1] - down <= row <= square[3] + down


def test_a_batch_of_ragged_images_is_explained_as_each_alone(adapter):
    together = explain(adapter, images(), [[CAPTION, "red car"]] * 3, methods=METHODS)
    for image, found in zip(images(), together, strict=True):
        alone = explain(adapter, image, [CAPTION, "red car"], methods=METHODS)
        for one, other in zip(found, alone, strict=True):
            same(one, other)


def test_prepared_images_are_selected_with_their_tiles(adapter):
    chosen = adapter.prepare_images(images()).select([2, 0])
    for found, image in zip(explain(adapter, chosen, CAPTION), (images()[2], images()[0]), strict=True):
        same(found, explain(adapter, image, CAPTION))


def same(one, other):
    assert close(np.array([e.score for e in one.entries]), np.array([e.score for e in other.entries]))
    assert one.views == other.views
    for key, own in one.methods.items():
        assert close(own.maps, other.methods[key].maps), key
        assert own.status == other.methods[key].status
        assert (own.overview is None) == (other.overview is None)
        if own.overview is not None:
            assert close(own.overview, other.methods[key].overview), key
            assert own.overview_status == other.methods[key].overview_status


def test_the_maps_of_tiles_are_those_of_a_loop_over_tiles():
    """Forward and backward of the whole model by hand; tile by tile, patch by patch."""
    adapter = TiledAdapter()
    image = images()[0]
    found = explain(
        adapter, image, CAPTION, methods=["gradcam", "rollout", "relevance"], select=Selection(tokens=False)
    )
    pixels = adapter.prepare_images([image]).tensors["pixel_values"]
    seed = adapter._embed(tuple(sum(map(ord, word)) % 97 for word in CAPTION.split()))
    model, kept = adapter.model, {}
    model.config._attn_implementation = "textbook"
    vision.KEPT.clear()
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: kept.update(f=out[0]))
    embedded = model(pixels).mean(0)
    handle.remove()
    model.config._attn_implementation = "sdpa"
    for tensor in (kept["f"], *vision.KEPT):
        tensor.retain_grad()
    score = embedded / embedded.norm() @ seed
    score.backward()
    assert found.score == pytest.approx(score.item(), rel=1e-9)
    features, gradient = (t.detach().numpy() for t in (kept["f"], kept["f"].grad))
    attention = [(a.detach().numpy(), a.grad.numpy()) for a in vision.KEPT]
    for view, tiles in (("detail", range(1, 5)), ("overview", [0])):
        # The pooled gradient is the mean over the patches of the view.
        weights = np.mean([gradient[t, p] for t in tiles for p in range(TILE)], axis=0)
        expected = {"gradcam": [], "rollout": [], "relevance": []}
        for t in tiles:
            expected["gradcam"].append([features[t, p] @ weights for p in range(TILE)])
            rollout = relevance = np.eye(TILE)
            for a, g in attention:
                mean = a[t].mean(0) + np.eye(TILE)
                rollout = mean / mean.sum(-1, keepdims=True) @ rollout
                relevance = relevance + np.maximum(a[t] * g[t], 0).mean(0) @ relevance
            # The mean over all tokens of the five tiles.
            expected["rollout"].append(rollout.sum(0) / (5 * TILE))
            expected["relevance"].append(relevance.sum(0) / (5 * TILE))
        for key, of_tiles in expected.items():
            own = found.methods[key].maps[0] if view == "detail" else found.methods[key].overview[0]
            assert close(own, mosaic(of_tiles)), (key, view)


def mosaic(tiles):
    """One tile, or four in reading order, as one map."""
    grids = [np.asarray(tile).reshape(ROWS, COLUMNS) for tile in tiles]
    if len(grids) == 1:
        return grids[0]
    made = np.zeros((2 * ROWS, 2 * COLUMNS))
    for number, grid in enumerate(grids):
        row, column = divmod(number, 2)
        made[row * ROWS : (row + 1) * ROWS, column * COLUMNS : (column + 1) * COLUMNS] = grid
    return made


def test_layers_of_tiled_and_packed_models_are_listed(adapter):
    layers = list_layers(adapter, images()[0], CAPTION)
    assert [layer.path for layer in layers if layer.default] == ["blocks.1"]
    assert all(layer.live for layer in layers if layer.path.startswith("blocks.1"))


def test_attention_of_packed_images_needs_mean_pooling(monkeypatch):
    adapter = PackedAdapter()
    structure = adapter.structure("similarity")
    object.__setattr__(structure, "pooling", "cls")
    monkeypatch.setattr(adapter, "structure", lambda kind: structure)
    with pytest.raises(ModelError, match="packed images with pooling 'cls'"):
        explain(adapter, images()[0], CAPTION, methods=["rollout"])
    assert torch.is_tensor(adapter.encode_images(adapter.prepare_images(images())))
