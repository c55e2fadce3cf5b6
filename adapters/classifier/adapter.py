"""Image classifiers of Hugging Face: convolutional (ResNet, ConvNeXt), transformers (ViT, DeiT, DINOv2), Swin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import ceil
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from adapters.classifier.heads import Head, find_head
from adapters.loading import Checkpoint, check_model, model_info
from adapters.shared.images import prepare_images
from adapters.shared.layer_outputs import LayerOutput, record_outputs
from adapters.shared.stacks import find_stack
from adapters.shared.unmodified import parents_unmodified
from grounding.adapter.base import ModelInfo
from grounding.adapter.classification import ClassAdapter, ClassNames
from grounding.adapter.inputs import Inputs
from grounding.adapter.recorder import Recorder
from grounding.adapter.structure import ModelStructure, Stack
from grounding.core.errors import LayerError, ModelError

# Side of the blank picture that layers are found with where a configuration names none.
USUAL_SIDE = 224
# Read-out of the transformers: the tokens before the patches that logits are made of, and whether the patches are, too.
READ_OUTS = {"vit": ((0,), False), "deit": ((0,), False), "dinov2": ((0,), True), "dinov2_with_registers": ((0,), True)}
NO_ATTENTION = "it has none whose weights span the picture"
WINDOWS = "it attends within windows, whose weights cannot be chained over the whole picture"


class ClassifierAdapter(ClassAdapter):
    """A model of `AutoModelForImageClassification` with its image processor.

    Target `class`: the logit of a class. Of a convolutional network or a Swin the layers have grids of their own, each
    taken to divide the whole input evenly (the padding of convolutions is not followed); they have Grad-CAM and its
    kin, the transformers also rollout and relevance.
    """

    demo_parts: ClassVar[tuple[str, ...]] = ("classes",)
    demo_advice: ClassVar[str] = "this model knows only single objects of its cartoon world"
    example: ClassVar[str] = "microsoft/resnet-34"
    fast_kinds = ("class",)
    model: PreTrainedModel

    def __init__(self, model: Any, image_processor: Any, *, info: ModelInfo | None = None) -> None:
        check_model(self, model, PreTrainedModel)
        names = getattr(model.config, "id2label", None) or {}
        if sorted(names) != list(range(len(names))) or not names:
            raise ModelError(f"{type(model).__name__} does not number its classes in id2label: is it a classifier?")
        self.model, self.image_processor = model, image_processor
        self.info = info or model_info(model, image_processor)
        self.labels = ClassNames(tuple(str(names[i]) for i in range(len(names))), self.info.id)
        problem = getattr(model.config, "problem_type", None)
        self.by_itself = problem == "multi_label_classification"
        # As transformers has it where a configuration says nothing else.
        self.measures = problem == "regression" or (problem is None and len(names) == 1)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @classmethod
    def from_checkpoint(cls, source: Checkpoint) -> ClassifierAdapter:
        """The adapter of a checkpoint."""
        image_processor = source.image_processor()
        model = source.model(AutoModelForImageClassification)
        return cls(model, image_processor, info=source.info(model, image_processor))

    @cached_property
    def structure(self) -> ModelStructure:
        """Of a transformer the default tap is the input of the last block's attention, of the others the last stage, or
        the norm behind it where that has a spatial size."""
        if self._read_out:
            stack = find_stack(self.model, self._base)
            registers = getattr(self._config, "num_register_tokens", 0) if "registers" in self._type else 0
            prefix = (2 if self._type == "deit" else 1) + registers
            return ModelStructure({"vision": stack}, layer=stack.inputs[-1], pooling="tokens", prefix=prefix)
        ran = {one.path: one for one in self._layers}
        blocks, layer = self._stages(ran)
        why = WINDOWS if hasattr(self._config, "window_size") else NO_ATTENTION
        return ModelStructure({"vision": Stack(blocks)}, layer, pooling="none", prefix=0, pyramid=True, unrecorded=why)

    def prepare_images(self, images: Sequence[Any]) -> Inputs:
        """Pixel values (B, C, H, W)."""
        found = prepare_images(self, self.image_processor, images, patch=self._grid_of)
        given, taken = found.pixel_values.shape[1], getattr(self._config, "num_channels", None)
        if isinstance(taken, int) and given != taken:
            raise ModelError(
                f"the image processor gives {given} channels, {self.info.id} takes {taken}: load the model yourself "
                "and use adapters.module.ModuleAdapter with a preprocess of its own (mode='L' for grey pictures)"
            )
        return Inputs(found.images, found.geometry, (), (), {"pixel_values": found.pixel_values}, found.warnings)

    def logits(self, inputs: Inputs) -> Float[Tensor, "B C"]:
        """What the model gives."""
        return self._run_on(inputs.tensors["pixel_values"]).logits

    def pooling_weights(self, count: int, tokens: int) -> Float[Tensor, "K N"] | None:
        """CLS (of a DeiT with a teacher CLS and distillation token); with DINOv2 the CLS and the mean over patches."""
        assert self._read_out is not None
        pooled, mean = self._read_out
        row = torch.zeros(count, tokens, dtype=torch.float32, device=self.device)
        row[:, list(pooled)] = 1 / (len(pooled) + mean)
        if mean:
            row[:, self.structure.prefix :] = 1 / ((tokens - self.structure.prefix) * (len(pooled) + mean))
        return row

    @property
    def fast_taps(self) -> Mapping[str, tuple[str, ...]]:
        """The last stage, where nothing but the head stands behind it."""
        head = self._head
        return (
            {}
            if head is None or not parents_unmodified(self.model, self.structure.layer)
            else {self.structure.layer: ()}
        )

    def score_from(
        self,
        layer: str,
        inputs: Inputs,
        targets: Any,
        shift: Float[Tensor, "K D"],
        outputs: Mapping[str, Tensor] | None = None,
        rule: str | None = None,
    ) -> Float[Tensor, "K"]:
        """The scores with one shift per target added to all cells of the tap; fast at `fast_taps`."""
        head = self._head
        if outputs is None or head is None or layer not in self.fast_taps:
            return super().score_from(layer, inputs, targets, shift, outputs, rule)
        features = outputs[layer].detach()[targets.image.to(shift.device)]
        with Recorder(self.model, rule=rule), torch.enable_grad():
            logits = head(features + shift[:, :, None, None])
        own = torch.arange(len(targets), device=logits.device)
        return logits[own, targets.data["class"].to(logits.device)]

    # ------------------------------------------------------------------ where things are

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
    def _read_out(self) -> tuple[tuple[int, ...], bool] | None:
        """Tokens and patches that the logits of a known transformer are made of; None of other architectures."""
        if type(self.model).__name__.endswith("WithTeacher"):
            return (0, 1), False
        return READ_OUTS.get(self._type)

    @property
    def _head(self) -> Head | None:
        return None if self._read_out else find_head(self.model, self.structure.layer)

    def _run_on(self, pixels: Tensor) -> Any:
        """The model's output; a transformer's position codes are stretched to an input of another size."""
        size = self._trained_at
        stretched = {"interpolate_pos_encoding": True} if self._type in ("vit", "deit") else {}
        return self.model(pixel_values=pixels, **(stretched if tuple(pixels.shape[-2:]) != size else {}))

    @property
    def _trained_at(self) -> tuple[int, int]:
        wrapped = getattr(self._config, "pretrained_cfg", None) or {}  # of timm: (channels, height, width)
        size = getattr(self._config, "image_size", None) or wrapped.get("input_size", ())[-2:] or USUAL_SIDE
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @cached_property
    def _layers(self) -> list[LayerOutput]:
        """All layers, from a pass of a blank picture."""
        return record_outputs(self.model, lambda: self._run_on(self._blank(*self._trained_at)))

    def _blank(self, height: int, width: int) -> Tensor:
        channels = getattr(self._config, "num_channels", 3)
        return torch.zeros(1, channels, height, width, device=self.device, dtype=self.dtype)

    def _stages(self, ran: Mapping[str, LayerOutput]) -> tuple[tuple[str, ...], str]:
        """Paths of the stages, and the default tap. Raises ModelError where no list of layers has a spatial size."""
        lists = [
            tuple(f"{path}.{i}" for i in range(len(module)))
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        ]
        usable = [one for one in lists if all(path in ran and self._cells(ran[path]) for path in one)]
        if not usable:
            raise ModelError(
                f"{type(self.model).__name__} has no list of layers with a spatial size, nor a read-out that is known "
                f"(transformers: {', '.join(READ_OUTS)})"
            )
        # The one that ends last; of those that end together, the outermost.
        order = list(ran)
        blocks = max(usable, key=lambda one: (order.index(one[-1]), -one[0].count(".")))
        norm = f"{self._base}.layernorm"
        if norm in ran and ran[norm].shape == ran[blocks[-1]].shape:
            return blocks, norm
        return blocks, blocks[-1]

    def _cells(self, one: LayerOutput, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """(rows, columns) of a layer's output at an input of this (height, width); None where they are not known.

        Tokens of a Swin-like network: the grid of patches, halved (rounded up) from stage to stage.
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
        """(rows, columns) of the default tap for an input of this size. Raises LayerError where it is 1 x 1."""
        if self._read_out:
            patch = self._config.patch_size
            return height // patch, width // patch
        if (height, width) not in self._grids:
            layer = self.structure.layer
            with Recorder(self.model, {layer: False}) as recorder:
                self._run_on(self._blank(height, width))
                recorder.check()
            found = self._cells(LayerOutput(layer, tuple(recorder.outputs[layer].shape)), (height, width))
            if found is None:
                raise LayerError(
                    f"layer {layer!r} gives {tuple(recorder.outputs[layer].shape)} for an input of {width} x {height} "
                    "pixels: there is nothing to point at; use a larger picture"
                )
            self._grids[height, width] = found
        return self._grids[height, width]
