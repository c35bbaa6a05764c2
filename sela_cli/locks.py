"""Exclusive lock files: what two processes must not do at once in one place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held_here: set[int] = set()


def _drop() -> None:
    """A forked child shares the lock, and would hold it on after its parent is killed."""
    for handle in _held_here:
        os.close(handle)
    _held_here.clear()


os.register_at_fork(after_in_child=_drop)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` in this block; it is gone afterwards.

    Of a process that was killed the file stays, but not the lock: the next one takes it
    over. Raises BlockingIOError where another process holds it, OSError where no file can
    be made.
    """
    handle = _held(path)
    _held_here.add(handle)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _held_here.remove(handle)
        os.close(handle)


def _held(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            # A file system without locks, as some on clusters: HDF5 goes on there too.
            return handle
        # Its last holder may have removed it after it was opened here.
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)
