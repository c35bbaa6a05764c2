"""`sela label`."""

from __future__ import annotations

from typing import Annotated

import typer

from sela_cli.options import (
    Assign,
    Device,
    DryRun,
    Force,
    InputKindChoice,
    Json,
    LabelMethodChoice,
    Lamb,
    Marginal,
    MaxIter,
    MaxMemory,
    Output,
    Quiet,
    Seed,
    SolverChoice,
    Tol,
    device_name,
    given,
    size_in_bytes,
)

EXAMPLES = """Examples: sela label logits.h5 -o labels.h5.
sela label probabilities.npy --input-kind probabilities -o labels.h5 --csv labels.csv"""


def label(
    logits: Annotated[
        str,
        typer.Argument(
            metavar="LOGITS",
            help="N x K scores: a logits file, another HDF5 (FILE::/DATASET), .npy, .npz "
            "(FILE::NAME), safetensors, or '-' for any of them on standard input.",
        ),
    ],
    output: Output,
    csv: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Also write key,label lines.")
    ] = None,
    lamb: Lamb = None,
    tol: Tol = None,
    max_iter: MaxIter = None,
    marginal: Marginal = None,
    assign: Assign = None,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="FILE", help="Labels file whose potentials to start from."),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            "--head",
            min=0,
            help="Label this head alone, from 0; the others keep the labels of --init.",
        ),
    ] = None,
    fixed: Annotated[
        bool,
        typer.Option(
            "--fixed",
            help="Label by the potentials of --init as they are, without solving: for rows that "
            "were not there when they were solved for, scored by the same network.",
        ),
    ] = False,
    min_size: Annotated[
        int | None,
        typer.Option("--min-size", min=0, help="Rows of a cluster at least, instead of equality."),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option("--max-size", min=1, help="Rows of a cluster at most, instead of equality."),
    ] = None,
    method: Annotated[
        LabelMethodChoice | None,
        typer.Option(
            "--method",
            help="sela (default), or kmeans on the scores or on LOGITS::/features, to compare: "
            "DeepCluster's labels, of whatever sizes.",
        ),
    ] = None,
    clusters: Annotated[
        str | None,
        typer.Option(
            "--clusters",
            metavar="SPEC",
            help="Clusters of --method kmeans, such as 128x10; default: a column each.",
        ),
    ] = None,
    solver: Annotated[
        SolverChoice | None,
        typer.Option(
            "--solver",
            help="newton (auto, the default): few reads of the scores. lbfgs: more, of less work. "
            "sinkhorn: the paper's iteration.",
        ),
    ] = None,
    input_kind: Annotated[
        InputKindChoice | None,
        typer.Option(
            "--input-kind",
            help="logits (default) or probabilities, which may be exactly zero.",
        ),
    ] = None,
    max_memory: MaxMemory = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Scores to balanced labels: stage 2 of the loop, and useful alone.

    Every row gets one of K clusters so that all clusters have the same size and the
    scores of the chosen cells are as high as they can be.
    """
    from sela_cli.errors import UsageError
    from sela_cli.labels import LabelSettings, check_outputs, label_stage, plan, summary, warning
    from sela_cli.networks import parse_heads
    from sela_cli.terminal import Terminal

    if fixed and assign:
        raise UsageError("--fixed takes no --assign: it gives each row what it prefers")
    settings = LabelSettings(
        **given(
            lamb=lamb,
            tol=tol,
            max_iter=max_iter,
            marginal=marginal,
            assign="fixed" if fixed else assign,
            method=method,
            clusters=tuple(parse_heads(clusters, "--clusters")) if clusters else None,
            solver=solver,
            min_size=min_size,
            max_size=max_size,
            input_kind=input_kind,
            seed=seed,
            max_memory=size_in_bytes(max_memory),
        )
    )
    terminal = Terminal(quiet, as_json, stdout_taken="-" in (output, csv))
    if head is not None and init is None:
        raise UsageError("--head labels one head; the others need --init FILE")
    if init and head is None and settings.assign == "random":
        raise UsageError("--init is not for --assign random", "drop one of them")
    check_outputs(logits, output, settings, init, csv, force or dry_run)
    if dry_run:
        shown = plan(logits, settings, init, head)
        terminal.result(
            shown, f"would label {shown['rows']} rows, heads {shown['heads']}, to {output}"
        )
        return
    where = device_name(device)
    with terminal.progress("label") as progress:
        labels = label_stage(
            logits,
            output,
            settings,
            init=init,
            head=head,
            csv_path=csv,
            force=force,
            device=where,
            progress=progress,
            say=terminal.say,
        )
    values, text = summary(labels, output)
    terminal.result(values, text)
    if problem := warning(labels, output, head):
        raise problem
