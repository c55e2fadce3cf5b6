"""What can go wrong for a reason the user can act on: one line each.

`status` is what a batch run records for the picture, `exit_code` what a command ends with: 1 could not do it, 2 was
asked for something that does not exist.
"""

from __future__ import annotations


class GroundingError(ValueError):
    """Base of all errors that a command prints as one line."""

    status = "failed_input"
    exit_code = 1


class TextError(GroundingError):
    """A caption, token or phrase that cannot be used."""

    exit_code = 2


class UnknownNameError(GroundingError, KeyError):
    """A name that no table entry answers to; the message lists what there is and the nearest match."""

    exit_code = 2
    __str__ = ValueError.__str__  # a KeyError would quote its message


class OptionError(GroundingError):
    """A method option that does not exist or has the wrong type."""

    exit_code = 2


class ModelError(GroundingError):
    """A checkpoint that cannot be loaded, or a model that cannot do what was asked of it."""

    status = "failed_model"


class LayerError(ModelError):
    """A layer that does not exist, is no tap, or is dead (its gradient is exactly zero)."""

    exit_code = 2


class TargetError(ModelError):
    """A target that this architecture does not have."""

    exit_code = 2


class NumericError(GroundingError):
    """NaN or Inf in scores, attention or gradients. Never replaced by zero."""

    status = "failed_numeric"


class ImageError(GroundingError):
    """A picture that cannot be used. `status` is `failed_read`, `failed_decode` or `failed_input`."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # From one process to another: an exception is made anew from what it was made of.
        return ImageError, (str(self), self.status)


class CropError(ImageError):
    """A part of a picture that it does not have."""

    exit_code = 2


class GeometryError(GroundingError):
    """Sizes, scales or indices that cannot belong to one picture and one model input."""


class DataError(GroundingError):
    """A data set, or one record of it, that cannot be read."""


class OutputError(GroundingError, OSError):
    """A folder that results cannot be written into."""


EXIT_BUDGET = 4


class BudgetError(GroundingError):
    """Too much failed."""

    exit_code = EXIT_BUDGET


class DifferentRunError(GroundingError):
    """The folder holds a run that computes something else."""

    exit_code = 2


class CrashError(ImageError):
    """A picture that killed the processes that decoded it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "failed_crash")


class ProbeError(ModelError):
    """A preprocessing whose answers to ramps fit no axis-aligned affine map."""
