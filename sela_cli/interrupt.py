"""SIGTERM and SIGUSR1 set a flag that long loops poll between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = False
_waiting = False


def _request(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if _waiting:
        raise InterruptedError


def listen() -> None:
    """Turn SIGTERM and SIGUSR1 into a request to stop after the current step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request)


def requested() -> bool:
    """Whether a stop was asked for."""
    return _requested


@contextmanager
def waiting() -> Iterator[None]:
    """A block that waits for something and can't poll: there a request is an InterruptedError."""
    global _waiting
    _waiting = True
    try:
        if _requested:
            raise InterruptedError
        yield
    finally:
        _waiting = False
