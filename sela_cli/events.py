"""TensorBoard's event files, written by torch: losses of a run and what each round changed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any


class Events:
    """Event files in `folder`, which is made with the first value."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder))

    def record(self, name: str, value: float, step: int) -> None:
        """Add a point to the curve `name`."""
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still held back."""
        if "_writer" in self.__dict__:
            self._writer.close()
