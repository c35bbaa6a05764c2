"""`sela report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sela_cli.options import Force, Json, Output, Quiet

EXAMPLES = "Example: sela report runs/demo -o report.html --png figures/"


def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `sela run` finished.")],
    output: Output,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Also write the figures, as PNG for papers."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SPEC", help="Images of the run, if they are no longer where it was."
        ),
    ] = None,
    clusters: Annotated[
        int,
        typer.Option("--clusters", min=1, help="Clusters of each head shown, evenly spread."),
    ] = 100,
    images: Annotated[
        int, typer.Option("--images", min=1, help="Images of each cluster shown, evenly spread.")
    ] = 12,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """A run as one page: curves, residuals, sizes, NMI, probes, filters, images by cluster.

    The page holds all that it shows and opens without a server or a network. Needs the
    extra `report`.
    """
    from sela_cli import extras
    from sela_cli.terminal import Terminal

    extras.require("report")
    from sela_cli.report.page import report_stage

    shown = report_stage(
        run,
        output,
        png=png,
        data=data,
        clusters=clusters,
        images=images,
        force=force,
    )
    lines = [
        f"{output}: {sum(shown['clusters'])} clusters, {shown['thumbnails']} of "
        f"{shown['images']} images, {shown['megabytes']:.1f} MB"
    ]
    Terminal(quiet, as_json, stdout_taken=output == "-").result(
        shown, "\n".join(lines + shown["figures"])
    )
