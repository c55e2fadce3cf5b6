"""Skeleton of an adapter for Qwen2.5-VL: packed patches in window order, merged 2 x 2, a causal language model.

It forces given answers and generates greedily. It is here to hold the contract against such a model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.vision_utils import get_vision_window_index

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
from grounding.adapter.patch_tokens import PatchTokens
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.errors import LayerError
from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import Generate, TokenizedText

PROMPT = "a picture of"
VISION, MERGER, LANGUAGE = "model.visual", "model.visual.merger", "model.language_model"


class QwenAdapter(Adapter):
    """Adapter around a `Qwen2_5_VLForConditionalGeneration`, a tokenizer and an image processor.

    Target `logit`: of a token of the answer at the row that writes it; of a phrase the mean over its tokens.
    """

    target_kinds = ("logit",)
    token_targets = ()
    default_methods = ("gradcam", "grad_x_attention")

    def __init__(self, model, tokenizer, image_processor):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.info = ModelInfo(id="qwen", type=model.config.model_type)
        self.merge = model.config.vision_config.spatial_merge_size

    def structure(self, kind):
        del kind
        text, vision = self.model.model.language_model.layers, self.model.model.visual.blocks
        blocks = tuple(f"{LANGUAGE}.layers.{i}" for i in range(len(text)))
        language = Stack(
            blocks,
            tuple(f"{block}.input_layernorm" for block in blocks),
            tuple(f"{block}.self_attn" for block in blocks),
            items="sequence",
            rows_read_alone=True,
        )
        return ModelStructure(
            stacks={"vision": Stack(tuple(f"{VISION}.blocks.{i}" for i in range(len(vision)))), "language": language},
            default_layer=MERGER,
            pooling="sequence",
            path=(Hop("language"),),
            sequence_side=(LANGUAGE,),
            unrecorded="attention by windows",
        )

    def prepare_images(self, images):
        opened = tuple(open_image(image) for image in images)
        found = [self.image_processor(image.pil, return_tensors="pt") for image in opened]
        views, side = [], self.image_processor.patch_size
        for b, (image, one) in enumerate(zip(opened, found, strict=True)):
            _, rows, columns = one["image_grid_thw"][0].tolist()
            geometry = Geometry.from_steps(image.width, image.height, resized=(columns * side, rows * side))
            views.append(View(b, geometry.with_grid(rows // self.merge, columns // self.merge)))
        tensors = {name: torch.cat([one[name] for one in found]) for name in ("pixel_values", "image_grid_thw")}
        tensors["pixel_values"] = tensors["pixel_values"].to(self.dtype)
        counts = tuple(len(one["pixel_values"]) for one in found)
        return ImageInputs(opened, tuple(views), tensors, packed={"pixel_values": counts})

    def encode_images(self, images):
        tensors = images.tensors
        return self.model.model.visual(tensors["pixel_values"], grid_thw=tensors["image_grid_thw"]).pooler_output

    def generate(self, images, features, queries):
        del features
        return [self._answer(images.select([b]), query) for b, query in queries]

    def _answer(self, images, query):
        if not isinstance(query.text, Generate):
            return replace(self._tokens(query.text), origin="forced")
        ids = torch.tensor([self._prompt(images, 0, query)])
        kinds = {"input_ids": ids, "mm_token_type_ids": (ids == self.model.config.image_token_id).long()}
        made = self.model.generate(
            **kinds, **images.tensors, max_new_tokens=query.text.max_length or 4, do_sample=False
        )
        written = made[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(written)
        starts = [len(self.tokenizer.decode(written[:i])) for i in range(len(written) + 1)]
        offsets = tuple(pairwise(starts))
        return TokenizedText(text, tuple(written), offsets, (False,) * len(written), origin="generated")

    def _tokens(self, text):
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = tuple(encoded["input_ids"])
        return TokenizedText(text, ids, tuple(map(tuple, encoded["offset_mapping"])), (False,) * len(ids))

    def _prompt(self, images, b, query):
        """Ids of the placeholders of an image and of the prompt."""
        geometry = images.geometry(b)
        config = self.model.config
        asked = self.tokenizer(query.prompt or PROMPT, add_special_tokens=False)["input_ids"]
        places = [config.image_token_id] * (geometry.rows * geometry.columns)
        return [config.vision_start_token_id, *places, config.vision_end_token_id, *asked]

    def prepare_texts(self, images, queries):
        flat = [(b, query) for b, own in enumerate(queries) for query in own]
        prompts = [self._prompt(images, b, query) for b, query in flat]
        texts = tuple(query.text for _, query in flat)
        rows = [[*prompt, *text.ids[:-1]] for prompt, text in zip(prompts, texts, strict=True)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        begins = torch.tensor([len(prompt) - 1 for prompt in prompts])
        tensors = {"input_ids": ids, "attention_mask": mask, "begin": begins}
        return Inputs(images, texts, tuple(b for b, _ in flat), tensors)

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        rows = torch.zeros(len(found), inputs.tensors["input_ids"].shape[1], dtype=self.dtype)
        token = torch.zeros_like(rows, dtype=torch.long)
        for k, (t, span) in enumerate(found.flat):
            for position in span.positions:
                at = int(inputs.tensors["begin"][t]) + position
                rows[k, at], token[k, at] = 1 / len(span.positions), inputs.texts[t].ids[position]
        return replace(found, data={"token": token}, chain_start=rows, read_rows=rows)

    def score(self, inputs, features, targets):
        model, ids, mask = self.model.model, inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        embedded = model.get_input_embeddings()(ids)
        places = ids == self.model.config.image_token_id
        owner = [self._cells(inputs.images)[b] for b in inputs.text_image]
        embedded = embedded.masked_scatter(places[..., None], torch.cat([features[own] for own in owner]))
        grid = inputs.images.tensors["image_grid_thw"][list(inputs.text_image)]
        positions, _ = model.get_rope_index(ids, places.int(), image_grid_thw=grid, attention_mask=mask)
        states = model.language_model(inputs_embeds=embedded, position_ids=positions, attention_mask=mask)
        logits = self.model.lm_head(states.last_hidden_state)
        k, row = targets.read_rows.nonzero(as_tuple=True)
        values = logits[targets.text[k], row, targets.data["token"][k, row]] * targets.read_rows[k, row]
        return values.new_zeros(len(targets)).index_add(0, k, values)

    def _cells(self, images):
        """For each image the rows of the merged features that are its own."""
        counts = [view.geometry.rows * view.geometry.columns for view in images.views]
        return [slice(sum(counts[:b]), sum(counts[: b + 1])) for b in range(len(counts))]

    def patch_tokens(self, path, inputs, shape):
        if path.startswith(f"{LANGUAGE}."):
            return self._in_language(inputs, shape, path)
        config, images = self.model.config.vision_config, inputs.images
        order, _ = get_vision_window_index(
            images.tensors["image_grid_thw"], spatial_merge_size=self.merge, window_size=config.window_size,
            patch_size=config.patch_size,
        )  # fmt: skip
        place = torch.as_tensor(order).argsort().numpy()  # of each merged cell, row by row
        merged = shape == (len(place), shape[-1])
        if not merged and shape != (len(place) * self.merge**2, shape[-1]):
            raise LayerError(f"a layer output of shape {shape} is no patch grid: expected {len(place)} merged cells")
        found = []
        for v, own in enumerate(self._cells(images)):
            geometry = images.views[v].geometry
            index = place[own].reshape(geometry.rows, geometry.columns)
            found.append(PatchTokens(v, None, index if merged else self._unmerged(index)))
        return tuple(found)

    def _unmerged(self, index):
        """Positions of the patches: those of a merged cell follow each other, row by row."""
        rows, columns = np.indices(np.array(index.shape) * self.merge)
        inside = (rows % self.merge) * self.merge + columns % self.merge
        return index[rows // self.merge, columns // self.merge] * self.merge**2 + inside

    def _in_language(self, inputs, shape, path):
        ids = inputs.tensors["input_ids"]
        if len(shape) != 3 or shape[1] != ids.shape[1]:
            raise LayerError(f"layer {path!r} of shape {shape} has no token for each position of the sequence")
        found = []
        for t, b in enumerate(inputs.text_image):
            geometry = inputs.images.geometry(b)
            index = (ids[t] == self.model.config.image_token_id).nonzero().flatten().numpy()
            found.append(PatchTokens(b, t, index.reshape(geometry.rows, geometry.columns)))
        return tuple(found)


def qwen_adapter(tokenizer, seed=0):
    """A tiny random Qwen2.5-VL: windows of 2 x 2 merged cells, four blocks on both sides."""
    torch.manual_seed(seed)
    size = len(tokenizer)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1, 3],
            "temporal_patch_size": 2,
        },
        text_config={
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": size + 8, "max_position_embeddings": 512,
            "bos_token_id": 0, "eos_token_id": size + 5, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        image_token_id=size, video_token_id=size + 1, vision_start_token_id=size + 2, vision_end_token_id=size + 3,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=2048)
    return QwenAdapter(model.double().eval(), tokenizer, processor)
