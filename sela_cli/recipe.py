"""The settings of a training, and what follows from them: its steps, and the rate of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from sela_cli import job, schedule
from sela_cli.errors import UsageError
from sela_cli.images.augment import AUGMENTATIONS

PRECISIONS = ("float32", "bfloat16", "auto")
HEAD_INITS = ("random", "kmeans")


@dataclass(frozen=True)
class Recipe:
    """Training settings; the defaults are the paper's for ImageNet.

    `lr_milestones` are fractions of `epochs`. `rotation` adds RotNet's task: a four-way
    head on the image turned by 0, 90, 180 and 270 degrees, its loss added with weight 1.
    `head_init`: how the heads of a fresh network begin, `random` as the paper's or `kmeans`.
    """

    epochs: float = 400.0
    batch_size: int = 256
    lr: float = 0.05
    lr_schedule: str = "step"
    lr_milestones: tuple[float, ...] = (0.375, 0.75, 0.875)
    lr_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-5
    aug: str = "imagenet"
    precision: str = "float32"
    seed: int = 0
    rotation: bool = False
    compile: bool = False
    head_init: str = "random"

    def check(self) -> None:
        """Raises UsageError where an option has no meaning."""
        for option, value, known in (
            ("--aug", self.aug, tuple(AUGMENTATIONS)),
            ("--precision", self.precision, PRECISIONS),
            ("--lr-schedule", self.lr_schedule, schedule.LR_KINDS),
            ("--head-init", self.head_init, HEAD_INITS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value} is none of {', '.join(known)}")
        for option, number, least in (
            ("--epochs", self.epochs, 0),
            ("--lr", self.lr, 0),
            ("--lr-factor", self.lr_factor, 0),
            ("--momentum", self.momentum, 0),
            ("--weight-decay", self.weight_decay, 0),
            ("--batch-size", self.batch_size, 1),
        ):
            if not least <= number < math.inf:
                raise UsageError(f"{option} {number} must be at least {least} and finite")
        if self.lr == 0:
            raise UsageError("--lr 0 would learn nothing")
        if not schedule.are_fractions(self.lr_milestones):
            raise UsageError("--lr-milestones are fractions of the epochs, 0 to 1")

    @classmethod
    def of(cls, *layers: dict[str, Any]) -> Recipe:
        """Defaults, overridden by each layer in turn; None and foreign names are passed over."""
        known = {field.name for field in fields(cls)}
        recipe = cls()
        for layer in layers:
            recipe = replace(
                recipe, **{k: v for k, v in layer.items() if k in known and v is not None}
            )
        return replace(recipe, lr_milestones=tuple(recipe.lr_milestones))

    def steps_per_epoch(self, count: int) -> int:
        """Whole batches of `count` images; what is left over waits for the next epoch's order."""
        return max(1, count // self.batch_size)

    def views(self, count: int) -> int:
        """What one process puts through the network in a step, of `count` images."""
        return job.largest_share(min(self.batch_size, count)) * (4 if self.rotation else 1)

    def steps(self, position: float, count: int) -> int:
        """Steps done at `position` epochs."""
        return schedule.step_at(position, self.steps_per_epoch(count))

    def lr_at(self, step: int, count: int) -> float:
        """Learning rate of a step."""
        return schedule.learning_rate(
            step / self.steps_per_epoch(count),
            self.epochs,
            self.lr,
            self.lr_schedule,
            [fraction * self.epochs for fraction in self.lr_milestones],
            self.lr_factor,
        )


def check_rates(options: Mapping[str, Any], recipe: Recipe) -> None:
    """Raises UsageError where options are for another schedule of the learning rate."""
    for name in ("lr_milestones", "lr_factor"):
        if name in options and recipe.lr_schedule != "step":
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is not for --lr-schedule {recipe.lr_schedule}")
