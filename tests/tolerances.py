"""Tolerances in one place."""

ORACLE = 1e-6  # float64 against a float64 oracle, relative to the largest value
SINGLE = 1e-4  # float32 against float64
TUTORIAL = 1e-5  # raw maps against a plain float32 loop, relative to the largest value


def close(found, expected, tolerance=ORACLE):
    """Largest difference relative to the largest expected value, with a message that shows it."""
    import numpy as np

    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = np.abs(expected).max()
    assert size > 0, "the expected values are all zero: nothing is tested"
    error = np.abs(found - expected).max() / size
    assert error <= tolerance, f"relative difference {error:.2e} > {tolerance:.0e}"
    return True
