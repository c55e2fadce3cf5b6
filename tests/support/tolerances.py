"""Bounds of the tests on floating-point differences and on waiting times, in one place.

Rounding differs between processors. The bound on every comparison of values computed or stored in float32 or less is
therefore at least five times the largest error measured with MKL_ENABLE_INSTRUCTIONS=SSE4_2, AVX2, AVX512, with
MKL_CBWR=COMPATIBLE, with ATEN_CPU_CAPABILITY=default, avx2, avx512, and with one and two threads. The comment of each
bound ends with that error.

To measure again: GROUNDING_TEST_ERRORS=FILE adds a line to FILE for every comparison (test, name of the bound, bound,
error, with tabs between them); GROUNDING_TEST_THREADS is the number of torch's threads, one unless given.
"""

import os
from pathlib import Path

import numpy as np


class Bound(float):
    """A number with an identity: two bounds of one size stay two, and each is found by its name."""


# Relative to the largest value, unless the comment states another unit.

# float64 against float64: the proof. Maps and inspections are stored as float32, which is all of the error. 8.4e-8.
ORACLE = Bound(1e-6)
# Sums and differences of what is stored as float32. 1.6e-6.
STORED = Bound(2e-5)
# Slopes in float64 against finite differences. 1.2e-9.
SLOPE = Bound(1e-5)
# Maps at original pixels, as float32, against torch's interpolation in float64. 2.9e-7.
SAMPLED = Bound(1e-5)

# Maps and scores of one float32 model, computed in two ways: a plain loop, a file, a batch of another size. 2.7e-5.
TUTORIAL = Bound(5e-4)
# Maps of a float32 model against the same model in float64. 1.1e-6.
SINGLE = Bound(1e-4)
# Maps of a model in float16 or bfloat16 against float64: one less the correlation. 1.4e-4.
HALF_MODEL = Bound(0.01)

# A map stored as float16 with a scale. Not from a measurement: rounding takes 2^-12, and the rest is spare. 2.5e-4.
HALF = Bound(2.0**-11)
# The same where a float32 model computed the map in a batch of another size: both of them.
HALF_BATCH = Bound(HALF + TUTORIAL)
# Share of a map inside a box, of a map stored as float16. 4.6e-5.
HALF_ENERGY = Bound(1e-3)

# Seconds: a loaded machine is four times slower than a quiet one, and more. Only a fault waits to the end of these. The
# limit of a whole test is `timeout` in pyproject.toml.
SOON = 120.0  # what takes a few at most: a figure (1.5 on a quiet machine), processes that end, a first shard
COMMAND = 900.0  # a whole command in a process of its own: 10 under load
WORKER = 8.0  # after which a worker that does not answer is replaced: it starts in 1.4 under load
HUB = 30.0  # until a model hub must have answered


def close(found, expected, bound=ORACLE):
    """Largest difference relative to the largest expected value, with a message that shows it."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = np.abs(expected).max()
    assert size > 0, "the expected values are all zero: nothing is tested"
    return within(np.abs(found - expected).max() / size, bound)


def close_each(found, expected, bound=ORACLE):
    """The same of each map by itself (the first axis counts them); a map of zeros must be one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert not found[~expected.any(axis=(1, 2))].any(), "a map of zeros is none"
    sizes = np.abs(expected).max(axis=(1, 2), keepdims=True)
    return within((np.abs(found - expected) / np.where(sizes, sizes, 1)).max(), bound)


def alike(found, expected, bound):
    """One less the correlation of two maps."""
    return within(1 - np.corrcoef(np.ravel(found), np.ravel(expected))[0, 1], bound)


def within(error, bound):
    """What all of these end in: the error is not above the bound. Written to the file GROUNDING_TEST_ERRORS, if set."""
    if file := os.environ.get("GROUNDING_TEST_ERRORS"):
        name = next((name for name, value in globals().items() if value is bound), "")
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0]
        with Path(file).open("a") as lines:
            lines.write(f"{test}\t{name}\t{bound:.1e}\t{error:.2e}\n")
    assert error <= bound, f"difference {error:.2e} > {bound:.1e}"
    return True
