"""`sela finetune`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import (
    Device,
    Download,
    DryRun,
    Force,
    Json,
    Limit,
    Output,
    PartChoice,
    Quiet,
    Seed,
    TaskChoice,
    device_name,
    given,
)

EXAMPLES = """Example: sela finetune --data voc2007:ROOT --task detection -c checkpoint.h5
-o detection.h5"""


def finetune(
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="SPEC", help="voc2007:ROOT[@SPLIT]; trains on trainval by default."
        ),
    ],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", metavar="FILE", help="Network to start from.")
    ],
    output: Output,
    task: Annotated[TaskChoice, typer.Option("--task", help="What to learn.")],
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="SPEC", help="Test images; default: the test split."),
    ] = None,
    train: Annotated[
        PartChoice,
        typer.Option("--train", help="The fully connected layers only, or the whole network."),
    ] = "all",
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="Batches; default 20000.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Images a batch; default 16, for detection 4."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Learning rate; default 0.003, for detection 0.005."),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", min=0, help="SGD weight decay.")
    ] = 1e-4,
    min_size: Annotated[
        int | None,
        typer.Option("--min-size", min=32, help="Shorter side of images for detection; 600."),
    ] = None,
    seed: Seed = 0,
    limit: Limit = None,
    download: Download = False,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """PASCAL VOC 2007: average precision after fine-tuning, for classification or detection.

    Detection (torchvision's Faster R-CNN) needs the extra voc.
    """
    from dataclasses import asdict

    from sela_cli import envelope, formats, outputs, voc
    from sela_cli.errors import UsageError
    from sela_cli.finetune import FinetuneRecipe, finetune_stage
    from sela_cli.keys import dataset_id
    from sela_cli.terminal import Terminal
    from sela_cli.training import network_of

    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    if not dry_run:
        outputs.check_output(output, force, checkpoint)
    if min_size is not None and task != "detection":
        raise UsageError("--min-size is for --task detection", "leave it out")
    recipe = FinetuneRecipe(
        task=task,
        part=train,
        iterations=iterations,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        **given(min_size=min_size),
    )
    recipe.check()
    state = formats.read_checkpoint(checkpoint)
    learned = voc.open_voc(data, download, limit)
    # Keys begin with the split; without one in `data`, an @ there is the folder's.
    split = learned[0].keys[0].partition("/")[0]
    tested = voc.open_voc(test or f"{data.removesuffix('@' + split)}@test", download, limit)
    terminal.warn_if_same(learned[0], tested[0])
    steps, batch, rate = recipe.resolved()
    resolved = asdict(recipe) | {"iterations": steps, "batch_size": batch, "lr": rate}
    counts = {"train": len(learned[0]), "test": len(tested[0])}
    if dry_run:
        terminal.result(
            counts | {"arch": state.arch} | resolved,
            f"would fine-tune {state.arch} on {counts['train']} images for {steps} batches of "
            f"{batch}, test on {counts['test']}",
        )
        return
    assert state.header is not None
    parameters = {"data": data, "test": test, "limit": limit} | resolved
    provenance = envelope.Provenance("finetune", parameters, dataset_id=dataset_id(learned[0].keys))
    with terminal.progress("finetune", "images") as progress:
        rows = finetune_stage(
            learned,
            tested,
            network_of(state, checkpoint),
            output,
            recipe,
            provenance.reading("checkpoint", state.header),
            device=device_name(device),
            force=force,
            progress=progress,
        )
    means = voc.mean_precision(rows)
    lines = [
        f"{row['class']:<12} AP {row['ap']:.4f}  11-point {row['ap11']:.4f} "
        f"({row['positives']} positives)"
        for row in rows
    ]
    lines.append(f"{'mean':<12} AP {means['map']:.4f}  11-point {means['map11']:.4f}")
    terminal.result({"output": output, **counts, **means, "results": rows}, "\n".join(lines))
