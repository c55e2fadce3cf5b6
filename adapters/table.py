"""All architectures by name. To add one: one file, and one line here."""

from grounding.core.registry import Registry

ADAPTERS = Registry(
    "architecture",
    {
        "CLIPModel": "adapters.clip.adapter:ClipAdapter",
        "FlavaForPreTraining": "adapters.flava.adapter:FlavaAdapter",
        "FlavaModel": "adapters.flava.adapter:FlavaAdapter",
        "VisionEncoderDecoderModel": "adapters.trocr.adapter:TrOcrAdapter",
        "AutoModelForImageClassification": "adapters.classifier.adapter:ClassifierAdapter",
        "nn.Module": "adapters.module.adapter:ModuleAdapter",
    },
    group="grounding.adapters",
)
# Ends of architecture names -> architecture: all classifiers have one adapter.
ENDINGS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForImageClassificationWithTeacher": "AutoModelForImageClassification",
}
# model_type -> architecture, for checkpoints whose config names no architecture.
MODEL_TYPES = {"clip": "CLIPModel", "flava": "FlavaModel", "vision-encoder-decoder": "VisionEncoderDecoderModel"}
