"""Adapter for the image classifiers of transformers: ResNet, ConvNeXt, ViT, DeiT, DINOv2, Swin and their like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from adapters.classifier.heads import Head, HeadShortcut, find_head
from adapters.loading import Checkpoint, check_model, model_info
from adapters.shared.images import prepare_images
from adapters.shared.layer_outputs import LayerOutput, record_outputs
from adapters.shared.stacks import find_stack
from adapters.shared.unmodified import parents_unmodified
from grounding.adapter.base import ModelInfo, Shortcut
from grounding.adapter.classification import ClassAdapter, ClassNames
from grounding.adapter.inputs import ImageInputs
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import Hop, ModelStructure, Stack
from grounding.core.errors import LayerError, ModelError

# Side in pixels of the blank image that layers are found with, if the configuration names no image size.
USUAL_SIDE = 224
# Pooling of the transformers: the prefix tokens that the logits are computed from, and whether the mean over patches is
# added to them.
CLS = ((0,), False)
POOLINGS = {"vit": CLS, "deit": CLS, "dinov2": ((0,), True), "dinov2_with_registers": ((0,), True)}
NO_ATTENTION = "it has none whose weights span the image"
WINDOWS = "it attends within windows, whose weights cannot be chained over the whole image"


class ClassifierAdapter(ClassAdapter):
    """Adapter around a model of `AutoModelForImageClassification` and its image processor.

    Target `class`: the logit of a class. Transformers have all methods, convolutional networks and Swin only those on
    activations and gradients. Their layers have grids of their own, each assumed to divide the whole input evenly (the
    padding of convolutions is ignored).
    """

    model: PreTrainedModel

    def __init__(self, model: Any, image_processor: Any, *, info: ModelInfo | None = None) -> None:
        check_model(self, model, PreTrainedModel)
        names = getattr(model.config, "id2label", None) or {}
        if sorted(names) != list(range(len(names))) or not names:
            raise ModelError(f"{type(model).__name__} does not number its classes in id2label: is it a classifier?")
        self.model, self.image_processor = model, image_processor
        self.info = info or model_info(model, image_processor)
        self.class_names = ClassNames(tuple(str(names[i]) for i in range(len(names))), self.info.id)
        problem = getattr(model.config, "problem_type", None)
        self.by_itself = problem == "multi_label_classification"
        # The default of transformers if the configuration names no problem type.
        self.measures = problem == "regression" or (problem is None and len(names) == 1)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> ClassifierAdapter:
        """Load the parts of a checkpoint and return their adapter. Raises ModelError."""
        image_processor = source.image_processor()
        model = source.model(AutoModelForImageClassification)
        return cls(model, image_processor, info=source.info(model, image_processor))

    def structure(self, kind: str) -> ModelStructure:  # noqa: ARG002
        """Structure of the network. The default layer of a transformer is the input of the last block's attention, of
        other networks the last stage, or the norm after it if that has a spatial size. Raises ModelError."""
        return self._structure

    @cached_property
    def _structure(self) -> ModelStructure:
        if self._pooling:
            stack = find_stack(self.model, self._base)
            registers = getattr(self._config, "num_register_tokens", 0) if "registers" in self._type else 0
            prefix = (2 if self._type == "deit" else 1) + registers
            pooling = "cls" if self._pooling == CLS else "tokens"
            return ModelStructure({"vision": stack}, stack.inputs[-1], pooling, path=(Hop("vision"),), prefix=prefix)
        outputs = {one.path: one for one in self._outputs}
        blocks, layer = self._stages(outputs)
        why = WINDOWS if hasattr(self._config, "window_size") else NO_ATTENTION
        return ModelStructure({"vision": Stack(blocks)}, layer, "none", pyramid=True, unrecorded=why)

    def prepare_images(self, images: Sequence[Any]) -> ImageInputs:
        """Inputs with pixel values (B, C, H, W). Raises ModelError if the model takes another number of channels."""
        inputs = prepare_images(self, self.image_processor, images, patch=self._grid_of)
        given, taken = inputs.tensors["pixel_values"].shape[1], getattr(self._config, "num_channels", None)
        if isinstance(taken, int) and given != taken:
            raise ModelError(
                f"the image processor gives {given} channels, {self.info.id} takes {taken}: load the model yourself "
                "and use adapters.module.ModuleAdapter with a preprocess of its own (mode='L' for grey images)"
            )
        return inputs

    def encode_images(self, images: ImageInputs) -> Float[Tensor, "B C"]:
        """The scores of all classes, the model's logits."""
        return self._run_on(images.tensors["pixel_values"]).logits

    def pooling_weights(self, kind: str, count: int, tokens: int) -> Float[Tensor, "K N"]:  # noqa: ARG002
        """Weights of the CLS; with a DeiT teacher also the distillation token; of DINOv2 also the mean over patches."""
        assert self._pooling is not None
        pooled, mean = self._pooling
        row = torch.zeros(count, tokens, dtype=torch.float32)
        row[:, list(pooled)] = 1 / (len(pooled) + mean)
        if mean:
            row[:, self._structure.prefix :] = 1 / ((tokens - self._structure.prefix) * (len(pooled) + mean))
        return row

    def shortcut(self, kind: str) -> Shortcut | None:  # noqa: ARG002
        """The pooled gradient at the last stage, if only a known, unmodified head follows it; else None."""
        head, layer = self._head, self._structure.default_layer
        if head is None or not parents_unmodified(self.model, layer):
            return None
        return HeadShortcut(self.model, {layer: ()}, head)

    # ------------------------------------------------------------------ the network's structure

    @property
    def _config(self) -> Any:
        return self.model.config

    @property
    def _type(self) -> str:
        return self._config.model_type

    @property
    def _base(self) -> str:
        return self.model.base_model_prefix

    @cached_property
    def _pooling(self) -> tuple[tuple[int, ...], bool] | None:
        """Pooling of a known transformer, see `POOLINGS`; None for other architectures."""
        if type(self.model).__name__.endswith("WithTeacher"):
            return (0, 1), False
        return POOLINGS.get(self._type)

    @property
    def _head(self) -> Head | None:
        return None if self._pooling else find_head(self.model, self._structure.default_layer)

    def _run_on(self, pixels: Tensor) -> Any:
        """The model's output, with interpolated position embeddings for an input of another size than trained at."""
        other_size = tuple(pixels.shape[-2:]) != self._trained_at
        interpolated = {"interpolate_pos_encoding": True} if other_size and self._type in ("vit", "deit") else {}
        return self.model(pixel_values=pixels, **interpolated)

    @property
    def _trained_at(self) -> tuple[int, int]:
        wrapped = getattr(self._config, "pretrained_cfg", None) or {}  # of timm: (channels, height, width)
        size = getattr(self._config, "image_size", None) or wrapped.get("input_size", ())[-2:] or USUAL_SIDE
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @cached_property
    def _outputs(self) -> list[LayerOutput]:
        """The outputs of all layers in a pass of a blank image."""
        return record_outputs(self.model, lambda: self._run_on(self._blank(*self._trained_at)))

    def _blank(self, height: int, width: int) -> Tensor:
        channels = getattr(self._config, "num_channels", 3)
        return torch.zeros(1, channels, height, width, device=self.device, dtype=self.dtype)

    def _stages(self, outputs: Mapping[str, LayerOutput]) -> tuple[tuple[str, ...], str]:
        """Paths of the stages, and of the default layer. Raises ModelError if no list of layers has a spatial size."""
        lists = [
            tuple(f"{path}.{i}" for i in range(len(module)))
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        ]
        usable = [one for one in lists if all(path in outputs and self._cells(outputs[path]) for path in one)]
        if not usable:
            raise ModelError(
                f"{type(self.model).__name__} has no list of layers with a spatial size, nor a known pooling "
                f"(transformers: {', '.join(POOLINGS)})"
            )
        # The one that ends last; of those that end together, the outermost.
        order = list(outputs)
        blocks = max(usable, key=lambda one: (order.index(one[-1]), -one[0].count(".")))
        norm = f"{self._base}.layernorm"
        if norm in outputs and outputs[norm].shape == outputs[blocks[-1]].shape:
            return blocks, norm
        return blocks, blocks[-1]

    def _cells(self, one: LayerOutput, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """(rows, columns) of a layer's output at an input of this (height, width); None if not known.

        Tokens of a Swin-like network are the grid of patches, halved (rounded up) from stage to stage.
        """
        if found := one.cells(size or self._trained_at):
            return found
        patch, stages = getattr(self._config, "patch_size", None), len(getattr(self._config, "depths", ()))
        if len(one.shape) != 3 or not isinstance(patch, int):
            return None
        rows, columns = (ceil(side / patch) for side in size or self._trained_at)
        for _ in range(stages):
            if rows * columns == one.shape[1]:
                return rows, columns
            rows, columns = ceil(rows / 2), ceil(columns / 2)
        return None

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the default layer for an input of this size. Raises LayerError if it is 1 x 1."""
        if self._pooling:
            patch = self._config.patch_size
            return height // patch, width // patch
        if (height, width) not in self._grids:
            layer = self._structure.default_layer
            with Recorder(self.model, {layer: False}) as recorder:
                self._run_on(self._blank(height, width))
                recorder.check()
            found = self._cells(LayerOutput(layer, tuple(recorder.outputs[layer].shape)), (height, width))
            if found is None:
                raise LayerError(
                    f"layer {layer!r} gives {tuple(recorder.outputs[layer].shape)} for an input of {width} x {height} "
                    "pixels, which has no grid of patches: use a larger image"
                )
            self._grids[height, width] = found
        return self._grids[height, width]
