"""How clusters agree with true classes, or with other clusters. Any numbers of either.

N images, K clusters, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix

from sela_cli import formats
from sela_cli.errors import BadData, NoInput
from sela_cli.formats import HeadLabels, Labels
from sela_cli.images.sources import open_source


def agreement(labels_N: np.ndarray, truth_N: np.ndarray) -> dict[str, float]:
    """NMI, adjusted MI, adjusted Rand index, one-to-one accuracy and purity, each in 0..1.

    `accuracy` is under the best one-to-one match of clusters to classes (Hungarian
    method): clusters left without a class count as wrong. `purity` gives every cluster
    its most frequent class.
    """
    table_CK = contingency_matrix(truth_N, labels_N)
    rows, columns = linear_sum_assignment(table_CK, maximize=True)
    return {
        "nmi": float(metrics.normalized_mutual_info_score(truth_N, labels_N)),
        "ami": float(metrics.adjusted_mutual_info_score(truth_N, labels_N)),
        "ari": float(metrics.adjusted_rand_score(truth_N, labels_N)),
        "accuracy": float(table_CK[rows, columns].sum() / len(labels_N)),
        "purity": float(table_CK.max(axis=0).sum() / len(labels_N)),
    }


def sizes(head: HeadLabels) -> dict[str, float]:
    """Clusters of a head: their number, how many are empty, and their sizes."""
    usage_K = head.usage_K
    return {
        "clusters": len(usage_K),
        "smallest": int(usage_K.min()),
        "median": float(np.median(usage_K)),
        "largest": int(usage_K.max()),
        "empty": int((usage_K == 0).sum()),
    }


def sizes_text(values: dict[str, Any]) -> str:
    """`sizes` in words."""
    empty = f", {values['empty']} empty" if values["empty"] else ""
    return f"{values['clusters']} clusters of {values['smallest']}..{values['largest']}{empty}"


def churn(before: list[HeadLabels], after: list[HeadLabels]) -> float:
    """Share of labels that changed between two rounds, mean over the heads."""
    pairs = zip(before, after, strict=True)
    return float(np.mean([(b.labels_N != a.labels_N).mean() for b, a in pairs]))


def compare(labels_path: str, truth: str) -> list[dict[str, float]]:
    """Sizes and agreement of each head with `truth`: a labels file, a .npy, or images with classes.

    Rows are matched by their keys (a .npy: by position). Raises BadData where one is missing.
    """
    labels = formats.read_labels(labels_path)
    truth_N = _truth(labels, labels_path, truth)
    return [sizes(head) | agreement(head.labels_N, truth_N) for head in labels.heads]


def table(heads: list[dict[str, float]]) -> str:
    """`compare`'s result as aligned text."""
    names = ("clusters", "smallest", "largest", "empty", "nmi", "ami", "ari", "accuracy", "purity")
    lines = [" ".join(["head", *(f"{name:>8}" for name in names)])]
    for number, head in enumerate(heads):
        cells = [f"{head[name]:8d}" for name in names[:4]] + [
            f"{head[name]:8.4f}" for name in names[4:]
        ]
        lines.append(" ".join([f"{number:4d}", *cells]))
    return "\n".join(lines)


def _truth(labels: Labels, labels_path: str, truth: str) -> np.ndarray:
    if truth.endswith(".npy"):
        return _truth_of_array(labels, labels_path, truth)
    if truth.endswith((".h5", ".hdf5")) and _is_labels(truth):
        other = formats.read_labels(truth)
        classes = dict(zip(other.keys, other.heads[0].labels_N.tolist(), strict=True))
    else:
        source = open_source(truth)
        if source.truth_N is None:
            raise BadData(f"{truth} has no true classes", "use one subfolder a class, or a .npy")
        classes = dict(zip(source.keys, source.truth_N.tolist(), strict=True))
    missing = [key for key in labels.keys if key not in classes]
    if missing:
        raise BadData(
            f"{truth} has no class for {len(missing)} of {len(labels.keys)} images of "
            f"{labels_path}, first '{missing[0]}'",
            "give the images that were embedded",
        )
    return np.array([classes[key] for key in labels.keys])


def _truth_of_array(labels: Labels, labels_path: str, truth: str) -> np.ndarray:
    try:
        truth_N = np.load(truth, allow_pickle=False)
    except FileNotFoundError:
        raise NoInput(f"{truth}: no such file") from None
    except Exception as error:  # The header is Python text: damage shows in many ways.
        raise BadData(f"{truth}: not a readable .npy array ({error})") from error
    if truth_N.shape != (len(labels.keys),) or truth_N.dtype.kind not in "iuUS":
        raise BadData(
            f"{truth} holds {truth_N.dtype} of shape {truth_N.shape}, not one class for each of "
            f"the {len(labels.keys)} rows of {labels_path}"
        )
    return truth_N


def _is_labels(path: str) -> bool:
    with formats.open_hdf5(path) as file:
        return formats.is_ours(file)
