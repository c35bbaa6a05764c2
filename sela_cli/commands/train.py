"""`sela train`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import (
    Arch,
    Aug,
    BatchSize,
    Compile,
    Data,
    Device,
    Download,
    DryRun,
    Epochs,
    Force,
    HeadInit,
    ImageSize,
    Json,
    Limit,
    Lr,
    LrFactor,
    LrMilestones,
    LrSchedule,
    Momentum,
    OptionalSeed,
    Output,
    Precision,
    Quiet,
    SkipBad,
    WeightDecay,
    device_name,
    fractions,
    given,
)

EXAMPLES = """Examples: sela train --data digits --labels labels.h5 --arch alexnet-small
-o first.h5 --epochs 30 --to 2.
sela train --data digits --labels labels.h5 --checkpoint first.h5 -o next.h5 --to 5"""


def train(
    data: Data,
    labels: Annotated[str, typer.Option("--labels", "-l", metavar="FILE", help="Labels to learn.")],
    output: Output,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", "-c", metavar="FILE", help="Go on from here, with its settings."
        ),
    ] = None,
    arch: Arch = None,
    image_size: ImageSize = None,
    to: Annotated[
        float | None,
        typer.Option("--to", min=0, help="Stop at this epoch of the schedule; default: its end."),
    ] = None,
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
    head_init: HeadInit = None,
    seed: OptionalSeed = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    download: Download = False,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Images and labels to a checkpoint: stage 3 of the loop.

    Starts from --checkpoint, whose training settings hold unless given here, or from a
    fresh network of --arch, with the labels' clusters as its heads.
    """
    from sela_cli import outputs
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
        head_init=head_init,
        seed=seed,
    )
    if not dry_run:
        outputs.check_output(output, force, data, labels)
    where = device_name(device, dry_run)
    with terminal.progress("decode", "images") as progress:
        training = prepare(
            "train",
            data,
            labels,
            output,
            options,
            checkpoint=checkpoint,
            arch=arch,
            image_size=image_size,
            to=to,
            limit=limit,
            skip_bad=skip_bad,
            download=download,
            force=force,
            hold=not dry_run,
            progress=progress,
        )
    terminal.train(training, where, dry_run)
