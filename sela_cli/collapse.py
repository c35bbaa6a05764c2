"""Signs that a run learns nothing, or one cluster: what the network predicts, and the loss.

N images, n of a tile, K clusters of a head, T heads, S clusters of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
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
    """How sure and how varied the predictions in the logits `spec` are.

    `entropy`: mean of H(p(y|x)) / ln K, 1 where nothing is told apart, mean over the heads.
    `spread`: H(mean p) / ln K, near 0 where all images get one cluster of several, of the head
    that is worst. `unwanted`: share of the clusters that no image prefers, mean over the heads.
    Of max(50,000, 32 K) images, evenly spread, where there are more: a cluster that very few
    prefer may then count as unwanted. Raises StoppedEarly after a signal.
    """
    with open_scores(spec) as scores:
        rows = ScoreRows(scores.side_by_side(), spec, device=torch.device(device))
        heads = _of_heads(rows, [matrix.shape[1] for matrix in scores.heads])
    found = {name: float(np.mean([head[name] for head in heads])) for name in heads[0]}
    # Among ten heads the mean would hide one that has collapsed.
    return found | {"spread": min(head["spread"] for head in heads)}


def _of_heads(rows: ScoreRows, clusters: list[int]) -> list[dict[str, float]]:
    """By one pass over rows that have all heads side by side, each of so many clusters."""
    some = evenly(rows, max(_ROWS, _ROWS_OF_CLUSTER * max(clusters)))
    columns = [slice(*ends) for ends in pairwise(np.cumsum([0, *clusters]).tolist())]

    def work(tiles: Iterator[tuple[int, Tensor]]) -> list[np.ndarray]:
        entropy_T = torch.zeros(len(clusters), dtype=torch.float64, device=rows.device)
        sum_S = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        chosen_S = torch.zeros(rows.shape[1], dtype=torch.long, device=rows.device)
        for _, tile_nS in tiles:
            for head, own in enumerate(columns):
                logits_nK = tile_nS[:, own]
                log_p_nK = logits_nK.log_softmax(1)
                p_nK = log_p_nK.exp()
                sum_S[own] += p_nK.sum(0, dtype=torch.float64)
                chosen_S[own] += logits_nK.argmax(1).bincount(minlength=clusters[head])
                entropy_T[head] -= log_p_nK.mul_(p_nK).sum(dtype=torch.float64)
        return [each.cpu().numpy() for each in (entropy_T, sum_S, chosen_S)]

    entropy_T, sum_S = np.zeros(len(clusters)), np.zeros(rows.shape[1])
    chosen_S = np.zeros(rows.shape[1], np.int64)
    for part in map_spans(some, work, torch.float32):
        if interrupt.requested():
            raise StoppedEarly(f"{rows.path}: stopped while reading predictions", "run it again")
        entropy_T += part[0]
        sum_S += part[1]
        chosen_S += part[2]
    count = some.shape[0]
    return [
        _shares(entropy / count, sum_S[own] / count, chosen_S[own])
        for entropy, own in zip(entropy_T, columns, strict=True)
    ]


def _shares(entropy: float, mean_K: np.ndarray, chosen_K: np.ndarray) -> dict[str, float]:
    """Of ln K, and of the clusters; one cluster alone leaves nothing to tell apart."""
    most = math.log(len(mean_K)) if len(mean_K) > 1 else 1.0
    return {
        "entropy": float(entropy) / most,
        "spread": float(-xlogy(mean_K, mean_K).sum()) / most if len(mean_K) > 1 else 1.0,
        "unwanted": float((chosen_K == 0).mean()),
    }


def nothing_learned(loss: float, chance: float) -> dict[str, str]:
    """Advice by name, as of `problems`, where the loss of an epoch is one of no knowledge."""
    if not loss > (1 - _LEARNED) * chance:
        return {}
    return {
        "loss about ln K": (
            f"the loss {loss:.3f} is about ln K = {chance:.3f}, that of a network that knows "
            "nothing: try another --lr, fewer --opts (longer between relabellings), fewer clusters "
            "or a milder --aug"
        )
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
    found |= nothing_learned(loss, chance)
    if row["spread"] < _SPREAD:
        found["few clusters predicted"] = (
            "predictions of a head gather in few clusters (entropy of their mean "
            f"{row['spread']:.2f} of ln K): try a smaller --lr, or --view random"
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
