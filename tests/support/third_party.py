"""A third-party architecture, written from the documented requirements of `Adapter` alone."""

from dataclasses import replace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grounding.adapter.base import Adapter, ModelInfo
from grounding.adapter.inputs import ImageInputs, Inputs, Targets, View
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.geometry import Geometry
from grounding.core.images import open_image
from grounding.core.text import TokenizedText, word_spans

WIDTH, HEADS, PATCH, ROWS, COLUMNS = 16, 2, 8, 3, 5


class Config:
    _attn_implementation = "sdpa"


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=HEADS)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return self.out(attend(self, q, k, v, None, scaling=(WIDTH // HEADS) ** -0.5, is_causal=False)[0].flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), Attention(config)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attend(self.norm(x))
        return (x + self.mlp(x),)


class MeanModel(nn.Module):
    """Patches by convolution, two blocks that return tuples, the mean over patches; texts as bags of words."""

    def __init__(self):
        super().__init__()
        self.config = Config()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList([Block(self.config), Block(self.config)])
        self.words = nn.EmbeddingBag(97, WIDTH, mode="sum")

    def forward(self, pixels):
        x = rearrange(self.stem(pixels), "b d r c -> b (r c) d")
        for block in self.blocks:
            (x,) = block(x)
        return x.mean(1)


class MeanAdapter(Adapter):
    target_kinds = ("similarity", "norm")
    text_independent = ("norm",)
    rows, columns = ROWS, COLUMNS

    def __init__(self):
        torch.manual_seed(1)
        self.model = MeanModel().double().eval()
        self.info = ModelInfo(id="mean", type="mean")

    def structure(self, kind):
        blocks = tuple(f"blocks.{i}" for i in range(2))
        stack = Stack(blocks, tuple(f"{b}.norm" for b in blocks), tuple(f"{b}.attend" for b in blocks))
        return ModelStructure({"vision": stack}, "blocks.1", "mean", path=(Hop("vision"),))

    def prepare_images(self, images):
        opened = tuple(open_image(image) for image in images)
        size = (self.columns * PATCH, self.rows * PATCH)
        pixels = [torch.frombuffer(bytearray(p.pil.resize(size).tobytes()), dtype=torch.uint8) for p in opened]
        pixels = torch.stack(pixels).reshape(-1, size[1], size[0], 3).movedim(-1, 1).double() / 255
        geometry = tuple(
            Geometry.from_steps(p.width, p.height, resized=size).with_grid(self.rows, self.columns) for p in opened
        )
        return ImageInputs(opened, tuple(View(b, own) for b, own in enumerate(geometry)), {"pixel_values": pixels})

    def prepare_texts(self, images, queries):
        texts = []
        for text in (query.text for own in queries for query in own):
            spans = word_spans(text)
            ids = tuple(sum(map(ord, text[a:b].lower())) % 97 for a, b in spans)
            texts.append(TokenizedText(text, ids, spans, (False,) * len(ids)))
        return Inputs(images, tuple(texts), tuple(b for b, own in enumerate(queries) for _ in own))

    def targets(self, inputs, spans, kind, token_target=None):
        kind, token_target = self.check_target(kind, token_target)
        found = Targets.of_spans(inputs, spans, kind, token_target)
        if kind == "norm":
            return found
        seeds = []
        for t, span in found.flat:
            ids = inputs.texts[t].ids
            rest = [ids[i] for i in range(len(ids)) if i not in span.positions]
            whole = self._embed(ids)
            alone = span.kind == "caption" or span.alone or token_target == "alone"
            seeds.append(self._embed([ids[i] for i in span.positions]) if alone else whole - self._embed(rest))
        return replace(found, data={"seeds": torch.stack(seeds)})

    def encode_images(self, images):
        return self.model(images.tensors["pixel_values"])

    def score(self, inputs, features, targets):
        if targets.kind == "norm":
            return features.norm(dim=-1)[targets.image]
        return (F.normalize(features, dim=-1)[targets.image] * targets.data["seeds"]).sum(-1)

    def _embed(self, ids):
        with torch.no_grad():
            return F.normalize(self.model.words(torch.tensor([list(ids)], dtype=torch.long))[0], dim=-1)
