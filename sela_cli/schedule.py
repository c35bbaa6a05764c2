"""When to relabel, and the learning rate: functions of the position in training, in epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

RELABEL_KINDS = ("quadratic", "linear")
LR_KINDS = ("step", "cosine", "constant")
# Of positions: 0.28 times 100 epochs lies a little beyond 28.
_ROUNDING = 1e-6


def relabel_positions(epochs: float, opts: int, kind: str = "quadratic") -> list[float]:
    """Positions, in epochs, at which the images are relabelled.

    t_k = (E + 1.01) (k / (n - 1))^2 for k = 0..n-1 (`linear`: power 1), of which those
    beyond the end of training are dropped: the last, and of the presets' 400 `linear` ones in
    400 epochs the last two. The paper's #opts counts them.
    Source: SeLa section 4.1 and its reference implementation.
    """
    assert epochs >= 0 and opts >= 0 and kind in RELABEL_KINDS
    power = 2 if kind == "quadratic" else 1
    positions = [(epochs + 1.01) * (k / max(opts - 1, 1)) ** power for k in range(opts)]
    return [position for position in positions if position < epochs or position == 0]


def learning_rate(
    position: float, epochs: float, lr: float, kind: str, milestones: list[float], factor: float
) -> float:
    """Learning rate at `position` epochs of `epochs`.

    `step`: lr * factor^(number of milestones passed). `cosine`: lr (1 + cos(pi t/E)) / 2.
    """
    if kind == "constant" or epochs == 0:
        return lr
    if kind == "cosine":
        return 0.5 * lr * (1 + math.cos(math.pi * min(position / epochs, 1.0)))
    assert kind == "step"
    return float(lr * factor ** sum(position >= milestone - _ROUNDING for milestone in milestones))


def are_fractions(milestones: Sequence[float]) -> bool:
    """Whether all lie within the epochs."""
    return all(0 <= milestone <= 1 for milestone in milestones)


def step_at(position: float, steps_per_epoch: int) -> int:
    """First whole step at or after `position` epochs."""
    return math.ceil(position * steps_per_epoch - _ROUNDING)
