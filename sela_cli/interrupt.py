"""SIGTERM, SIGUSR1 and SIGHUP set a flag that long loops poll between steps, or end what can't."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_requested = False
# What ends a block that can't poll, while there is one.
_end: Exception | None = None


def _request(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if _end:
        raise _end


def listen() -> None:
    """Turn SIGTERM, SIGUSR1 and SIGHUP into a request to stop after the current step."""
    for number in SIGNALS:
        # nohup has a command go on without its terminal.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
