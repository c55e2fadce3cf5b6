"""Figures of explanations: overlays, comparisons, reading strips, inspections."""
