"""SIGTERM and SIGUSR1 set a flag that long loops poll between steps."""

from __future__ import annotations

import signal
from types import FrameType

_requested = False


def _request(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """Turn SIGTERM and SIGUSR1 into a request to stop after the current step."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _request)


def requested() -> bool:
    """Whether a stop was asked for."""
    return _requested
