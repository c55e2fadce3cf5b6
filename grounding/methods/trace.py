"""Trace: signals recorded for a chunk of targets, the only input of a method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from grounding.adapter.base import Adapter
from grounding.adapter.inputs import DETAIL, OVERVIEW, Inputs, Targets
from grounding.adapter.patch_tokens import PatchTokens, fold
from grounding.adapter.structure import Hop, ModelStructure
from grounding.core.errors import ModelError
from grounding.core.geometry import Geometry
from grounding.methods.masks import Masks

LAYER_SIGNALS = frozenset({"activations", "pooled_gradient", "patch_gradient"})
GRADIENT_SIGNALS = frozenset({"pooled_gradient", "patch_gradient", "attention_gradient", "readout_gradient"})
# Those that depend on the score.
SCORE_SIGNALS = GRADIENT_SIGNALS | {"rescoring"}
SIGNALS = LAYER_SIGNALS | SCORE_SIGNALS | {"attention", "query_key"}


@dataclass(frozen=True, eq=False)
class Trace:
    """Signals of k targets at one layer, in one view of their images. Reading a signal that the method does not declare
    raises RuntimeError.

    Parameters
    ----------
    adapter, structure, inputs, targets: the adapter, its structure for this kind of target, the inputs, the k targets.
    needs: the signals that may be read.
    outputs, gradients: layer -> output and d score / d output. The leading axis counts images, or text sequences on the
        sequence side (`ModelStructure.items`). Gradients require that no two targets of the trace share an item of it.
    pooled_gradients: layer -> pooled gradient (k, D), at layers where a shortcut of the adapter computed it without
        `gradients`.
    weights, weight_gradients: attention module -> weights (B, H, Q, S) and d score / d weights, leading axis as above.
    layer: the layer at which a method is computed; None for methods that read attention.
    readouts: block -> gradient (B, H, Q, S) of the score with the output of this block in place of the last, with
        respect to the attention of the block (or of the pooling head on its output).
    query_keys: attention module -> query (B, H, Q, d) and key (B, H, S, d).
    masks: for each image what was hidden from the model, in the detail view.
    whole, masked: scores (k,) of the images, and (k, n) of the masked images.
    view: the view in which maps are computed. All targets of a trace that a method gets have the same patch grid.

    The methods that read the layer return one item per target, those that read attention one matrix per image or text
    sequence; `chain` multiplies the row of each target by its matrix. Where the patches of an image are spread over
    several items (tiles) or images share one token axis, `PatchTokens.item` is None: tokens are then counted over all
    items, N = B Q, and each row has all of them.
    """

    adapter: Adapter
    structure: ModelStructure
    inputs: Inputs
    targets: Targets
    needs: frozenset[str]
    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    pooled_gradients: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    weight_gradients: Mapping[str, Tensor]
    readouts: Mapping[str, Tensor] = field(default_factory=dict)
    query_keys: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: Sequence[Masks] = ()
    whole: Float[Tensor, "k"] | None = None
    masked: Float[Tensor, "k n"] | None = None
    layer: str | None = None
    view: str = DETAIL

    def at(self, layer: str | None, needs: frozenset[str], view: str = DETAIL) -> Trace:
        """Return the trace for a method with these `needs` at one layer, in one view."""
        return replace(self, layer=layer, needs=needs, view=view)

    def of(self, members: Sequence[int], **signals: Any) -> Trace:
        """Return the trace of the targets at indices `members`, with the fields given in `signals` replaced."""
        return replace(self, targets=self.targets.select(members), **signals)

    def by_grid(self) -> dict[tuple[int, int], list[int]]:
        """(rows, columns) -> indices of the targets with this patch grid; targets without such a view are left out."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for k, grid in enumerate(self._grids()):
            if grid is not None:
                found[grid].append(k)
        return dict(found)

    def _grids(self) -> list[tuple[int, int] | None]:
        if self.masks:
            own = (self._geometry(image) for image in self.targets.image.tolist())
            return [None if one is None else (one.rows, one.columns) for one in own]
        return [None if place is None else place.grid for place in self._places(self._path, self._shape)]

    def _geometry(self, image: int) -> Geometry | None:
        images = self.inputs.images
        return None if images.view(image, self.view) is None else images.geometry(image, self.view)

    def with_pooled(self, members: Sequence[int]) -> Trace:
        """Return the trace of the targets at indices `members`, with what there is of each target by itself."""
        if list(members) == list(range(len(self.targets))):
            return self
        own = list(members)
        return self.of(
            own,
            pooled_gradients={path: gradient[own] for path, gradient in self.pooled_gradients.items()},
            whole=None if self.whole is None else self.whole[own],
            masked=None if self.masked is None else self.masked[own],
        )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches at the layer, or of those that the path of attention leads to."""
        grid = self._grids()[0]
        assert grid is not None
        return grid

    def gradient_sizes(self) -> dict[str, float]:
        """Layer -> largest absolute gradient at a patch (or of the pooled gradient); 0 for dead layers."""
        patches = {path: self.folded(path, gradient) for path, gradient in self.gradients.items()}
        sizes = {path: max(float(own.abs().max()) for own in found) for path, found in patches.items()}
        return sizes | {path: float(gradient.abs().max()) for path, gradient in self.pooled_gradients.items()}

    def folded(self, path: str, tensor: Tensor) -> list[Float[Tensor, "n rows columns D"]]:
        """Return the patches of all images (or sequences) of the targets in a record of the module at `path`, one
        tensor for each patch grid."""
        units, _ = self._units(path, tuple(tensor.shape))
        by_grid: dict[tuple[int, int], list[PatchTokens]] = defaultdict(list)
        for place in units:
            by_grid[place.grid].append(place)
        return [fold(tensor, places) for places in by_grid.values()]

    # ------------------------------------------------------------------ at a layer

    def activations(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """Return the patch features at the layer.

        With `other`, those of the sequences whose scores are subtracted (see `Targets.baseline_sequence`); 0 where
        there is none.
        """
        return self._per_target("activations", self.outputs, other)

    def patch_gradient(self, *, other: bool = False) -> Float[Tensor, "k rows columns D"]:
        """Return d score / d features per patch; `other` as in `activations`."""
        return self._per_target("patch_gradient", self.gradients, other)

    def pooled_gradient(self, *, other: bool = False) -> Float[Tensor, "k D"]:
        """Return the patch gradient summed over patches; `other` as in `activations`.

        It equals d score / d v for one vector v added to all patches.
        """
        self._declared("pooled_gradient")
        assert self.layer is not None
        if self.layer in self.pooled_gradients:
            return precise(self.pooled_gradients[self.layer])
        gradient = self.gradients[self.layer]
        units, owner = self._units(self.layer, tuple(gradient.shape), other=other)
        if not units:
            return precise(gradient).new_zeros(len(owner), gradient.shape[-1])
        return fold(precise(gradient), units).sum((1, 2))[owner]

    @property
    def compares(self) -> bool:
        """Whether scores are differences of two sequences' scores at this layer (a layer with a sequence per text)."""
        return (
            self.layer is not None
            and self.structure.items(self.layer) == "sequence"
            and self.targets.baseline_sequence is not None
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
        output = self.outputs[self.layer]
        units, owner = self._units(self.layer, tuple(output.shape), other=other)
        maps = weights.new_zeros(len(weights), *self.grid)
        if not units:
            return maps
        features = precise(fold(output, units))
        if centred:
            features = features - features.mean((1, 2), keepdim=True)
        owner = owner.to(weights.device)
        for b in owner[owner >= 0].unique().tolist():
            mine = owner == b
            maps[mine] = einsum(features[b], weights[mine], "r c d, k d -> k r c")
        return maps

    # ------------------------------------------------------------------ attention

    @property
    def path(self) -> tuple[Hop, ...]:
        """The hops from the score to the patches."""
        return self.structure.path

    def attentions(self, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """Return the attention weights of the blocks of a stack, first to last, per image or text sequence."""
        self._declared("attention")
        return [precise(self.weights[path]) for path in self.structure.stack(stack).attention[blocks]]

    def attention_gradients(self, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """Return d score / d attention weights of the blocks of a stack, first to last.

        In a trace with attention gradients each image or text sequence (or each row of it) has one target.
        """
        self._declared("attention_gradient")
        return [precise(self.weight_gradients[path]) for path in self.structure.stack(stack).attention[blocks]]

    def readout_gradients(self, stack: str, blocks: slice = slice(None)) -> list[Float[Tensor, "B H Q S"]]:
        """Return for blocks of a stack, first to last, the gradient of the score with the output of that block in place
        of the last, with respect to the attention of the block, or of the pooling head on its output."""
        self._declared("readout_gradient")
        return [precise(self.readouts[path]) for path in self.structure.stack(stack).blocks[blocks]]

    def queries_and_keys(self, stack: str, blocks: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        """Return query (B, H, Q, d) and key (B, H, S, d) of the blocks of a stack, first to last, as they enter the
        product of the attention weights."""
        self._declared("query_key")
        pairs = (self.query_keys[path] for path in self.structure.stack(stack).attention[blocks])
        return [(precise(query), precise(key)) for query, key in pairs]

    def start(self) -> Float[Tensor, "k N"]:
        """Return the row in which chains of attention start: weights, summing to 1, of the queries of the first hop.

        On the sequence side these are the target's positions, else the tokens that the vision stack's pooling reads.
        """
        first = self.path[0].stack
        if self.structure.stack(first).items == "sequence":
            assert self.targets.chain_start is not None
            return self.targets.chain_start
        if self.packed(first):
            return self._packed_start(self.path[0])
        row = self.adapter.pooling_weights(self.targets.kind, len(self.targets), self._weights_shape(first)[-2])
        return row.to(self.weights[self._recorded(first)].device)

    def chain(self, row: Float[Tensor, "k N"], matrix: Float[Tensor, "B Q S"], stack: str) -> Float[Tensor, "k M"]:
        """Return each target's row times the matrix of its image or text sequence, without a copy per target.

        Packed tokens (of tiles, or of several images) have one row over all of them: the matrices are the blocks of
        one block-diagonal matrix.
        """
        if self.packed(stack):
            blocks = row.to(matrix.dtype).reshape(len(row), *matrix.shape[:2])
            return einsum(blocks, matrix, "k b q, b q s -> k b s").flatten(1)
        owner = self.owner(stack)
        made = matrix.new_empty(len(row), matrix.shape[-1])
        for b in owner.unique().tolist():
            mine = owner == b
            made[mine] = row[mine].to(matrix.dtype) @ matrix[b]
        return made

    def through(self, row: Float[Tensor, "k N"], matrix: Float[Tensor, "B Q Q"], stack: str) -> Float[Tensor, "k N"]:
        """Return row times rownorm(matrix + I) for a block of a stack, without computing that matrix."""
        row = row.to(matrix.dtype) / self.per_target(matrix.sum(-1) + 1, stack)
        return row + self.chain(row, matrix, stack)

    def per_target(self, values: Float[Tensor, "B Q"], stack: str) -> Float[Tensor, "#k N"]:
        """Return each target's row of values given per matrix of a stack; one row for all where tokens are packed."""
        return values.reshape(1, -1) if self.packed(stack) else values[self.owner(stack)]

    def owner(self, stack: str) -> Int[Tensor, "k"]:
        """Return the index of each target's matrix in a stack: its image, or its text sequence."""
        sequence = self.structure.stack(stack).items == "sequence"
        return self.targets.sequences if sequence else self.targets.image

    def carried(self, row: Float[Tensor, "k N"], hop: Hop) -> Float[Tensor, "k M"]:
        """Return a row over the tokens that a hop leads to as a row over those of the next hop's stack.

        The tokens of an image in a joint sequence with the text are those of its vision stack.
        """
        after = next((after for before, after in pairwise(self.path) if before is hop), None)
        if after is None or hop.kind != "self":
            return row
        made = row.new_zeros(len(row), self._tokens(after.stack))
        for view in (DETAIL, OVERVIEW):
            pairs = zip(self._hop_places(hop, view), self._hop_places(after, view), strict=True)
            for k, (own, other) in enumerate(pairs):
                if own is not None and other is not None:
                    made[k, other.positions] = row[k, own.positions]
        return made

    def patches(self, row: Float[Tensor, "k N"], hop: Hop) -> Float[Tensor, "k rows columns"]:
        """Return the patch map of a row over the tokens that a hop leads to. Raises LayerError."""
        places = [replace(place, item=k) for k, place in enumerate(self._hop_places(hop, self.view)) if place]
        return fold(row[..., None], places)[..., 0]

    def _hop_places(self, hop: Hop, view: str) -> list[PatchTokens | None]:
        return self._places(self.structure.keys(hop), self._hop_shape(hop), view)

    def packed(self, stack: str) -> bool:
        """Whether the tokens that a stack of self-attention leads to are packed: a view has no item of its own."""
        hop = next((hop for hop in self.path if hop.stack == stack and hop.kind == "self"), None)
        if hop is None or self.structure.stack(stack).items == "sequence":
            return False
        found = self.adapter.patch_tokens(self.structure.keys(hop), self.inputs, self._hop_shape(hop))
        return any(place.item is None for place in found)

    def _packed_start(self, hop: Hop) -> Float[Tensor, "k N"]:
        """The mean over the patches of all views of each target's image. Raises ModelError for another pooling."""
        if self.structure.pooling != "mean":
            raise ModelError(
                f"attention of packed images with pooling {self.structure.pooling!r} is not supported: only 'mean' "
                "names the tokens where chains of attention start"
            )
        weights = self.weights[self._recorded(hop.stack)]
        row = torch.zeros(len(self.targets), self._tokens(hop.stack), dtype=weights.dtype, device=weights.device)
        for view in (DETAIL, OVERVIEW):
            for k, place in enumerate(self._hop_places(hop, view)):
                if place is not None and place.index is not None:
                    row[k, place.index.ravel().tolist()] = 1
        return row / row.sum(-1, keepdim=True)

    def _tokens(self, stack: str) -> int:
        """The number of tokens of a row of a stack."""
        blocks, *_, tokens, _ = self._weights_shape(stack)
        return blocks * tokens if self.packed(stack) else tokens

    def _hop_shape(self, hop: Hop) -> tuple[int, ...]:
        shape = self._weights_shape(hop.stack)
        return (shape[0], shape[-1], 1)

    def _weights_shape(self, stack: str) -> tuple[int, ...]:
        """The shape (B, H, Q, S) of the weights of a block of a stack that was recorded."""
        return tuple(self.weights[self._recorded(stack)].shape)

    def _recorded(self, stack: str) -> str:
        return next(path for path in reversed(self.structure.stack(stack).attention) if path in self.weights)

    # ------------------------------------------------------------------ scores of masked images

    def whole_scores(self) -> Float[Tensor, "k"]:
        """Return the score of each target."""
        self._declared("rescoring")
        assert self.whole is not None
        return self.whole

    def masked_scores(self) -> Float[Tensor, "k n"]:
        """Return the scores of each target on its image under n masks. Of an image with fewer masks the last columns
        repeat the last one; `weighted_masks` leaves them out."""
        self._declared("rescoring")
        assert self.masked is not None
        return self.masked

    def weighted_masks(self, weights: Float[Tensor, "k n"], *, hidden: bool = False) -> Float[Tensor, "k rows columns"]:
        """Return sum_n weights_kn M_n for every target, M_n the mean over each patch of mask n, or of what it hides.

        Masks are over the detail view; in another view of the image they are averaged over its patches.
        """
        self._declared("rescoring")
        maps = weights.new_zeros(len(weights), *self.grid)
        for image in self.targets.image.unique().tolist():
            mine = self.targets.image == image
            geometry = self._geometry(image)
            assert geometry is not None
            masks = self.masks[image].over(geometry).to(weights)
            maps[mine] = einsum(weights[mine][:, : len(masks)], 1 - masks if hidden else masks, "k n, n r c -> k r c")
        return maps

    # ------------------------------------------------------------------ places of patches

    @property
    def _path(self) -> str:
        return self.structure.keys(self._recorded_hop) if self.layer is None else self.layer

    @property
    def _shape(self) -> tuple[int, ...]:
        return self._hop_shape(self._recorded_hop) if self.layer is None else tuple(self.outputs[self.layer].shape)

    @property
    def _recorded_hop(self) -> Hop:
        """The last hop whose attention was recorded."""
        return next(
            hop
            for hop in reversed(self.path)
            if any(path in self.weights for path in self.structure.stack(hop.stack).attention)
        )

    def _places(self, path: str, shape: tuple[int, ...], view: str = "") -> list[PatchTokens | None]:
        """For each target the positions of its patches in an output of this shape; None without such a view.

        `view` is by default that of the trace.
        """
        views, view = self.inputs.images.views, view or self.view
        found = [one for one in self.adapter.patch_tokens(path, self.inputs, shape) if views[one.view].name == view]
        if self.structure.items(path) == "sequence":
            by_text = {one.item: one for one in found}
            return [by_text.get(text) for text in self.targets.text.tolist()]
        by_image = {views[one.view].image: one for one in found}
        return [by_image.get(image) for image in self.targets.image.tolist()]

    def _units(
        self, path: str, shape: tuple[int, ...], *, other: bool = False
    ) -> tuple[list[PatchTokens], Int[Tensor, "k"]]:
        """The images or sequences of the targets, each once, and the index of each target's among them (-1: none)."""
        places = self._places(path, shape)
        if self.structure.items(path) == "sequence":
            sequences = self.targets.baseline_sequence if other else self.targets.sequences
            assert sequences is not None
            keys = sequences.tolist()
        else:
            keys = [place.view if place is not None else -1 for place in places]
        known = sorted({key for key in keys if key >= 0})
        place_of = dict(zip(keys, places, strict=True))
        units = []
        for key in known:
            place = place_of[key]
            assert place is not None
            units.append(replace(place, item=key) if self.structure.items(path) == "sequence" else place)
        order = {key: i for i, key in enumerate(known)}
        return units, torch.tensor([order.get(key, -1) for key in keys])

    def _per_target(self, signal: str, record: Mapping[str, Tensor], other: bool) -> Tensor:
        """One item per target of a record per image or sequence; no copy where the two are the same."""
        self._declared(signal)
        assert self.layer is not None
        tensor = record[self.layer]
        units, owner = self._units(self.layer, tuple(tensor.shape), other=other)
        if not units:
            return precise(tensor).new_zeros(len(owner), *self.grid, tensor.shape[-1])
        patches = precise(fold(tensor, units))
        if owner.tolist() == list(range(len(units))):
            return patches
        owner = owner.to(tensor.device)
        return patches[owner.clamp(min=0)] * (owner >= 0).reshape(-1, 1, 1, 1)

    def _declared(self, signal: str) -> None:
        if signal not in self.needs:
            raise RuntimeError(f"a method reads {signal!r} but declares only {sorted(self.needs)}")


def precise(tensor: Tensor) -> Tensor:
    """Return the tensor off the graph, half precision as float32: sums over patches and blocks need the digits."""
    tensor = tensor.detach()
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
