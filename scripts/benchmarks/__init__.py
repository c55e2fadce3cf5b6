"""Measured loops at full size; run by scripts/benchmark.py."""
