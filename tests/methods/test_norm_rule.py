"""The option `norm_rule` of every method that reads a gradient: the LN-rule, against norms written out."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from grounding import METHODS, Explanation, Selection, explain
from grounding.core.errors import OptionError
from tests.support import models
from tests.support.images import noise
from tests.support.oracles import vision
from tests.support.tolerances import ORACLE, STORED, close
from tests.support.tutorials.clip import CAPTION, LAYERS, run_tutorial
from tests.support.tutorials.trocr import TOKENS

WHOLE = Selection(tokens=False)
IMAGE = noise(90, 60)
RULED = [name for name in METHODS if "norm_rule" in METHODS[name].defaults]
DETACHED = {"norm_rule": "detach"}


def asked(name, options=DETACHED):
    return {f"{name}.{key}": value for key, value in options.items()}


def test_which_methods_have_the_option():
    """Those that read a gradient; `gradcam_ln` is defined by the rule."""
    others = ["gradcam_ln", "rollout", "attention", "cross_attention", "occlusion", "rise"]
    assert sorted([*RULED, *others]) == sorted(METHODS)
    assert all(METHODS[name].defaults["norm_rule"] == "none" for name in RULED)
    with pytest.raises(OptionError, match="'gradcam_ln' has no option 'norm_rule'"):
        explain(models.clip_adapter(), IMAGE, CAPTION, methods="gradcam_ln", options=asked("gradcam_ln"))
    with pytest.raises(OptionError, match="norm_rule: 'lrp' is none of none, detach"):
        explain(models.clip_adapter(), IMAGE, CAPTION, methods="gradcam", options={"gradcam.norm_rule": "lrp"})


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcam_with_the_rule_is_gradcam_ln(layer):
    adapter = models.clip_adapter()
    ruled = explain(adapter, IMAGE, CAPTION, methods="gradcam", layers=[layer], options=asked("gradcam"))
    named = explain(adapter, IMAGE, CAPTION, methods="gradcam_ln", layers=[layer])
    assert np.array_equal(ruled.methods["gradcam"].maps, named.methods["gradcam_ln"].maps)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", list(vision.CAMS))
def test_maps_at_a_layer(name, layer, monkeypatch):
    """Class activation maps at a layer."""
    adapter = models.clip_adapter()
    found = explain(adapter, IMAGE, CAPTION, methods=name, layers=[layer], select=WHOLE, options=asked(name))
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", vision.constant_deviation_norm)
    _, features, gradient, _ = run_tutorial(adapter, IMAGE, layer)[0]
    assert close(found[0].raw.ravel(), vision.CAMS[name](features[1:], gradient[1:]))


@pytest.mark.parametrize("name", ["gradient_rollout", "relevance", "grad_x_attention"])
def test_maps_of_attention(name, monkeypatch):
    adapter = models.clip_adapter()
    found = explain(adapter, IMAGE, CAPTION, methods=name, select=WHOLE, options=asked(name))
    plain = explain(adapter, IMAGE, CAPTION, methods=name, select=WHOLE)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", vision.constant_deviation_norm)
    pairs = run_tutorial(adapter, IMAGE, LAYERS[0])[0][3]
    oracle = {
        "gradient_rollout": vision.gradient_rollout,
        "relevance": vision.relevance,
        "grad_x_attention": lambda pairs: vision.attention_gradcam(*pairs[-1]),
    }
    assert close(found[0].raw.ravel(), oracle[name](pairs)[0, 1:])
    assert np.abs(found[0].raw - plain[0].raw).max() > 1e-3 * np.abs(plain[0].raw).max()


@pytest.mark.parametrize("name", RULED)
def test_scores_do_not_change_and_each_rule_has_its_pass(name):
    """In one request with a method without the rule."""
    makes = (models.clip_adapter, models.trocr_adapter, lambda: models.flava_adapter(kind="logit"))
    for make in makes:
        adapter = make()
        try:
            ruled = explain(adapter, IMAGE, "red car", methods=[name, "gradcam_ln", "rollout"], options=asked(name))
        except OptionError:
            continue
        plain = explain(adapter, IMAGE, "red car", methods=[name, "rollout"])
        scores = [[e.score for e in one.entries] for one in (ruled, plain)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-12)
        alone = explain(adapter, IMAGE, "red car", methods=[name], options=asked(name))
        assert close(ruled.methods[name].maps, alone.methods[name].maps)
        assert not np.allclose(ruled.methods[name].maps, plain.methods[name].maps, rtol=1e-3, atol=0)
        assert ruled.methods[name].options["norm_rule"] == "detach"
        return
    pytest.fail(f"no model has {name}")


def test_where_the_gradient_is_orthogonal_the_rule_has_no_warning():
    """The layer of an encoder-decoder that only a LayerNorm reads."""
    adapter = models.trocr_adapter()
    methods = ["hirescam", "gradcam"]
    plain = explain(adapter, IMAGE, "red car", methods=methods, select=TOKENS)
    ruled = explain(adapter, IMAGE, "red car", methods=methods, select=TOKENS,
                    options=asked("hirescam") | asked("gradcam"))  # fmt: skip
    assert sum("<activation, gradient>" in text for text in plain.warnings) == 2
    assert not any("<activation, gradient>" in text for text in ruled.warnings)
    assert not any((status.reason or "").startswith("rounding") for status in ruled.methods["hirescam"].status)
    assert np.abs(ruled.methods["hirescam"].maps).max() > 1e6 * np.abs(plain.methods["hirescam"].maps).max()


class RmsNorm(nn.Module):
    """A norm of another library."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def test_the_rule_reaches_norms_of_other_libraries(monkeypatch):
    adapter = models.mean_adapter()
    for block in adapter.model.blocks:
        block.norm = RmsNorm(16).double()
    ruled, plain = (
        explain(adapter, IMAGE, "two dogs", methods="gradcam", layers=["0"], select=WHOLE, options=options)
        for options in (asked("gradcam"), {})
    )

    def constant(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps).detach()

    monkeypatch.setattr(RmsNorm, "forward", constant)
    expected = explain(adapter, IMAGE, "two dogs", methods="gradcam", layers=["0"], select=WHOLE)
    assert close(ruled[0].raw, expected[0].raw, ORACLE)
    assert np.abs(ruled[0].raw - plain[0].raw).max() > 1e-3 * np.abs(plain[0].raw).max()


def test_explanations_stored_before_the_option_existed_load(tmp_path):
    found = explain(models.clip_adapter(), IMAGE, CAPTION, methods=["gradcam", "relevance"])
    files = found.save(tmp_path / "result", ["json", "npz"])
    content = json.loads(files["json"].read_text())
    for own in content["methods"].values():
        assert own["options"].pop("norm_rule") == "none"
    files["json"].write_text(json.dumps(content))
    loaded = Explanation.load(tmp_path / "result")
    assert "norm_rule" not in loaded.methods["gradcam"].options
    assert close(loaded.methods["gradcam"].maps, found.methods["gradcam"].maps, STORED)
    assert loaded.figure() is not None
