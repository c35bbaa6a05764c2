"""`sela export-labels`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.errors import UsageError
from sela_cli.options import Force, Json, Quiet

EXAMPLES = """Examples: sela export-labels labels.h5 -o labels.parquet.
sela export-labels labels.h5 --links clusters/ --data photos/"""


def export_labels(
    labels: Annotated[str, typer.Argument(metavar="LABELS", help="Labels file, or '-'.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="A .csv, .parquet or .npy to write."),
    ] = None,
    links: Annotated[
        str | None,
        typer.Option(
            "--links",
            metavar="DIR",
            help="New folder with a folder of links for each cluster. Needs --data.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="Folder of the labelled images.")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Labels for other programs: a table, an array, or folders to look at.

    A table has a row an image: its key, and the label of each head. An array has the labels
    alone, in the file's order. Parquet needs the extra `parquet`.
    """
    from sela_cli import extras, formats, outputs
    from sela_cli.terminal import Terminal

    if not output and not links:
        raise UsageError("give -o FILE or --links DIR")
    if (links is None) != (data is None):
        raise UsageError("--links and --data go together")
    if output:
        outputs.check_output(output, force, labels)
    if output and output.endswith(".parquet"):
        extras.require("parquet")
    from sela_cli import export_tables

    read = formats.read_labels(labels)
    shown = {"output": output, "links": links, "rows": len(read.keys), "heads": read.clusters}
    lines = []
    # What may be refused comes first.
    if links and data:
        count = export_tables.write_links(read, data, links)
        lines.append(f"wrote {links}: {count} links")
    if output:
        export_tables.write_labels_as(read, output, force)
        lines.append(f"wrote {output}: {len(read.keys)} rows, heads {read.clusters}")
    Terminal(quiet, as_json).result(shown, "\n".join(lines))
