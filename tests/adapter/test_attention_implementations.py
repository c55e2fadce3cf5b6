"""Which attention is recorded, and which is refused: foreign functions, unknown options, repeated calls, dropouts."""

import functools
import importlib
import types

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grounding.adapter.attention_interface import IMPLEMENTATION, _recorded_attention, refuse_foreign
from grounding.adapter.recorder import Recorder
from grounding.core.errors import ModelError
from tests.support.attention_models import blip_matching, gemma2, qwen2_5_vision, record, siglip
from tests.support.model_state import snapshot, unchanged
from tests.support.tolerances import close

FOREIGN = r"SiglipModel uses the attention implementation '{}', whose weights cannot be recorded: it is not softmax"


def uniform(module, query, key, value, attention_mask, **options):
    """No softmax attention: every query attends to all keys alike."""
    return value.mean(2, keepdim=True).expand_as(query).transpose(1, 2).contiguous(), None


@pytest.fixture
def register(monkeypatch):
    """Registers an attention function for one test."""
    return functools.partial(monkeypatch.setitem, AttentionInterface._global_mapping)


def refused(model, path, name):
    before = snapshot(model)
    with pytest.raises(ModelError, match=FOREIGN.format(name)) as caught:
        record(model, {path: True})
    assert "set_attn_implementation('eager')" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert unchanged(before, snapshot(model))


@pytest.mark.parametrize("part", ["", "vision_model", "text_model"])
def test_a_foreign_function_is_refused(part, register):
    case = siglip()
    register("mine", uniform)
    (getattr(case.model, part) if part else case.model).set_attn_implementation("mine")
    refused(case.model, case.attention[0], "mine")
    case.model.set_attn_implementation("eager")
    record(case.model, {case.attention[0]: True}, case.call)


@functools.wraps(sdpa_attention_forward)
def wrapped(*args, **keywords):
    """Has the names of the function of transformers."""
    output, weights = sdpa_attention_forward(*args, **keywords)
    return 2 * output, weights


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("function", [uniform, wrapped, functools.partial(uniform)])
def test_a_name_of_the_library_registered_again_is_refused(name, function, register):
    case = siglip(implementation=name)
    register(name, function)
    refused(case.model, case.attention[0], name)


def test_a_patched_eager_function_is_refused(monkeypatch):
    case = siglip(implementation="eager")
    monkeypatch.setattr(importlib.import_module(type(case.model).__module__), "eager_attention_forward", uniform)
    refused(case.model, case.attention[0], "eager")


def test_functions_of_transformers_are_accepted(register):
    case = siglip()
    own = (IMPLEMENTATION, "textbook")  # the second is registered by an oracle
    names = [name for name in AttentionInterface._global_mapping if name not in own]
    assert {"sdpa", "flash_attention_2", "flex_attention"} <= {*names}
    register("same", functools.partial(sdpa_attention_forward, is_causal=False))
    for name in (*names, "eager", "paged|eager", "paged|sdpa", "same", IMPLEMENTATION):
        for config in (case.model.config, case.model.config.text_config, case.model.config.vision_config):
            config._attn_implementation_internal = name
        refuse_foreign(case.model)


def test_attention_that_reads_no_interface_is_not_refused(register):
    """The head of SigLIP and BLIP's modules compute attention on their own, whatever is configured."""
    register("mine", uniform)
    case = siglip()
    case.model.set_attn_implementation("mine")
    with torch.no_grad():
        plain = case.call()
    with Recorder(case.model, attention={"vision_model.head.attention": True}) as recorder:
        assert close(case.call().detach(), plain)
        recorder.check()


def test_an_option_that_only_the_family_knows_is_refused(monkeypatch):
    case = gemma2()
    file = importlib.import_module(type(case.model).__module__)
    own = file.eager_attention_forward

    def eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, tilt=None, **options):
        return own(module, query, key, value, attention_mask, dropout, scaling, softcap, **options)

    eager.__module__ = file.__name__
    monkeypatch.setattr(file, "eager_attention_forward", eager)
    call = case.model.model.layers[0].self_attn
    call.register_forward_pre_hook(lambda _m, args, kwargs: (args, kwargs | {"tilt": 2.0}), with_kwargs=True)
    with pytest.raises(ModelError, match="attention with tilt cannot be recorded in Gemma2Attention"):
        record(case.model, {case.attention[0]: True}, case.call)


def test_a_second_call_without_boundaries_is_refused():
    case = siglip()
    before = snapshot(case.model)
    with pytest.raises(ModelError, match=r"'vision_model.encoder.layers.0.self_attn' computes weights a second time"):
        record(case.model, {case.attention[0]: True}, case.call, case.call)
    assert unchanged(before, snapshot(case.model))


def test_a_second_pass_over_packed_sequences_is_refused():
    case = qwen2_5_vision()
    with pytest.raises(ModelError, match=r"'blocks.0.attn' computes weights a second time"):
        record(case.model, {"blocks.0.attn": False}, case.call, case.call)


class OneCall(nn.Module):
    """Attention to packed sequences by one call with a mask."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="eager")

    def forward(self, x, cu_seqlens):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        sequence = torch.bucketize(torch.arange(len(x)), cu_seqlens[1:], right=True)
        mask = torch.where(sequence[:, None] == sequence, 0.0, -torch.inf).double()
        return attend(self, x[None, None], x[None, None], x[None, None], mask)[0]


def test_packed_sequences_in_one_call():
    model = nn.ModuleDict({"a": OneCall()})
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    recorder = record(model, {"a": True}, lambda: model["a"](x, torch.tensor([0, 2, 5])))
    expected = torch.block_diag(*((part @ part.T / 2).softmax(-1) for part in (x[:2], x[2:])))
    assert close(recorder.weights["a"].detach()[0, 0], expected)


class Mixer(nn.Module):
    """A dropout on values that are no attention weights."""

    def __init__(self, axes):
        super().__init__()
        self.dropout, self.axes = nn.Dropout(0.1), axes

    def forward(self, x):
        return self.dropout(x.view(*self.axes)).flatten()


@pytest.mark.parametrize("axes", [(2, 2, 3, 3), (2, 18), (36,)])
def test_a_dropout_on_other_values_is_not_recorded(axes):
    model = nn.ModuleDict({"a": Mixer(axes)})
    with pytest.raises(ModelError, match="could not be recorded: ModuleDict computes it in a way that exposes no"):
        record(model, {"a": True}, lambda: model["a"](torch.arange(36.0)))
    assert not model["a"].dropout._forward_hooks


def test_dropout_of_blip_does_nothing_in_a_model_in_train_mode():
    case = blip_matching()
    with torch.no_grad():
        plain = case.call()
    case.model.train()
    with Recorder(case.model, attention=dict.fromkeys(case.attention, True)) as recorder:
        assert close(case.call().detach(), plain)
        recorder.check()
    assert case.model.training


def test_boolean_masks_and_grouped_queries_as_sdpa():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 4, generator=generator).double() for n in (4, 2, 2))
    mask = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    found, weights = _recorded_attention(nn.Module().eval(), query, key, value, mask)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert close(found, expected.transpose(1, 2))
    assert weights.masked_select(~mask).eq(0).all()
