"""Stage 1: images + network -> logits. Eval mode, the plain centre view, in order.

N images, n of a batch, K clusters, T heads, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sela_cli import formats, interrupt
from sela_cli.errors import StoppedEarly
from sela_cli.formats import Provenance
from sela_cli.images.augment import ViewOf, centre_view
from sela_cli.images.batches import Images
from sela_cli.networks import Network


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
    augment: ViewOf | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> None:
    """Write the logits of every image, or its features and the heads; see docs/schema.md.

    `augment` makes the view of a batch; the default is the plain centre view.
    """
    heads: list[tuple[np.ndarray, np.ndarray]] = []
    if store == "logits":
        columns = {f"logits/{t}": clusters for t, clusters in enumerate(network.clusters)}
    else:
        columns = {"features": network.width}
        heads = network.head_arrays()
    with formats.create_logits(
        output,
        images.keys,
        images.index_N,
        provenance,
        columns=columns,
        dtype=dtype,
        heads=heads,
        force=force,
    ) as datasets:
        module = network if store == "logits" else network.trunk
        done = 0
        for outputs in forward(module, network, images, batch_size, device, precision, augment):
            tensors = outputs if isinstance(outputs, list) else [outputs]
            for item, tensor in zip(datasets.values(), tensors, strict=True):
                if dtype == "float16" and store == "logits":
                    # Half precision is fine near zero: large logits would lose their differences.
                    tensor = tensor - tensor.amax(1, keepdim=True)
                item[done : done + len(tensor)] = tensor.numpy()
            done += len(tensors[0])
            progress(done, len(images), "")
            if interrupt.requested():
                raise StoppedEarly(f"{output}: stopped after {done} images", "run it again")


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


@torch.no_grad()
def forward(
    module: Any,
    network: Network,
    images: Images,
    batch_size: int,
    device: str = "cpu",
    precision: str = "float32",
    augment: ViewOf | None = None,
) -> Iterator[Any]:
    """Outputs of `module` (the network or a part of it), batch by batch, as float32 on the CPU."""
    network.eval().to(device)
    for start in range(0, len(images), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(images)))
        batch = images.batch(rows).to(device)
        view = augment(batch) if augment else centre_view(batch, network.image_size)
        with autocast(device, precision):
            outputs = module(view.contiguous(memory_format=torch.channels_last))
        yield _to_cpu(outputs)


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 arithmetic where `precision` asks for it."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def _to_cpu(outputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(outputs, list):
        return [output.float().cpu() for output in outputs]
    return outputs.float().cpu()
