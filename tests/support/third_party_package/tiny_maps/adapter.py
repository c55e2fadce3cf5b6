"""The adapter of this model, by the six members of the contract."""

from dataclasses import replace

import numpy as np
import torch

from grounding.adapter import Adapter
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import TokenizedText, word_spans
from tiny_maps.model import TinyMapsModel


class TinyAdapter(Adapter):
    target_kinds = ("similarity",)
    token_targets = ("alone",)

    def __init__(self, model, info):
        self.model, self.info = model.eval(), info

    @classmethod
    def from_checkpoint(cls, source):
        model = source.model(TinyMapsModel)
        return cls(model, source.info(model, None))

    def structure(self, kind):
        stack = Stack(("mlp",), ("norm",), ("attention",))
        return ModelStructure({"vision": stack}, "norm", "mean", path=(Hop("vision"),))

    def prepare_images(self, images):
        own, opened = self.model.config, tuple(open_image(image) for image in images)
        size, grid = (own.columns * own.patch, own.rows * own.patch), (own.rows, own.columns)
        pixels = np.stack([np.asarray(one.pil.resize(size), np.float32) / 255 for one in opened])
        geometry = [Geometry.from_steps(one.width, one.height, resized=size, grid=grid) for one in opened]
        views = tuple(View(image, one) for image, one in enumerate(geometry))
        return ImageInputs(opened, views, {"pixels": torch.from_numpy(pixels).movedim(-1, 1).to(self.dtype)})

    def prepare_texts(self, images, queries):
        texts = []
        for text in (query.text for own in queries for query in own):
            spans = word_spans(text)
            ids = tuple(sum(map(ord, text[start:end])) % self.model.config.words for start, end in spans)
            texts.append(TokenizedText(text, ids, spans, (False,) * len(ids)))
        return Inputs(images, tuple(texts), tuple(image for image, own in enumerate(queries) for _ in own))

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        ids = [torch.tensor([[inputs.texts[t].ids[i] for i in span.positions]]) for t, span in found.flat]
        with torch.no_grad():
            return replace(found, data={"text": torch.cat([self.model.embed_texts(own) for own in ids])})

    def encode_images(self, images):
        return self.model.embed_images(images.tensors["pixels"])

    def score(self, inputs, features, targets):
        return (features[targets.image] * targets.data["text"]).sum(-1)
