"""`sela run`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sela_cli.options import (
    Arch,
    Assign,
    Aug,
    BatchSize,
    Compile,
    Data,
    Device,
    Download,
    DryRun,
    Dtype,
    Epochs,
    Force,
    HeadInit,
    Heads,
    ImageSize,
    Json,
    Lamb,
    Limit,
    Lr,
    LrFactor,
    LrMilestones,
    LrSchedule,
    Marginal,
    MaxIter,
    MaxMemory,
    Momentum,
    PresetChoice,
    Quiet,
    RelabelChoice,
    RelabelHeadsChoice,
    RunPrecision,
    Seed,
    SkipBad,
    Store,
    Tol,
    View,
    Views,
    WeightDecay,
    device_name,
    fractions,
    given,
    size_in_bytes,
)

EXAMPLES = """Examples: sela run --data digits --out runs/demo.
sela run --data photos/ --out runs/photos --arch resnet18 --heads 128x10 --epochs 100 --opts 50"""


def run(
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the run, new or a run's; other files in it are left alone.",
        ),
    ],
    preset: Annotated[
        PresetChoice | None,
        typer.Option(
            "--preset",
            help="Named settings in place of the defaults; 'digits' is implied by --data digits.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Go on with an unfinished run of these settings."
        ),
    ] = True,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="FILE",
            help="Network to begin with in place of a fresh one, as `sela import` writes it; its "
            "heads stay, or with --head-init kmeans begin anew.",
        ),
    ] = None,
    arch: Arch = None,
    heads: Heads = None,
    image_size: ImageSize = None,
    opts: Annotated[
        int | None,
        typer.Option(
            "--opts",
            min=0,
            help="How often to relabel, as the paper counts: the last of several lies beyond the "
            "end; default 80.",
        ),
    ] = None,
    relabel: Annotated[
        RelabelChoice | None,
        typer.Option(
            "--relabel", help="Spacing of the relabelling positions: quadratic (default) or linear."
        ),
    ] = None,
    relabel_heads: Annotated[
        RelabelHeadsChoice | None,
        typer.Option(
            "--relabel-heads",
            help="Heads that a relabelling labels: all (default), or one in turn (cycle).",
        ),
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
    precision: RunPrecision = None,
    compile: Compile = None,
    head_init: HeadInit = None,
    lamb: Lamb = None,
    tol: Tol = None,
    max_iter: MaxIter = None,
    marginal: Marginal = None,
    assign: Assign = None,
    max_memory: MaxMemory = None,
    store: Store = None,
    dtype: Dtype = None,
    view: View = None,
    views: Views = None,
    seed: Seed = 0,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    download: Download = False,
    device: Device = "auto",
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also write event files to DIR/tensorboard. Needs the extra `tensorboard`.",
        ),
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole loop: label, train, label, ... and the result in one folder.

    Writes labels.h5, checkpoint.h5, rounds.csv and, where classes are known, probe.h5.
    The same command goes on with a run that was stopped.
    """
    from sela_cli import extras, formats, job
    from sela_cli.events import Events
    from sela_cli.images.batches import open_images
    from sela_cli.loop import Watcher, run, text_of
    from sela_cli.run_settings import check_heads, plan, settings_of
    from sela_cli.terminal import Terminal

    terminal = Terminal(quiet, as_json)
    if tensorboard:
        extras.require("tensorboard")
    options = given(
        arch=arch,
        heads=heads,
        opts=opts,
        relabel=relabel,
        relabel_heads=relabel_heads,
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
        lamb=lamb,
        tol=tol,
        max_iter=max_iter,
        marginal=marginal,
        assign=assign,
        max_memory=size_in_bytes(max_memory),
        store=store,
        dtype=dtype,
        view=view,
        views=views,
        seed=seed,
    )
    start = formats.read_checkpoint(checkpoint) if checkpoint else None
    name = preset or ("digits" if data == "digits" else None)
    settings = settings_of(name, image_size, options, start)
    where = device_name(device, dry_run)
    with terminal.progress("decode", "images") as progress:
        images, size = open_images(
            data,
            settings.image_size or None,
            download=download,
            skip_bad=skip_bad,
            limit=limit,
            hold=not dry_run,
            progress=progress,
        )
    left_out = terminal.left_out(images)
    settings = replace(settings, image_size=size)
    if dry_run:
        shown, text = plan(images, settings)
        terminal.result(shown | left_out, text)
        check_heads(images, settings)
        return
    watcher = Watcher(lambda title: terminal.progress(title, "images"), terminal.say)
    with closing(Events(out / "tensorboard")) as events:
        if tensorboard and job.number() == 0:
            watcher = replace(watcher, record=events.record)
        summary = run(
            images, out, settings, watcher, device=where, force=force, resume=resume, start=start
        )
    terminal.result(summary | left_out, text_of(summary))
