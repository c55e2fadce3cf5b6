"""Explanations: entries and maps, their files, tables and figures."""
