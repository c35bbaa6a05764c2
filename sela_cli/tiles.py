"""Passes over a matrix of scores: small tiles, several spans of them at a time.

N rows (images), K columns (clusters), n rows of one tile.

Torch's own threads meet at a barrier after every operation, which on tiles this small
costs more than the work, and on a busy machine a hundred times more. Here every worker
takes a span of rows of its own, with one thread, and results come back in the order of
the rows: a pass gives the same bits whatever the number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sela_cli.spread import spread

S = TypeVar("S")
T = TypeVar("T")

CPU = torch.device("cpu")

# A megabyte of float64: it stays in the cache from one operation to the next.
_TILE_ELEMENTS = 1 << 17
_SPAN_ELEMENTS = 1 << 21
# Scores in single precision are kept finite, and so are differences of two of them.
FARTHEST = -1e38
# On a GPU: enough to keep it busy, little enough that the copies an operation makes fit;
# and of rows that are there and need no copy. It is waited for once a span.
_DEVICE_TILE, _DEVICE_VIEW = 1 << 23, 1 << 32
_DEVICE_TILES = 8
# Threads that read tiles for it, and so the spans that are in its memory.
_DEVICE_WORKERS = 4
# Rows shorter than this torch takes one number at a time, at ten times the price.
_VECTOR = 16
# Workers of a pass, where that is not what the calling thread has.
_THREADS: ContextVar[int | None] = ContextVar("threads", default=None)
# Threads that make K x K numbers each: memory is not to grow with the number of processors.
SQUARE_WORKERS = 4


class Rows(Protocol):
    """An N x K matrix of finite scores, each row less its maximum.

    Scores are log-probabilities up to a constant of each row: logits will do. Both
    methods are called from several threads, and what they return, on the device, is not to
    be changed. Where `dtype` is None they give rows as they are stored, not less their maximum.
    """

    @property
    def device(self) -> torch.device:
        """Where tiles are."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K)."""
        ...

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K); `rows_n` is ascending."""
        ...


@dataclass(frozen=True)
class _Chosen:
    """Rows of others, where those are."""

    source: Rows

    @property
    def device(self) -> torch.device:
        """Where tiles are."""
        return self.source.device


@dataclass(frozen=True)
class InMemory(_Chosen):
    """Rows kept as float32; whoever wants float64 has it from where they came."""

    scores_NK: Tensor

    @classmethod
    def of(cls, source: Rows, rows_N: np.ndarray | None = None) -> InMemory:
        """The named rows (ascending), or all of them."""
        rows = source if rows_N is None else Some(source, rows_N)
        count, clusters = rows.shape
        scores_NK = room(rows.shape, source.device)
        span = tile_rows(clusters, _SPAN_ELEMENTS)

        def keep(start: int) -> None:
            stop = min(start + span, count)
            tile_nK = rows.tile(start, stop, torch.float32)
            torch.clamp(tile_nK, min=FARTHEST, out=scores_NK[start:stop])

        deque(map_in_pool(keep, range(0, count, span), source.device), maxlen=0)
        return cls(rows, scores_NK)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.scores_NK), self.scores_NK.shape[1]

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K). As they are kept, where `dtype` is None."""
        if dtype in (torch.float32, None):
            return self.scores_NK[start:stop]
        return self.source.tile(start, stop, dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K). As the source stores them, where `dtype` is None."""
        if dtype == torch.float32:
            return self.scores_NK[torch.from_numpy(rows_n)]
        return self.source.take(rows_n, dtype)


@dataclass(frozen=True)
class Resident:
    """Rows kept on a device as they are stored."""

    stored_NK: Tensor

    @classmethod
    def of(cls, source: Rows, device: torch.device | None = None) -> Resident:
        """All the rows, read once; on the device that they are on, or another."""
        if isinstance(source, InMemory) and device in (None, source.device):
            return cls(source.scores_NK)
        dtype = source.tile(0, 0, None).dtype
        stored_NK = torch.empty(source.shape, dtype=dtype, device=device or source.device)

        def work(tiles: Iterator[tuple[int, Tensor]]) -> None:
            for start, tile_nK in tiles:
                stored_NK[start : start + len(tile_nK)] = tile_nK

        deque(map_spans(source, work, None), maxlen=0)
        return cls(stored_NK)

    def rows(self, chosen: slice) -> Resident:
        """Some of them, without a copy."""
        return Resident(self.stored_NK[chosen])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.stored_NK), self.stored_NK.shape[1]

    @property
    def device(self) -> torch.device:
        """Where tiles are."""
        return self.stored_NK.device

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K)."""
        tile_nK = self.stored_NK[start:stop]
        return tile_nK if dtype is None else less_maximum(tile_nK, dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K)."""
        stored_nK = self.stored_NK[torch.from_numpy(rows_n)]
        return stored_nK if dtype is None else less_maximum(stored_nK, dtype)


def room(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A matrix that is still to be filled."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # NumPy asks for large pages, which are there in half the time.
    return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.float64))


def less_maximum(tile_nK: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows less their maximum, as `dtype`."""
    wide_nK = widened(tile_nK, dtype)
    return less(wide_nK, wide_nK.amax(1, keepdim=True), tile_nK, dtype)


def widened(stored_nK: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as `dtype`, or as float64 where float32 would not hold them exactly."""
    if stored_nK.dtype not in (torch.float16, torch.float32):
        return stored_nK.double()
    # By way of single precision: torch takes half to double one by one, at six times the price.
    return stored_nK.float().to(dtype)


def less(wide_nK: Tensor, maximum_n1: Tensor, stored_nK: Tensor, dtype: torch.dtype) -> Tensor:
    """What was widened from stored rows less its maximum, as `dtype`."""
    # In place where that spoils no stored rows: a large new tile costs more than the sum.
    ours = wide_nK is not stored_nK
    return (wide_nK.sub_(maximum_n1) if ours else wide_nK.sub(maximum_n1)).to(dtype)


def finite(values_K: Tensor, dtype: torch.dtype) -> Tensor:
    """Potentials or prices, float64, as finite numbers of another kind: beside a score that is
    infinitely low in single precision an infinite one would make NaN."""
    if dtype == torch.float32:
        values_K = values_K.clamp(FARTHEST, -FARTHEST)
    return values_K.to(dtype)


def finite_like(values_K: Tensor, tile_nK: Tensor) -> Tensor:
    """`finite`, of the kind that a tile has, where that is."""
    return finite(values_K, tile_nK.dtype).to(tile_nK.device)


def softmax(score_nK: Tensor, out: Tensor | None = None) -> Tensor:
    """Of each row; in `out`, if it is given."""
    if score_nK.shape[1] >= _VECTOR or score_nK.device.type != "cpu":
        return torch.softmax(score_nK, 1, out=out)
    found_nK = torch.softmax(score_nK.T.contiguous(), 0).T
    return found_nK if out is None else out.copy_(found_nK)


@dataclass(frozen=True)
class Part(_Chosen):
    """Rows start..stop-1 of others: the share of one process."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.stop - self.start, self.source.shape[1]

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K)."""
        return self.source.tile(self.start + start, self.start + stop, dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K)."""
        return self.source.take(self.start + rows_n, dtype)


@dataclass(frozen=True)
class Some(_Chosen):
    """Rows of others by number, ascending; nothing is kept."""

    rows_N: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.rows_N), self.source.shape[1]

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """Rows start..stop-1, (n, K)."""
        return self.source.take(self.rows_N[start:stop], dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """The named rows, (n, K)."""
        return self.source.take(self.rows_N[rows_n], dtype)


def evenly(rows: Rows, most: int) -> Some:
    """So many of the rows, evenly spread; all where they are fewer."""
    return Some(rows, spread(rows.shape[0], most))


def map_spans(
    rows: Rows,
    work: Callable[[Iterator[tuple[int, Tensor]]], T],
    dtype: torch.dtype | None = torch.float64,
    square: int = 0,
    workers: int | None = None,
) -> Iterator[T]:
    """`work` of each span of rows, in order. It is given the span's tiles, one at a time,
    as (number of the first row, tile_nK), and runs in a thread of its own, of `workers` at
    most. `square`: it gives K x K numbers, which cost less by the row if spans have so many
    rows for each cluster."""
    count, clusters = rows.shape
    elements, span_elements = _TILE_ELEMENTS, _SPAN_ELEMENTS
    if rows.device.type != "cpu":
        elements = _DEVICE_TILE
        if dtype is None and isinstance(rows, Resident):
            elements = _DEVICE_VIEW
        span_elements = _DEVICE_TILES * elements
    tile = tile_rows(clusters, elements)
    most = max(1, span_elements // (tile * clusters), square * clusters // tile)
    span = tile * _even_part(-(-count // tile), most)

    def tiles(first: int) -> Iterator[tuple[int, Tensor]]:
        end = min(first + span, count)
        for start in range(first, end, tile):
            yield start, rows.tile(start, min(start + tile, end), dtype)

    return map_in_pool(work, map(tiles, range(0, count, span)), rows.device, workers)


def _even_part(count: int, most: int) -> int:
    """The part of a count of which there are an even number, as workers mostly are, of one size:
    so that all are done at one time."""
    parts = -(-count // most)
    return max(1, -(-count // max(parts + parts % 2, 1)))


def map_rows(rows: Rows, rows_n: np.ndarray, work: Callable[[Tensor], T]) -> Iterator[T]:
    """`work` of the named rows (ascending), float64, a span of them at a time, in order."""
    parts = spans_of(rows_n, rows.shape[1])
    return map_in_pool(lambda part_n: work(rows.take(part_n)), parts, rows.device)


def spans_of(rows_n: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Named rows, a span of them at a time."""
    size = tile_rows(clusters, _SPAN_ELEMENTS)
    return [rows_n[at : at + size] for at in range(0, len(rows_n), size)]


def map_in_pool(
    work: Callable[[S], T],
    items: Iterable[S],
    device: torch.device,
    workers: int | None = None,
) -> Iterator[T]:
    """Results as a plain map gives them, worked out in a pool of `workers` at most, a few
    ahead."""
    # Those of a GPU wait for disks and copies, whatever OMP_NUM_THREADS says: torchrun says 1.
    on_cpu = device.type == "cpu"
    most = (_THREADS.get() or torch.get_num_threads()) if on_cpu else _DEVICE_WORKERS
    workers = min(workers or most, most)
    pool = _pool(workers)
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def by_itself() -> Iterator[None]:
    """The calling thread works alone between passes, which have as many workers as ever.

    What is done there to matrices of K x K is often too little to wait for other threads,
    and its bits do not depend on how many there are.
    """
    threads = torch.get_num_threads()
    token = _THREADS.set(_THREADS.get() or threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _THREADS.reset(token)


def tile_rows(clusters: int, elements: int = _TILE_ELEMENTS) -> int:
    """Rows of a tile."""
    return max(1, elements // clusters)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=_prepare)
    # The setting is the calling thread's, but also what later threads start with.
    pool.submit(int).result()
    torch.set_num_threads(threads)
    return pool


def _prepare() -> None:
    # Torch may give a thread the common number when it is first asked, in place of its own.
    torch.get_num_threads()
    torch.set_num_threads(1)
    # Plan entries fade into numbers that the processor is many times slower with.
    torch.set_flush_denormal(True)
