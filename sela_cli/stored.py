"""Rows of an array as they lie in a file, read past the library that wrote it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from sela_cli.errors import BadData, NoInput

# Bytes between two rows that are read rather than left out, and of a piece of them at most.
_SKIPPED, _PIECE = 1 << 12, 1 << 23


class Stored:
    """A C-ordered array at an offset of a file, read by the row, by several threads at a time.

    Errors name the file `shown`; `unwanted` is told the bytes that are read between the rows
    that are asked for. Not mapped: the pages of a mapping count as the process's
    memory, and a file cut short meanwhile would kill it.
    """

    def __init__(
        self, path: str, dtype: np.dtype, shape: tuple[int, ...], offset: int, shown: str
    ) -> None:
        self.shape = shape
        self.file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (open as long as this)
        self._dtype, self._offset, self._shown = dtype, offset, shown
        self.unwanted: Callable[[int], None] = lambda count: None
        self._row_bytes = max(math.prod(shape[1:]) * dtype.itemsize, 1)
        # Rows between two that are wanted, and those wanted, of one piece at most.
        self._skip = _SKIPPED // self._row_bytes
        self._most = max(_PIECE // (self._row_bytes + _SKIPPED), 1)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """The named rows, in that order.

        Raises BadData where the file ends before them, NoInput where the disk fails.
        """
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            block = np.empty((stop - start, *self.shape[1:]), self._dtype)
            self._fill(block, start)
            return block
        block = np.empty((len(rows), *self.shape[1:]), self._dtype)
        skipped = np.diff(rows) - 1
        breaks = (np.flatnonzero((skipped < 0) | (skipped > self._skip)) + 1).tolist()
        for first, last in pairwise([0, *breaks, len(rows)]):
            for start in range(first, last, self._most):
                some = rows[start : min(start + self._most, last)]
                self._fill_some(block[start : start + len(some)], some)
        return block

    def _fill_some(self, block: np.ndarray, rows: np.ndarray) -> None:
        """From one piece of the file: a call for each row costs more than what is not wanted."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            self._fill(block, first)
        else:
            piece = self.read(slice(first, last + 1))
            block[:] = piece[rows - first]
            self.unwanted(piece.nbytes - block.nbytes)

    def _fill(self, block: np.ndarray, row: int) -> None:
        left = block.view(np.uint8).reshape(-1)
        at = self._offset + row * self._row_bytes
        while len(left):
            try:
                got = os.preadv(self.file.fileno(), [left.data], at)
            except OSError as error:
                # Of the disk or a file server: the file may be whole.
                raise NoInput(f"{self._shown}: {error.strerror}") from error
            if not got:
                end = (at - self._offset) // self._row_bytes
                raise BadData(f"{self._shown} ends too early, at row {end}", "copy it again")
            left, at = left[got:], at + got
