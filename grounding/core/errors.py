"""Errors that a user can act on, each with a one-line message, the status of a batch row and an exit code.

`status` is stored in the row of a batch run. `exit_code` is that of a command: 1 if the work failed, 2 if the request
names something that does not exist.
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
    """A name that a registry does not contain; the message lists its names and the nearest match."""

    exit_code = 2
    __str__ = ValueError.__str__  # a KeyError would quote its message


class OptionError(GroundingError):
    """A method option that does not exist or has the wrong type."""

    exit_code = 2


class ModelError(GroundingError):
    """A checkpoint that cannot be loaded, or a model that does not support the request."""

    status = "failed_model"


class LayerError(ModelError):
    """A layer that does not exist, has no patch grid, or is dead (its gradient is exactly zero)."""

    exit_code = 2


class TargetError(ModelError):
    """A target that this architecture does not support."""

    exit_code = 2


class NumericError(GroundingError):
    """NaN or Inf in scores, attention weights or gradients. They are never replaced by zero."""

    status = "failed_numeric"


class ImageError(GroundingError):
    """An image that cannot be used. `status` is `failed_read`, `failed_decode` or `failed_input`."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # Pickle would call the class with the message alone.
        return ImageError, (str(self), self.status)


class CropError(ImageError):
    """A crop that is not inside its image."""

    exit_code = 2


class GeometryError(GroundingError):
    """Sizes, scales or indices that are not valid for one image and one model input."""


class DataError(GroundingError):
    """A data set, or a record of one, that cannot be read."""


class OutputError(GroundingError, OSError):
    """An output folder that results cannot be written to."""


EXIT_FAILURE_LIMIT = 4


class FailureLimitError(GroundingError):
    """A batch run in which too many rows failed."""

    exit_code = EXIT_FAILURE_LIMIT


class DifferentRunError(GroundingError):
    """An output folder that contains a batch run with another configuration."""

    exit_code = 2


class CrashError(ImageError):
    """An image whose decoding killed the worker processes."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "failed_crash")


class ProbeError(ModelError):
    """A preprocessing that is no axis-aligned affine map of the image."""
