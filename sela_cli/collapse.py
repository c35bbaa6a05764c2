"""Signs that a run learns nothing, or one cluster: what the network predicts, and the loss.

N images, n of a tile, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import xlogy
from torch import Tensor

from sela_cli import interrupt
from sela_cli.errors import StoppedEarly
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import open_scores
from sela_cli.tiles import evenly, map_spans

# Rows that the means are taken over, where there are more; for each cluster enough that one
# which only a tenth of its share of them prefer is met three times.
_ROWS, _ROWS_OF_CLUSTER = 50_000, 32

# Shares: how far below ln K the loss must be, how varied predictions are at least, how many
# clusters may lack an image that prefers them, how many labels may change late in a run.
_LEARNED, _SPREAD, _UNWANTED, _CHURN = 0.02, 0.5, 0.5, 0.9
# Of the training: before it, a slow start is no problem.
_START = 0.1


def predictions(spec: str, device: str = "cpu") -> dict[str, float]:
    """How sure and how varied the predictions in the logits `spec` are, mean over the heads.

    `entropy`: mean of H(p(y|x)) / ln K, 1 where nothing is told apart. `spread`:
    H(mean p) / ln K, near 0 where all images get one cluster of several. `unwanted`: share of the
    clusters that no image prefers. Of max(50,000, 32 K) images, evenly spread, where there
    are more: a cluster that very few prefer may then count as unwanted. Raises StoppedEarly
    after a signal.
    """
    with open_scores(spec) as scores:
        where = torch.device(device)
        rows = [_of_head(ScoreRows(matrix, spec, device=where)) for matrix in scores.heads]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _of_head(rows: ScoreRows) -> dict[str, float]:
    clusters = rows.shape[1]
    some = evenly(rows, max(_ROWS, _ROWS_OF_CLUSTER * clusters))
    most = math.log(clusters) if clusters > 1 else 1.0
    entropy, mean_K, wanted_K = 0.0, np.zeros(clusters), np.zeros(clusters, np.int64)

    def work(tiles: Iterator[tuple[int, Tensor]]) -> tuple[float, np.ndarray, np.ndarray]:
        total, sum_K = 0.0, torch.zeros(clusters, dtype=torch.float64, device=rows.device)
        chosen_K = torch.zeros(clusters, dtype=torch.long, device=rows.device)
        for _, tile_nK in tiles:
            log_p_nK = tile_nK.log_softmax(1)
            p_nK = log_p_nK.exp()
            sum_K += p_nK.sum(0, dtype=torch.float64)
            chosen_K += tile_nK.argmax(1).bincount(minlength=clusters)
            total -= float(log_p_nK.mul_(p_nK).sum(dtype=torch.float64))
        return total, sum_K.cpu().numpy(), chosen_K.cpu().numpy()

    for total, sum_K, chosen_K in map_spans(some, work, torch.float32):
        if interrupt.requested():
            raise StoppedEarly(f"{rows.path}: stopped while reading predictions", "run it again")
        entropy += total
        mean_K += sum_K / some.shape[0]
        wanted_K += chosen_K
    return {
        "entropy": entropy / some.shape[0] / most,
        "spread": float(-xlogy(mean_K, mean_K).sum()) / most if clusters > 1 else 1.0,
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
