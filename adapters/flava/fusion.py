"""FLAVA's multimodal encoder: picture and text in one sequence, and the targets that are read behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adapters.shared.last_block import LastBlock
from adapters.shared.text_targets import Flat, scored_as, span_ids
from adapters.shared.tokenization import pad
from grounding.adapter.inputs import Inputs, Targets

# The multimodal sequence: its own CLS, the image CLS, patches, text.
BEFORE = 2


@dataclass(frozen=True, eq=False)
class Fusion:
    """The part of a FlavaForPreTraining behind its towers.

    Targets that are read in the same text with the same picture share one sequence (`Targets.unit`). A part of a
    caption that is matched is compared with the caption in which it is masked: one more sequence, behind all others.
    """

    model: Any  # a FlavaForPreTraining; its parts have no static types
    pad_id: int

    def targets(self, inputs: Inputs, flat: Flat, targets: Targets) -> Targets:
        """Per target the text that it is read in, what is masked for comparison, and where attention chains start: at
        the places of the span. The matching head itself reads the CLS alone, but that reads the words, and they the
        picture: its own row is where little is to be seen (measured on the demo model)."""
        matching = targets.kind == "matching"
        how = [scored_as(span, targets.token_target) if matching else "whole" for _, span in flat]
        own = [
            span_ids(inputs.tokens[t], span) if h == "alone" else list(inputs.tokens[t].ids)
            for (t, span), h in zip(flat, how, strict=True)
        ]
        device = inputs.tensors["input_ids"].device
        ids, mask = pad(own, self.pad_id, device)
        compared = mask.clone()
        ahead = BEFORE + inputs.geometry[0].rows * inputs.geometry[0].columns
        start = torch.zeros(len(flat), ahead + ids.shape[1], device=device)
        for k, (t, span) in enumerate(flat):
            places = torch.tensor(span.positions or inputs.tokens[t].visible, device=device)
            if how[k] == "left out":
                compared[k, places] = 0
            if how[k] == "alone":  # a text of its own: its tokens stand behind the first special ones
                places = inputs.tokens[t].visible[0] + torch.arange(len(places), device=device)
            start[k, ahead + places] = 1 / len(places)
        precise = self.model.dtype if self.model.dtype.itemsize >= 4 else torch.float32
        start = start.to(precise)
        known: dict[tuple[int, ...], int] = {}
        unit = [known.setdefault((b, *text), len(known)) for b, text in zip(targets.image.tolist(), own, strict=True)]
        data = {"ids": ids, "mask": mask, "compared": compared, "start": start}
        left_out = [h == "left out" for h in how]
        # Sequences without a token stand behind those of the texts, in the order of their targets.
        other = [len(known) + sum(left_out[:k]) if out else -1 for k, out in enumerate(left_out)]
        return replace(
            targets,
            data=data,
            unit=torch.tensor(unit),
            rows=None if matching else start,
            other=torch.tensor(other) if any(left_out) else None,
        )

    def scores(self, encoded: Float[Tensor, "B 2 N D"], targets: Targets) -> Float[Tensor, "K"]:
        """Log odds of the matching head, or masked-language logits (of a span the mean over its tokens)."""
        place = torch.unique(targets.units, return_inverse=True)[1]
        units = place.tolist()
        first = [units.index(unit) for unit in range(max(units) + 1)]
        place, data = place.to(encoded.device), targets.data
        left_out = (data["compared"] != data["mask"]).any(1).nonzero().flatten()
        rows = torch.cat([torch.tensor(first, device=encoded.device), left_out])
        masks = torch.cat([data["mask"][first], data["compared"][left_out]])
        states = encoded[targets.image.to(encoded.device)[rows], 0]
        fused = self.fuse(states, data["ids"][rows], masks)
        if targets.kind == "matching":
            odds = self.model.itm_head(fused)
            odds = odds[:, 1] - odds[:, 0]
            return odds[place].index_add(0, left_out, -odds[len(first) :])
        k, at = data["start"].nonzero(as_tuple=True)
        token = data["ids"][k, at - (data["start"].shape[1] - data["ids"].shape[1])]
        # A caption, its tokens and its phrases share places: each goes through the vocabulary once.
        spots, own = torch.stack([place[k], at], 1).unique(dim=0, return_inverse=True)
        logits = self.model.mmm_text_head(fused[spots[:, 0], spots[:, 1]])[own, token]
        weights = data["start"][k, at].to(logits.dtype)
        return logits.new_zeros(len(targets)).index_add(0, k, logits * weights)

    def shifts(
        self,
        last: LastBlock,
        hidden: Float[Tensor, "R Q D"],
        targets: Targets,
        patch: Float[Tensor, "Q"],
        **where: bool,
    ) -> Float[Tensor, "K D"]:
        """d score / d shift of all patches at the last block, from the rows that the targets are read in; `hidden` is
        the block's input. What a caption is compared with has no part in it: it is another sequence."""
        made = hidden.new_zeros(len(targets), hidden.shape[-1])
        start, ids = targets.data["start"], targets.data["ids"]
        ahead = start.shape[1] - ids.shape[1]
        rows = start if targets.kind == "logit" else torch.zeros_like(start).index_fill(1, ids.new_zeros(1), 1)
        k, at = rows.nonzero(as_tuple=True)
        unit = targets.units.to(k.device)[k]
        for u in unit.unique().tolist():
            mine = unit == u
            kept = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
            kept[ahead:] = targets.data["mask"][k[mine][0]].bool()
            with torch.enable_grad():
                shift = hidden.new_zeros(int(mine.sum()), hidden.shape[-1]).requires_grad_()
                read = last.rows(hidden[u], at[mine], shift, patch, kept=kept, **where)
                read = last.norm(self.model.flava.multimodal_model.layernorm, read)
                if targets.kind == "logit":
                    token = ids[k[mine], at[mine] - ahead]
                    scores = self._head(last, read).gather(1, token[:, None])[:, 0] * rows[k[mine], at[mine]]
                else:
                    odds = self.model.itm_head(read[:, None])
                    scores = odds[:, 1] - odds[:, 0]
                [gradient] = torch.autograd.grad(scores.sum(), shift)
            made = made.index_add(0, k[mine], gradient)
        return made

    def _head(self, last: LastBlock, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """The masked-language head, its norm under the rule."""
        head, transform = self.model.mmm_text_head, self.model.mmm_text_head.transform
        inner = transform.transform_act_fn(transform.dense(states))
        return head.decoder(last.norm(transform.LayerNorm, inner))

    def fuse(
        self, states: Float[Tensor, "R N D"], ids: Int[Tensor, "R L"], mask: Int[Tensor, "R L"]
    ) -> Float[Tensor, "R Q D"]:
        """The multimodal encoder's output for pictures' states and texts, row by row."""
        towers = self.model.flava
        text = towers.text_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True
        ).hidden_states[-1]
        together = torch.cat([towers.image_to_mm_projection(states), towers.text_to_mm_projection(text)], 1)
        seen = torch.ones(len(ids), BEFORE - 1 + states.shape[1], dtype=mask.dtype, device=mask.device)
        return towers.multimodal_model(
            together, attention_mask=torch.cat([seen, mask], 1), return_dict=True
        ).last_hidden_state


def last_block(tower: Any, behind: Sequence[nn.Module], rule: str | None) -> LastBlock:
    """The last block of one of FLAVA's encoders, and what is recomputed behind it."""
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
