"""Trace: signals recorded for a chunk of targets, the only input of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import Targets

SIGNALS = frozenset({"activations", "shift", "patch_gradient", "attention", "attention_gradient"})
LAYER_SIGNALS = frozenset({"activations", "shift", "patch_gradient"})
GRADIENT_SIGNALS = frozenset({"shift", "patch_gradient", "attention_gradient"})


@dataclass(frozen=True, eq=False)
class Trace:
    """Signals of k targets at one layer. Reading a signal that the method does not declare raises RuntimeError.

    Parameters
    ----------
    adapter, targets, grid: the adapter, the k targets, and the patch grid (rows, columns) at the layer.
    needs: the signals that may be read.
    outputs, gradients: layer -> output and d score / d output. The leading axis counts images, or text sequences on the
        text side (`ModelStructure.axis`). Gradients require that no two targets of the trace share an item of it.
    shifts: layer -> pooled gradient (k, D), at layers where a shortcut of the adapter computed it without `gradients`.
    weights, weight_gradients: attention module -> weights (B, H, Q, S) and d score / d weights, leading axis as above.
    layer: the layer at which a method is computed; None for methods that read attention.

    The methods that read the layer return one item per target, those that read attention one matrix per image or text
    sequence; `chain` multiplies the row of each target by its matrix.
    """

    adapter: Adapter
    targets: Targets
    grid: tuple[int, int]
    needs: frozenset[str]
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    shifts: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    weight_gradients: Mapping[str, Tensor]
    layer: str | None = None

    def at(self, layer: str | None, needs: frozenset[str]) -> Trace:
        """Return the trace for a method with these `needs` at one layer, with the patch grid of that layer."""
        found = None if layer is None else self.adapter.layout(self.outputs[layer], self.grid, layer)
        return replace(self, layer=layer, needs=needs, grid=(found.rows, found.columns) if found else self.grid)

    def of(self, members: Sequence[int], **signals: Any) -> Trace:
        """Return the trace of the targets at indices `members`, with the fields given in `signals` replaced."""
        return replace(self, targets=self.targets.select(members), **signals)

    def gradient_sizes(self) -> dict[str, float]:
        """Layer -> largest absolute gradient at a patch (or of the pooled gradient); 0 for dead layers."""
        patches = {
            layer: self.adapter.to_grid(gradient, self.grid, layer) for layer, gradient in self.gradients.items()
        }
        return {layer: float(gradient.abs().max()) for layer, gradient in (patches | dict(self.shifts)).items()}

    def activations(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """Return the patch features at the layer.

        With `other`, those of the sequences whose scores are subtracted (see `Targets.other`); 0 where there is none.
        """
        return self._folded(self._rows("activations", self.outputs, other))

    def patch_gradient(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """Return d score / d features per patch; `other` as in `activations`."""
        return self._folded(self._rows("patch_gradient", self.gradients, other))

    def shift(self, *, other: bool = False) -> Float[Tensor, "k D"]:
        """Return the pooled gradient: the patch gradient summed over patches; `other` as in `activations`.

        It equals d score / d v for one vector v added to all patches.
        """
        self._declared("shift")
        assert self.layer is not None
        if self.layer in self.shifts:
            return precise(self.shifts[self.layer])
        owner = self._owner(self.layer, other=other)
        return self._folded(precise(self.gradients[self.layer])).sum((1, 2))[owner]

    @property
    def compares(self) -> bool:
        """Whether scores are differences of two sequences' scores at this layer (a layer with a sequence per text)."""
        return (
            self.layer is not None
            and self.adapter.structure.axis(self.layer) == "text"
            and self.targets.other is not None
        )

    def weighted(
        self, weights: Float[Tensor, "k D"], *, centred: bool = False, other: bool = False
    ) -> Float[Tensor, "k rows columns"]:
        """Return sum_d weights_kd F_pd for every target; `other` as in `activations`.

        With `centred`, the mean over patches is subtracted from the features first. Features are read per image and
        never copied per target: many targets of one image cost one matrix product.
        """
        self._declared("activations")
        assert self.layer is not None
        features = precise(self._folded(self.outputs[self.layer]))
        if centred:
            features = features - features.mean((1, 2), keepdim=True)
        maps = weights.new_zeros(len(weights), *self.grid)
        owner = self._owner(self.layer, other=other).to(weights.device)
        for b in owner[owner >= 0].unique().tolist():
            mine = owner == b
            maps[mine] = einsum(features[b], weights[mine], "r c d, k d -> k r c")
        return maps

    def attentions(self, stack: str = "vision", blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """Return the attention weights of the blocks of a stack, first to last, per image or text sequence."""
        self._declared("attention")
        return [precise(self.weights[path]) for path in self.adapter.structure.stack(stack).attention[blocks]]

    def attention_gradients(self, stack: str = "vision", blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """Return d score / d attention weights of the blocks of a stack, first to last.

        In a trace with attention gradients each image or text sequence (or each row of it) has one target.
        """
        self._declared("attention_gradient")
        return [precise(self.weight_gradients[path]) for path in self.adapter.structure.stack(stack).attention[blocks]]

    def chain(
        self, row: Float[Tensor, "k Q"], matrix: Float[Tensor, "B Q S"], stack: str = "vision"
    ) -> Float[Tensor, "k S"]:
        """Return each target's row times the matrix of its image or text sequence, without a copy per target."""
        owner = self.owner(stack)
        made = matrix.new_empty(len(row), matrix.shape[-1])
        for b in owner.unique().tolist():
            mine = owner == b
            made[mine] = row[mine].to(matrix.dtype) @ matrix[b]
        return made

    def owner(self, stack: str = "vision") -> Int[Tensor, "k"]:
        """Return the index of each target's matrix in a stack: its image, or its text sequence."""
        return self._owner(self.adapter.structure.stack(stack).blocks[0])

    def has(self, stack: str) -> bool:
        """Whether the model has a stack of this name."""
        return stack in self.adapter.structure.stacks

    def text_rows(self) -> Float[Tensor, "k Q"]:
        """Return the start row of attention chains over the text side's sequence: weights that sum to 1."""
        return self.adapter.chain_start(self.targets)

    def image_part(self, row: Float[Tensor, "k Q"]) -> Float[Tensor, "k N"]:
        """Return the part of a row over the `fusion` stack's sequence that belongs to the vision stack's tokens."""
        before, _ = self.adapter.sequence(self.adapter.structure.stack("fusion").blocks[0])
        first = before - self.adapter.structure.prefix
        return row[:, first : first + self.tokens]

    @property
    def tokens(self) -> int:
        """N, the number of tokens of the vision stack, prefix included."""
        return self.adapter.structure.prefix + self.grid[0] * self.grid[1]

    def pooling_row(self) -> Float[Tensor, "k N"]:
        """Return the start row of attention chains: the weight of each token of the vision stack in its pooling.

        For the poolings `cross` and `fusion` it is computed from the attention of these stacks.
        """
        row = self.adapter.pooling_weights(len(self.targets), self.tokens)
        if row is not None:
            return row
        if self.adapter.structure.pooling == "cross":
            [weights] = self.attentions("cross", slice(-1, None))
            return self.chain(self.text_rows(), weights.mean(1), "cross")
        row = self.text_rows()
        for weights in reversed(self.attentions("fusion")):
            row = self.through(row, weights.mean(1), "fusion")
        return self.image_part(row)

    def through(
        self, row: Float[Tensor, "k N"], matrix: Float[Tensor, "B N N"], stack: str = "vision"
    ) -> Float[Tensor, "k N"]:
        """Return row times rownorm(matrix + I) for a block of a stack, without computing that matrix."""
        row = row.to(matrix.dtype) / (matrix.sum(-1) + 1)[self.owner(stack)]
        return row + self.chain(row, matrix, stack)

    def patches(self, row: Float[Tensor, "k N"]) -> Float[Tensor, "k rows columns"]:
        """Return the patch map of a row over the vision stack's tokens, without the prefix. Raises LayerError."""
        return rearrange(self.adapter.to_grid(row[..., None], self.grid), "k r c 1 -> k r c")

    def _folded(self, hidden: Tensor) -> Tensor:
        assert self.layer is not None
        return self.adapter.to_grid(hidden, self.grid, self.layer)

    def _owner(self, path: str, *, other: bool = False) -> Int[Tensor, "k"]:
        if other:
            assert self.targets.other is not None
            return self.targets.other
        return self.targets.units if self.adapter.structure.axis(path) == "text" else self.targets.image

    def _rows(self, signal: str, record: Mapping[str, Tensor], other: bool) -> Tensor:
        """Return one item per target of a record per image or text; no copy where the two are the same."""
        self._declared(signal)
        assert self.layer is not None
        tensor, owner = record[self.layer], self._owner(self.layer, other=other)
        if owner.tolist() == list(range(len(tensor))):
            return precise(tensor)
        owner = owner.to(tensor.device)
        return precise(tensor[owner.clamp(min=0)] * (owner >= 0).reshape(-1, *[1] * (tensor.ndim - 1)))

    def _declared(self, signal: str) -> None:
        if signal not in self.needs:
            raise RuntimeError(f"a method reads {signal!r} but declares only {sorted(self.needs)}")


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor off the graph, half precision as float32: sums over patches and blocks need the digits."""
    tensor = tensor.detach()
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
