"""Figures of explanations: overlays, comparisons, reading strips and inspections."""
