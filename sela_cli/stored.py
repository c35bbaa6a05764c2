"""Rows of an array as they lie in a file, read past the library that wrote it."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from sela_cli.errors import BadData, NoInput


class Stored:
    """A C-ordered array at an offset of a file, read by the row, by several threads at a time.

    Errors name the file `shown`. Not mapped: the pages of a mapping count as the process's
    memory, and a file cut short meanwhile would kill it.
    """

    def __init__(
        self, path: str, dtype: np.dtype, shape: tuple[int, ...], offset: int, shown: str
    ) -> None:
        self.shape = shape
        self.file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (open as long as this)
        self._dtype, self._offset, self._shown = dtype, offset, shown

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
        breaks = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        for first, last in pairwise([0, *breaks, len(rows)]):
            if last > first:
                self._fill(block[first:last], int(rows[first]))
        return block

    def _fill(self, block: np.ndarray, row: int) -> None:
        left = block.view(np.uint8).reshape(-1)
        at = self._offset + row * math.prod(self.shape[1:]) * self._dtype.itemsize
        while len(left):
            try:
                got = os.preadv(self.file.fileno(), [left.data], at)
            except OSError as error:
                # Of the disk or a file server: the file may be whole.
                raise NoInput(f"{self._shown}: {error.strerror}") from error
            if not got:
                raise BadData(f"{self._shown} ends too early, at row {row}", "copy it again")
            left, at = left[got:], at + got
