"""Encoder-decoders that read a picture: TrOCR (Li et al. 2021) and its like, a ViT or DeiT and a text decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import VisionEncoderDecoderModel

from adapters.loading import Checkpoint, model_info, own_parts
from adapters.shared.generation import TextGenerator
from adapters.shared.images import prepare_images
from adapters.shared.stacks import decoder_stacks, find_stack
from adapters.shared.tokenization import pad
from adapters.shared.unmodified import parents_unmodified
from adapters.trocr.fast_decoder import FastDecoder
from grounding.adapter.base import Adapter, ModelInfo, TokenProbability
from grounding.adapter.inputs import Inputs, Targets
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure
from grounding.adapter.vision_cache import encoded_of
from grounding.core.errors import LayerError, ModelError, TextError
from grounding.core.text import Alternative, Asked, Generate, Span, TokenizedText, check_text

# Prefix tokens of the encoders: CLS, and DeiT's distillation token.
PREFIX = {"vit": 1, "deit": 2}
# A picture this high that is not at least so much wider is more than a line.
PAGE_HEIGHT, PAGE_ASPECT = 100, 1.5
ALTERNATIVES = 3


class TrOcrAdapter(Adapter):
    """`VisionEncoderDecoderModel` with its processor (or `tokenizer` and `image_processor` apart).

    A text is what the model writes of the picture (`Generate`), or what it is made to write. Row t of the decoder
    writes token t: inputs are the start token and ids[:-1], targets ids. Target `logit`: the logit of a token at its
    row, `log_probability` likewise; of a word, phrase or caption the mean over its tokens.
    """

    kinds = ("logit", "log_probability")
    fast_kinds = kinds
    token_targets = ()
    default_methods = ("gradcam", "gradcam_ln", "rollout", "gradient_x_cross_attention")
    generates = True

    model: VisionEncoderDecoderModel

    def __init__(
        self,
        model: VisionEncoderDecoderModel,
        processor: Any = None,
        *,
        tokenizer: Any = None,
        image_processor: Any = None,
        info: ModelInfo | None = None,
    ) -> None:
        parts = own_parts(self, model, (VisionEncoderDecoderModel,), processor, tokenizer, image_processor)
        self.model, (self.tokenizer, self.image_processor) = model, parts
        if self._vision.model_type not in PREFIX:
            raise ModelError(
                f"vision encoders of type {self._vision.model_type!r} are not supported "
                f"(there are: {', '.join(PREFIX)})"
            )
        self.writer = TextGenerator(model, self.tokenizer)
        self.info = info or model_info(model, self.image_processor)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> TrOcrAdapter:
        """The adapter of a checkpoint. Its pooler, which many lack, is read by nothing."""
        image_processor, tokenizer = source.image_processor(), source.tokenizer()
        model = source.model(VisionEncoderDecoderModel, unused=("encoder.pooler.",))
        return cls(
            model, tokenizer=tokenizer, image_processor=image_processor, info=source.info(model, image_processor)
        )

    @cached_property
    def structure(self) -> ModelStructure:
        """The default tap is the last encoder block: every patch of it is read."""
        vision = find_stack(self.model, "encoder")
        return ModelStructure(
            stacks={"vision": vision, **decoder_stacks(self.model, "decoder")},
            layer=vision.blocks[-1],
            pooling="cross",
            prefix=PREFIX[self._vision.model_type],
            text_stacks=frozenset({"cross"}),
            text_side=("decoder", "enc_to_dec_proj"),
        )

    def sequence(self, path: str) -> tuple[int, bool]:
        """The decoder has text tokens alone. Raises LayerError there."""
        if f"{path}.".startswith("decoder."):
            raise LayerError(f"layer {path!r} has tokens of the text alone: there are no patches in it")
        return super().sequence(path)

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Pixel values (B, 3, H, W)."""
        found = prepare_images(self, self.image_processor, images, patch=self._vision.patch_size)
        warnings = tuple((*own, *_page(p.width, p.height)) for own, p in zip(found.warnings, found.images, strict=True))
        return replace(found, warnings=warnings)

    def prepare_texts(self, inputs: Inputs, texts: Sequence[Sequence[Asked]]) -> Inputs:
        """Token ids (T, L) that each row of the decoder gets and writes, padded to the longest text."""
        owner = [b for b, own in enumerate(texts) for _ in own]
        flat = [text for own in texts for text in own]
        encoded = encoded_of(self, inputs)
        found: dict[int, tuple[TokenizedText, tuple[str, ...]]] = {}
        with Recorder(self.model):
            asked: dict[Generate, list[int]] = defaultdict(list)
            for t, text in enumerate(flat):
                if isinstance(text, Generate):
                    asked[text].append(t)
                else:
                    found[t] = self.writer.force(check_text(text), encoded[owner[t]])
            for how, members in asked.items():
                found |= dict(zip(members, self.writer.write(encoded[[owner[t] for t in members]], how), strict=True))
        tokens = tuple(found[t][0] for t in range(len(flat)))
        target_ids, _ = pad([own.ids for own in tokens], self.writer.pad, self.device)
        start = torch.full_like(target_ids[:, :1], self.writer.start)
        return replace(
            inputs,
            tokens=tokens,
            text_image=tuple(owner),
            tensors={
                **inputs.tensors,
                "target_ids": target_ids,
                "input_ids": torch.cat([start, target_ids[:, :-1]], 1),
            },
            text_warnings=tuple(found[t][1] for t in range(len(flat))),
            per_text=("target_ids", "input_ids"),
            origins=tuple("generated" if isinstance(text, Generate) else "forced" for text in flat),
            notes={},
        )

    def targets(
        self,
        inputs: Inputs,
        spans: Sequence[Sequence[Span]],
        kind: str | None = None,
        token_target: str | None = None,
    ) -> Targets:
        """Per span its rows of the decoder and the token at each; of a contrast the second token besides."""
        kind, token_target = self.check_kind(kind, token_target)
        flat = [(t, self.writer.named(inputs.tokens[t], span)) for t, chosen in enumerate(spans) for span in chosen]
        owner = torch.tensor([t for t, _ in flat])
        ids = inputs.tensors["target_ids"][owner]  # (K, L)
        precise = self.dtype if self.dtype.itemsize >= 4 else torch.float32
        rows = torch.zeros(ids.shape, dtype=precise, device=ids.device)
        against = torch.full_like(ids[:, 0], -1)
        for k, (t, span) in enumerate(flat):
            places = list(span.positions or inputs.tokens[t].visible or range(len(inputs.tokens[t])))
            rows[k, places] = 1 / len(places)
            if span.token:
                assert span.token_id is not None
                ids[k, places] = span.token_id
            if span.other_token:
                against[k] = self.writer.token_id(span.other_token, inputs.tokens[t].ids[places[0]])
                if against[k] == span.token_id:
                    raise TextError(f"{span.token!r} and {span.other_token!r} are the same token: there is no contrast")
        return Targets(
            kind=kind,
            image=torch.tensor(inputs.text_image)[owner],
            text=owner,
            spans=tuple(span for _, span in flat),
            data={"ids": ids, "against": against},
            token_target=token_target,
            rows=rows,
        )

    def encode_images(self, inputs: Inputs) -> Float[Tensor, "B N D"]:
        """All states of the encoder."""
        pixels, size = inputs.tensors["pixel_values"], self._vision.image_size
        usual = (size, size) if isinstance(size, int) else tuple(size)
        return self.model.encoder(
            pixel_values=pixels, interpolate_pos_encoding=tuple(pixels.shape[-2:]) != usual
        ).last_hidden_state

    def score(self, inputs: Inputs, encoded: Float[Tensor, "B N D"], targets: Targets) -> Float[Tensor, "K"]:
        """The mean logit (or log-probability) of each target's tokens at their rows."""
        states = encoded[list(inputs.text_image)]
        logits = self.model(
            encoder_outputs=(states,), decoder_input_ids=inputs.tensors["input_ids"], use_cache=False
        ).logits
        inputs.notes["logits"] = logits.detach()
        k, row, token, weight = atoms(targets)
        text = targets.text.to(logits.device)[k]
        values = logits[text, row, token]
        if targets.kind == "log_probability":
            values = values - logits.logsumexp(-1)[text, row]
        return values.new_zeros(len(targets)).index_add(0, k, values * weight.to(values.dtype))

    def alternatives(self, inputs: Inputs, targets: Targets) -> list[TokenProbability | None]:
        """Of targets at one row: the probability of the token explained there, and the best three others."""
        found: list[TokenProbability | None] = []
        assert targets.rows is not None
        for k, row in enumerate(targets.rows):
            places = row.nonzero().flatten().tolist()
            if len(places) != 1:
                found.append(None)
                continue
            own = int(targets.data["ids"][k, places[0]])
            chances = inputs.notes["logits"][int(targets.text[k]), places[0]].float().softmax(-1)
            best = [i for i in chances.topk(min(ALTERNATIVES + 1, len(chances))).indices.tolist() if i != own]
            others = (Alternative(self.writer.label_of(i), i, float(chances[i])) for i in best[:ALTERNATIVES])
            found.append((float(chances[own]), tuple(others)))
        return found

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """The last encoder block and the norm behind it, where the decoder is TrOCR's own."""
        last = self.structure.stacks["vision"].blocks[-1]
        inner = self.structure.stacks["decoder"].blocks[-1]
        if not FastDecoder.fits(self.model) or not parents_unmodified(self.model, last, inner):
            return {}
        return {last: (), "encoder.layernorm": ()}

    def from_tap(self, layer: str, features: Tensor) -> Tensor | None:
        """The last block is read through the encoder's final norm alone."""
        norm: Any = self.model.encoder.layernorm
        return norm(features) if layer == self.structure.stacks["vision"].blocks[-1] else None

    def shifts(
        self,
        layer: str,
        inputs: Inputs,
        targets: Targets,
        outputs: Mapping[str, Tensor],
        rule: str | None = None,
    ) -> Float[Tensor, "K D"]:
        """All tokens of a text in one decoder graph, see `FastDecoder`."""
        k, row, token, weight = atoms(targets)
        made = outputs[layer].new_zeros(len(targets), outputs[layer].shape[-1])
        text = targets.text.to(k.device)[k]
        for t in text.unique().tolist():
            mine = text == t
            pairs, place = torch.stack([row[mine], token[mine]], 1).unique(dim=0, return_inverse=True)
            decoder = FastDecoder(
                self.model,
                outputs[layer][inputs.text_image[t]],
                self.structure.prefix,
                layer != "encoder.layernorm",
                rule,
            )
            found = decoder.shifts(inputs.tensors["input_ids"][t], pairs, targets.kind == "log_probability")
            made = made.index_add(0, k[mine], found[place].detach() * weight[mine].to(found.dtype)[:, None])
        return made

    @property
    def _vision(self) -> Any:
        """The encoder's configuration."""
        return self.model.config.encoder


def atoms(targets: Targets) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The targets as sums of single logits: for each its target k, its row, its token id and its weight."""
    assert targets.rows is not None
    k, row = targets.rows.nonzero(as_tuple=True)
    weight = targets.rows[k, row]
    against = targets.data["against"][k]
    minus = against >= 0
    return (
        torch.cat([k, k[minus]]),
        torch.cat([row, row[minus]]),
        torch.cat([targets.data["ids"][k, row], against[minus]]),
        torch.cat([weight, -weight[minus]]),
    )


def _page(width: int, height: int) -> tuple[str, ...]:
    if height < PAGE_HEIGHT or width >= PAGE_ASPECT * height:
        return ()
    aspect = f"{width} x {height} pixels, width : height = {width / height:.2g}"
    return (f"the picture has {aspect}: this model reads one line of text; cut a page into lines first",)
