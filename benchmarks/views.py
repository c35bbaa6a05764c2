"""How noisy labels by random views are: `sela run --view random --views N`.

    python benchmarks/views.py --data DATA --checkpoint RUN/checkpoint.h5 --limit 10000

One network, which stays as it is, labels the images by the centre view, and twice by the mean
over 1, 2, 4 and 8 random views of each. Writes docs/results-views.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from sela_cli import formats, metrics
from sela_cli.envelope import Provenance
from sela_cli.formats import Labels
from sela_cli.images.batches import Images, open_images
from sela_cli.labels import LabelSettings, label_stage
from sela_cli.logits import embed_stage
from sela_cli.machine import processor
from sela_cli.networks import Network
from sela_cli.recipe import Recipe
from sela_cli.training import label_view, network_of

VIEWS = (1, 2, 4, 8)
# Views are drawn anew for every step.
DRAWS = (1, 2)


def labelled(
    images: Images, network: Network, recipe: Recipe, views: int, step: int | None
) -> tuple[Labels, float]:
    """Balanced labels by random views as of a step, or by the centre view; seconds to embed."""
    augment = None if step is None else label_view("random", recipe, step)
    with tempfile.TemporaryDirectory() as folder:
        logits, labels = f"{folder}/logits.h5", f"{folder}/labels.h5"
        provenance = Provenance("embed", {}, dataset_id=images.dataset_id)
        began = time.perf_counter()
        embed_stage(
            images,
            network,
            logits,
            provenance,
            augment=augment,
            views=views,
            precision="bfloat16",
        )
        seconds = time.perf_counter() - began
        return label_stage(logits, labels, LabelSettings()), seconds


def nmi(labels: Labels, images: Images) -> float:
    """With the classes, mean of the heads."""
    assert images.truth_N is not None
    return statistics.fmean(
        metrics.agreement(head.labels_N, images.truth_N)["nmi"] for head in labels.heads
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--output", type=Path, default=Path("docs/results-views.md"))
    options = parser.parse_args()
    state = formats.read_checkpoint(options.checkpoint)
    network = network_of(state, options.checkpoint)
    recipe = Recipe.of(state.recipe)
    images, _ = open_images(options.data, state.image_size, limit=options.limit)
    centre, seconds = labelled(images, network, recipe, 1, None)
    rows = [f"| the centre view | {nmi(centre, images):.4f} |  |  | {seconds:.1f} |"]
    for views in VIEWS:
        found = [labelled(images, network, recipe, views, step) for step in DRAWS]
        (one, _), (other, _) = found
        agreement = statistics.fmean(nmi(labels, images) for labels, _ in found)
        rows.append(
            f"| {views} | {agreement:.4f} | {metrics.churn(one.heads, other.heads):.1%} "
            f"| {metrics.churn(one.heads, centre.heads):.1%} "
            f"| {statistics.fmean(seconds for _, seconds in found):.1f} |"
        )
    lines = [
        "# Labels by several random views",
        "",
        "Written by `python benchmarks/views.py`. A network that stays as it is labels the images",
        "by the mean of its logits over so many random views of each; twice, as two rounds would.",
        "*NMI*: with the classes, mean of the heads. What `--views` does for a network that learns",
        "from such labels is not measured here.",
        "",
        f"{len(images):,} images, {state.arch} with heads of {', '.join(map(str, state.heads))} "
        f"clusters after {state.epoch:g} epochs, {datetime.now(UTC):%Y-%m-%d}, {processor()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, seed {recipe.seed}.",
        "",
        "| random views | NMI | labels that differ between two draws | from those by the centre "
        "view | seconds to embed |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "```sh",
        f"python benchmarks/views.py --data DATA --checkpoint RUN/checkpoint.h5"
        f"{f' --limit {options.limit}' if options.limit else ''}",
        "```",
        "",
    ]
    options.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
