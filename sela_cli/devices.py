"""What a GPU takes to be kept at work: copies that nothing waits for, steps launched whole.

The processor says what is to be done and the GPU does it later, in the order in which it
was said. A plain copy to the GPU waits until all that was said before is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sela_cli import parallel

# Calls after which nothing is made for the first time any more: momentum, the libraries' plans.
_FIRST = 3


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device; the copy to a GPU goes on while the processor does."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def has_graphs(device: torch.device | str) -> bool:
    """Whether work there can be made one CUDA graph: exchanges between processes can't."""
    return torch.device(device).type == "cuda" and parallel.size() == 1


class Graphed:
    """`step` of tensors on a GPU, as one CUDA graph: its operations are launched all at once.

    One by one they cost the processor more time than the GPU. The first calls are plain
    ones, and so are those with other shapes than the graph is made for. The next call
    overwrites what this one has returned.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step, self._calls = step, 0
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._result = torch.empty(0)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `step` makes of them."""
        self._calls += 1
        if self._calls <= _FIRST or (self._graph and not self._fit(inputs)):
            return self._plainly(*inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            # Says what is to be done, and does nothing yet; other threads may go on, such as
            # one that pins batches.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = self._step(*self._inputs)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._result

    def _fit(self, inputs: Sequence[Tensor]) -> bool:
        return all(
            kept.shape == given.shape for kept, given in zip(self._inputs, inputs, strict=True)
        )

    def _plainly(self, *inputs: Tensor) -> Tensor:
        """Beside the stream that all else is in, as a capture will be."""
        self._aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._aside):
            result = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(self._aside)
        return result
