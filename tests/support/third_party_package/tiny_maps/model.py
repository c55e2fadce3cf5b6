"""A dual encoder: patches, one attention block, the mean; texts are bags of hashed words."""

from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel


class TinyMapsConfig(PretrainedConfig):
    model_type = "tiny_maps"

    def __init__(self, width=16, patch=8, rows=4, columns=6, words=100, **options):
        super().__init__(**options)
        self.width, self.patch, self.rows, self.columns, self.words = width, patch, rows, columns, words


class TinyMapsModel(PreTrainedModel):
    config_class = TinyMapsConfig

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, 2, batch_first=True)
        self.mlp = nn.Linear(config.width, config.width)
        self.words = nn.EmbeddingBag(config.words, config.width, mode="sum")
        self.post_init()

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.5)

    def embed_images(self, pixels):
        x = self.patches(pixels).flatten(2).mT
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return F.normalize((x + self.mlp(x).relu()).mean(1), dim=-1)

    def embed_texts(self, ids):
        return F.normalize(self.words(ids), dim=-1)


AutoConfig.register("tiny_maps", TinyMapsConfig)
