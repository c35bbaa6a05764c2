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
    ProtocolChoice,
    Quiet,
    Seed,
    SkipBad,
    WeightDecay,
    device_name,
    fractions,
    given,
    numbers,
    whole_numbers,
)

EXAMPLES = """Examples: sela probe --data digits -c checkpoint.h5 -o probe.h5 --method knn.
sela probe --protocol imagenet-linear --data imagenet:ROOT --test imagenet:ROOT@val
-c checkpoint.h5 -o probe.h5"""
_HOLDOUT = 0.2


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
        float | None,
        typer.Option(
            "--holdout",
            min=0.01,
            max=0.99,
            help="Share of --data to test on, without --test; default 0.2.",
        ),
    ] = None,
    protocol: Annotated[
        ProtocolChoice | None,
        typer.Option(
            "--protocol",
            help="The paper's settings: imagenet-linear and places-linear (conv1..conv5 of an "
            "AlexNet, the pooled features of a ResNet), small-linear (CIFAR, SVHN), knn "
            "(sweep of k and sigma). Options given here override it.",
        ),
    ] = None,
    method: Annotated[
        MethodChoice | None, typer.Option("--method", help="Which probes; default both.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="all (default), or names such as conv3,conv5; features: what the heads see "
            "(linear probes).",
        ),
    ] = None,
    k: Annotated[
        str | None, typer.Option("--k", metavar="K,K..", help="Neighbours; default 10.")
    ] = None,
    sigma: Annotated[
        str | None, typer.Option("--sigma", metavar="S,S..", help="kNN temperature; default 0.1.")
    ] = None,
    pca: Annotated[
        int | None,
        typer.Option("--pca", min=1, help="Run kNN also on so many principal components."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=1, help="Epochs of the linear probes; default 36.")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            "--lr",
            metavar="F,F..",
            help="Learning rates of the linear probes, trained side by side; default 0.01. Of "
            "several, the best on the held-out --validation is reported.",
        ),
    ] = None,
    lr_milestones: Annotated[
        str | None,
        typer.Option(
            "--lr-milestones",
            metavar="F,F..",
            help="Fractions of the epochs at which the rate falls tenfold; default 10/36, 20/36 "
            "and 30/36, as decimals.",
        ),
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            min=0.01,
            max=0.99,
            help="Share of the training images that chooses among several rates; default 0.1.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Images a batch; default 192.")
    ] = None,
    weight_decay: WeightDecay = None,
    aug: Annotated[
        str | None,
        typer.Option("--aug", help="Augmentation for the linear probes; default crop-flip."),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option("--crops", help="Test views of linear probes: 1 (default) or 10."),
    ] = None,
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
    from functools import partial

    from sela_cli import envelope, formats, job, outputs, presets, probes
    from sela_cli.errors import UsageError
    from sela_cli.images.batches import open_images
    from sela_cli.precision import decided
    from sela_cli.terminal import Terminal
    from sela_cli.training import network_of
    from sela_cli.unfinished import began_in

    if test and holdout:
        raise UsageError("--holdout is for images without --test", "drop one of them")
    share = holdout or _HOLDOUT
    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    if not dry_run:
        outputs.check_output(output, force, data, test, checkpoint)
    where = device_name(device, dry_run)
    state = formats.read_checkpoint(checkpoint)
    asked = given(
        method=method,
        layers=layers,
        k=tuple(whole_numbers(k, "--k")) if k else None,
        sigma=tuple(numbers(sigma, "--sigma")) if sigma else None,
        pca=pca,
        epochs=epochs,
        lr=tuple(numbers(lr, "--lr")) if lr else None,
        lr_milestones=fractions(lr_milestones),
        validation=validation,
        batch_size=batch_size,
        weight_decay=weight_decay,
        aug=aug,
        crops=crops,
    )
    options: dict[str, Any] = {"method": "both", "layers": "all"}
    options |= presets.protocol(protocol, state.arch) | asked
    linear, knn = probes.recipes(options | {"seed": seed})
    probes.check_asked(asked, options["method"], linear)
    linear.check()
    knn.check()
    network = network_of(state, checkpoint)
    probes.chosen_layers(network, options["layers"])
    opening: dict[str, Any] = {"download": download, "skip_bad": skip_bad, "limit": limit}
    opening["hold"] = not dry_run
    with terminal.progress("decode", "images") as progress:
        train, _ = open_images(data, state.image_size, progress=progress, **opening)
        if test:
            tested, _ = open_images(test, state.image_size, progress=progress, **opening)
            left_out = terminal.left_out(train, tested)
            terminal.warn_if_same(*(i.source.part(i.index_N) for i in (train, tested)))
            split = "test"
        else:
            left_out = terminal.left_out(train)
            train, tested = probes.holdout(train, share, seed)
            split = f"holdout {share:g}"
    fitting = probes.possible(knn, train, network, asked)
    if dry_run:
        plan = probes.plan(
            train, tested, network, options["method"], options["layers"], linear, knn
        )
        terminal.result(
            plan | left_out, f"would probe with {len(train)} images, test on {len(tested)}"
        )
        return
    assert state.header is not None
    views = linear.batch_size
    if options["method"] != "knn":
        # Linear probes share their batches; kNN deals whole ones out.
        views = job.largest_share(views)
    arithmetic = decided(
        precision or state.recipe.get("precision", "float32"),
        partial(began_in, output),
        network,
        views,
        where,
        training=False,
    )
    parameters = {"data": data, "test": test, "holdout": None if test else share, "seed": seed}
    parameters |= {"limit": limit, "precision": arithmetic}
    parameters |= probes.settings(network, options["method"], options["layers"], linear, fitting)
    provenance = envelope.Provenance("probe", parameters, dataset_id=train.dataset_id)
    with terminal.progress("probe", "images") as progress:
        rows = probes.probe_stage(
            train,
            tested,
            network,
            output,
            provenance.reading("checkpoint", state.header),
            method=options["method"],
            layers=options["layers"],
            linear=linear,
            knn=fitting,
            device=where,
            precision=arithmetic,
            split=split,
            force=force,
            progress=progress,
        )
    lines = [
        f"{row['layer']:<10} {row['method']:<7} {_setting(row):<26} top1 {row['top1']:.4f} "
        f"top5 {row['top5']:.4f} ({row['split']}, n = {row['n']})"
        for row in rows
    ]
    terminal.result({"output": output, **left_out, "results": rows}, "\n".join(lines))


def _setting(row: dict[str, Any]) -> str:
    return f"{row['setting']} lr={row['lr']:g}" if row["method"] == "linear" else row["setting"]
