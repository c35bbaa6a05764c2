"""A fresh network made ready for its images: BatchNorm statistics, and heads.

N images, n of a batch, D features, K clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from sela_cli import interrupt, job, parallel
from sela_cli.devices import sent
from sela_cli.errors import BadData, StoppedEarly, UsageError
from sela_cli.images.augment import AUGMENTATIONS, draw, drawn_view
from sela_cli.images.batches import Images
from sela_cli.networks import Network
from sela_cli.passes import in_order
from sela_cli.progress import Progress, silent
from sela_cli.recipe import Recipe
from sela_cli.seeds import generator_of
from sela_cli.spread import spread

# Batches that BatchNorm statistics are taken from.
_SETTLING = 8
# Images whose features heads are fitted to: for each cluster, and at least; and of a batch.
_FITTED, _BATCH = (16, 20_000), 256


def make_ready(
    network: Network,
    images: Images,
    recipe: Recipe,
    device: str = "cpu",
    progress: Progress = silent,
) -> None:
    """A fresh network settled, and with the heads that the recipe asks for."""
    settle(network, images, recipe, device)
    if recipe.head_init == "kmeans":
        fit_heads(network, images, recipe.seed, device, progress)


@torch.no_grad()
def settle(network: Network, images: Images, recipe: Recipe, device: str = "cpu") -> None:
    """Give a fresh network the BatchNorm statistics of some batches of its images.

    Without, a fresh network in eval mode normalises nothing, and its logits hardly differ
    in more than the brightness of the images.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        # None: the plain mean over the batches.
        norm.momentum = None
    network.train().to(device)
    augmentation = AUGMENTATIONS[recipe.aug]
    generator = generator_of(recipe.seed, "settle", 0)
    for _ in range(_SETTLING):
        rows = torch.randperm(len(images), generator=generator)[: recipe.batch_size]
        draws = draw(len(rows), network.image_size, augmentation, generator)
        if len(rows) > 1:
            mine = job.share(len(rows))
            batch = sent(images.batch(rows[mine]), device)
            network.trunk(drawn_view(batch, network.image_size, draws.of(mine).on(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


@torch.no_grad()
def fit_heads(
    network: Network,
    images: Images,
    seed: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> None:
    """Heads anew, by `kmeans.heads_of` the features of some images in the centre view.

    Raises UsageError where there are more clusters than images, BadData where features are
    not finite, StoppedEarly after a signal.
    """
    # scikit-learn is slow to import.
    from sela_cli.kmeans import heads_of

    widest = max(network.clusters)
    if widest > len(images):
        raise UsageError(
            f"--head-init kmeans: {widest} clusters of {len(images)} images",
            "use at most as many clusters as images",
        )
    share, least = _FITTED
    some_n = spread(len(images), max(share * widest, least))
    some = images if len(some_n) == len(images) else images.subset(some_n)
    network.eval().to(device)
    features_ND, at = np.empty((len(some), network.width), np.float32), 0
    size, columns = network.image_size, [network.width]
    for (part_nD,) in in_order(some, size, network.trunk, columns, _BATCH, device):
        features_ND[at : at + len(part_nD)] = part_nD
        at += len(part_nD)
    if not np.isfinite(features_ND).all():
        raise BadData("the network's features are not finite", "look at its weights")
    # The first process alone: others would round otherwise.
    heads = heads_of(features_ND, network.clusters, seed) if parallel.rank() == 0 else None
    for number, head in enumerate(network.heads):
        if parallel.any_of(interrupt.requested()):
            raise StoppedEarly("stopped while the heads were fitted", "run it again")
        progress(number, len(network.heads), "heads by k-means")
        fitted = next(heads) if heads else (None, None)
        for (_, parameter), array in zip(head.named_parameters(), fitted, strict=True):
            own = None if array is None else torch.from_numpy(array).float()
            parameter.copy_(job.from_process(0, own, tuple(parameter.shape)))
