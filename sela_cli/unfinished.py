"""What stopped work leaves: its state beside its output, for the same call to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sela_cli import envelope, formats, interrupt, job, outputs, parallel
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, StoppedEarly
from sela_cli.formats import Checkpoint

_SAVE_SECONDS = 300.0


class Unfinished:
    """The state of unfinished work at `output`; only the call of the same `identity` takes it up.

    With `output` `-` nothing is kept. Raises CannotCreate where nothing could be. `force`:
    begin anew where a call of other options has left its state.
    """

    def __init__(
        self, output: str, kind: str, identity: dict[str, Any], force: bool = False
    ) -> None:
        self.path = _path_of(output)
        if self.path is not None:
            outputs.check_output(str(self.path), force=True)
        self._command, self._identity, self._force = f"{kind} (unfinished)", identity, force
        self._saved = time.monotonic()

    def read(self) -> Checkpoint | None:
        """What was left, if it was this call that left it.

        Raises CannotCreate where it was one of the same command with other options, whose work
        would be lost.
        """
        checkpoint = _state_at(self.path)
        if checkpoint is None:
            return None
        assert checkpoint.header is not None
        # Through JSON, as the file's was: tuples become lists.
        there, here = checkpoint.header.parameters, envelope.through_json(self._identity)
        if there == here:
            return checkpoint
        if checkpoint.header.history[-1]["command"] == self._command and not self._force:
            raise CannotCreate(
                f"{self.path} was left by a call that differs in {_differing(there, here)}",
                "give what it had to go on, or --force to begin anew",
            )
        return None

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace what is there."""
        if self.path is not None:
            provenance = Provenance(self._command, self._identity)
            formats.write_checkpoint(str(self.path), checkpoint, provenance, force=True)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """When the work is done."""
        if self.path is not None:
            outputs.discard(self.path)

    def after_step(self, step: int, last: int, state: Callable[[], Checkpoint]) -> None:
        """Save now and then, by the first process; and where a stop is asked for, raising
        StoppedEarly unless this was the last step."""
        if parallel.any_of(interrupt.requested()) and step < last:
            told, mend = "state saved", "run it again"
            if self.path is None:
                told, mend = "nothing saved", "with -o FILE its state is kept"
            with self.kept(state):
                raise StoppedEarly(f"stopped at step {step} of {last}, {told}", mend)
        if parallel.rank() == 0 and time.monotonic() - self._saved > _SAVE_SECONDS:
            self.write(state())

    @contextmanager
    def kept(self, state: Callable[[], Checkpoint]) -> Iterator[None]:
        """StoppedEarly in the block leaves the state."""
        try:
            yield
        except StoppedEarly:
            # Where one process of a job ends, the others are ended too: not while one writes.
            job.once(lambda: self.write(state()))
            raise


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Names of what is not the same in both."""
    old, new = list(envelope.leaves(there)), list(envelope.leaves(here))
    differing = [leaf for leaf in old if leaf not in new] + [
        leaf for leaf in new if leaf not in old
    ]
    return ", ".join(sorted({name.replace("_", "-") for name, _ in differing}))


def began_in(output: str) -> str | None:
    """The precision of the unfinished work at `output`; None where there is none."""
    left = _state_at(_path_of(output))
    return None if left is None else left.recipe.get("precision")


def _path_of(output: str) -> Path | None:
    return None if output == "-" else Path(f"{output}.unfinished")


def _state_at(path: Path | None) -> Checkpoint | None:
    """What is left there, unless `sela embed` has left it: its is no checkpoint."""
    if path is None or not path.exists():
        return None
    with outputs.removable(path):
        with envelope.open_hdf5(str(path)) as file:
            if file.attrs.get("kind") != "checkpoint":
                return None
        return formats.read_checkpoint(str(path))


def momentum_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Momentum by the name of the parameter; of those that have any."""
    found: dict[str, np.ndarray] = {}
    for name, parameter in module.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            found[name] = buffer.cpu().numpy()
    return found


def restore_momentum(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    momentum: Mapping[str, np.ndarray],
    path: str,
) -> None:
    """The reverse of `momentum_of`. Raises BadData where names or shapes differ."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    for name, array in momentum.items():
        if name not in parameters or parameters[name].shape != array.shape:
            raise BadData(f"{path}: the momentum of '{name}' does not fit")
        buffer = torch.from_numpy(array).to(parameters[name].device)
        like = torch.empty_like(parameters[name]).copy_(buffer)
        optimizer.state[parameters[name]]["momentum_buffer"] = like
