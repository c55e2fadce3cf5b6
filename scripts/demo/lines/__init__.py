"""Rendered lines of text with a box for every character."""
