"""`sela export-logits`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import Force, Json, Output, Quiet

EXAMPLES = "Example: sela export-logits logits.h5 -o logits.npy --head 1"


def export_logits(
    logits: Annotated[str, typer.Argument(metavar="LOGITS", help="Logits file.")],
    output: Output,
    head: Annotated[
        int | None, typer.Option("--head", min=0, help="Head whose logits to write; default 0.")
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Write the features instead, if they were stored.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Logits or features for other programs: a .npy with a row an image."""
    from sela_cli.errors import UsageError
    from sela_cli.export_tables import write_logits_as_npy
    from sela_cli.terminal import Terminal

    if features and head is not None:
        raise UsageError("--features are the same for every head", "leave --head out")
    shape = write_logits_as_npy(logits, output, head or 0, features, force)
    Terminal(quiet, as_json, stdout_taken=output == "-").result(
        {"output": output, "shape": shape}, f"wrote {output}: {shape[0]} x {shape[1]}"
    )
