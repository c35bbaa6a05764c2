"""Signs that a run learns nothing, or one cluster: what the network predicts, and the loss.

N images, n of a tile, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import softmax, xlogy

from sela_cli.scores import Matrix, open_scores

# Values of a tile, some tens of megabytes as float64.
_TILE_VALUES = 1 << 22

# Shares: how far below ln K the loss must be, how varied predictions are at least, how many
# clusters may lack an image that prefers them, how many labels may change late in a run.
_LEARNED, _SPREAD, _UNWANTED, _CHURN = 0.02, 0.5, 0.5, 0.9
# Of the training: before it, a slow start is no problem.
_START = 0.1


def predictions(spec: str) -> dict[str, float]:
    """How sure and how varied the predictions in the logits `spec` are, mean over the heads.

    `entropy`: mean of H(p(y|x)) / ln K, 1 where nothing is told apart. `spread`:
    H(mean p) / ln K, near 0 where all images get one cluster. `unwanted`: share of the
    clusters that no image prefers.
    """
    with open_scores(spec) as scores:
        rows = [_of_head(matrix) for matrix in scores.heads]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _of_head(matrix: Matrix) -> dict[str, float]:
    count, clusters = matrix.shape
    most = math.log(clusters) if clusters > 1 else 1.0
    entropy, mean_K, wanted_K = 0.0, np.zeros(clusters), np.zeros(clusters, np.int64)
    tile = max(1, _TILE_VALUES // clusters)
    for start in range(0, count, tile):
        p_nK = softmax(
            matrix.read(slice(start, min(start + tile, count))).astype(np.float64), axis=1
        )
        entropy -= float(xlogy(p_nK, p_nK).sum())
        mean_K += p_nK.sum(axis=0)
        wanted_K += np.bincount(p_nK.argmax(axis=1), minlength=clusters)
    mean_K /= count
    return {
        "entropy": entropy / count / most,
        "spread": float(-xlogy(mean_K, mean_K).sum()) / most,
        "unwanted": float((wanted_K == 0).mean()),
    }


def problems(row: Mapping[str, Any], loss: float, chance: float, progress: float) -> dict[str, str]:
    """What looks wrong after a round, by name, each with advice.

    `row`: the round's churn, empty clusters and `predictions`; `loss`: the mean of the
    epoch before it; `chance`: mean of ln K over the heads, the loss of a network that
    knows nothing; `progress`: share of the training that is done. Early rounds are left
    alone: a network that learns random labels starts slowly.
    """
    found: dict[str, str] = {}
    if row["empty"]:
        found["empty clusters"] = (
            f"{row['empty']} clusters are empty: use --assign balanced, or fewer clusters"
        )
    if progress < _START:
        return found
    if loss > (1 - _LEARNED) * chance:
        found["loss about ln K"] = (
            f"the loss {loss:.3f} is about ln K = {chance:.3f}, that of a network that knows "
            "nothing: try another --lr, fewer --opts (longer between relabellings), fewer clusters "
            "or a milder --aug"
        )
    if row["spread"] < _SPREAD:
        found["few clusters predicted"] = (
            f"predictions gather in few clusters (entropy of their mean {row['spread']:.2f} of "
            "ln K): try a smaller --lr, or --view random"
        )
    elif row["unwanted"] > _UNWANTED and loss < (1 - _LEARNED) * chance:
        found["clusters nobody wants"] = (
            f"no image prefers {row['unwanted']:.0%} of the clusters: use fewer clusters, "
            "or a smaller --lamb"
        )
    if progress >= 0.5 and row["churn"] > _CHURN:
        found["labels do not settle"] = (
            f"{row['churn']:.0%} of the labels changed: use fewer --opts (longer between "
            "relabellings), or a smaller --lr"
        )
    return found
