"""SIGTERM and SIGUSR1 set a flag that long loops poll between steps, or end what can't poll."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_requested = False
# What ends a block that can't poll, while there is one.
_end: Exception | None = None


def _request(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if _end:
        raise _end


def listen() -> None:
    """Turn SIGTERM and SIGUSR1 into a request to stop after the current step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request)


def requested() -> bool:
    """Whether a stop was asked for."""
    return _requested


@contextmanager
def raising(end: Exception) -> Iterator[None]:
    """A block that can't poll: there a request raises `end`, wherever it is."""
    global _end
    before, _end = _end, end
    try:
        if _requested:
            raise end
        yield
    finally:
        _end = before
