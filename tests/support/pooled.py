"""A model whose image encoder ends in an attention pooling head: a tiny SigLIP, its texts one direction per word."""

from dataclasses import replace

import torch
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

from adapters.shared.stacks import find_stack
from grounding.adapter.base import ModelInfo
from grounding.adapter.inputs import Targets
from grounding.adapter.structure import Hop, ModelStructure, Stack
from tests.support.third_party import MeanAdapter


def siglip_model(layers=3, side=16, patch=8):
    """A random SigLIP: vision blocks of width 32 with 4 heads."""
    torch.manual_seed(7)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    made = SiglipModel(
        SiglipConfig(
            text_config=tower | {"num_hidden_layers": 1, "vocab_size": 40, "max_position_embeddings": 8},
            vision_config=tower | {"num_hidden_layers": layers, "image_size": side, "patch_size": patch},
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return made.double().eval()


class PooledAdapter(MeanAdapter):
    """The image encoder of a SigLIP. A text's direction (32,) is drawn from its token ids."""

    rows, columns = 2, 2

    def __init__(self):
        super().__init__()
        self.model = siglip_model()
        self.info = ModelInfo(id="pooled", type="pooled")

    def structure(self, kind):
        vision = find_stack(self.model, "vision_model")
        head = "vision_model.head"
        stacks = {"vision": vision, "pool": Stack((head,), attention=(f"{head}.attention",))}
        path = (Hop("pool", "pool", keys="vision_model.post_layernorm"), Hop("vision"))
        return ModelStructure(stacks, vision.blocks[-1], "attention_pool", path)

    def encode_images(self, images):
        return self.model.get_image_features(pixel_values=images.tensors["pixel_values"]).pooler_output

    def targets(self, inputs, spans, kind, token_target=None):
        found = Targets.of_spans(inputs, spans, self.check_target(kind)[0])
        seeds = [self._embed([inputs.texts[t].ids[i] for i in span.positions]) for t, span in found.flat]
        return replace(found, data={"seeds": torch.stack(seeds)})

    def _embed(self, ids):
        generator = torch.Generator().manual_seed(sum(ids))
        return F.normalize(torch.randn(32, generator=generator, dtype=torch.float64), dim=0)
