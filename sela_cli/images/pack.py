"""A collection as one file of equal squares, which reads as fast as memory does."""

from __future__ import annotations

from typing import Any

from sela_cli import formats, interrupt
from sela_cli.envelope import Provenance
from sela_cli.errors import StoppedEarly
from sela_cli.images.batches import Images
from sela_cli.progress import Progress, silent

_BATCH = 256


def plan(images: Images) -> dict[str, Any]:
    """What a dry run shows."""
    return {
        "images": len(images),
        "side": images.side,
        "classes": len(images.classes),
        "dataset_id": images.dataset_id,
        "megabytes": len(images) * 3 * images.side**2 / 1e6,
    }


def pack_stage(
    images: Images,
    output: str,
    provenance: Provenance,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> None:
    """Write the images, their keys and their classes; see docs/schema.md."""
    with formats.create_images(
        output,
        images.keys,
        images.index_N,
        provenance.of(images.dataset_id),
        side=images.side,
        truth_N=images.truth_N,
        classes=images.classes,
        force=force,
    ) as pixels:
        for start, batch in images.in_order(_BATCH):
            done = start + len(batch)
            pixels[start:done] = batch.numpy()
            progress(done, len(images), "")
            if interrupt.requested() and done < len(images):
                raise StoppedEarly(f"{output}: stopped after {done} images", "run it again")
