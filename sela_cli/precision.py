"""The arithmetic of networks: float32, or bfloat16, which is faster on hardware made for it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sela_cli import parallel
from sela_cli.devices import LEAD, Graphed, has_graphs
from sela_cli.networks import Network

_REPEATS = 3
# bfloat16 rounds to three digits: it has to be worth it.
_GAIN = 0.9


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 arithmetic where `precision` asks for it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16")


def decided(
    asked: str,
    began: Callable[[], str | None],
    network: Network,
    views: int,
    device: str,
    training: bool,
) -> str:
    """`asked`, or for `auto` what the work `began` in before it was stopped, else the faster."""
    if asked != "auto":
        return asked
    return began() or faster(network, views, device, training)


def _seconds(work: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    # Waits for the device.
    float(work())
    return time.perf_counter() - began


def faster(network: Network, views: int, device: str, training: bool) -> str:
    """`float32` or `bfloat16`, by the time that so many views at once take a copy of the network.

    In a job `views` are those of one process, and the first decides for all.
    """
    trial = copy.deepcopy(network).to(device).to(memory_format=torch.channels_last)
    trial.train(training)
    size = network.image_size
    view = torch.zeros(views, 3, size, size, device=device)
    view = view.contiguous(memory_format=torch.channels_last)

    def compute(precision: str, view: Tensor) -> Tensor:
        with autocast(device, precision), torch.set_grad_enabled(training):
            loss = torch.stack([logits.float().square().mean() for logits in trial(view)]).sum()
        if training:
            trial.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    times: dict[str, float] = {}
    # Dropout draws.
    with torch.random.fork_rng(devices=[]):
        for precision in ("float32", "bfloat16"):
            work: Callable[[Tensor], Tensor] = partial(compute, precision)
            lead = 1
            if has_graphs(device):
                # One by one the launches take as long in either.
                work, lead = Graphed(work), LEAD
            for _ in range(lead):
                work(view)
            times[precision] = min(_seconds(partial(work, view)) for _ in range(_REPEATS))
    gained = times["bfloat16"] < _GAIN * times["float32"]
    return "bfloat16" if parallel.first_says(gained) else "float32"
