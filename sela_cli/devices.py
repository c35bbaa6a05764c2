"""What a GPU takes to be kept at work: copies that nothing waits for, steps launched whole.

The processor says what is to be done and the GPU does it later, in the order in which it
was said. A plain copy to the GPU waits until all that was said before is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sela_cli import parallel

# Calls after which nothing is made for the first time any more: momentum, the libraries' plans.
_FIRST = 3
# The call after those makes the graph.
LEAD = _FIRST + 1


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; the copy to a GPU goes on while the processor does."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """The tensor on the processor, when it is called for; the copy begins at once.

    What is said to a GPU after this may overwrite the tensor.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        # Memory that a GPU writes to is scarce: whoever keeps results is not to keep it.
        return copy.clone()

    return wait


class Beside:
    """Makes tensors on a GPU beside what it is at, in a stream of its own.

    What is said to the GPU after that waits for them. Elsewhere they are made as ever.
    """

    def __init__(self, device: torch.device | str) -> None:
        on_gpu = torch.device(device).type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def __call__(self, make: Callable[..., Tensor], *inputs: object) -> Tensor:
        """What `make` makes of the inputs."""
        if self._stream is None:
            return make(*inputs)
        with torch.cuda.stream(self._stream):
            made = make(*inputs)
        usual = torch.cuda.current_stream(self._stream.device)
        usual.wait_stream(self._stream)
        # Its memory is this stream's until the usual one is done with it.
        made.record_stream(usual)
        return made


def runs_ahead(device: torch.device | str) -> bool:
    """Whether the processor can say what comes next while the device is still at work."""
    return torch.device(device).type == "cuda"


def has_graphs(device: torch.device | str) -> bool:
    """Whether work there can be made one CUDA graph: exchanges between processes can't."""
    return runs_ahead(device) and parallel.size() == 1


class Graphed:
    """`step` of tensors on a GPU, as one CUDA graph: its operations are launched all at once.

    One by one they cost the processor more time than the GPU. Calls with other shapes than
    the first has are plain ones, and so are the first few. The next call overwrites what
    this one has returned.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step, self._calls = step, 0
        self._shapes: list[torch.Size] = []
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `step` makes of them."""
        shapes = [tensor.shape for tensor in inputs]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            return self._step(*inputs)
        self._calls += 1
        if self._calls <= _FIRST:
            return self._plainly(*inputs)
        if self._graph is None:
            self._capture(*inputs)
        assert self._graph is not None
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._result

    def _plainly(self, *inputs: Tensor) -> Tensor:
        """Beside the stream that all else is in, as the capture will be."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside), _searching():
            result = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(self._aside)
        return result

    def _capture(self, *inputs: Tensor) -> None:
        """Say what is to be done, and do nothing yet."""
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on, such as one that pins batches.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"), _searching():
            self._result = self._step(*self._inputs)


@contextmanager
def _searching() -> Iterator[None]:
    """Of cuDNN's convolutions the fastest: worth a search where shapes stay what they are."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
