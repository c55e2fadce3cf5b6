"""TrOCR and similar encoder-decoders."""

from adapters.trocr.adapter import TrOcrAdapter

__all__ = ["TrOcrAdapter"]
