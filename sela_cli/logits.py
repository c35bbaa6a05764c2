"""Stage 1: images + network -> logits. Eval mode, the plain centre view, in order.

N images, n of a batch, K clusters, T heads, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sela_cli import envelope, formats, interrupt, job, outputs, parallel, passes
from sela_cli.devices import Graphed, has_graphs
from sela_cli.envelope import Provenance
from sela_cli.errors import StoppedEarly
from sela_cli.folding import folded
from sela_cli.images.augment import DrawOf, drawn_view
from sela_cli.images.batches import Images
from sela_cli.networks import Network
from sela_cli.precision import autocast
from sela_cli.progress import Progress, silent


def embed_stage(
    images: Images,
    network: Network,
    output: str,
    provenance: Provenance,
    *,
    store: str = "logits",
    dtype: str = "float32",
    batch_size: int = 256,
    device: str = "cpu",
    precision: str = "float32",
    augment: DrawOf | None = None,
    views: int = 1,
    force: bool = False,
    progress: Progress = silent,
) -> None:
    """Write the logits of every image, or its features and the heads; see docs/schema.md.

    `augment` draws the views of a batch, several `views` of each image perhaps, of which the
    mean is written; the default is the plain centre view. The first process of a job writes.
    A signal leaves the rows that are done beside `output` and raises StoppedEarly; the same
    call then goes on from there.
    """
    outputs.check_output(output, force)
    job.meet()
    # As many views at a time as there would be images.
    batch_size = max(1, batch_size // views)
    heads: list[tuple[np.ndarray, np.ndarray]] = []
    if store == "logits":
        columns = {f"logits/{t}": clusters for t, clusters in enumerate(network.clusters)}
    else:
        columns = {"features": network.width}
        heads = network.head_arrays()
    same: list[Any] = [provenance.parameters, [entry["digest"] for entry in provenance.inputs]]
    same += [provenance.dataset_id, columns, dtype, batch_size, views, device.split(":")[0]]
    part = envelope.Part(f"{precision} {_identity(network, same)}")
    file = formats.create_logits(
        output,
        images.keys,
        images.index_N,
        provenance,
        columns=columns,
        dtype=dtype,
        heads=heads,
        force=force,
        part=part,
    )
    # Of the first process; empty in the others.
    datasets: dict[str, Any] = {}
    with _leaving_together(), ExitStack() as stack:
        job.once(lambda: datasets.update(stack.enter_context(file)))
        begun = torch.tensor([part.done // batch_size], dtype=torch.float32)
        skip = int(job.from_process(0, begun, (1,)))
        done = skip * batch_size
        for blocks in forward(
            network,
            images,
            batch_size,
            device=device,
            precision=precision,
            augment=augment,
            skip=skip,
            views=views,
            features=store == "features",
        ):
            if dtype == "float16":
                if store == "logits":
                    # Half precision is fine near zero: large ones would lose their differences.
                    blocks = [tensor - tensor.amax(1, keepdim=True) for tensor in blocks]
                # HDF5 itself takes ten times as long.
                blocks = [tensor.half() for tensor in blocks]
            job.once(partial(_write, datasets, done, blocks))
            part.done = done = done + len(blocks[0])
            progress(done, len(images), "")
            if parallel.any_of(interrupt.requested()) and done < len(images):
                raise StoppedEarly(f"{output}: stopped after {done} images", "run it again")
        job.once(stack.close)


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Where one process of a job ends the others are ended too: not while one saves its rows."""
    try:
        yield
    except StoppedEarly:
        job.meet()
        raise


def _write(datasets: dict[str, Any], start: int, blocks: list[Tensor]) -> None:
    for item, tensor in zip(datasets.values(), blocks, strict=True):
        item[start : start + len(tensor)] = tensor.numpy()


def began_in(output: str) -> str | None:
    """The precision of the unfinished logits at `output`; None where there are none."""
    left = envelope.part_at(output)
    return left.identity.split()[0] if left else None


def _identity(network: Network, settings: list[Any]) -> str:
    """Hash of all else that the logits depend on."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, array in network.arrays().items():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def plan(images: Images, network: Network, store: str, dtype: str) -> dict[str, Any]:
    """What a dry run shows: shapes and bytes on disk."""
    if store == "logits":
        columns, fixed = sum(network.clusters), 0
    else:
        columns = network.width
        fixed = 4 * sum(network.clusters) * (columns + 1)
    values = len(images) * columns
    return {
        "images": len(images),
        "dataset_id": images.dataset_id,
        "arch": network.arch,
        "image_size": network.image_size,
        "heads": network.clusters,
        "store": store,
        "dtype": dtype,
        "megabytes": (values * (2 if dtype == "float16" else 4) + fixed) / 1e6,
    }


def forward(
    network: Network,
    images: Images,
    batch_size: int,
    device: str = "cpu",
    precision: str = "float32",
    augment: DrawOf | None = None,
    skip: int = 0,
    views: int = 1,
    *,
    features: bool,
) -> Iterator[list[Tensor]]:
    """The features of a network, or the logits of each head, batch by batch, as float32 on the
    CPU. The first `skip` batches are left out; of several `views` of each image, which
    `augment` draws, the mean is taken.
    """
    trunk = folded(network.eval().to(device).trunk, precision)
    columns = [network.width] if features else network.clusters

    def compute(view: Tensor) -> Tensor:
        with autocast(device, precision):
            features_nD = trunk(view)
        if features:
            return features_nD
        # Not in bfloat16, which rounds logits of 10 by 0.03: lambda makes that e^0.8.
        return network.logits(features_nD.float())

    step: Callable[[Tensor], Tensor] = compute
    view_of: passes.ViewOf = drawn_view
    if augment and views > 1:
        step = passes.mean_over(compute, views)
        augment, view_of = passes.repeated(augment, views)
    step = Graphed(step) if has_graphs(device) else step
    return passes.in_order(
        images,
        network.image_size,
        step,
        columns,
        batch_size,
        device=device,
        augment=augment,
        view_of=view_of,
        skip=skip,
    )
