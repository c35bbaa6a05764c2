"""Decoded images of one size: in memory where they fit, else decoded batch by batch.

A packed file (`sela pack`) is neither held nor decoded: its rows are read as they lie there.

N images, n images of a batch, S stored side in pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sela_cli import interrupt, job
from sela_cli.errors import BadData, StoppedEarly
from sela_cli.images.sources import Source, open_source
from sela_cli.keys import dataset_id, some_of
from sela_cli.progress import Progress, silent
from sela_cli.spread import spread

_Made = TypeVar("_Made")

# Images that the side of a collection's is taken from.
_SIDES = 15
# Of a picture so many times as long as it is wide only the middle is looked at.
_LONG = 16
# Images of up to this side are taken as they are, by networks with the small stem.
SMALL = 64
_MEMORY_BYTES = 4 << 30
# Images that a thread decodes before it can be stopped.
_PART = 64
# Batches that are being read or decoded while one is at work.
_AHEAD = 2


def _processors() -> int:
    """What a batch system or a container allows of them."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _decoders(native: int) -> int:
    """Threads for images whose shorter edge this is."""
    # They would wait for each other longer than a decoder takes for a small image.
    return 1 if native <= SMALL else _processors()


@cache
def _pool(decoders: int) -> ThreadPoolExecutor:
    """One for all images that want so many."""
    return ThreadPoolExecutor(decoders)


# A forked child has the pool but none of its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _in_parts(
    task: Callable[[np.ndarray], list[_Made]], numbers: np.ndarray, decoders: int
) -> list[Future[list[_Made]]]:
    """What the pool's threads make of parts of the numbers, in their order."""
    count = max(decoders, -(-len(numbers) // _PART))
    return [_pool(decoders).submit(task, part) for part in np.array_split(numbers, count)]


class Images:
    """Square uint8 images, each known by its key. Batches are (n, 3, S, S), uint8."""

    def __init__(self, source: Source, side: int, rows: np.ndarray, decoders: int = 0) -> None:
        """`decoders`: threads that decode; 0: as many as there are processors."""
        self.source = source
        self.side = side
        self._decoders = decoders or _processors()
        self.index_N = rows
        self.keys = some_of(source.keys, rows)
        self.truth_N = None if source.truth_N is None else source.truth_N[rows]
        self.classes = source.classes
        self.dataset_id = dataset_id(self.keys)
        # Keys of those asked for beside these that can't be read.
        self.left_out: list[str] = []
        # All that are in memory, and where these are among them.
        self._held: Tensor | None = None
        self._places_N = torch.arange(len(rows))
        fits = source.pixels is not None and source.pixels.shape[-1] == side
        self._stored = source.pixels if fits else None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def spec(self) -> str:
        """How the user named them."""
        return self.source.spec

    @property
    def truth_digest(self) -> str:
        """Hash of the true classes' numbers; '' where they are not known."""
        if self.truth_N is None:
            return ""
        return hashlib.sha256(self.truth_N.astype(np.int64).tobytes()).hexdigest()

    def batch(self, rows_n: Tensor) -> Tensor:
        """The images of these positions, (n, 3, S, S), uint8."""
        if self._stored is not None:
            return torch.from_numpy(self._stored.read(self.index_N[rows_n.numpy()]))
        if self._held is not None:
            return self._held[self._places_N[rows_n]]
        return _stacked(self._decoding(rows_n))

    def stream(self, rows: Iterable[Tensor]) -> Iterator[Tensor]:
        """`batch` of each; files are read and decoded while earlier batches are at work."""
        if self._held is not None:
            yield from map(self.batch, rows)
            return
        waiting: deque[list[Future[Any]]] = deque()
        try:
            for rows_n in rows:
                waiting.append(self._begun(rows_n))
                if len(waiting) > _AHEAD:
                    yield self._ended(waiting.popleft())
            while waiting:
                yield self._ended(waiting.popleft())
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()

    def subset(self, rows: np.ndarray) -> Images:
        """Some of the images, in the given order."""
        part = Images(self.source, self.side, self.index_N[rows], self._decoders)
        part._held, part._places_N = self._held, self._places_N[torch.from_numpy(rows)]
        return part

    def hold(self, progress: Progress) -> None:
        """Decode everything now and keep it, if it fits and is not packed."""
        if self._stored is not None or len(self) * 3 * self.side**2 > _MEMORY_BYTES:
            return
        held = torch.empty((len(self), 3, self.side, self.side), dtype=torch.uint8)
        for start, batch in self.in_order(1024):
            held[start : start + len(batch)] = batch
            progress(start + len(batch), len(self), "")
            if interrupt.requested():
                raise StoppedEarly(f"{self.spec}: stopped while decoding", "run it again")
        self._held, self._places_N = held, torch.arange(len(self))

    def in_order(self, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """Every image, by batches, each with the position of its first."""
        starts = range(0, len(self), batch_size)
        rows = (torch.arange(s, min(s + batch_size, len(self))) for s in starts)
        return zip(starts, self.stream(rows), strict=True)

    def _decoding(self, rows_n: Tensor) -> list[Future[list[np.ndarray]]]:
        return _in_parts(self._squares, self.index_N[rows_n.numpy()], self._decoders)

    def _begun(self, rows_n: Tensor) -> list[Future[Any]]:
        """What reads or decodes these images in other threads."""
        if self._stored is not None:
            return [_pool(1).submit(self.batch, rows_n)]
        return self._decoding(rows_n)

    def _ended(self, parts: list[Future[Any]]) -> Tensor:
        return _stacked(parts) if self._stored is None else parts[0].result()

    def _squares(self, numbers: np.ndarray) -> list[np.ndarray]:
        return [square(self.source.image(int(row), self.side), self.side) for row in numbers]


def _stacked(parts: list[Future[list[np.ndarray]]]) -> Tensor:
    stack = np.stack([image for part in parts for image in part.result()])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def square(image: np.ndarray, side: int) -> np.ndarray:
    """Resize the shorter edge to `side` and cut the centre: side x side x 3, uint8."""
    from PIL import Image

    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    if max(height, width) > _LONG * min(height, width):
        # Of a line a pixel wide only the middle is kept: resized whole it would fill memory.
        half = _LONG * min(height, width) // 2
        top, left = max(height // 2 - half, 0), max(width // 2 - half, 0)
        return square(image[top : top + 2 * half, left : left + 2 * half], side)
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def stored_side(native: int, image_size: int) -> int:
    """Side at which images wait for a network of `image_size`: small ones are kept as they are
    and scaled with the batch, which costs no memory."""
    wanted = resized_side(image_size)
    return min(native, wanted) if native <= SMALL < image_size else wanted


def resized_side(image_size: int) -> int:
    """Side to which images are resized before a network of `image_size` has its part of them:
    large ones cut 7/8 (224 of 256)."""
    return image_size if image_size <= SMALL else image_size * 8 // 7


def open_images(
    spec: str,
    image_size: int | None,
    *,
    download: bool = False,
    skip_bad: bool = False,
    limit: int | None = None,
    side: int | None = None,
    hold: bool = True,
    progress: Progress = silent,
) -> tuple[Images, int]:
    """Open `spec` for a network of `image_size` (None: 32 where most images are
    small, else 224).

    Returns the images and the image size. `limit` keeps that many, evenly spread.
    `skip_bad` reads every image once to leave out those that can't be read, and raises
    BadData only if none is left. `side`: another than the network's `stored_side`;
    `hold`: decode now what fits into memory.
    """
    if download and job.launched():
        # What several processes fetch at a time is damaged.
        job.once(partial(_fetch, spec))
        download = False
    source = open_source(spec, download)
    asked = spread(len(source), len(source) if limit is None else limit)
    rows = _but_bad(source, asked, progress) if skip_bad else asked
    # Not of the first alone: a collection of photographs may begin with an icon.
    some = rows[spread(len(rows), _SIDES)]
    native = int(np.median([min(source.image(int(row)).shape[:2]) for row in some]))
    if image_size is None:
        image_size = 32 if native <= SMALL else 224
    images = Images(source, side or stored_side(native, image_size), rows, _decoders(native))
    images.left_out = [source.keys[row] for row in np.setdiff1d(asked, rows)]
    if hold:
        images.hold(progress)
    return images, image_size


def _fetch(spec: str) -> None:
    open_source(spec, download=True)


def _but_bad(source: Source, rows: np.ndarray, progress: Progress) -> np.ndarray:
    """Those of the rows whose images can be read; raises BadData if there are none."""
    first = next((int(row) for row in rows if _readable(source, int(row))), None)
    if first is None:
        raise BadData(f"{source.spec}: none of its images can be read")
    decoders = _decoders(min(source.image(first).shape[:2]))
    good: list[int] = []
    step = _PART * decoders
    for start in range(0, len(rows), step):
        for part in _in_parts(partial(_readable_of, source), rows[start : start + step], decoders):
            good += part.result()
        progress(min(start + step, len(rows)), len(rows), "")
    return np.array(good)


def _readable_of(source: Source, rows: np.ndarray) -> list[int]:
    return [row for row in rows.tolist() if _readable(source, row)]


def _readable(source: Source, row: int) -> bool:
    if interrupt.requested():
        raise StoppedEarly(f"{source.spec}: stopped while reading images", "run it again")
    try:
        # As small as can be: even so a JPEG is read to its end.
        source.image(row, 1)
    except BadData:
        return False
    return True
