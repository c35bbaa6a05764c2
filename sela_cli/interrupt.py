"""SIGTERM and SIGUSR1 set a flag that long loops poll between steps, or end what can't poll."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sela_cli.errors import StoppedEarly

_requested = False
# What a block that can't poll was doing, while it is at it.
_doing = ""


def _request(signum: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if _doing:
        raise _stopped(_doing)


def _stopped(doing: str) -> StoppedEarly:
    return StoppedEarly(f"stopped while {doing}", "run it again")


def listen() -> None:
    """Turn SIGTERM and SIGUSR1 into a request to stop after the current step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _request)


def requested() -> bool:
    """Whether a stop was asked for."""
    return _requested


@contextmanager
def not_polling(doing: str) -> Iterator[None]:
    """A block that can't poll: there a request is StoppedEarly, raised wherever it is."""
    global _doing
    before, _doing = _doing, doing
    try:
        if _requested:
            raise _stopped(doing)
        yield
    finally:
        _doing = before
