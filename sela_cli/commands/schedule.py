"""`sela schedule`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from sela_cli.options import Json, RelabelChoice

EXAMPLES = "Example: sela schedule --epochs 160 --opts 80"


def schedule(
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Length of training.")],
    opts: Annotated[
        int,
        typer.Option(
            "--opts",
            min=0,
            help="How often to relabel, as the paper counts: the last of several lies beyond the "
            "end.",
        ),
    ],
    relabel: Annotated[
        RelabelChoice, typer.Option("--relabel", help="Spacing of the positions.")
    ] = "quadratic",
    as_json: Json = False,
) -> None:
    """Print the positions, in epochs, at which to relabel: one a line, for shell loops."""
    from sela_cli.errors import UsageError
    from sela_cli.schedule import relabel_positions
    from sela_cli.terminal import Terminal

    if not math.isfinite(epochs):
        raise UsageError(f"--epochs {epochs} must be finite")
    positions = relabel_positions(epochs, opts, relabel)
    text = "\n".join(repr(position) for position in positions)
    Terminal(as_json=as_json).result({"positions": positions}, text)
