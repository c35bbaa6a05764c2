"""`sela metrics`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import Json

EXAMPLES = "Example: sela metrics labels.h5 --truth digits"


def metrics(
    labels: Annotated[str, typer.Argument(metavar="LABELS", help="Labels file.")],
    truth: Annotated[
        str,
        typer.Option(
            "--truth",
            metavar="SPEC",
            help="True classes: images that have them (as --data), a .npy of one class a row, "
            "or another labels file.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare clusters with true classes: NMI, AMI, ARI, one-to-one accuracy, purity, per head."""
    from sela_cli.metrics import compare, table
    from sela_cli.terminal import Terminal

    heads = compare(labels, truth)
    Terminal(as_json=as_json).result(
        {"labels": labels, "truth": truth, "heads": heads}, table(heads)
    )
