"""Record layer outputs and attention weights of one forward pass, and restore the state of the model afterwards.

The pass runs without gradients up to the first output whose gradient is wanted. There the recorder cuts the graph: the
tensor is detached and made a leaf, and gradients are enabled, so that nothing before it is differentiated. Later
outputs are recorded on the graph that begins at this leaf.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grounding.adapter.attention import record_attention
from grounding.adapter.layernorm import LAYERNORM_RULE, is_norm, replace_gradient
from grounding.core.errors import LayerError, ModelError

# Names of the linear maps to query and key in attention modules that call no attention function; the last makes query,
# key and value in one.
PROJECTIONS = (("query", "key"), ("q_proj", "k_proj"), ("qkv", "qkv"))
# One recorder at a time per model: a second thread waits, or it would restore the state set by the first.
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_registering = Lock()


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Records layer outputs and attention weights of one forward pass made inside `with`.

    Parameters
    ----------
    model: the user's model. Inside the block it is in eval mode with frozen parameters. Afterwards, also after an
        error, modes, `requires_grad`, hooks, attention implementations and the random state are as before.
    layers: module path -> whether its gradient is wanted.
    attention: path of an attention module -> whether the gradient of its weights is wanted.
    rule: None or the backward rule `layernorm` (`grounding.adapter.layernorm`): the deviation of every LayerNorm and
        RMSNorm is a constant in the backward pass. The values of the forward pass are bit for bit the same.
    query_key: paths of attention modules whose queries and keys are recorded as well.

    After the pass `outputs[path]` is the output of a layer and `weights[path]` are attention weights (B, H, Q, S); for
    packed sequences of N tokens together a block-diagonal tensor (1, H, N, N), zero between sequences.
    `query_keys[path]` are query (B, H, Q, d) and key (B, H, S, d) off the graph. Weights whose
    gradient is wanted are on the graph: `torch.autograd.grad` of a score gives it.
    Raises ValueError for an unknown rule, ModelError for parameters that no gradient can pass and for attention that
    cannot be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, bool] | None = None,
        attention: Mapping[str, bool] | None = None,
        rule: str | None = None,
        query_key: Collection[str] = (),
    ) -> None:
        self.model = model
        self.layers = dict(layers or {})
        self.attention = dict(attention or {})
        if rule not in (None, LAYERNORM_RULE):
            raise ValueError(f"unknown backward rule {rule!r} (there is: {LAYERNORM_RULE})")
        self.rule = rule
        self.wanted_query_keys = frozenset(query_key)
        self.outputs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.query_keys: dict[str, tuple[Tensor, Tensor]] = {}
        self._projections: dict[tuple[str, str], Tensor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        with contextlib.ExitStack() as stack:
            with _registering:
                lock = _locks.setdefault(self.model, RLock())
            stack.enter_context(lock)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(random_state(self.model))
            stack.enter_context(_frozen(self.model))
            for path, gradient in self.layers.items():
                module = find_module(self.model, path)
                stack.enter_context(_hook(module, lambda out, p=path, g=gradient: self._take_output(p, out, g)))
            if self.rule:
                for norm in filter(is_norm, self.model.modules()):
                    handle = norm.register_forward_hook(replace_gradient, prepend=True)
                    stack.callback(handle.remove)
            for path in self.wanted_query_keys:
                stack.enter_context(self._projected(path, find_module(self.model, path)))
            self._modules = {find_module(self.model, path): path for path in self.attention}
            wanted = {module: self.attention[path] for module, path in self._modules.items()}
            if wanted:
                stack.enter_context(
                    record_attention(self.model, wanted, self._take_attention, lambda _module, x: _cut(x))
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Raise LayerError if a layer did not run, ModelError if attention weights were not recorded."""
        for path in self.layers:
            if path not in self.outputs:
                raise LayerError(f"layer {path!r} took no part in the forward pass; see --list-layers")
        for path in self.attention:
            if path not in self.weights:
                raise ModelError(
                    f"the attention of {path!r} could not be recorded: {type(self.model).__name__} computes it "
                    "in a way that exposes no weights"
                )
        for path in self.wanted_query_keys:
            if path not in self.query_keys and (pair := self._query_key(path)) is not None:
                self.query_keys[path] = pair
            if path not in self.query_keys:
                kind = type(find_module(self.model, path)).__name__
                raise ModelError(
                    f"the queries and keys of {path!r} could not be recorded: {kind} computes its attention in a way "
                    "that does not expose them"
                )

    def _take_attention(
        self, module: nn.Module, weights: Tensor, query: Tensor | None = None, key: Tensor | None = None
    ) -> Tensor:
        """Record the weights of a wanted module; return those with which the pass continues."""
        path = self._modules.get(module)
        if path is None:
            return weights
        if path in self.weights:
            raise ModelError(
                f"attention module {path!r} computes weights a second time in one pass: they would be ambiguous"
            )
        if path in self.wanted_query_keys and query is not None and key is not None:
            self.query_keys[path] = (query.detach(), key.detach())
        self.weights[path] = weights = _cut(weights) if self.attention[path] else weights
        return weights

    @contextlib.contextmanager
    def _projected(self, path: str, module: nn.Module) -> Iterator[None]:
        """Inside the block the outputs of a module's linear maps to query and key are recorded."""
        children = dict(module.named_children())
        names = next((pair for pair in PROJECTIONS if set(pair) <= children.keys()), ())
        with contextlib.ExitStack() as stack:
            for name in dict.fromkeys(names):

                def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and output.ndim == 3:
                        self._projections[path, name] = output.detach()

                stack.callback(children[name].register_forward_hook(keep).remove)
            yield

    def _query_key(self, path: str) -> tuple[Tensor, Tensor] | None:
        """Query and key (B, H, N, d) from the outputs of the linear maps, None if there are none of the same width."""
        heads = self.weights[path].shape[1]
        found = [
            (self._projections[path, a], self._projections[path, b])
            for a, b in PROJECTIONS
            if (path, a) in self._projections and (path, b) in self._projections
        ]
        if not found or len(found[0][0]) != len(self.weights[path]) or found[0][0].shape[-1] != found[0][1].shape[-1]:
            return None
        query, key = found[0] if found[0][0] is not found[0][1] else found[0][0].chunk(3, -1)[:2]
        return query.unflatten(-1, (heads, -1)).transpose(1, 2), key.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _take_output(self, path: str, output: Any, gradient: bool) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, Tensor):
            raise LayerError(f"layer {path!r} returns {type(tensor).__name__}, no tensor: it has no patch grid")
        if path in self.outputs:
            raise LayerError(f"layer {path!r} ran twice in one pass: its output would be ambiguous")
        self.outputs[path] = tensor = _cut(tensor) if gradient else tensor
        # The pass continues with a copy: an in-place operation after the layer must not overwrite the record.
        return (tensor.clone(), *output[1:]) if isinstance(output, tuple) else tensor.clone()


def _cut(tensor: Tensor) -> Tensor:
    """Return the tensor if it is on a graph, else a leaf that begins one; enable gradients."""
    torch.set_grad_enabled(True)
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path. Raises LayerError with the nearest existing parent and its children."""
    module, walked = model, ""
    for name in path.split("."):
        child = dict(module.named_children()).get(name)
        if child is None:
            children = ", ".join(n for n, _ in module.named_children()) or "no children"
            raise LayerError(
                f"{type(model).__name__} has no layer {path!r}: {walked or 'it'} has {children} (see --list-layers)"
            )
        module, walked = child, f"{walked}.{name}" if walked else name
    return module


@contextlib.contextmanager
def _hook(module: nn.Module, take: Any) -> Iterator[None]:
    # First: the capture hooks of transformers must get the tensor with which the pass continues.
    handle = module.register_forward_hook(lambda _module, _args, out: take(out), prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode without trainable parameters; then all states are restored.

    Raises ModelError for parameters that no gradient can pass.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} was made under torch.inference_mode(), where gradients cannot pass it"
        )
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def random_state(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Restore torch's random state of the CPU and of the model's device after the block.

    If `seed` is given, both start from it inside the block. Other devices are not touched.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
