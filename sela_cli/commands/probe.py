"""`sela probe`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sela_cli.options import (
    Data,
    Device,
    Download,
    DryRun,
    Force,
    Json,
    Limit,
    MethodChoice,
    Output,
    Precision,
    Quiet,
    Seed,
    SkipBad,
    device_name,
)

EXAMPLES = "Example: sela probe --data digits --checkpoint checkpoint.h5 -o probe.h5 --method knn"


def probe(
    data: Data,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", metavar="FILE", help="Network to measure.")
    ],
    output: Output,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="SPEC", help="Test images; default: --holdout of --data."),
    ] = None,
    holdout: Annotated[
        float,
        typer.Option(
            "--holdout", min=0.01, max=0.99, help="Share of --data to test on, without --test."
        ),
    ] = 0.2,
    method: Annotated[
        MethodChoice, typer.Option("--method", help="Which probes.")
    ] = MethodChoice.both,
    layers: Annotated[
        str, typer.Option("--layers", help="all, or names such as conv3,conv5 (linear probes).")
    ] = "all",
    k: Annotated[str, typer.Option("--k", metavar="K,K..", help="Neighbours.")] = "10",
    sigma: Annotated[
        str, typer.Option("--sigma", metavar="S,S..", help="kNN temperature.")
    ] = "0.1",
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Epochs of the linear probes.")
    ] = 36,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the linear probes.")] = 0.01,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Images a batch.")] = 192,
    aug: Annotated[
        str, typer.Option("--aug", help="Augmentation for the linear probes.")
    ] = "crop-flip",
    precision: Precision = None,
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
    """Measure features by true classes: weighted kNN, and a linear classifier on each layer.

    Needs images whose classes are known. Nothing is chosen on the test images.
    """
    from sela_cli import formats, probes
    from sela_cli.images.batches import open_images
    from sela_cli.options import numbers, whole_numbers
    from sela_cli.terminal import Terminal
    from sela_cli.training import network_of

    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    if not dry_run:
        formats.check_output(output, force)
    state = formats.read_checkpoint(checkpoint)
    network = network_of(state, checkpoint)
    opening: dict[str, Any] = {"download": download, "skip_bad": skip_bad, "limit": limit}
    with terminal.progress("decode", "images") as progress:
        train, _ = open_images(data, state.image_size, progress=progress, **opening)
        if test:
            tested, _ = open_images(test, state.image_size, progress=progress, **opening)
            split = "test"
        else:
            train, tested = probes.holdout(train, holdout, seed)
            split = f"holdout {holdout:g}"
    if dry_run:
        plan = {"train": len(train), "test": len(tested), "layers": list(network.layers())}
        terminal.result(plan, f"would probe with {len(train)} images, test on {len(tested)}")
        return
    parameters = {
        "data": data,
        "test": test,
        "holdout": holdout,
        "method": method.value,
        "layers": layers,
        "k": k,
        "sigma": sigma,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "aug": aug,
        "seed": seed,
    }
    provenance = formats.Provenance("probe", parameters, dataset_id=train.dataset_id)
    assert state.header is not None
    with terminal.progress("probe") as progress:
        rows = probes.probe_stage(
            train,
            tested,
            network,
            output,
            provenance.reading("checkpoint", state.header),
            method=method.value,
            layers=layers,
            ks=whole_numbers(k),
            sigmas=numbers(sigma),
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            aug=aug,
            seed=seed,
            device=device_name(device),
            precision=precision.value if precision else state.recipe.get("precision", "float32"),
            split=split,
            force=force,
            progress=progress,
        )
    lines = [
        f"{row['layer']:<10} {row['method']:<7} {row['setting']:<18} top1 {row['top1']:.4f} "
        f"top5 {row['top5']:.4f} (n = {row['n']})"
        for row in rows
    ]
    terminal.result({"output": output, "results": rows}, "\n".join(lines))
