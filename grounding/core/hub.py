"""The Hugging Face hub: check whether it answers, and silence the loggers of its client libraries."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

HUB_TIMEOUT = 5.0  # seconds


def hub_answers() -> bool:
    """Whether the hub answers within `HUB_TIMEOUT`; False in offline mode (HF_HUB_OFFLINE).

    Its clients retry for minutes: callers that get False load from the local cache only.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # noqa: BLE001  (of every kind: offline mode, name look-up, proxy, time-out)
        return False
    return True


@contextlib.contextmanager
def quiet(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Set the loggers of these names to `level`, and restore their levels afterwards."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
