"""Targets of FLAVA's multimodal encoder over image and text: its matching head and its masked-language head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapters.shared.last_block import LastBlock, patch_mask
from adapters.shared.text_sequences import SequenceBatch, sequence_targets
from grounding.adapter.base import Features
from grounding.adapter.inputs import ImageInputs, Inputs, Targets

# The multimodal sequence: its own CLS, the image CLS, patches, text.
BEFORE = 2


@dataclass(frozen=True, eq=False)
class Fusion:
    """The multimodal encoder of a FlavaForPreTraining and its heads; for its sequences see
    `adapters.shared.text_sequences`."""

    model: Any  # a FlavaForPreTraining; its parts have no static types
    pad_id: int

    def targets(self, inputs: Inputs, targets: Targets) -> Targets:
        """Add the sequences of the targets and the rows where attention chains start, see `sequence_targets`."""
        geometry = inputs.images.geometry(0)
        before = BEFORE + geometry.rows * geometry.columns
        logit = targets.kind == "logit"
        return sequence_targets(inputs, targets, self.pad_id, self.model.dtype, before=before, per_token=logit)

    def scores(self, states: Float[Tensor, "B N D"], targets: Targets) -> Float[Tensor, "K"]:
        """Log odds of the matching head, or masked-language logits (of a span the mean over its tokens)."""
        batch, data = SequenceBatch.of(targets, states.device), targets.data
        image = targets.image.to(states.device)
        fused = self.fuse(states[image[batch.rows]], data["ids"][batch.rows], batch.mask)
        if targets.kind == "matching":
            odds = self.model.itm_head(fused)
            return batch.differences(odds[:, 1] - odds[:, 0])
        start = targets.chain_start
        assert start is not None
        k, at = start.nonzero(as_tuple=True)
        token = data["ids"][k, at - (start.shape[1] - data["ids"].shape[1])]
        # A caption, its tokens and its phrases share positions: the head computes each once.
        spots, own = torch.stack([batch.own[k], at], 1).unique(dim=0, return_inverse=True)
        logits = self.model.mmm_text_head(fused[spots[:, 0], spots[:, 1]])[own, token]
        weights = start[k, at].to(logits.dtype)
        return logits.new_zeros(len(targets)).index_add(0, k, logits * weights)

    def pooled_gradients(
        self,
        last: LastBlock,
        hidden: Float[Tensor, "R Q D"],
        targets: Targets,
        patch: Float[Tensor, "Q"],
        *,
        before_norm: bool,
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients at the last block, from the rows that the heads read; `hidden` is the block's input.

        The sequence with a masked part, whose score is subtracted, is another sequence and adds nothing.
        """
        start, ids = targets.chain_start, targets.data["ids"]
        assert start is not None
        ahead = start.shape[1] - ids.shape[1]
        rows = start if targets.kind == "logit" else torch.zeros_like(start).index_fill(1, ids.new_zeros(1), 1)
        k, at = rows.nonzero(as_tuple=True)
        kept = torch.nn.functional.pad(targets.data["mask"].bool(), (ahead, 0), value=True)

        def scores(row: Tensor, mine: Tensor) -> Tensor:
            states = last.norm(self.model.flava.multimodal_model.layernorm, row)
            if targets.kind == "logit":
                token = ids[k[mine], at[mine] - ahead]
                return self._head(last, states).gather(1, token[:, None])[:, 0] * rows[k[mine], at[mine]]
            odds = self.model.itm_head(states[:, None])
            return odds[:, 1] - odds[:, 0]

        sequence = targets.sequences.to(k.device)[k]
        found = last.pooled_gradients(hidden, sequence, at, patch, scores, kept=kept[k], before_norm=before_norm)
        return hidden.new_zeros(len(targets), hidden.shape[-1]).index_add(0, k, found)

    def _head(self, last: LastBlock, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Logits of the masked-language head, its norm under the block's backward rule."""
        head, transform = self.model.mmm_text_head, self.model.mmm_text_head.transform
        inner = transform.transform_act_fn(transform.dense(states))
        return head.decoder(last.norm(transform.LayerNorm, inner))

    def fuse(
        self, states: Float[Tensor, "R N D"], ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"]
    ) -> Float[Tensor, "R Q D"]:
        """Output of the multimodal encoder for R pairs of image states and text."""
        towers = self.model.flava
        text = towers.text_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True
        ).hidden_states[-1]
        together = torch.cat([towers.image_to_mm_projection(states), towers.text_to_mm_projection(text)], 1)
        seen = torch.ones(len(ids), BEFORE - 1 + states.shape[1], dtype=mask.dtype, device=mask.device)
        return towers.multimodal_model(
            together, attention_mask=torch.cat([seen, mask], 1), return_dict=True
        ).last_hidden_state


@dataclass(frozen=True, eq=False)
class FusionShortcut:
    """The pooled gradient at the last block of the multimodal encoder. `blocks` makes that block for a backward rule;
    `layers` are the input of its attention, and its own input."""

    fusion: Fusion
    layers: Mapping[str, tuple[str, ...]]
    blocks: Callable[[str | None], LastBlock]

    def pooled_gradient(
        self, layer: str, inputs: Inputs, targets: Targets, outputs: Mapping[str, Tensor], rule: str | None
    ) -> Float[Tensor, "K D"]:
        """Pooled gradients from the rows of the last block that the heads read."""
        [before] = self.layers[layer] or (layer,)
        hidden, geometry = outputs[before].detach(), inputs.images.geometry(0)
        patch = patch_mask(hidden, BEFORE, geometry.rows * geometry.columns)
        return self.fusion.pooled_gradients(self.blocks(rule), hidden, targets, patch, before_norm=layer == before)

    def features(self, layer: str, output: Tensor, images: ImageInputs) -> Features | None:  # noqa: ARG002
        """None: an attention block follows these layers."""
        return None


def last_block(tower: Any, behind: Sequence[nn.Module], rule: str | None) -> LastBlock:
    """The last block of one of FLAVA's encoders, with the modules after it that are recomputed."""
    block = tower.encoder.layer[-1]
    attention = block.attention.attention
    return LastBlock(
        before=block.layernorm_before,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        out=block.attention.output.dense,
        after=block.layernorm_after,
        mlp=lambda x: block.output.dense(block.intermediate(x)),
        heads=attention.num_attention_heads,
        parts=(block, tower.layernorm, *behind),
        rule=rule,
    )
