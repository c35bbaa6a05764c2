"""`sela retrain`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import (
    Aug,
    BatchSize,
    Compile,
    Data,
    Device,
    Download,
    DryRun,
    Epochs,
    Force,
    ImageSize,
    Json,
    Limit,
    Lr,
    LrFactor,
    LrMilestones,
    LrSchedule,
    Momentum,
    Output,
    Precision,
    Quiet,
    Seed,
    SkipBad,
    WeightDecay,
    device_name,
    fractions,
    given,
)

EXAMPLES = """Example: sela retrain --data digits --labels labels.h5 --arch alexnet-small
-o fresh.h5 --epochs 10"""


def retrain(
    data: Data,
    labels: Annotated[str, typer.Option("--labels", "-l", metavar="FILE", help="Labels to learn.")],
    arch: Annotated[
        str,
        typer.Option(
            "--arch", help="alexnet, alexnet-small, resnet18, resnet34, resnet50 or resnet50-v2."
        ),
    ],
    output: Output,
    rotation: Annotated[
        bool, typer.Option("--rotation", help="Add RotNet's task: a 4-way head on turned copies.")
    ] = False,
    image_size: ImageSize = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    lr_schedule: LrSchedule = None,
    lr_milestones: LrMilestones = None,
    lr_factor: LrFactor = None,
    momentum: Momentum = None,
    weight_decay: WeightDecay = None,
    aug: Aug = None,
    precision: Precision = None,
    compile: Compile = None,
    seed: Seed = 0,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    download: Download = False,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """A fresh network on fixed labels, of this or of another network: 90 epochs.

    Defaults are the paper's (Table 5). The labels stay as they are.
    """
    from sela_cli import outputs, presets
    from sela_cli.terminal import Terminal
    from sela_cli.training import prepare

    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    options = given(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        lr_schedule=lr_schedule,
        lr_milestones=fractions(lr_milestones),
        lr_factor=lr_factor,
        momentum=momentum,
        weight_decay=weight_decay,
        aug=aug,
        precision=precision,
        compile=compile,
        seed=seed,
        rotation=rotation,
    )
    if not dry_run:
        outputs.check_output(output, force, data, labels)
    where = device_name(device, dry_run)
    with terminal.progress("decode", "images") as progress:
        training = prepare(
            "retrain",
            data,
            labels,
            output,
            options,
            defaults=presets.retraining(rotation),
            arch=arch,
            image_size=image_size,
            limit=limit,
            skip_bad=skip_bad,
            download=download,
            force=force,
            hold=not dry_run,
            progress=progress,
        )
    terminal.train(training, where, dry_run)
