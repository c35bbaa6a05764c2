"""k-means labels: clouds are found, clusters keep their numbers, large sets go in batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from sela_cli import kmeans
from sela_cli.errors import BadData
from sela_cli.formats import Labels
from sela_cli.kmeans import heads_of, kmeans_labels, renumbered, whitened
from sela_cli.scores import open_scores


def clouds(rows: int = 300, clusters: int = 5, columns: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Rows about well separated centres; the first cloud has a third of them."""
    rng = np.random.default_rng(0)
    truth_N = np.where(rng.random(rows) < 0.2, 0, rng.integers(0, clusters, rows))
    centres = 10 * rng.normal(size=(clusters, columns))
    return centres[truth_N] + rng.normal(size=(rows, columns)), truth_N


@pytest.fixture
def cluster(write_logits: Callable[..., str]) -> Callable[..., Labels]:
    number = count()

    def call(*heads_NK: np.ndarray, **options: object) -> Labels:
        path = write_logits(*heads_NK, name=f"{next(number)}.h5")
        with open_scores(path) as scores:
            return kmeans_labels(scores, path, **options)  # type: ignore[arg-type]

    return call


@pytest.mark.parametrize("batches", [False, True])
def test_clouds_of_unequal_sizes_are_found(
    batches: bool, cluster: Callable[..., Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    if batches:
        monkeypatch.setattr(kmeans, "_SAMPLE", 100)
    rows_ND, truth_N = clouds()
    labels = cluster(rows_ND, clusters=[5] * 4)
    best = max(adjusted_rand_score(truth_N, head.labels_N) for head in labels.heads)
    assert best > (0.7 if batches else 0.95)
    for head in labels.heads:
        assert head.attributes["assign"] == "kmeans" and head.usage_K.sum() == 300
    assert labels.clusters == [5] * 4


def test_heads_of_logits_have_their_own_columns_and_k(cluster: Callable[..., Labels]) -> None:
    rows_ND, _ = clouds(columns=10)
    labels = cluster(rows_ND[:, :4], rows_ND[:, 4:10])
    assert labels.clusters == [4, 6]
    assert all(head.labels_N.max() == k - 1 for head, k in zip(labels.heads, (4, 6), strict=True))


def test_the_same_seed_gives_the_same_labels(cluster: Callable[..., Labels]) -> None:
    rows_ND = np.random.default_rng(1).normal(size=(200, 8))
    one, two, other = (cluster(rows_ND, seed=seed).heads[0].labels_N for seed in (3, 3, 4))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_whitened_rows(write_logits: Callable[..., str]) -> None:
    """Unit length; independent directions; a column that never varies adds nothing."""
    rng = np.random.default_rng(0)
    rows_ND = rng.normal(size=(4000, 6)) * [1, 5, 25, 1, 1, 1] + 7
    rows_ND = np.hstack([rows_ND, np.full((4000, 2), 3.0)])
    with open_scores(write_logits(rows_ND)) as scores:
        points_NP = whitened(scores.heads[0], "rows", 0)
    assert points_NP.shape == (4000, 6)
    np.testing.assert_allclose(np.linalg.norm(points_NP, axis=1), 1, atol=1e-5)
    # Directions of equal variance: each has a sixth of the unit length.
    np.testing.assert_allclose(points_NP.T @ points_NP / 4000, np.eye(6) / 6, atol=0.01)


def test_clusters_keep_their_numbers(cluster: Callable[..., Labels]) -> None:
    rows_ND, _ = clouds()
    first = cluster(rows_ND, clusters=[5])
    turned = np.array([3, 0, 4, 1, 2], np.int32)[first.heads[0].labels_N]
    first.heads[0].labels_N = turned
    again = cluster(rows_ND, clusters=[5], before=first)
    assert np.array_equal(again.heads[0].labels_N, turned)


def test_renumbering_shares_as_many_images_as_can_be() -> None:
    rng = np.random.default_rng(0)
    # Cluster 3 is empty on one side, 0 on the other.
    labels_N, earlier_N = rng.integers(0, 3, 60), rng.integers(1, 4, 60)
    kept = (renumbered(labels_N, earlier_N, 4) == earlier_N).sum()
    assert kept == max(
        (np.array(numbers)[labels_N] == earlier_N).sum() for numbers in permutations(range(4))
    )


def test_what_does_not_fit_is_bad_data(cluster: Callable[..., Labels]) -> None:
    rows_ND, _ = clouds(40)
    with pytest.raises(BadData, match="41 clusters for 40"):
        cluster(rows_ND, clusters=[41])
    with pytest.raises(BadData, match="2 heads, not the 3"):
        cluster(rows_ND, rows_ND, clusters=[2, 2, 2])
    with pytest.raises(BadData, match="--init"):
        cluster(rows_ND, clusters=[3], before=cluster(rows_ND, clusters=[4]))
    rows_ND[7, 2] = np.nan
    with pytest.raises(BadData, match="row 7 "):
        cluster(rows_ND)


@pytest.mark.filterwarnings("error")
def test_rows_that_are_all_the_same_are_one_cluster(cluster: Callable[..., Labels]) -> None:
    (head,) = cluster(np.ones((12, 3)), clusters=[2]).heads
    assert sorted(head.usage_K.tolist()) == [0, 12]


def test_heads_tell_the_clusters_of_features() -> None:
    """What a head prefers is the cloud: in other units, far from zero, in more dimensions."""
    rows_ND, truth_N = clouds(rows=600, columns=8)
    turn_DD = np.linalg.qr(np.random.default_rng(1).normal(size=(400, 400)))[0]
    features_ND = (1e-3 * np.pad(rows_ND, ((0, 0), (0, 392))) @ turn_DD + 5).astype(np.float32)
    heads = list(heads_of(features_ND, [5, 5, 5, 9], seed=0))
    scores = []
    for (weight_KD, bias_K), clusters in zip(heads, [5, 5, 5, 9], strict=True):
        assert weight_KD.shape == (clusters, 400) and bias_K.shape == (clusters,)
        logits_NK = features_ND @ weight_KD.T + bias_K
        # Cosines times lengths whose mean is one.
        assert 0.3 < abs(logits_NK).max() < 5
        scores.append(adjusted_rand_score(truth_N, logits_NK.argmax(1)))
    assert max(scores[:3]) > 0.95 and scores[3] > 0.5


def test_each_head_is_a_clustering_of_its_own_and_repeats() -> None:
    features_ND = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    one, two = (list(heads_of(features_ND, [7, 7], seed=3)) for _ in range(2))
    for (weight_KD, bias_K), (weight_too_KD, bias_too_K) in zip(one, two, strict=True):
        assert np.array_equal(weight_KD, weight_too_KD) and np.array_equal(bias_K, bias_too_K)
    assert not np.array_equal(one[0][0], one[1][0])


@pytest.mark.filterwarnings("error")
def test_features_that_are_all_the_same_give_finite_heads() -> None:
    for weight_KD, bias_K in heads_of(np.ones((12, 3), np.float32), [2, 3], seed=0):
        assert np.isfinite(weight_KD).all() and np.isfinite(bias_K).all()
