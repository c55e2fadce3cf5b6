"""The oracles of LeGrad, Grad-ECLIP, occlusion and RISE, on cases that are known on paper and against the models."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import models
from tests.support.oracles import perturbation, towers
from tests.support.pooled import siglip_model
from tests.support.tolerances import ORACLE, SLOPE, close

SIDE, PATCH = 16, 8


def made(kind, layers=3, detach=False):
    """A tower with one image, and a text embedding of length 1."""
    model = models.clip_model(2, SIDE, PATCH, layers) if kind == "clip" else siglip_model(layers)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    text = torch.randn(16 if kind == "clip" else 32, generator=generator, dtype=torch.float64)
    return model, pixels, towers.Tower(model, pixels, detach), text / text.norm()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("detach", [False, True])
def test_the_written_out_tower_is_the_model(kind, detach):
    model, pixels, tower, text = made(kind, detach=detach)
    states = tower.inputs()
    image = model.get_image_features(pixels).pooler_output[0].detach()
    found = tower.final(states[-1], text)[0]
    assert close(found.detach(), image @ text / image.norm(), ORACLE)
    hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states
    for state, expected in zip(states, hidden, strict=True):
        assert close(state, expected[0].detach(), ORACLE)
    if kind == "siglip":
        normed = tower.norm(model.vision_model.post_layernorm, states[-1])
        _, weights = model.vision_model.head.attention(
            model.vision_model.head.probe, normed[None], normed[None], average_attn_weights=False
        )
        assert close(tower.pool(normed).weights.detach(), weights[0].detach(), ORACLE)


def test_legrad_is_the_slope_of_a_blocks_own_score():
    """By differences, one attention weight moved at a time, nothing renormalised."""
    _, _, tower, text = made("clip", layers=2)
    z, number, step = tower.inputs()[1], 1, 1e-5
    block = tower.blocks[number]
    found = tower.block(number, z)
    value = tower.heads_of(found.value)

    @torch.no_grad()
    def score(weights):
        joined = torch.cat([a @ v for a, v in zip(weights, value, strict=True)], -1)
        x = z + block.self_attn.out_proj(joined)
        x = x + tower.feed_forward(block.mlp, tower.norm(block.layer_norm2, x))
        return tower.score(tower.norm(tower.vision.post_layernorm, x.mean(0)), text).item()

    weights = found.weights.detach()
    slopes = np.zeros(weights.shape)
    for place in itertools.product(*map(range, weights.shape)):
        up, down = weights.clone(), weights.clone()
        up[place] += step
        down[place] -= step
        slopes[place] = (score(up) - score(down)) / (2 * step)
    expected = np.maximum(slopes, 0).mean((0, 1))[1:]
    assert close(towers.legrad(tower, text, start=1), expected, SLOPE)
    assert (slopes < 0).any()


def test_legrad_is_the_mean_of_its_blocks():
    _, _, tower, text = made("clip")
    single = []
    for number in range(3):
        tower.blocks = tower.vision.encoder.layers[: number + 1]
        single.append(towers.legrad(tower, text, start=number))
    tower.blocks = tower.vision.encoder.layers
    assert close(towers.legrad(tower, text), sum(single) / 3)
    assert close(towers.legrad(tower, text, start=1), sum(single[1:]) / 2)


def test_legrad_of_the_cls_token_reads_one_row():
    """Of the last block this is the model's own score: its gradient, and only in the row of the CLS token."""
    _, _, tower, text = made("clip")
    last = tower.block(2, tower.inputs()[2].requires_grad_())
    [gradient] = torch.autograd.grad(tower.final(last.output, text)[0], last.weights)
    assert not gradient[:, 1:].any()
    assert close(
        towers.legrad(tower, text, start=2, pooling="cls"), gradient[:, 0, 1:].clamp(min=0).mean(0) / len(gradient[0])
    )


@pytest.mark.parametrize("final_norm", [True, False])
def test_legrad_of_an_attention_pooling_by_its_values(final_norm):
    """The pooling is sum_p A_hp v_hp: ds / dA_hp = g_h . v_hp, with g the gradient of its output."""
    _, _, tower, text = made("siglip")
    z = tower.inputs()[-1].requires_grad_()
    pool = tower.pool(tower.norm(tower.vision.post_layernorm, z) if final_norm else z)
    [g] = torch.autograd.grad(tower.score(pool.output, text), pool.joined)
    g, value = tower.heads_of(g)[:, 0].numpy(), tower.heads_of(pool.value).detach().numpy()
    expected = [np.mean([max(g[h] @ value[h, p], 0.0) for h in range(tower.heads)]) for p in range(len(z))]
    assert close(towers.legrad_pool(tower, text, start=2, final_norm=final_norm), expected)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_where_attention_cannot_change_the_score_legrad_is_zero(kind):
    """Without an output projection nothing that attention gathers goes on."""
    model, _, tower, text = made(kind)
    own = [model.vision_model.head.attention] if kind == "siglip" else [b.self_attn for b in tower.blocks]
    with torch.no_grad():
        for attention in own:
            attention.out_proj.weight.zero_()
    found = towers.legrad(tower, text) if kind == "clip" else towers.legrad_pool(tower, text)
    assert not found.any()


def test_positive_mean_of_one_head_and_two_patches():
    assert towers.positive_mean(np.array([[[1.0, -2.0], [3.0, 4.0]]])).tolist() == [2.0, 2.0]


def test_grad_eclip_of_one_head_and_two_patches():
    """q = (1, 0): cosines 1 and 0 are weights 1 and 0, so the second patch has nothing."""
    gradient, query = np.array([2.0, -1.0]), np.array([1.0, 0.0])
    value, key = np.array([[3.0, 1.0], [4.0, 4.0]]), np.array([[5.0, 0.0], [0.0, 2.0]])
    assert towers.grad_eclip(gradient, value, query, key).tolist() == [5.0, 0.0]
    assert towers.grad_eclip(gradient, value, query, 2 * key[:1].repeat(2, 0)).tolist() == [5.0, 4.0]  # keys alike
    # One channel a head: cosines 1 and 0/0 are no case; of heads (1, 1) and (1, -1) the second weighs 1 and 0.
    query, key = np.array([1.0, 1.0]), np.array([[1.0, 1.0], [1.0, -1.0]])
    assert towers.grad_eclip(gradient, value, query, key, heads=2).tolist() == [5.0, 8.0]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("detach", [False, True])
def test_grad_eclip_by_the_gradient_of_the_attention(kind, detach):
    """sum_c g_c v_pc over a head's channels is ds / dA of that head: its map is weighted attention gradients."""
    _, _, tower, text = made(kind, detach=detach)
    states = tower.inputs()
    z = states[-1 if kind == "siglip" else -2].requires_grad_()
    if kind == "siglip":
        found = tower.pool(tower.norm(tower.vision.post_layernorm, z))
        score = tower.score(found.output, text)
    else:
        found = tower.block(2, z)
        score = tower.final(found.output, text)[0]
    gradient = torch.autograd.grad(score, found.weights)[0][:, 0, tower.prefix :].numpy()
    query, key = found.query.detach().numpy()[0], found.key.detach().numpy()[tower.prefix :]
    assert close(towers.grad_eclip_of(tower, text, "plain"), gradient.sum(0))

    def weights(q, keys):
        cosines = keys @ q / np.linalg.norm(keys, axis=1) / np.linalg.norm(q)
        return (cosines - cosines.min()) / np.ptp(cosines)

    assert close(towers.grad_eclip_of(tower, text), weights(query, key) * gradient.sum(0))
    heads = zip(query.reshape(4, -1), key.reshape(len(key), 4, -1).swapaxes(0, 1), gradient, strict=True)
    assert close(towers.grad_eclip_of(tower, text, "heads"), sum(weights(q, k) * g for q, k, g in heads))


def test_published_grad_eclip_explains_another_score():
    """Its single head of full width is each head with the same weights, which the model does not have."""
    _, _, tower, text = made("clip")
    z = tower.inputs()[2]
    own, single = tower.block(2, z), tower.block(2, z, single=True)
    assert single.weights.shape == (1, 5, 5)
    scores = [tower.final(found.output, text)[0].item() for found in (own, single)]
    assert abs(scores[0] - scores[1]) > 1e-4
    repeated = torch.cat([single.weights[0] @ v for v in tower.heads_of(own.value)], -1)
    assert close(single.joined.detach(), repeated.detach())
    published, plain = (towers.grad_eclip_of(tower, text, form) for form in ("published", "model"))
    assert np.abs(published - plain).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_ln_rule_changes_gradients_alone(kind):
    _, _, tower, text = made(kind)
    ruled = made(kind, detach=True)[2]
    z = tower.inputs()[-1]
    assert tower.final(z, text)[0].item() == ruled.final(z, text)[0].item()
    map_of = towers.legrad if kind == "clip" else towers.legrad_pool
    plain, found = map_of(tower, text), map_of(ruled, text)
    assert np.abs(plain - found).max() > 0.01 * np.abs(plain).max()


LINEAR = SimpleNamespace(
    weights=np.arange(1.0, 1 + 2 * 4 * 6).reshape(2, 4, 6), x=np.sin(np.arange(48.0)).reshape(2, 4, 6)
)


def linear(pixels):
    return (LINEAR.weights * pixels).sum() + 3


def cells(array):
    return array.reshape(2, 2, 2, 3, 2).sum((0, 2, 4))


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_occlusion_of_a_linear_model(baseline):
    """What a window takes away is the sum of weight x (x - baseline) in it."""
    base = np.full_like(LINEAR.x, baseline)
    worth = cells(LINEAR.weights * (LINEAR.x - base))
    assert close(perturbation.occlusion(linear, LINEAR.x, base, 2), worth)
    whole = perturbation.occlusion(linear, LINEAR.x, base, 2, window=3, stride=3)
    assert close(whole, np.full((2, 3), worth.sum()))
    left, right = worth[:, :2].sum(), worth[:, 1:].sum()
    overlapping = perturbation.occlusion(linear, LINEAR.x, base, 2, window=2)
    assert close(overlapping, np.repeat([[left, (left + right) / 2, right]], 2, 0))
    cut = perturbation.occlusion(linear, LINEAR.x, base, 2, window=2, stride=2)
    assert close(cut, np.repeat([[left, left, worth[:, 2].sum()]], 2, 0))


def test_windows_reach_the_end_and_no_further():
    assert perturbation.starts(7, 3, 2) == [0, 2, 4]
    assert perturbation.starts(8, 3, 2) == [0, 2, 4, 6]
    assert perturbation.starts(2, 3, 1) == [0]


def test_rise_with_masks_given():
    """Two masks that show one half each: each half has its own score, over 2 x 1/2."""
    halves = np.zeros((2, 4, 6))
    halves[0, :, :2], halves[1, :, 2:] = 1, 1
    black = np.zeros_like(LINEAR.x)
    found = perturbation.rise(linear, LINEAR.x, black, halves, 0.5, 2)
    left, right = (linear(LINEAR.x * mask) for mask in halves)
    assert close(found, np.repeat([[left, right, right]], 2, 0))
    centred = perturbation.rise(linear, LINEAR.x, black, halves, 0.5, 2, centred=True)
    assert close(centred, np.repeat([[1, -1, -1]], 2, 0) * (left - right) / 2)


def test_rise_over_all_masks_of_a_linear_model():
    """E[f(x M) M_p] / p = f(whole) p + (1 - p) (worth of p) + a constant, of independent patches."""
    worth, keep = cells(LINEAR.weights * LINEAR.x), 0.5
    every = np.array(list(itertools.product([0.0, 1.0], repeat=6))).reshape(-1, 2, 3).repeat(2, 1).repeat(2, 2)
    found = perturbation.rise(linear, LINEAR.x, np.zeros_like(LINEAR.x), every, keep, 2)
    assert close(found, keep * worth.sum() + (1 - keep) * worth + 3)


def test_masks_of_rise():
    assert np.array_equal(perturbation.rise_mask(np.ones((2, 3)), (1, 1), 4, 6), np.ones((4, 6)))
    cells_ = np.array([[0.0, 1.0]])
    # One row of two cells of 2 pixels, enlarged to 3 x 2: six pixels, their centres at 1/3 of a cell.
    line = [0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    assert perturbation.rise_mask(cells_, (0, 0), 1, 4)[0] == pytest.approx(line[:4])
    assert perturbation.rise_mask(cells_, (0, 1), 1, 4)[0] == pytest.approx(line[1:5])


@pytest.mark.parametrize(("shape", "size"), [((7, 7), (32, 32)), ((3, 5), (14, 11))])
def test_masks_of_rise_are_torchs_bilinear_enlargement(shape, size):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cell = [-(-n // k) for n, k in zip(size, shape, strict=True)]
    enlarged = torch.nn.functional.interpolate(
        given[None, None], [(k + 1) * c for k, c in zip(shape, cell, strict=True)], mode="bilinear"
    )[0, 0]
    for shift in itertools.product(range(cell[0]), range(cell[1])):
        expected = enlarged[shift[0] : shift[0] + size[0], shift[1] : shift[1] + size[1]]
        assert close(perturbation.rise_mask(given.numpy(), shift, *size), expected)
