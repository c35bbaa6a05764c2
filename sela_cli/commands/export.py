"""`sela export`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import Force, Json

EXAMPLES = "Example: sela export checkpoint.h5 -o backbone.safetensors"


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Network to take the backbone of.")
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="NAME.safetensors (a state dict; a ResNet's for more than 64 pixels loads in "
            "torchvision) or NAME.onnx (needs the extra onnx).",
        ),
    ],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The backbone for other programs: everything up to the features, without the heads.

    Its input is RGB in 0..1, less the mean and over the standard deviation that the file
    names.
    """
    from sela_cli import formats, outputs
    from sela_cli.export_weights import export_stage
    from sela_cli.terminal import Terminal
    from sela_cli.training import network_of

    outputs.check_output(output, force, checkpoint)
    state = formats.read_checkpoint(checkpoint)
    facts = export_stage(network_of(state, checkpoint), state, output, force)
    Terminal(as_json=as_json).result(
        {"output": output} | facts,
        f"wrote {output}: {facts['arch']}, {facts['features']} features of images of "
        f"{facts['image-size']} pixels",
    )
