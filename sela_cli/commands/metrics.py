"""`sela metrics`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sela_cli.options import Json

EXAMPLES = """Examples: sela metrics labels.h5 --truth digits.
sela metrics labels-007.h5 --against labels-006.h5. sela metrics labels.h5"""


def metrics(
    labels: Annotated[str, typer.Argument(metavar="LABELS", help="Labels file.")],
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth",
            metavar="SPEC",
            help="True classes: images that have them (as --data), a .npy of one class a row, "
            "or another labels file, whose first head counts.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Labels file of as many heads, such as another round's: each head with its like.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare clusters with true classes, another round, or the heads among themselves.

    NMI, AMI, ARI, one-to-one accuracy and purity. Numbers of clusters and classes may
    differ. Without --truth and --against every pair of heads is compared.
    """
    from sela_cli import formats, metrics
    from sela_cli.terminal import Terminal

    compared = formats.read_labels(labels)
    found: dict[str, Any] = {"labels": labels}
    tables = []
    if truth:
        found |= {"truth": truth, "heads": metrics.compare(compared, truth)}
        tables.append(metrics.table(found["heads"]))
    if against:
        found |= {"against": against, "rounds": metrics.between_files(compared, against)}
        tables.append(metrics.table(found["rounds"]))
    if not tables:
        found |= {"pairs": metrics.between_heads(compared)}
        tables.append(metrics.table(found["pairs"]))
    Terminal(as_json=as_json).result(found, "\n\n".join(tables))
