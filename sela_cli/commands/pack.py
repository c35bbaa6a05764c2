"""`sela pack`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import (
    Download,
    DryRun,
    Force,
    Json,
    Limit,
    Output,
    Quiet,
    SkipBad,
)

EXAMPLES = "Example: sela pack photos/ -o photos.h5 --size 256"


def pack(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Images, in any of the forms of --data.")
    ],
    output: Output,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=1,
            help="Side in pixels; default: 32 for small images, else 256, of which a network "
            "sees 224.",
        ),
    ] = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    download: Download = False,
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decode and resize a collection once, into one HDF5 file of images.

    At the size that a network reads, its rows are read as they lie there. --data takes the
    file wherever it takes the collection: images keep their keys, their order and their classes.
    """
    from sela_cli import envelope, outputs
    from sela_cli.images.batches import open_images
    from sela_cli.images.pack import pack_stage, plan
    from sela_cli.terminal import Terminal

    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    if not dry_run:
        outputs.check_output(output, force, data)
    with terminal.progress("decode", "images") as progress:
        images, _ = open_images(
            data,
            None,
            download=download,
            skip_bad=skip_bad,
            limit=limit,
            side=size,
            hold=False,
            progress=progress,
        )
    shown = plan(images) | terminal.left_out(images)
    if not dry_run:
        provenance = envelope.Provenance("pack", {"data": data, "size": images.side})
        with terminal.progress("pack", "images") as progress:
            pack_stage(images, output, provenance, force=force, progress=progress)
    verb = "would write" if dry_run else "wrote"
    side = f"{images.side} x {images.side} pixels"
    terminal.result(
        {"output": output, **shown},
        f"{verb} {output}: {shown['images']} images of {side}, {shown['megabytes']:.1f} MB",
    )
