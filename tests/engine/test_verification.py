"""A pass with recorded attention must score what the model scores."""

import pytest
from einops import rearrange
from torch import nn

import grounding
from grounding.core.errors import ModelError
from grounding.engine import verification
from tests.support.images import noise
from tests.support.models import mean_adapter
from tests.support.third_party import HEADS


class Switched(nn.Module):
    """Attention with a switch: with it, the weights are returned, and the values are `factor` times as large."""

    def __init__(self, other, factor):
        super().__init__()
        self.qkv, self.out, self.factor = other.qkv, other.out, factor

    def forward(self, x, output_attentions=False):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=HEADS)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out = self.out(rearrange(weights @ v, "b h n d -> b n (h d)") * (self.factor if output_attentions else 1))
        return (out, weights) if output_attentions else (out,)


class Block(nn.Module):
    def __init__(self, other, factor):
        super().__init__()
        self.norm, self.mlp, self.attend = other.norm, other.mlp, Switched(other.attend, factor)

    def forward(self, x):
        x = x + self.attend(self.norm(x))[0]
        return (x + self.mlp(x),)


def switched(factor):
    adapter = mean_adapter()
    adapter.model.blocks = nn.ModuleList(Block(block, factor) for block in adapter.model.blocks)
    return adapter


def test_a_pass_that_scores_something_else_is_refused():
    adapter = switched(3.0)
    with pytest.raises(ModelError, match=r"mean scores \S+, but \S+ while its attention is recorded: .*gradcam"):
        grounding.explain(adapter, noise(), "a dog", methods="rollout")


def test_an_honest_switch_passes():
    explanation = grounding.explain(switched(1.0), noise(), "a dog", methods="rollout")
    assert explanation.methods["rollout"].maps.any()


def test_the_plain_pass_is_made_once(monkeypatch):
    adapter, plain = mean_adapter(), []

    def counted(*args):
        plain.append(len(plain))
        return score(*args)

    score = verification._plain_score
    monkeypatch.setattr(verification, "_plain_score", counted)
    for _ in range(3):
        grounding.explain(adapter, noise(), "a dog", methods=["rollout", "relevance"])
    assert len(plain) == 1
    grounding.explain(adapter, noise(), "a dog", methods="gradcam")
    assert len(plain) == 1
