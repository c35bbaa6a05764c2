"""The processes that `torchrun -m sela_cli` starts as one job: joining it, and acting as one.

Imports torch where it is needed only: every command asks whether there is a job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from sela_cli.errors import SelaError

if TYPE_CHECKING:
    from torch import Tensor

# What the processes of a job do together; other commands are left to the first of them.
VERBS = ("run", "embed", "label", "train", "retrain", "probe")


class FailedElsewhere(SelaError):
    """Another process has failed, and said why; this one ends with the exit code of its
    SelaError, or with 1."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the first process has failed")
        self.exit_code = exit_code


def number() -> int:
    """This process's number in a job of several, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def launched() -> bool:
    """Whether this is one of several processes."""
    # WORLD_SIZE alone may be a batch system's.
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def has_neighbours() -> bool:
    """Whether others of the job are on this machine."""
    return launched() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the job, if there is one. Only its first process prints."""
    if not launched():
        yield
        return
    from torch import cuda, distributed

    # The first process may label for long while the others wait.
    patience = timedelta(days=7)
    backend = "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=patience)
    try:
        if number() == 0:
            yield
        else:
            with (
                open(os.devnull, "w") as nowhere,  # noqa: PTH123
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                yield
    finally:
        distributed.destroy_process_group()


def device() -> str:
    """The GPU of this process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if launched() else "cuda"


def meet() -> None:
    """Wait until every process has come here."""
    from sela_cli import parallel

    parallel.any_of(False)


def once(work: Callable[[], None]) -> None:
    """The first process does `work`, when all have come; they go on when it is done.

    Raises what it raises there, and FailedElsewhere in the other processes.
    """
    import torch

    from sela_cli import parallel

    meet()
    failure: Exception | None = None
    if parallel.rank() == 0:
        try:
            work()
        except Exception as error:  # All must hear of it before one leaves.
            failure = error
    code = failure.exit_code if isinstance(failure, SelaError) else int(failure is not None)
    # Of all but the first it is zero.
    code = int(parallel.sum_of(torch.tensor(code)))
    if code:
        raise failure or FailedElsewhere(code)


def from_process(owner: int, value: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """What `owner` has as `value`, float32 on the CPU, in every process."""
    import torch
    from torch import distributed

    from sela_cli import parallel

    if parallel.size() > 1:
        if parallel.rank() != owner:
            value = torch.empty(shape)
        assert value is not None
        value = value.contiguous()
        distributed.broadcast(value, owner)
    assert value is not None
    return value


def share(count: int) -> slice:
    """This process's part of `count` things in order."""
    from sela_cli import parallel

    size, rank = parallel.size(), parallel.rank()
    return slice(count * rank // size, count * (rank + 1) // size)


def largest_share(count: int) -> int:
    """The most that any process has of `count` things."""
    from sela_cli import parallel

    return -(-count // parallel.size())
