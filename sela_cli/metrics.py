"""How clusters agree with true classes, or with other clusters. Any numbers of either.

N images, K clusters, C classes, B sizes that clusters have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import h5py
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import bmat, csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import entr, gammaln

from sela_cli import envelope, formats
from sela_cli.errors import BadData, NoInput, StoppedEarly
from sela_cli.formats import HeadLabels, Labels
from sela_cli.images.sources import no_classes, open_source

# Cells of a table that are counted without sorting, and numbers that need none, an image.
_CELLS, _NUMBERS = 4, 4


def agreement(labels_N: np.ndarray, truth_N: np.ndarray) -> dict[str, float]:
    """NMI, adjusted MI, adjusted Rand index, one-to-one accuracy and purity, each at most 1.

    All from one contingency table n_CK, so that the images are counted once. `nmi` and
    `ami` normalise by the mean of both entropies, as scikit-learn does by default.
    `accuracy` is under the best one-to-one match of clusters to classes (Hungarian
    method): clusters left without a class count as wrong. `purity` gives every cluster
    its most frequent class.
    """
    n_CK = _contingency(truth_N, labels_N)
    sizes_C, sizes_K = n_CK.sum(1).A1, n_CK.sum(0).A1
    total = int(sizes_K.sum())
    information, mean_entropy = _information(n_CK, sizes_C, sizes_K)
    chance = _chance(sizes_C, sizes_K)
    # One cluster and class, or one an image: chance is all there is, up to rounding.
    by_chance = n_CK.shape in ((1, 1), (total, total))
    return {
        "nmi": _share(information, mean_entropy),
        "ari": _adjusted_rand(n_CK, sizes_C, sizes_K),
        "accuracy": _matched(n_CK) / total,
        "purity": float(n_CK.max(axis=0).sum() / total),
        "ami": 1.0 if by_chance else _share(information - chance, mean_entropy - chance),
    }


def _contingency(truth_N: np.ndarray, labels_N: np.ndarray) -> csr_matrix:
    """Images of each class in each cluster, of those that have any: no more cells than images."""
    (classes_N, classes), (clusters_N, clusters) = _numbered(truth_N), _numbered(labels_N)
    cells_N = classes_N * clusters + clusters_N
    if classes * clusters <= _CELLS * len(cells_N):
        counts = np.bincount(cells_N, minlength=classes * clusters)
        cells = np.flatnonzero(counts)
        counts = counts[cells]
    else:
        cells, counts = np.unique(cells_N, return_counts=True)
    return csr_matrix((counts, np.divmod(cells, clusters)), (classes, clusters))


def _numbered(values_N: np.ndarray) -> tuple[np.ndarray, int]:
    """The same with the numbers 0.. for the values that occur, in order, and how many these are."""
    small = values_N.dtype.kind in "iu" and values_N.min() >= 0
    if small and values_N.max() < _NUMBERS * len(values_N):
        occurs = np.bincount(values_N) > 0
        return (np.cumsum(occurs) - 1)[values_N], int(occurs.sum())
    values, numbers_N = np.unique(values_N, return_inverse=True)
    return numbers_N, len(values)


def _matched(n_CK: csr_matrix) -> int:
    """Images under the best one-to-one match of clusters to classes.

    What no image connects is matched apart, so that only what hangs together is a dense table.
    """
    _, parts = connected_components(bmat([[None, n_CK], [n_CK.T, None]]), directed=False)
    classes = n_CK.shape[0]
    part_C, part_K = parts[:classes], parts[classes:]
    # Of a part with one class or one cluster, the largest cell counts.
    cells = n_CK.tocoo()
    best_P = np.zeros(parts.max() + 1, np.int64)
    np.maximum.at(best_P, part_C[cells.row], cells.data)
    several = (np.bincount(part_C) > 1) & (np.bincount(part_K) > 1)
    matched = int(best_P[~several].sum())
    for part in np.flatnonzero(several):
        cost_ck = -n_CK[part_C == part][:, part_K == part].toarray().astype(np.float64)
        matched -= int(cost_ck[linear_sum_assignment(cost_ck)].sum())
    return matched


def _information(n_CK: csr_matrix, sizes_C: np.ndarray, sizes_K: np.ndarray) -> tuple[float, float]:
    """Mutual information, and the mean entropy of classes and clusters."""
    # scikit-learn takes a quarter of the start of commands that only count.
    from sklearn.metrics import mutual_info_score

    information = mutual_info_score(None, None, contingency=n_CK)
    shares_C, shares_K = sizes_C / sizes_C.sum(), sizes_K / sizes_K.sum()
    return information, 0.5 * float(entr(shares_C).sum() + entr(shares_K).sum())


def _chance(sizes_C: np.ndarray, sizes_K: np.ndarray) -> float:
    """Mutual information expected of random classes and clusters of these sizes.

    The sum over all pairs of a class and a cluster, of a and b images, and over the n that
    they may have in common: n/N ln(N n / (a b)) P(n), P hypergeometric (Vinh, Epps and Bailey
    2010, eq. 24a). Pairs of the same sizes are counted once, and n is followed as far as
    Chernoff's bound is above 1e-30: scikit-learn takes minutes at ImageNet's size.
    """
    total = int(sizes_C.sum())
    of_classes = np.unique(sizes_C, return_counts=True)
    b_B, counts_B = np.unique(sizes_K, return_counts=True)
    chance = 0.0
    for a, count in zip(*map(np.ndarray.tolist, of_classes), strict=True):
        mean_B = a * b_B / total
        reach_B = (12 * np.sqrt(mean_B) + 50).astype(int)
        low_B = np.maximum.reduce(
            [np.ones_like(b_B), a + b_B - total, mean_B.astype(int) - reach_B]
        )
        high_B = np.minimum.reduce([np.full_like(b_B, a), b_B, mean_B.astype(int) + reach_B])
        lengths_B = high_B - low_B + 1
        which = np.repeat(np.arange(len(b_B)), lengths_B)
        n, b = np.arange(len(which)) + (low_B - lengths_B.cumsum() + lengths_B)[which], b_B[which]
        probability = np.exp(
            _log_choose(b, n) + _log_choose(total - b, a - n) - _log_choose(total, a)
        )
        information = n / total * np.log(n / mean_B[which])
        chance += count * float((counts_B[which] * information * probability).sum())
    return chance


def _log_choose(of: np.ndarray | int, some: np.ndarray | int) -> np.ndarray:
    return gammaln(of + 1) - gammaln(some + 1) - gammaln(of - some + 1)


def _share(part: float, whole: float) -> float:
    """`part / whole`; 1 where there is nothing to agree on (one cluster and one class)."""
    return float(part / whole) if abs(whole) > np.finfo(np.float64).eps else 1.0


def _adjusted_rand(n_CK: csr_matrix, sizes_C: np.ndarray, sizes_K: np.ndarray) -> float:
    """Pairs that are together in both, less those of chance (Hubert and Arabie 1985)."""

    def pairs(sizes: np.ndarray) -> float:
        return float((sizes * (sizes - 1.0)).sum() / 2)

    both, of_classes, of_clusters = pairs(n_CK.data), pairs(sizes_C), pairs(sizes_K)
    total = pairs(sizes_C.sum())
    chance = of_classes * of_clusters / total if total else 0.0
    return _share(both - chance, 0.5 * (of_classes + of_clusters) - chance)


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
    smallest, largest = values["smallest"], values["largest"]
    size = f"{smallest}" if smallest == largest else f"{smallest}..{largest}"
    return f"{values['clusters']} clusters of {size}{empty}"


def certificate(head: HeadLabels) -> dict[str, Any]:
    """Sizes of a head, what its solve says of itself, and the seconds that it took."""
    values = sizes(head) | head.attributes
    if values["assign"] == "balanced":
        # Below zero only by rounding.
        values["gap"] = max(values["objective"] - values["lower-bound"], 0.0)
    values["seconds"] = float(head.trace["seconds"][-1]) if "seconds" in head.trace else 0.0
    return values


def certificate_lines(heads: list[dict[str, Any]]) -> list[str]:
    """`certificate` of each head in words."""
    lines = []
    for number, values in enumerate(heads):
        line = f"head {number}: {sizes_text(values)}"
        if values["assign"] in ("balanced", "argmax"):
            line += f", objective {values['objective']:.4f}, "
            if values["assign"] == "balanced":
                line += f"gap {values['gap']:.1e}, "
            line += (
                f"residual {values['residual']:.1e}, {values['n-iters']} passes, "
                f"{values['seconds']:.1f} s"
            )
            # Labels of earlier versions, kept as they are, lack these.
            if "bytes-read" in values:
                line += f", {values['bytes-read'] / 1e6:.1f} MB read"
            if not values["converged"]:
                line += f" ({values.get('status', 'not converged')})"
        lines.append(line)
    return lines


def churn(before: list[HeadLabels], after: list[HeadLabels]) -> float:
    """Share of labels that changed between two rounds, mean over the heads."""
    pairs = zip(before, after, strict=True)
    return float(np.mean([(b.labels_N != a.labels_N).mean() for b, a in pairs]))


def compare(labels: Labels, truth: str) -> list[dict[str, float]]:
    """Sizes and agreement of each head with `truth`: a labels file (its first head), a .npy, or
    images with classes.

    Rows are matched by their keys (a .npy: by position). Raises BadData where one is missing.
    """
    truth_N = _truth(labels, truth)
    return [sizes(head) | agreement(head.labels_N, truth_N) for head in labels.heads]


def between_heads(labels: Labels) -> list[dict[str, float]]:
    """Agreement of every pair of heads of a file, and the sizes of the first of the pair.

    A file of one head gives its sizes alone.
    """
    if len(labels.heads) == 1:
        return [{"head": 0} | sizes(labels.heads[0])]
    return [
        {"head": one, "other": two} | sizes(a) | agreement(a.labels_N, b.labels_N)
        for (one, a), (two, b) in combinations(enumerate(labels.heads), 2)
    ]


def between_files(labels: Labels, other_path: str) -> list[dict[str, float]]:
    """Agreement of each head with the same head of another file, such as an earlier round's.

    `changed` is the share of images whose label differs as it stands: clusters keep their
    numbers from round to round. Rows are matched by key. Raises BadData where a key is
    missing or the files have different numbers of heads.
    """
    other = formats.read_labels(other_path)
    if len(labels.heads) != len(other.heads):
        raise BadData(
            f"{_path(labels)} has {len(labels.heads)} heads, {other_path} {len(other.heads)}",
            "compare one head with --truth",
        )
    order_N = _by_key(labels, other.keys, np.arange(len(other.keys)), other_path)
    return [
        {"head": number}
        | sizes(mine)
        | {"changed": float((mine.labels_N != theirs.labels_N[order_N]).mean())}
        | agreement(mine.labels_N, theirs.labels_N[order_N])
        for number, (mine, theirs) in enumerate(zip(labels.heads, other.heads, strict=True))
    ]


_COLUMNS = ("head", "other", "clusters", "smallest", "largest", "empty")
_SHARES = ("changed", "nmi", "ami", "ari", "accuracy", "purity")


def table(rows: list[dict[str, float]]) -> str:
    """What the comparisons give, as aligned text; columns that no row has are left out."""
    rows = [{"head": number} | row for number, row in enumerate(rows)]
    names = [name for name in (*_COLUMNS, *_SHARES) if name in rows[0]]
    cells = [[f"{row[n]:.4f}" if n in _SHARES else f"{row[n]}" for n in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    lines = [map(str.rjust, line, widths) for line in (names, *cells)]
    return "\n".join(map("  ".join, lines))


def _path(labels: Labels) -> str:
    assert labels.header is not None
    return labels.header.path


def _truth(labels: Labels, truth: str) -> np.ndarray:
    if truth.endswith(".npy"):
        return _truth_of_array(labels, truth)
    if _is_hdf5(truth) and not _holds_images(truth):
        other = formats.read_labels(truth)
        return _by_key(labels, other.keys, other.heads[0].labels_N, truth)
    source = open_source(truth)
    if source.truth_N is None:
        raise no_classes(truth, source.keys, ", or give a .npy of one class a row")
    return _by_key(labels, source.keys, source.truth_N, truth)


def _by_key(labels: Labels, keys: Sequence[str], values_N: np.ndarray, source: str) -> np.ndarray:
    """What `source` says of every row of `labels`, whose rows it may have in another order."""
    if labels.keys == keys:
        return values_N
    rows = dict(zip(keys, range(len(keys)), strict=True))
    missing = [key for key in labels.keys if key not in rows]
    if missing:
        raise BadData(
            f"{source} has no class for {len(missing)} of {len(labels.keys)} images of "
            f"{_path(labels)}, first '{missing[0]}'",
            "give the images that were embedded",
        )
    return values_N[[rows[key] for key in labels.keys]]


def _truth_of_array(labels: Labels, truth: str) -> np.ndarray:
    try:
        truth_N = np.load(truth, allow_pickle=False)
    except FileNotFoundError:
        raise NoInput(f"{truth}: no such file") from None
    except StoppedEarly:
        raise
    except Exception as error:  # The header is Python text: damage shows in many ways.
        raise BadData(f"{truth}: not a readable .npy array ({error})") from error
    if not isinstance(truth_N, np.ndarray):
        raise BadData(f"{truth} is an .npz file, of several arrays", "save its labels as .npy")
    if truth_N.shape != (len(labels.keys),) or truth_N.dtype.kind not in "biuUS":
        raise BadData(
            f"{truth} holds {truth_N.dtype} of shape {truth_N.shape}, not one class for each of "
            f"the {len(labels.keys)} rows of {_path(labels)}",
            # Of another number of classes that would be of no help.
            "save .astype(int).ravel() of it" if truth_N.size == len(labels.keys) else "",
        )
    return truth_N


def _is_hdf5(path: str) -> bool:
    """By what is in it; by its name where nothing is."""
    return h5py.is_hdf5(path) if os.path.isfile(path) else path.endswith((".h5", ".hdf5"))


def _holds_images(path: str) -> bool:
    """Whether an HDF5 file is one of images, packed or anybody's."""
    with envelope.open_hdf5(path) as file:
        return not envelope.is_ours(file) or envelope.plain(file.attrs.get("kind")) == "images"
