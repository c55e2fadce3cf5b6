"""The LN-rule: gradients against the formula with a constant deviation, for the norms of torch and transformers."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4UnweightedRMSNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.pix2struct.modeling_pix2struct import Pix2StructLayerNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.t5.modeling_t5 import T5LayerNorm

from grounding.adapter import layernorm
from grounding.core.errors import ModelError
from tests.support.tolerances import ORACLE, close

WIDTH = 6


class Unnamed(nn.Module):
    """A root mean square norm under another name, its epsilon in no attribute."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain


class SquaredRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) ** 2


class Scale(nn.Module):
    """As wide as a norm, and none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


class L2Norm(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


# A module, whether it subtracts the mean, what is added to its weight, and the axis of the channels.
NORMS = {
    "LayerNorm": (nn.LayerNorm(WIDTH, eps=0.1), True, 0, -1),
    "without weight": (nn.LayerNorm(WIDTH, elementwise_affine=False), True, 0, -1),
    "two axes": (nn.LayerNorm((5, WIDTH)), True, 0, (-2, -1)),
    "channels first": (ConvNextLayerNorm(WIDTH, eps=1e-3, data_format="channels_first"), True, 0, -3),
    "channels last": (ConvNextLayerNorm(WIDTH, eps=1e-3, data_format="channels_last"), True, 0, -1),
    "RMSNorm": (nn.RMSNorm(WIDTH, eps=0.1), False, 0, -1),
    "RMSNorm of the smallest epsilon": (nn.RMSNorm(WIDTH), False, 0, -1),
    "Llama": (LlamaRMSNorm(WIDTH, 0.05), False, 0, -1),
    "Qwen2": (Qwen2RMSNorm(WIDTH), False, 0, -1),
    "Gemma": (GemmaRMSNorm(WIDTH, 0.05), False, 1, -1),
    "Gemma3n": (Gemma3nRMSNorm(WIDTH), False, 0, -1),
    "Gemma3n without weight": (Gemma3nRMSNorm(WIDTH, with_scale=False), False, 0, -1),
    "T5": (T5LayerNorm(WIDTH), False, 0, -1),
    "Pix2Struct": (Pix2StructLayerNorm(WIDTH), False, 0, -1),
    "Qwen3 over the head": (Qwen3RMSNorm(WIDTH), False, 0, -1),
    "Cohere2, over the head": (Cohere2LayerNorm((4, WIDTH)), True, 0, -1),
    "DeepSeek without weight": (DeepseekV4UnweightedRMSNorm(0.05), False, 0, -1),
    "unnamed": (Unnamed(), False, 0, -1),
}
SHAPES = {"channels first": (2, WIDTH, 3, 4), "two axes": (3, 5, WIDTH)}


def made(name, dtype=torch.float64):
    """A norm with random parameters, and an input."""
    norm = copy.deepcopy(NORMS[name][0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(SHAPES.get(name, (2, 3, 4, WIDTH)), generator=generator, dtype=torch.float64) + 0.7
    return norm.to(dtype).requires_grad_(False), x.to(dtype)


def epsilon(norm, x):
    found = [getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)] or [1e-5]
    return torch.finfo(x.dtype).eps if found[0] is None else found[0]


def by_formula(name, norm, x, gradient):
    """g G / sigma, and of a LayerNorm less its mean: of each position by itself."""
    _, centred, offset, axes = NORMS[name]
    weight = next(iter(norm.parameters()), torch.ones(())).double() + offset
    if name == "channels first":
        weight = weight[:, None, None]
    x, gradient = x.double(), (gradient * weight).double()
    mean = x.mean(axes, keepdim=True) if centred else 0
    sigma = (((x - mean) ** 2).mean(axes, keepdim=True) + epsilon(norm, x)).sqrt()
    return (gradient - (gradient.mean(axes, keepdim=True) if centred else 0)) / sigma


def hooked(norm, x, gradient):
    """Output and gradient of the input, with the hook of the rule."""
    handle = norm.register_forward_hook(layernorm.replace_gradient, prepend=True)
    leaf = x.clone().requires_grad_()
    output = norm(leaf)
    handle.remove()
    [found] = torch.autograd.grad(output, leaf, gradient)
    return output.detach(), found


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("scale", [1, 1e-3], ids=["large", "as small as epsilon"])
def test_gradient_is_that_of_a_constant_deviation(name, scale):
    norm, x = made(name)
    x = x * scale
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert layernorm.is_norm(norm)
    output, found = hooked(norm, x, gradient.to(norm(x).dtype))
    assert torch.equal(output, norm(x))
    assert close(found, by_formula(name, norm, x, gradient), ORACLE)
    if scale == 1:
        plain = x.clone().requires_grad_()
        [true] = torch.autograd.grad(norm(plain), plain, gradient.to(output.dtype))
        assert (true - found).abs().max() > 0.01 * found.abs().max()


@pytest.mark.parametrize("name", [name for name in NORMS if name not in ("channels first", "two axes")])
def test_the_function_is_the_module_with_the_rule(name):
    norm, x = made(name)
    leaf = x.clone().requires_grad_()
    output = layernorm.layernorm(norm, leaf, layernorm.LAYERNORM_RULE)
    assert close(output.detach(), norm(x))
    gradient = torch.ones_like(output)
    gradient[..., ::2] = -2
    [found] = torch.autograd.grad(output, leaf, gradient)
    assert close(found, by_formula(name, norm, x, gradient))
    assert torch.equal(layernorm.layernorm(norm, x, None), norm(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["LayerNorm", "channels first", "RMSNorm", "Llama", "Gemma", "T5"])
def test_half_precision(name, dtype):
    norm, x = made(name, dtype)
    x = x * 300  # squares overflow in float16
    gradient = torch.ones_like(x)
    gradient[..., ::2] = -2
    output, found = hooked(norm, x, gradient)
    assert torch.equal(output, norm(x))
    assert output.dtype == norm(x).dtype
    assert found.dtype == dtype
    assert close(found.double(), by_formula(name, norm, x, gradient.double()), 0.03)


def test_initial_weights_leave_no_doubt_and_later_ones_count():
    """With a weight of 1, or of 0 and 1 added, several formulas give the same output."""
    for kind, offset in ((LlamaRMSNorm, 0), (GemmaRMSNorm, 1), (Unnamed, 0)):
        norm = (kind(WIDTH) if kind is not Unnamed else kind()).double().requires_grad_(False)
        x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        first = hooked(norm, x, torch.ones_like(x))[1]
        [weight] = norm.parameters()
        weight.copy_(torch.arange(WIDTH) + 2.0)
        again = hooked(norm, x, torch.ones_like(x))[1]
        assert close(again, first * (torch.arange(WIDTH) + 2.0 + offset))


def test_no_rule_without_gradients():
    norm, x = made("Llama")
    with torch.no_grad():
        assert layernorm.replace_gradient(norm, (x,), x) is x


def test_what_is_no_norm():
    others = [nn.Linear(WIDTH, WIDTH), nn.PReLU(WIDTH), nn.GroupNorm(2, WIDTH), nn.BatchNorm2d(WIDTH)]
    others += [Scale(), L2Norm(), nn.Sequential(nn.LayerNorm(WIDTH)), nn.Dropout()]
    assert [type(module).__name__ for module in others if layernorm.is_norm(module)] == []


def test_a_module_that_is_only_named_like_a_norm_is_refused():
    x = torch.ones(1, 2, WIDTH, requires_grad=True)
    norm = SquaredRMSNorm(WIDTH)
    assert layernorm.is_norm(norm)
    with pytest.raises(ModelError, match=r"^the LN-rule cannot follow a SquaredRMSNorm: it is no LayerNorm or RMSNorm"):
        hooked(norm, x, torch.ones_like(x))
    with pytest.raises(ModelError, match="cannot follow a Qwen3NextRMSNormGated"):
        layernorm.replace_gradient(Qwen3NextRMSNormGated(WIDTH), (x, x), x)
    with pytest.raises(ModelError, match="cannot follow a Linear"):
        layernorm.layernorm(nn.Linear(WIDTH, WIDTH), x, layernorm.LAYERNORM_RULE)


def test_recognising_a_norm_leaves_no_trace():
    """No hook runs, no random number is drawn, no parameter, buffer or attribute changes."""

    class Counting(Unnamed):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    norm, ran = Counting(), []
    norm.register_forward_hook(lambda *_: ran.append(1))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    names, state = set(vars(norm)), torch.get_rng_state()
    assert layernorm.is_norm(norm)
    assert not ran
    assert set(vars(norm)) == names
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
