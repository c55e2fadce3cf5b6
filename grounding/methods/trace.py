"""What one pass left behind for a chunk of targets: the only thing a method looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from grounding.adapter.inputs import Targets

if TYPE_CHECKING:
    from grounding.adapter.base import Adapter

SIGNALS = frozenset({"activations", "shift", "patch_gradient", "attention", "attention_gradient"})
LAYER_SIGNALS = frozenset({"activations", "shift", "patch_gradient"})
GRADIENT_SIGNALS = frozenset({"shift", "patch_gradient", "attention_gradient"})


@dataclass(frozen=True, eq=False)
class Trace:
    """The signals of k targets at one tap. Reading an undeclared one is an error.

    Outputs, attention weights and their gradients have the pictures of the batch first, or its texts' sequences (see
    `ModelStructure`); gradients are there only where targets do not get into each other's way. `shifts` (k, D) stand for them at
    fast taps. The readers of taps below give one row per target, those of attention one matrix per picture or text:
    `chain` multiplies each target's row with its own.
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
        """The same record seen by one method at one tap, whose grid may be its own."""
        found = None if layer is None else self.adapter.layout(self.outputs[layer], self.grid, layer)
        return replace(self, layer=layer, needs=needs, grid=(found.rows, found.columns) if found else self.grid)

    def of(self, members: Sequence[int], **signals: Any) -> Trace:
        """The record of some of the targets, with the signals that belong to them."""
        return replace(self, targets=self.targets.select(members), **signals)

    def gradient_sizes(self) -> dict[str, float]:
        """Tap -> largest absolute gradient at a patch (or of the shift), for telling dead taps."""
        patches = {
            layer: self.adapter.to_grid(gradient, self.grid, layer) for layer, gradient in self.gradients.items()
        }
        return {layer: float(gradient.abs().max()) for layer, gradient in (patches | dict(self.shifts)).items()}

    def activations(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """Patch features at the tap; with `other`, those of the sequences that the targets' own are compared with (zero
        where there is none)."""
        return self._folded(self._rows("activations", self.outputs, other))

    def patch_gradient(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """d score / d features, per patch; `other` as in `activations`."""
        return self._folded(self._rows("patch_gradient", self.gradients, other))

    def shift(self, *, other: bool = False) -> Float[Tensor, "k D"]:
        """d score / d (one vector added to all patches) = the patch gradient summed over patches; with `other`, of the
        sequences that the targets' own are compared with."""
        self._declared("shift")
        assert self.layer is not None
        if self.layer in self.shifts:
            return precise(self.shifts[self.layer])
        owner = self._owner(self.layer, other=other)
        return self._folded(precise(self.gradients[self.layer])).sum((1, 2))[owner]

    @property
    def compares(self) -> bool:
        """Whether targets are compared with other sequences at this tap: where every text has a sequence of its own."""
        return (
            self.layer is not None
            and self.adapter.structure.axis(self.layer) == "text"
            and self.targets.other is not None
        )

    def weighted(
        self, weights: Float[Tensor, "k D"], *, centred: bool = False, other: bool = False
    ) -> Float[Tensor, "k rows columns"]:
        """sum_d weights_kd F_pd for every target, with the mean over patches taken off the features first if `centred`;
        with `other`, the features of the sequences that the targets' own are compared with (zero where there is none).

        Features are read per picture, never copied per target: many targets of one picture cost one matrix product.
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
        """Attention weights of the blocks of a stack, first to last, per picture or text."""
        self._declared("attention")
        return [precise(self.weights[path]) for path in self.adapter.structure.stack(stack).attention[blocks]]

    def attention_gradients(self, stack: str = "vision", blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """d score / d attention weights of the blocks of a stack, first to last: those of the one target that each
        picture or text (or row of it) has here."""
        self._declared("attention_gradient")
        return [precise(self.weight_gradients[path]) for path in self.adapter.structure.stack(stack).attention[blocks]]

    def chain(
        self, row: Float[Tensor, "k Q"], matrix: Float[Tensor, "B Q S"], stack: str = "vision"
    ) -> Float[Tensor, "k S"]:
        """Each target's row times the matrix of its picture or text. Nothing is copied per target."""
        owner = self.owner(stack)
        made = matrix.new_empty(len(row), matrix.shape[-1])
        for b in owner.unique().tolist():
            mine = owner == b
            made[mine] = row[mine].to(matrix.dtype) @ matrix[b]
        return made

    def owner(self, stack: str = "vision") -> Int[Tensor, "k"]:
        """Which matrix of a stack belongs to each target: that of its picture, or of its text's sequence."""
        return self._owner(self.adapter.structure.stack(stack).blocks[0])

    def has(self, stack: str) -> bool:
        """Whether the architecture has such a stack."""
        return stack in self.adapter.structure.stacks

    def text_rows(self) -> Float[Tensor, "k Q"]:
        """The places of the text side's sequence from which chains of attention start: weights that sum to 1."""
        return self.adapter.chain_start(self.targets)

    def image_part(self, row: Float[Tensor, "k Q"]) -> Float[Tensor, "k N"]:
        """What a row over the sequence of the `fusion` stack says of the vision stack's tokens in it."""
        before, _ = self.adapter.sequence(self.adapter.structure.stack("fusion").blocks[0])
        first = before - self.adapter.structure.prefix
        return row[:, first : first + self.tokens]

    @property
    def tokens(self) -> int:
        """N, the length of the vision stack's sequence, prefix included."""
        return self.adapter.structure.prefix + self.grid[0] * self.grid[1]

    def pooling_row(self) -> Float[Tensor, "k N"]:
        """How much each token of the vision stack's output is read: where chains of attention start."""
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
        """row times rownorm(matrix + I) of a block of a stack, without making that matrix."""
        row = row.to(matrix.dtype) / (matrix.sum(-1) + 1)[self.owner(stack)]
        return row + self.chain(row, matrix, stack)

    def patches(self, row: Float[Tensor, "k N"]) -> Float[Tensor, "k rows columns"]:
        """A row over the vision stack's tokens as a patch map: prefix dropped, folded, the count checked."""
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
        """One row per target of what the tap has per picture or text; not copied where they are the same."""
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
    """Off the graph; half precision as float32, so that sums over patches and chains of layers keep their digits."""
    tensor = tensor.detach()
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
