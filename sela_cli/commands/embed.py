"""`sela embed`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sela_cli.options import (
    Arch,
    BatchSize,
    Data,
    Device,
    Download,
    DryRun,
    Dtype,
    Force,
    Heads,
    ImageSize,
    Json,
    Limit,
    OptionalSeed,
    Output,
    Precision,
    Quiet,
    SkipBad,
    Store,
    View,
    Views,
    device_name,
    given,
)

EXAMPLES = """Example: sela embed --data digits --arch alexnet-small --heads 10x5 -o logits.h5"""


def embed(
    data: Data,
    output: Output,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", metavar="FILE", help="Network to use.")
    ] = None,
    arch: Arch = None,
    heads: Heads = None,
    image_size: ImageSize = None,
    store: Store = None,
    dtype: Dtype = None,
    view: View = None,
    views: Views = None,
    precision: Precision = None,
    batch_size: BatchSize = None,
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
    """Images and a network to logits: stage 1 of the loop.

    The network is that of --checkpoint, or a fresh one of --arch and --heads. It is in
    eval mode and sees the plain centre view of each image, or random views on request.
    """
    from functools import partial

    from sela_cli import envelope, formats, outputs
    from sela_cli.errors import UsageError
    from sela_cli.fresh import settle
    from sela_cli.images.batches import open_images
    from sela_cli.logits import began_in, embed_stage, plan
    from sela_cli.networks import build, check_arch, parse_heads
    from sela_cli.precision import decided
    from sela_cli.recipe import Recipe
    from sela_cli.terminal import Terminal
    from sela_cli.training import check_views, label_view, network_of

    if (checkpoint is None) == (arch is None):
        raise UsageError("give either --checkpoint, or --arch and --heads")
    if checkpoint and (heads or image_size):
        raise UsageError("--heads and --image-size are the checkpoint's", "leave them out")
    if arch and not heads:
        raise UsageError("--arch needs --heads, for instance --heads 128x10")
    if arch:
        check_arch(arch)
    seen: dict[str, Any] = {"view": "centre", "views": 1} | given(view=view, views=views)
    check_views(**seen)
    clusters = parse_heads(heads) if heads else []
    terminal = Terminal(quiet, as_json, stdout_taken=output == "-")
    if not dry_run:
        outputs.check_output(output, force, data, checkpoint)
    where = device_name(device, dry_run)
    state = formats.read_checkpoint(checkpoint) if checkpoint else None
    with terminal.progress("decode", "images") as progress:
        images, size = open_images(
            data,
            state.image_size if state else image_size,
            download=download,
            skip_bad=skip_bad,
            limit=limit,
            hold=not dry_run,
            progress=progress,
        )
    recipe = Recipe.of(state.recipe if state else {}, {"seed": seed})
    if state and checkpoint:
        network = network_of(state, checkpoint)
    else:
        network = build(str(arch), size, clusters, recipe.seed)
    options: dict[str, Any] = {"precision": recipe.precision}
    options |= given(store=store, dtype=dtype, precision=precision, batch_size=batch_size)
    shown = plan(images, network, options.get("store", "logits"), options.get("dtype", "float32"))
    shown |= terminal.left_out(images)
    if not dry_run:
        if not state:
            settle(network, images, recipe, where)
        options["precision"] = decided(
            options["precision"],
            partial(began_in, output),
            network,
            min(options.get("batch_size", 256), len(images)),
            where,
            training=False,
        )
        parameters = {"data": data, "arch": arch, "heads": heads, "seed": recipe.seed}
        parameters |= seen | options
        provenance = envelope.Provenance("embed", parameters, dataset_id=images.dataset_id)
        if state:
            assert state.header is not None
            provenance = provenance.reading("checkpoint", state.header)
        with terminal.progress("embed", "images") as progress:
            embed_stage(
                images,
                network,
                output,
                provenance,
                device=where,
                augment=label_view(seen["view"], recipe, state.step if state else 0),
                views=seen["views"],
                force=force,
                progress=progress,
                **options,
            )
    verb = "would write" if dry_run else "wrote"
    size_text = f"{shown['images']} images, heads {shown['heads']}, {shown['megabytes']:.1f} MB"
    terminal.result({"output": output, **shown}, f"{verb} {output}: {size_text}")
