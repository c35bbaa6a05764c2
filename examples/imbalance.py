"""Does equal partition hurt where classes are not equal? Balanced labels against k-means.

The experiment of the SeLa paper (CIFAR-10 there) on any images with classes:

    python examples/imbalance.py --data digits --out runs/imbalance

`none` keeps all images, `light` half of the last class, `heavy` a share of each class that
rises evenly from 1/C to 1. For each, one network alternates between training and labels
of `sela label`, another between training and k-means of the features (DeepCluster). Both
begin with the same heads, clusters of the fresh features, and the labels that these give;
both are probed by weighted kNN on the same held-out images of every class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from sela_cli import formats, metrics, probes
from sela_cli.envelope import Provenance
from sela_cli.errors import CannotCreate, SelaError
from sela_cli.formats import Labels
from sela_cli.fresh import make_ready
from sela_cli.images.batches import Images, open_images
from sela_cli.images.sources import no_classes
from sela_cli.kmeans import kmeans_labels
from sela_cli.labels import LabelSettings, label_stage
from sela_cli.logits import embed_stage
from sela_cli.networks import build, parse_heads
from sela_cli.recipe import Recipe
from sela_cli.scores import open_scores
from sela_cli.training import label_view, network_of, train_stage

IMBALANCES = ("none", "light", "heavy")
METHODS = ("balanced", "kmeans")
HOLDOUT = 0.2


def kept_shares(imbalance: str, classes: int) -> np.ndarray:
    """The share of each class that stays."""
    if imbalance == "heavy":
        return np.arange(1, classes + 1) / classes
    shares = np.ones(classes)
    if imbalance == "light":
        shares[-1] = 0.5
    return shares


def imbalanced(images: Images, imbalance: str, seed: int) -> Images:
    """A seeded part of the images, of these shares of the classes."""
    assert images.truth_N is not None
    rng = np.random.default_rng(seed)
    kept = []
    for label, share in enumerate(kept_shares(imbalance, int(images.truth_N.max()) + 1)):
        rows = np.flatnonzero(images.truth_N == label)
        kept.append(rng.permutation(rows)[: round(share * len(rows))])
    return images.subset(np.sort(np.concatenate(kept)))


def relabel(method: str, logits: str, output: str, init: str, settings: LabelSettings) -> None:
    """One labelling of the features and heads in `logits`."""
    if method == "balanced":
        label_stage(logits, output, settings, init=init)
        return
    before: Labels = formats.read_labels(init)
    assert before.header is not None
    with open_scores(f"{logits}::/features") as scores:
        labels = kmeans_labels(scores, logits, before.clusters, seed=settings.seed, before=before)
        # A single dataset of a logits file still has the file's images.
        provenance = Provenance("label", {"method": "kmeans"}, dataset_id=scores.dataset_id)
    formats.write_labels(output, labels, provenance)


def run(
    method: str, train: Images, test: Images, folder: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Alternate `rounds` times; kNN accuracy, and NMI of the last labels with the classes."""
    folder.mkdir(parents=True)
    recipe = Recipe(
        epochs=arguments.epochs,
        batch_size=64,
        lr=0.03,
        aug=arguments.aug,
        head_init="kmeans",
        seed=arguments.seed,
    )
    settings = LabelSettings(lamb=10.0, seed=arguments.seed)
    heads = parse_heads(arguments.heads)
    network = build(arguments.arch, arguments.image_size, heads, arguments.seed)
    make_ready(network, train, recipe)
    start = None
    logits, labels = str(folder / "logits.h5"), str(folder / "labels-000.h5")
    provenance = Provenance("embed", {}, dataset_id=train.dataset_id)
    embed_stage(train, network, logits, provenance, store="features")
    label_stage(logits, labels, settings)
    for number in range(1, arguments.rounds + 1):
        checkpoint = str(folder / "checkpoint.h5")
        train_stage(
            train,
            formats.read_labels(labels),
            network,
            checkpoint,
            recipe,
            start=start,
            to=arguments.epochs * number / arguments.rounds,
            force=True,
            ready=True,
        )
        start = formats.read_checkpoint(checkpoint)
        network = network_of(start, checkpoint)
        view = label_view("random", recipe, start.step)
        embed_stage(train, network, logits, provenance, store="features", augment=view, force=True)
        before, labels = labels, str(folder / f"labels-{number:03d}.h5")
        relabel(method, logits, labels, before, settings)
    assert train.truth_N is not None
    scores = [
        metrics.agreement(head.labels_N, train.truth_N)["nmi"]
        for head in formats.read_labels(labels).heads
    ]
    (row,) = probes.knn_rows(train, test, network)
    return {"knn": row["top1"], "nmi": float(np.mean(scores))}


def main() -> None:
    """Parse and compare; a mistake is told in a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--arch", default="alexnet-small")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--heads", default="10,20,40,80")
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--aug", default="crop")
    parser.add_argument("--seed", type=int, default=0)
    try:
        compare(parser.parse_args())
    except SelaError as error:
        sys.exit(f"error: {error}")


def compare(arguments: argparse.Namespace) -> None:
    """Six runs, one line each."""
    pairs = [(imbalance, method) for imbalance in IMBALANCES for method in METHODS]
    folders = {pair: arguments.out / "-".join(pair) for pair in pairs}
    for folder in folders.values():
        if folder.exists():
            raise CannotCreate(f"{folder} exists", "choose another --out")
    images, _ = open_images(arguments.data, arguments.image_size, limit=arguments.limit)
    if images.truth_N is None:
        raise no_classes(images.spec, images.source.keys)
    train, test = probes.holdout(images, HOLDOUT, arguments.seed)
    print(f"{'imbalance':<10} {'method':<10} {'images':>7} {'kNN':>7} {'NMI':>7}")
    for imbalance in IMBALANCES:
        part = imbalanced(train, imbalance, arguments.seed)
        for method in METHODS:
            result = run(method, part, test, folders[imbalance, method], arguments)
            print(
                f"{imbalance:<10} {method:<10} {len(part):>7} {result['knn']:>7.4f} "
                f"{result['nmi']:>7.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
