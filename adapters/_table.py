"""All architectures by name. To add one: one file, and one line here."""

from grounding.registry import Registry

ADAPTERS = Registry(
    "architecture",
    {
        "CLIPModel": "adapters.clip:ClipAdapter",
        "FlavaForPreTraining": "adapters.flava:FlavaAdapter",
        "FlavaModel": "adapters.flava:FlavaAdapter",
        "VisionEncoderDecoderModel": "adapters.trocr:TrOcrAdapter",
        "AutoModelForImageClassification": "adapters.classifier:ClassifierAdapter",
        "nn.Module": "adapters.module:ModuleAdapter",
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
