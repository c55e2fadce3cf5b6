"""Table of the supported architectures: name in `config.architectures` -> adapter class, imported on first use.

To add an architecture: a folder `adapters/<family>/` with the adapter, and one line in `ADAPTERS`.
"""

from grounding.core.registry import Registry

ADAPTERS = Registry(
    "architecture",
    {
        "CLIPModel": "adapters.clip.adapter:ClipAdapter",
        "MetaClip2Model": "adapters.clip.adapter:ClipAdapter",
        "ChineseCLIPModel": "adapters.clip.adapter:ClipAdapter",
        "AltCLIPModel": "adapters.clip.adapter:ClipAdapter",
        "SiglipModel": "adapters.siglip.adapter:SiglipAdapter",
        "Siglip2Model": "adapters.siglip.naflex:Siglip2Adapter",
        "AlignModel": "adapters.align.adapter:AlignAdapter",
        "BlipForImageTextRetrieval": "adapters.blip.adapter:BlipAdapter",
        "FlavaForPreTraining": "adapters.flava.adapter:FlavaAdapter",
        "FlavaModel": "adapters.flava.adapter:FlavaAdapter",
        "VisionEncoderDecoderModel": "adapters.trocr.adapter:TrOcrAdapter",
        "AutoModelForImageClassification": "adapters.classifier.adapter:ClassifierAdapter",
        "nn.Module": "adapters.module.adapter:ModuleAdapter",
    },
    group="grounding.adapters",
)
# End of an architecture's name -> architecture: all classifiers share one adapter.
ENDINGS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
}
# model_type -> architecture, for checkpoints without `config.architectures`.
MODEL_TYPES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "chinese_clip": "ChineseCLIPModel",
    "altclip": "AltCLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "align": "AlignModel",
    "blip": "BlipForImageTextRetrieval",
    "flava": "FlavaModel",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}
