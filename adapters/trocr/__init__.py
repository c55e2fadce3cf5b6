"""Adapter for TrOCR and other `VisionEncoderDecoderModel`s."""

from adapters.trocr.adapter import TrOcrAdapter

__all__ = ["TrOcrAdapter"]
