"""Keys: what the images, or the rows of a matrix, are called. As text, and as bytes.

N rows.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

# Keys that are bytes at a time.
_SOME = 1 << 14


def key_bytes(key: str) -> bytes:
    """A key as it is stored and hashed: names of files may be no UTF-8."""
    return key.encode("utf-8", "surrogateescape")


def text_of(stored: bytes) -> str:
    """The reverse of `key_bytes`."""
    return bytes(stored).decode("utf-8", "surrogateescape")


class _Keys(Sequence[str]):
    """Keys that become text when they are asked for: a list of many takes long to make."""

    def _texts(self, rows: slice) -> Iterator[str]:
        raise NotImplementedError

    def stored(self, start: int, stop: int) -> np.ndarray:
        """Some of them as `key_bytes` makes them, filled up with zeros."""
        raise NotImplementedError

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [*self._texts(row)]
        row = range(len(self))[row]
        return next(self._texts(slice(row, row + 1)))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _SOME):
            yield from self._texts(slice(start, start + _SOME))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(map(operator.eq, self, other))


class RowNumbers(_Keys):
    """Keys of rows without names, "0", "1" and so on.

    As a list they took 60 bytes a row, and tens of seconds for as many million rows.
    """

    def __init__(self, count: int) -> None:
        self._rows = range(count)

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return self._rows == other._rows if isinstance(other, RowNumbers) else super().__eq__(other)

    def _texts(self, rows: slice) -> Iterator[str]:
        return map(str, self._rows[rows])

    def stored(self, start: int, stop: int) -> np.ndarray:
        """Digit by digit for all at once."""
        width = len(str(stop - 1))
        digits_nd = np.zeros((stop - start, width), np.uint8)
        for length in range(1, width + 1):
            first = max(start, 10 ** (length - 1) if length > 1 else 0)
            left_n = np.arange(first, min(stop, 10**length))
            digits_md = digits_nd[first - start :][: len(left_n)]
            for place in reversed(range(length)):
                # Not divmod, which takes five times as long.
                tenth_n = left_n // 10
                digits_md[:, place] = left_n - 10 * tenth_n + ord("0")
                left_n = tenth_n
        return digits_nd.view(f"S{width}")[:, 0]


class StoredKeys(_Keys):
    """Keys as a file has them, bytes of one length."""

    def __init__(self, stored_N: np.ndarray) -> None:
        self._stored_N = stored_N

    def __len__(self) -> int:
        return len(self._stored_N)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StoredKeys):
            return np.array_equal(self._stored_N, other._stored_N)
        return super().__eq__(other)

    def of(self, rows: np.ndarray) -> StoredKeys:
        """Those of some rows."""
        return StoredKeys(self._stored_N[rows])

    def _texts(self, rows: slice) -> Iterator[str]:
        return map(text_of, self._stored_N[rows].tolist())

    def stored(self, start: int, stop: int) -> np.ndarray:
        """As they are."""
        return self._stored_N[start:stop]


def some_of(keys: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """The keys of these rows, in that order."""
    if isinstance(keys, StoredKeys):
        return keys.of(rows)
    return [keys[row] for row in rows.tolist()]


def stored(keys: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Keys as bytes of one length, filled up with zeros: some at a time, each with the number
    of its first."""
    for start in range(0, len(keys), _SOME):
        stop = min(start + _SOME, len(keys))
        if isinstance(keys, _Keys):
            yield start, keys.stored(start, stop)
        else:
            yield start, np.array([key_bytes(key) for key in keys[start:stop]], "S")


def named(stored_N: np.ndarray) -> Sequence[str]:
    """The keys that are stored so, as bytes of one length or of many."""
    numbers = RowNumbers(len(stored_N))
    if all((stored_N[first : first + len(some)] == some).all() for first, some in stored(numbers)):
        return numbers
    if stored_N.dtype.kind == "S":
        return StoredKeys(stored_N)
    return [text_of(key) for key in stored_N.tolist()]


def dataset_id(keys: Sequence[str]) -> str:
    """Hash of the ordered keys, each with a zero byte behind it."""
    digest = hashlib.sha256()
    for _, some_n in stored(keys):
        digest.update(b"\0".join(some_n.tolist()) + b"\0")
    return "sha256:" + digest.hexdigest()
