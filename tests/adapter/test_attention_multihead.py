"""Recorded `nn.MultiheadAttention`: output of torch, weights and gradients by definition, each refusal."""

import pytest
import torch
from torch import nn

from grounding.adapter.multihead_attention import record_multihead
from grounding.adapter.recorder import Recorder
from grounding.core.errors import ModelError
from tests.support.attention_models import record
from tests.support.oracles import multihead
from tests.support.tolerances import HALF_MODEL, SINGLE, alike, close

B, L, S, D, H = 2, 3, 4, 8, 2
SHAPES = {
    "packed": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10},
    "only vdim": {"vdim": 10, "bias": False},
}
MASKS = ("none", "bool", "float", "bool heads", "float heads", "padding", "float padding", "both", "mixed")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**settings):
    torch.manual_seed(1)
    module = nn.MultiheadAttention(D, H, dropout=0.3, **settings).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.requires_grad_(False)


def masks(kind, batch):
    """Arguments of the module, and what they mean: forbidden and added (batch, H, L, S)."""
    forbidden, added = torch.zeros(batch, H, L, S, dtype=torch.bool), torch.zeros(batch, H, L, S).double()
    arguments = {}
    pairs, padded = random(L, S, seed=7) > 0.8, torch.zeros(batch, S, dtype=torch.bool)
    pairs[:, 0] = False  # a row without any key has no weights
    padded[0, -1] = True
    each = random(batch * H, L, S, seed=8)
    if kind in ("bool", "both"):
        arguments["attn_mask"], forbidden = pairs, forbidden | pairs
    if kind in ("float", "mixed"):
        arguments["attn_mask"], added = random(L, S, seed=9), added + random(L, S, seed=9)
    if kind == "bool heads":
        own = each > 0.8
        own[..., 0] = False
        arguments["attn_mask"], forbidden = own, forbidden | own.view(batch, H, L, S)
    if kind == "float heads":
        arguments["attn_mask"], added = each, each.view(batch, H, L, S)
    if kind in ("padding", "both", "mixed"):
        arguments["key_padding_mask"], forbidden = padded, forbidden | padded[:, None, None]
    if kind == "float padding":
        arguments["key_padding_mask"] = random(batch, S, seed=6)
        added = added + random(batch, S, seed=6)[:, None, None]
    return arguments, forbidden, added


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("order", ["batch first", "batch second", "unbatched"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_weights_and_gradient_by_definition(shape, order, kind):
    batch = 1 if order == "unbatched" else B
    module = attention(batch_first=order == "batch first", **SHAPES[shape])
    widths = (D, module.kdim, module.vdim)
    inputs = [random(batch, n, w, seed=i) for i, (n, w) in enumerate(zip((L, S, S), widths, strict=True))]
    arguments, forbidden, added = masks(kind, batch)
    given = [x[0] if order == "unbatched" else x if order == "batch first" else x.transpose(0, 1) for x in inputs]
    if order == "unbatched" and "key_padding_mask" in arguments:
        arguments["key_padding_mask"] = arguments["key_padding_mask"][0]
    own, own_weights = module(*given, average_attn_weights=False, **arguments)
    seed = random(*own.shape, seed=11)

    with Recorder(holder := nn.ModuleDict({"attention": module}), attention={"attention": True}) as recorder:
        found, found_weights = module(*given, average_attn_weights=False, **arguments)
        recorder.check()
        weights = recorder.weights["attention"]
        [gradient] = torch.autograd.grad((found * seed).sum(), weights)
    assert close(found.detach(), own)
    assert close(found_weights.detach(), own_weights)
    assert weights.is_leaf
    assert weights.shape == (batch, H, L, S)
    assert close(weights.detach().sum(-1), torch.ones(batch, H, L))

    expected = multihead.logits(module, *inputs[:2], forbidden, added).softmax(-1).requires_grad_()
    assert close(weights.detach(), expected.detach())
    slow = multihead.output(module, expected, inputs[2])
    ordered = seed[None] if order == "unbatched" else seed if order == "batch first" else seed.transpose(0, 1)
    assert close(gradient, torch.autograd.grad((slow * ordered).sum(), expected)[0])
    assert "forward" not in vars(module)
    assert not any(m._forward_hooks for m in holder.modules())


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_caller_gets_the_weights_it_requested(need, average, batched):
    module = attention(batch_first=True)
    x = random(B, L, D) if batched else random(L, D)
    plain = module(x, x, x, need_weights=need, average_attn_weights=average)
    with Recorder(nn.ModuleDict({"a": module}), attention={"a": False}) as recorder:
        found = module(x, x, x, need_weights=need, average_attn_weights=average)
    assert close(found[0], plain[0])
    assert (found[1] is None) == (plain[1] is None) == (not need)
    assert found[1] is None or close(found[1], plain[1])
    assert recorder.weights["a"].shape == (len(x) if batched else 1, H, L, L)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need", [True, False])
def test_causal_hint_and_lower_precision(dtype, need):
    module = attention(batch_first=True).to(dtype)
    x = random(B, L, D).to(dtype)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    plain = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0]
    with Recorder(nn.ModuleDict({"a": module}), attention={"a": False}) as recorder:
        found = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=need)[0]
    assert found.dtype == dtype
    assert recorder.weights["a"].triu(1).eq(0).all()
    if dtype == torch.float32:
        assert close(found, plain, SINGLE)
    else:
        assert alike(found.float(), plain.float(), HALF_MODEL)


def encoder(**settings):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval().requires_grad_(False)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_does_not_bypass_its_attention(gradient, masked):
    """torch's fast path of nn.TransformerEncoderLayer never calls self_attn."""
    model, x = encoder(), random(B, L, D)
    mask = torch.tensor([[False] * L, [False] * (L - 1) + [True]]) if masked else None
    with torch.no_grad(), torch.profiler.profile() as profile:
        plain = model(x, src_key_padding_mask=mask)
    fused = [event.key for event in profile.key_averages() if event.key == "aten::_transformer_encoder_layer_fwd"]
    assert fused, "the fast path was not taken: nothing is tested"
    paths = ["layers.0.self_attn", "layers.1.self_attn"]
    with Recorder(model, attention=dict.fromkeys(paths, gradient)) as recorder:
        found = model(x, src_key_padding_mask=mask)
        recorder.check()
    read = torch.ones(B, L, dtype=torch.bool) if mask is None else ~mask
    assert close(found.detach()[read], plain[read])
    for path in paths:
        assert recorder.weights[path].shape == (B, H, L, L)
    if gradient:
        assert all(g.any() for g in torch.autograd.grad(found[:, 0, 0].sum(), [*recorder.weights.values()]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).double().eval().requires_grad_(False)
    mask = torch.tensor([[False] * L, [False] * (L - 1) + [True]])
    with pytest.raises(ModelError, match=r"with nested tensors: build its nn\.TransformerEncoder with enable_"):
        record(model, {"layers.0.self_attn": False}, lambda: model(random(B, L, D), src_key_padding_mask=mask))
    assert all("forward" not in vars(m) and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_no_token_are_refused(settings):
    model = nn.ModuleDict({"a": attention(**settings)})
    with pytest.raises(ModelError, match="bias_k and add_zero_attn add keys of no token"):
        record(model, {"a": False})
    assert "forward" not in vars(model["a"])


def test_replaced_forward_is_refused_and_kept():
    module = attention()
    own = module.forward = lambda *args, **keywords: None
    with pytest.raises(ModelError, match="its forward method was replaced"):
        record(nn.ModuleDict({"a": module}), {"a": False})
    assert vars(module)["forward"] is own


def test_subclass_with_a_forward_of_its_own_is_refused():
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **keywords):
            return super().forward(*args, **keywords)

    with pytest.raises(ModelError, match="the attention of Other cannot be recorded"):
        record(nn.ModuleDict({"a": Other(D, H)}), {"a": False})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": True}, "is_causal, a hint about a mask, but without attn_mask"),
        ({"attn_mask": torch.zeros(L, L, dtype=torch.int64)}, "boolean or floating point, not torch.int64"),
    ],
)
def test_wrong_masks_are_refused_as_torch_does(arguments, message):
    module, x = attention(batch_first=True), random(B, L, D).requires_grad_()  # no fast path, which ignores the hint
    with pytest.raises((RuntimeError, AssertionError)):
        module(x, x, x, need_weights=False, **arguments)
    with pytest.raises(ModelError, match=message), record_multihead(module, lambda _module, weights, *_: weights):
        module(x, x, x, **arguments)
    assert "forward" not in vars(module)


def test_a_second_call_is_refused():
    module, x = attention(batch_first=True), random(B, L, D)
    with pytest.raises(ModelError, match="'a' computes weights a second time in one pass"):
        record(nn.ModuleDict({"a": module}), {"a": False}, lambda: module(x, x, x), lambda: module(x, x, x))
    assert "forward" not in vars(module)
