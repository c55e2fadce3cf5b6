"""Rendered scenes with exact boxes: vocabulary, drawing, phrases and splits."""
