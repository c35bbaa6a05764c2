"""`sela import`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import Force, Json, Output, Quiet, Seed

NAME = "import"
EXAMPLES = "Example: sela import resnet50.pth --arch resnet50 --heads 3000x10 -o checkpoint.h5"


def import_weights(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS",
            help="A .safetensors or .pth with the names of torchvision's ResNets or of the SeLa "
            "reference. No code in a .pth is run.",
        ),
    ],
    arch: Annotated[
        str,
        typer.Option(
            "--arch", help="alexnet, alexnet-small, resnet18, resnet34, resnet50 or resnet50-v2."
        ),
    ],
    heads: Annotated[
        str, typer.Option("--heads", help="Clusters of each fresh head: 128x10 or 128,256.")
    ],
    output: Output,
    image_size: Annotated[
        int, typer.Option("--image-size", min=16, help="Side of the network's input.")
    ] = 224,
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Weights from elsewhere as a checkpoint: a backbone to start from, with fresh heads."""
    from sela_cli.envelope import Provenance
    from sela_cli.import_weights import import_stage
    from sela_cli.networks import build, parse_heads
    from sela_cli.terminal import Terminal

    network = build(arch, image_size, parse_heads(heads), seed)
    parameters = {"arch": arch, "heads": heads, "image_size": image_size, "seed": seed}
    result = import_stage(weights, network, output, Provenance("import", parameters), force)
    Terminal(quiet, as_json, stdout_taken=output == "-").result(
        result,
        f"wrote {output}: {result['tensors']} tensors of {arch}, {len(result['unused'])} unused",
    )
