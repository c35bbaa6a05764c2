"""k-means: DeepCluster's labels, which balanced ones are compared with, and heads to begin with.

N rows (images), D columns (features or logits), P principal components, K clusters.
Nothing keeps these clusters of one size.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from sela_cli import interrupt
from sela_cli.errors import BadData, StoppedEarly
from sela_cli.formats import HeadLabels, Labels, unsolved
from sela_cli.progress import Progress, silent
from sela_cli.scores import Matrix, Scores
from sela_cli.tiles import tile_rows

COMPONENTS = 256
# Rows that the principal components are taken from, and beyond which k-means goes in
# batches: a whole pass costs N x K x P.
_SAMPLE = 50_000
# Numbers that are read at a time.
_VALUES = 1 << 21
# Of a head, which has only to begin well.
_HEAD_ITERATIONS = 30
# A direction with less of the largest variance is rounding: whitening would blow it up.
_LEAST_VARIANCE = 1e-6


def kmeans_labels(
    scores: Scores,
    path: str,
    clusters: Sequence[int] | None = None,
    *,
    seed: int = 0,
    max_iter: int = 100,
    before: Labels | None = None,
    progress: Progress = silent,
) -> Labels:
    """Cluster the rows of every head of `scores`; `path` is how errors name them.

    `clusters`: K of each head, by default as many as the head has columns; of a single
    matrix (features) each head is then another run, from seed, seed + 1, ... Clusters are
    numbered as those of `before` that they share most images with, so that a network in
    training keeps its head. Raises BadData where K or `before` does not fit, StoppedEarly
    after a signal.

    Source: Caron et al. 2018 (DeepCluster): principal components, whitened, rows of unit
    length, then k-means.
    """
    pairs = matched(scores, path, clusters, before)
    heads: list[HeadLabels] = []
    points_NP = np.empty((0, 0), np.float32)
    for number, (matrix, count) in enumerate(pairs):
        with interrupt.raising(StoppedEarly("stopped while clustering", "run it again")):
            if number == 0 or matrix is not pairs[number - 1][0]:
                points_NP = whitened(matrix, path, seed)
            head = _cluster(points_NP, count, seed + number, max_iter)
        if before:
            earlier_N = before.heads[number].labels_N
            head.labels_N = renumbered(head.labels_N, earlier_N, count)
        head.attributes["bytes-read"] = matrix.tally.take()
        heads.append(head)
        progress(number + 1, len(pairs), "k-means")
    return Labels(scores.keys, scores.index_N, heads)


def heads_of(
    features_ND: np.ndarray, clusters: Sequence[int], seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weight (K, D) and bias (K,) of linear heads whose logits tell clusters of the features.

    Spherical k-means of the features less their mean m: with c_k the direction of a centre
    and l the mean length of a row, logit k is c_k . (x - m) / l: of order one, as ten times
    larger ones lose the clusters again in training. Head number t is a run from seed + t.
    """
    pca = _components(features_ND, seed)
    points_NP = pca.transform(features_ND)
    # Rows that are all the same have no direction and no length.
    length = max(float(np.linalg.norm(points_NP, axis=1).mean()), np.finfo(np.float32).tiny)
    points_NP = normalize(points_NP)
    for number, count in enumerate(clusters):
        # Three threads and more add up the rows of a cluster in any order.
        with threadpool_limits(1, "openmp"):
            model = _fitted(points_NP, count, seed + number, _HEAD_ITERATIONS)
        weight_KD = normalize(model.cluster_centers_) @ pca.components_ / length
        yield weight_KD, -weight_KD @ pca.mean_


def matched(
    scores: Scores, path: str, clusters: Sequence[int] | None, before: Labels | None
) -> list[tuple[Matrix, int]]:
    """The matrix and K of each head; for arguments and errors see `kmeans_labels`."""
    wanted = list(clusters) if clusters else [matrix.shape[1] for matrix in scores.heads]
    matrices = scores.heads * len(wanted) if len(scores.heads) == 1 else scores.heads
    if len(matrices) != len(wanted):
        raise BadData(
            f"{path} has {len(matrices)} heads, not the {len(wanted)} asked for",
            f"cluster the features: {shlex.quote(path)}::/features",
        )
    if before and (before.keys != scores.keys or before.clusters != wanted):
        raise BadData(
            f"the earlier labels have heads {before.clusters} of {len(before.keys)} images, "
            f"{path} needs {wanted} of {len(scores.keys)}",
            "drop --init",
        )
    for matrix, count in zip(matrices, wanted, strict=True):
        if not 1 <= count <= matrix.shape[0]:
            raise BadData(f"{path}: {count} clusters for {matrix.shape[0]} images")
    return list(zip(matrices, wanted, strict=True))


def whitened(matrix: Matrix, path: str, seed: int) -> np.ndarray:
    """At most 256 principal components of the rows, each of unit variance, rows of length 1.

    Memory: N x P float32, and a sample of the rows. Raises BadData naming a row that is
    not finite.
    """
    count = matrix.shape[0]
    if count == 1:
        # One point has no variance to divide by.
        return np.zeros((1, 1), np.float32)
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(count)[:_SAMPLE])
    sample = _finite(matrix.read(rows), rows, path)
    pca = _components(sample, seed)
    variances = pca.explained_variance_
    kept = max(1, int((variances > _LEAST_VARIANCE * variances[0]).sum()))
    scale = np.sqrt(np.maximum(variances[:kept], np.finfo(np.float32).tiny)).astype(np.float32)
    points_NP = np.empty((count, kept), np.float32)
    step = tile_rows(matrix.shape[1], _VALUES)
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        values = _finite(matrix.read(some), np.arange(some.start, some.stop), path)
        points_NP[some] = normalize(pca.transform(values)[:, :kept] / scale)
    return points_NP


def _components(values_ND: np.ndarray, seed: int) -> PCA:
    # Rows that are all the same have no variance to divide by.
    with np.errstate(invalid="ignore"):
        return PCA(min(COMPONENTS, *values_ND.shape), random_state=_state(seed)).fit(values_ND)


def _state(seed: int) -> int:
    """A seed as scikit-learn takes it."""
    return seed % (1 << 32)


def _finite(values: np.ndarray, rows: np.ndarray, path: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = np.asarray(values, np.float32)
    bad = ~np.isfinite(narrow).all(1)
    if bad.any():
        first = int(bad.argmax())
        told = "is beyond float32" if np.isfinite(values[first]).all() else "is not finite"
        raise BadData(f"{path}: row {rows[first]} {told}")
    return narrow


def _cluster(points_NP: np.ndarray, clusters: int, seed: int, max_iter: int) -> HeadLabels:
    model = _fitted(points_NP, clusters, seed, max_iter)
    known = {"n-iters": int(model.n_iter_), "converged": bool(model.n_iter_ < max_iter)}
    labels_N = model.labels_.astype(np.int32)
    return HeadLabels(labels_N, np.zeros(clusters), unsolved("kmeans") | known)


def _fitted(
    points_NP: np.ndarray, clusters: int, seed: int, max_iter: int
) -> KMeans | MiniBatchKMeans:
    if len(points_NP) <= _SAMPLE:
        model = KMeans(clusters, n_init=1, max_iter=max_iter, random_state=_state(seed))
    else:
        model = MiniBatchKMeans(
            n_clusters=clusters,
            batch_size=max(4096, 4 * clusters),
            # Starts are compared on a sample only: cheap, and batches mend no bad start.
            n_init=3,
            max_iter=max_iter,
            random_state=_state(seed),
        )
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: the sizes tell.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(points_NP)


def renumbered(labels_N: np.ndarray, earlier_N: np.ndarray, clusters: int) -> np.ndarray:
    """The same clusters, each with the number of the earlier one that it shares most with."""
    everything = np.arange(clusters)
    # Every number occurs once more on both sides, so that the table is K x K.
    shared_KK = contingency_matrix(np.r_[labels_N, everything], np.r_[earlier_N, everything])
    own, earlier = linear_sum_assignment(shared_KK - np.eye(clusters), maximize=True)
    numbers_K = np.empty(clusters, np.int32)
    numbers_K[own] = earlier
    return numbers_K[labels_N]
