"""Images batch by batch: all in order, dealt out to the processes of a job, or at random."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import tee

import torch
from torch import Tensor

from sela_cli import job, parallel
from sela_cli.devices import Beside, fetched, runs_ahead, sent
from sela_cli.errors import UsageError
from sela_cli.images.augment import AUGMENTATIONS, DrawOf, Draws, draw, drawn_view, ten_views
from sela_cli.images.batches import Images
from sela_cli.seeds import batches, generator_of

# Batches that a GPU may have before it: it goes on while the results of earlier ones are written.
_AHEAD = 3

# Makes of a batch its views of `size` pixels.
ViewOf = Callable[[Tensor, int, Draws], Tensor]


def at_random(
    images: Images,
    size: int,
    aug: str,
    seed: int,
    steps: range,
    batch_size: int,
    device: str,
    purpose: str = "",
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of the batches `steps`: rows (n,), and views of `size` pixels.

    Order and views are drawn for whole batches, by the seed, the step and the `purpose`.
    """
    mine = job.share(batch_size)
    order = batches(seed, f"{purpose}order", len(images), batch_size, steps.start, steps.stop)
    rows, ahead = tee(rows_n[mine] for rows_n in order)
    beside = Beside(device)
    for step, rows_n, batch in zip(steps, rows, images.stream(ahead), strict=True):
        generator = generator_of(seed, f"{purpose}view", step)
        draws = draw(batch_size, size, AUGMENTATIONS[aug], generator).of(mine)
        yield rows_n, beside(_view_on, device, batch, size, draws)


def _view_on(
    device: str, batch: Tensor, size: int, draws: Draws, view_of: ViewOf = drawn_view
) -> Tensor:
    return view_of(sent(batch, device), size, draws.on(device))


def shared_batch(batch_size: int, count: int) -> int:
    """Images of a batch of `count` images at most. Raises UsageError where some process would
    have none of it."""
    size = min(batch_size, count)
    if size < parallel.size():
        raise UsageError(
            f"{parallel.size()} processes share batches of {size}",
            "start fewer, or use a larger --batch-size",
        )
    return size


@torch.no_grad()
def in_order(
    images: Images,
    size: int,
    compute: Callable[[Tensor], Tensor],
    columns: Sequence[int],
    batch_size: int,
    device: str = "cpu",
    augment: DrawOf | None = None,
    view_of: ViewOf = drawn_view,
    skip: int = 0,
) -> Iterator[list[Tensor]]:
    """What `compute` makes of each batch's view of `size` pixels, float32 on the CPU.

    It makes (n, sum of `columns`); that is given as an (n, columns) tensor for each of
    `columns`. Every process gets all of them, and computes every P-th. `augment` draws the
    views; the default is the plain centre view. `view_of` makes them, perhaps several of
    each image. The first `skip` batches are left out; what is drawn for the others does not
    change.
    """
    processes, rank = parallel.size(), parallel.rank()
    starts = range(skip * batch_size, len(images), batch_size)
    if augment:
        for _ in range(skip):
            augment(batch_size, size)
    counts = [min(batch_size, len(images) - start) for start in starts]
    own = range(rank, len(starts), processes)
    stream = images.stream(torch.arange(starts[n], starts[n] + counts[n]) for n in own)
    beside = Beside(device)

    def begun(group: list[int]) -> Callable[[], Tensor] | None:
        """This process's batch of one of each, if it has one there."""
        mine = None
        for owner, count in enumerate(group):
            # Drawn for every batch, so that the views do not depend on who computes them.
            draws = augment(count, size) if augment else Draws()
            if owner == rank:
                view = beside(_view_on, device, next(stream), size, draws, view_of)
                view = view.contiguous(memory_format=torch.channels_last)
                mine = fetched(compute(view).float())
        return mine

    def ended(group: list[int], mine: Callable[[], Tensor] | None) -> Iterator[list[Tensor]]:
        own_nS = mine() if mine else None
        for owner, count in enumerate(group):
            outputs_nS = job.from_process(owner, own_nS, (count, sum(columns)))
            yield list(torch.split(outputs_nS, list(columns), 1))

    groups = [counts[first : first + processes] for first in range(0, len(starts), processes)]
    # A GPU is at work on some batches while the next is made ready for it.
    ahead = _AHEAD if runs_ahead(device) else 0
    at_work: deque[Iterator[list[Tensor]]] = deque()
    for group in groups:
        at_work.append(ended(group, begun(group)))
        if len(at_work) > ahead:
            yield from at_work.popleft()
    for last in at_work:
        yield from last


def over_ten_crops(
    images: Images,
    size: int,
    compute: Callable[[Tensor], Tensor],
    columns: Sequence[int],
    batch_size: int,
    device: str = "cpu",
) -> Iterator[list[Tensor]]:
    """`in_order` on ten crops of each image: what `compute` makes of them, averaged."""

    def crops(batch: Tensor, size: int, draws: Draws) -> Tensor:
        return ten_views(batch, size)

    mean = mean_over(compute, 10)
    return in_order(images, size, mean, columns, batch_size, device, view_of=crops)


def mean_over(compute: Callable[[Tensor], Tensor], views: int) -> Callable[[Tensor], Tensor]:
    """`compute` averaged over so many views of each image, the images of one after another's."""

    def mean(view: Tensor) -> Tensor:
        outputs = compute(view).float()
        return outputs.reshape(views, -1, outputs.shape[1]).mean(0)

    return mean


def repeated(augment: DrawOf, views: int) -> tuple[DrawOf, ViewOf]:
    """What draws and makes so many views of each image, the images of one after another's."""

    def draw_all(count: int, size: int) -> Draws:
        return augment(count * views, size)

    def make_all(batch: Tensor, size: int, draws: Draws) -> Tensor:
        return drawn_view(batch.repeat(views, 1, 1, 1), size, draws)

    return draw_all, make_all
