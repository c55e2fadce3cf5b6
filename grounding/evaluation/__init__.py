"""Scores of maps: pointing game, OCR, deletion and insertion, protocols, reports."""
