"""Agreement with true classes against brute force, and the matching of rows by key."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as theirs
from sklearn.metrics.cluster import contingency_matrix

from sela_cli import formats
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, NoInput
from sela_cli.formats import HeadLabels, Labels, read_labels
from sela_cli.metrics import (
    agreement,
    between_files,
    between_heads,
    churn,
    compare,
    sizes,
    sizes_text,
    table,
)

KEYS = [f"{number}.png" for number in range(24)]


def random_pair(clusters: int, classes: int, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Labels that follow the truth half of the time; every cluster and class occurs."""
    rng = np.random.default_rng(10 * clusters + classes)
    truth_N = np.arange(count) % classes
    labels_N = np.where(
        rng.random(count) < 0.5, truth_N % clusters, rng.integers(clusters, size=count)
    )
    labels_N[:clusters] = np.arange(clusters)
    return labels_N, truth_N


def head(labels_N: np.ndarray, clusters: int) -> HeadLabels:
    attributes = dict.fromkeys(formats.LABEL_ATTRIBUTES, 0)
    return HeadLabels(np.asarray(labels_N), np.zeros(clusters), attributes)


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[..., str]:
    def write(*heads: HeadLabels, keys: list[str] = KEYS, name: str = "labels.h5") -> str:
        path = str(tmp_path / name)
        labels = Labels(keys, np.arange(len(keys)), list(heads))
        formats.write_labels(path, labels, Provenance("test", {}))
        return path

    return write


PAIRS = [(2, 2), (3, 3), (5, 3), (3, 5), (1, 4), (4, 1)]


@pytest.mark.parametrize(("clusters", "classes"), PAIRS)
def test_accuracy_is_the_best_of_all_matches(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)
    # Clusters or classes without a partner meet one that never occurs.
    names = range(max(clusters, classes))
    best = max(
        np.mean([match[label] == truth for label, truth in zip(labels_N, truth_N, strict=True)])
        for match in permutations(names)
    )
    assert agreement(labels_N, truth_N)["accuracy"] == pytest.approx(best)


@pytest.mark.parametrize(("clusters", "classes"), PAIRS)
def test_purity_is_the_share_of_majorities(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)
    majorities = sum(
        Counter(truth_N[labels_N == cluster].tolist()).most_common(1)[0][1]
        for cluster in range(clusters)
    )
    assert agreement(labels_N, truth_N)["purity"] == pytest.approx(majorities / len(truth_N))


@pytest.mark.parametrize(("clusters", "classes"), [(2, 2), (3, 3), (5, 3), (3, 5)])
def test_nmi_is_information_over_mean_entropy(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)

    def entropy(*columns: np.ndarray) -> float:
        counts = Counter(zip(*(column.tolist() for column in columns), strict=True))
        p = np.array(list(counts.values())) / len(columns[0])
        return float(-(p * np.log(p)).sum())

    information = entropy(labels_N) + entropy(truth_N) - entropy(labels_N, truth_N)
    expected = information / (0.5 * (entropy(labels_N) + entropy(truth_N)))
    assert agreement(labels_N, truth_N)["nmi"] == pytest.approx(expected)


@pytest.mark.parametrize(("clusters", "classes"), [(2, 2), (3, 3), (5, 3), (3, 5)])
def test_ari_counts_pairs(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)
    pairs = list(combinations(range(len(labels_N)), 2))
    together = [labels_N[i] == labels_N[j] for i, j in pairs]
    same_class = [truth_N[i] == truth_N[j] for i, j in pairs]
    both = np.sum(np.logical_and(together, same_class))
    chance = np.sum(together) * np.sum(same_class) / len(pairs)
    expected = (both - chance) / ((np.sum(together) + np.sum(same_class)) / 2 - chance)
    assert agreement(labels_N, truth_N)["ari"] == pytest.approx(expected)


@pytest.mark.parametrize(("clusters", "classes"), [*PAIRS, (1, 1), (40, 40), (40, 3)])
def test_one_table_gives_what_scikit_learn_gives(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)
    result = agreement(labels_N, truth_N)
    assert result["nmi"] == pytest.approx(theirs.normalized_mutual_info_score(truth_N, labels_N))
    assert result["ari"] == pytest.approx(theirs.adjusted_rand_score(truth_N, labels_N))
    expected = theirs.adjusted_mutual_info_score(truth_N, labels_N)
    assert result["ami"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_ami_of_many_images_is_scikit_learns(skew: float) -> None:
    """Of equal sizes and of none alike; so many that most counts are too unlikely to matter."""
    rng = np.random.default_rng(0)
    labels_N, truth_N = ((rng.random(100_000) ** (1 + skew) * n).astype(int) for n in (60, 7))
    assert agreement(labels_N, truth_N)["ami"] == pytest.approx(
        theirs.adjusted_mutual_info_score(truth_N, labels_N), abs=1e-9
    )


@pytest.mark.parametrize("count", [1, 2, 10, 19, 100, 50_000])
def test_a_cluster_an_image_and_one_for_all_agree_with_themselves(count: int) -> None:
    for labels_N in (np.arange(count), np.zeros(count, int)):
        assert agreement(labels_N, labels_N[::-1])["ami"] == 1
    if 2 < count < 1000:
        assert agreement(np.arange(count), np.arange(count) // 2)["ami"] == pytest.approx(
            theirs.adjusted_mutual_info_score(np.arange(count) // 2, np.arange(count)), abs=1e-9
        )


def test_ami_is_nmi_corrected_for_chance() -> None:
    """Zero on average over shuffles, where NMI of many clusters is well above zero."""
    rng = np.random.default_rng(0)
    truth_N = np.arange(60) % 4
    results = [agreement(rng.permutation(60) % 12, truth_N) for _ in range(200)]
    assert abs(np.mean([result["ami"] for result in results])) < 0.01
    assert np.mean([result["nmi"] for result in results]) > 0.1


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_what_no_image_connects_is_matched_apart(parts: int) -> None:
    """Beside the match of the whole table: parts of several classes and clusters, and of one."""
    rng = np.random.default_rng(parts)
    part_N = rng.integers(0, parts, 500)
    labels_N = 4 * part_N + rng.integers(0, 1 + part_N % 4)
    truth_N = 4 * part_N + rng.integers(0, 1 + part_N % 3)
    n_CK = contingency_matrix(truth_N, labels_N)
    best = n_CK[linear_sum_assignment(n_CK, maximize=True)].sum() / 500
    assert agreement(labels_N, truth_N)["accuracy"] == pytest.approx(best)


def test_contingency_by_hand() -> None:
    # Clusters by classes: 3 1 0 / 0 2 2 / 1 0 1.
    labels_N = np.repeat([0, 1, 2], [4, 4, 2])
    truth_N = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0, 2])
    result = agreement(labels_N, truth_N)
    assert result["purity"] == pytest.approx((3 + 2 + 1) / 10)
    assert result["accuracy"] == pytest.approx((3 + 2 + 1) / 10)


@pytest.mark.parametrize(("clusters", "classes"), PAIRS)
def test_names_of_clusters_and_classes_do_not_matter(clusters: int, classes: int) -> None:
    labels_N, truth_N = random_pair(clusters, classes)
    rng = np.random.default_rng(0)
    renamed = rng.permutation(50)[:clusters][labels_N]
    words = np.array([f"class {name}" for name in rng.permutation(classes)])[truth_N]
    assert agreement(renamed, words) == pytest.approx(agreement(labels_N, truth_N))


def test_perfect_agreement() -> None:
    truth_N = np.arange(30) % 5
    assert agreement((truth_N + 2) % 5, truth_N) == pytest.approx(
        dict.fromkeys(("nmi", "ami", "ari", "accuracy", "purity"), 1.0)
    )


def test_sizes_count_empty_clusters() -> None:
    result = sizes(head(np.array([0, 0, 0, 2, 2, 4]), 6))
    assert result == {"clusters": 6, "smallest": 0, "median": 0.5, "largest": 3, "empty": 3}
    assert sizes_text(result) == "6 clusters of 0..3, 3 empty"
    assert sizes_text(result | {"smallest": 3, "empty": 0}) == "6 clusters of 3"


def test_churn_is_the_share_of_changed_labels() -> None:
    zeros, ones = np.zeros(8, int), np.r_[np.ones(2, int), np.zeros(6, int)]
    assert churn([head(zeros, 2)] * 2, [head(ones, 2), head(zeros, 2)]) == pytest.approx(1 / 8)


# ---- compare ----------------------------------------------------------------


def write_list(path: Path, truth: dict[str, int]) -> str:
    """Images with classes; a list names them without their being there."""
    path.write_text("".join(f"{key}\tclass {label}\n" for key, label in truth.items()))
    return str(path)


def test_rows_are_matched_by_key(write_labels: Callable[..., str], tmp_path: Path) -> None:
    labels_N, truth_N = random_pair(4, 3, 24)
    path = write_labels(head(labels_N, 4), head(truth_N, 3))
    order = np.random.default_rng(0).permutation(24)
    truth = {KEYS[row]: int(truth_N[row]) for row in order} | {"extra.png": 0}
    results = compare(read_labels(path), write_list(tmp_path / "truth.txt", truth))
    assert [result["clusters"] for result in results] == [4, 3]
    for result, row in zip(results, (labels_N, truth_N), strict=True):
        expected = agreement(row, truth_N)
        assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert results[1]["accuracy"] == 1.0 > results[0]["accuracy"]


def test_missing_key_is_named(write_labels: Callable[..., str], tmp_path: Path) -> None:
    path = write_labels(head(np.arange(24) % 3, 3))
    truth = write_list(tmp_path / "truth.txt", dict.fromkeys(KEYS[:5] + KEYS[7:], 1))
    with pytest.raises(BadData, match=r"2 of 24 .*'5\.png'"):
        compare(read_labels(path), truth)


def test_labels_against_labels(write_labels: Callable[..., str]) -> None:
    labels_N, other_N = random_pair(4, 6, 24)
    path = write_labels(head(labels_N, 4))
    other = write_labels(
        head(other_N[::-1], 6), head(other_N * 0, 6), keys=KEYS[::-1], name="other.h5"
    )
    (result,) = compare(read_labels(path), other)
    assert {name: result[name] for name in ("nmi", "ari", "accuracy")} == pytest.approx(
        {name: agreement(labels_N, other_N)[name] for name in ("nmi", "ari", "accuracy")}
    )
    assert compare(read_labels(path), path)[0]["accuracy"] == 1.0


def test_packed_images_bring_their_classes(
    write_labels: Callable[..., str], tmp_path: Path
) -> None:
    labels_N, truth_N = random_pair(4, 3, 24)
    path, packed = write_labels(head(labels_N, 4)), str(tmp_path / "photos.h5")
    with formats.create_images(
        packed, KEYS, np.arange(24), Provenance("pack", {}), side=2, truth_N=truth_N
    ):
        pass
    assert compare(read_labels(path), packed) == compare(read_labels(path), f"{packed}::/images")
    assert compare(read_labels(path), packed)[0]["ari"] == pytest.approx(
        agreement(labels_N, truth_N)["ari"]
    )


@pytest.mark.parametrize("words", [False, True])
def test_npy_is_matched_by_position(
    words: bool, write_labels: Callable[..., str], tmp_path: Path
) -> None:
    labels_N, truth_N = random_pair(4, 3, 24)
    path, truth = write_labels(head(labels_N, 4)), tmp_path / "truth.npy"
    np.save(truth, np.array(["ape", "bee", "cat"])[truth_N] if words else truth_N)
    assert compare(read_labels(path), str(truth))[0]["ari"] == pytest.approx(
        agreement(labels_N, truth_N)["ari"]
    )


def test_npy_of_two_classes_may_be_true_or_false(
    write_labels: Callable[..., str], tmp_path: Path
) -> None:
    labels = read_labels(write_labels(head(np.arange(24) % 2, 2)))
    np.save(tmp_path / "truth.npy", np.arange(24) % 2 == 0)
    assert compare(labels, str(tmp_path / "truth.npy"))[0]["accuracy"] == 1.0


def test_the_advice_for_classes_that_are_no_vector_of_whole_numbers_helps(
    write_labels: Callable[..., str], tmp_path: Path
) -> None:
    labels, path = read_labels(write_labels(head(np.arange(24) % 3, 3))), tmp_path / "truth.npy"
    column = (np.arange(24.0) % 3)[:, None]
    np.save(path, column)
    with pytest.raises(BadData, match=r"\.astype\(int\)\.ravel\(\)"):
        compare(labels, str(path))
    np.save(path, column.astype(int).ravel())
    assert compare(labels, str(path))[0]["accuracy"] == 1.0


@pytest.mark.parametrize(
    "array",
    [np.zeros(23, int), np.zeros((24, 1), int), np.zeros(24), np.array([{}] * 24, object)],
    ids=["short", "2-D", "floats", "pickled"],
)
def test_npy_that_does_not_fit(
    array: np.ndarray, write_labels: Callable[..., str], tmp_path: Path
) -> None:
    path = write_labels(head(np.arange(24) % 3, 3))
    np.save(tmp_path / "truth.npy", array)
    with pytest.raises(BadData, match=r"truth\.npy"):
        compare(read_labels(path), str(tmp_path / "truth.npy"))


def test_labels_of_any_name_are_truth(write_labels: Callable[..., str], tmp_path: Path) -> None:
    path = write_labels(head(np.arange(24) % 3, 3))
    shutil.copy(path, tmp_path / "truth")
    assert compare(read_labels(path), str(tmp_path / "truth"))[0]["accuracy"] == 1.0


def test_damaged_and_missing_truth(write_labels: Callable[..., str], tmp_path: Path) -> None:
    path = write_labels(head(np.arange(24) % 3, 3))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").touch()
    with (tmp_path / "several.npy").open("wb") as stream:
        np.savez(stream, a=np.arange(24))
    for name in ("text.npy", "empty.npy", "several.npy"):
        with pytest.raises(BadData, match=name):
            compare(read_labels(path), str(tmp_path / name))
    for name in ("absent.npy", "absent.txt"):
        with pytest.raises(NoInput, match=name):
            compare(read_labels(path), str(tmp_path / name))


def test_truth_without_classes(write_labels: Callable[..., str], tmp_path: Path) -> None:
    path = write_labels(head(np.arange(24) % 3, 3))
    (tmp_path / "plain.txt").write_text("\n".join(KEYS))
    with pytest.raises(BadData, match="no true classes"):
        compare(read_labels(path), str(tmp_path / "plain.txt"))


def test_a_column_of_classes_is_told_to_name_no_images(
    write_labels: Callable[..., str], tmp_path: Path
) -> None:
    """Whether classes come twice or once each."""
    labels = read_labels(write_labels(head(np.arange(24) % 3, 3)))
    for classes in (2, 24):
        (tmp_path / "truth.txt").write_text("".join(f"{row % classes}\n" for row in range(24)))
        with pytest.raises(BadData, match=r"a tab.*a \.npy"):
            compare(labels, str(tmp_path / "truth.txt"))


def test_table_has_a_line_a_head(write_labels: Callable[..., str]) -> None:
    path = write_labels(head(np.arange(24) % 3, 3), head(np.arange(24) % 5, 7))
    header, *lines = table(compare(read_labels(path), path)).splitlines()
    assert len(lines) == 2 and len({len(line) for line in (header, *lines)}) == 1
    rows = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
    assert [row["clusters"] for row in rows] == ["3", "7"]
    assert [row["empty"] for row in rows] == ["0", "2"]
    assert float(rows[0]["accuracy"]) == 1.0


# ---- heads and rounds -----------------------------------------------------------


def test_every_pair_of_heads_is_compared(write_labels: Callable[..., str]) -> None:
    a, b = random_pair(4, 6, 24)
    rows = between_heads(read_labels(write_labels(head(a, 4), head(b, 6), head((a + 1) % 4, 4))))
    assert [(row["head"], row["other"]) for row in rows] == [(0, 1), (0, 2), (1, 2)]
    # Renamed clusters are the same clusters.
    assert rows[1]["accuracy"] == 1.0 and rows[1]["nmi"] == pytest.approx(1.0)
    assert rows[0]["ari"] == pytest.approx(agreement(a, b)["ari"]) == pytest.approx(rows[2]["ari"])
    (alone,) = between_heads(read_labels(write_labels(head(a, 4), name="one.h5")))
    assert alone == {"head": 0} | sizes(head(a, 4))


def test_rounds_are_compared_head_by_head_and_by_key(write_labels: Callable[..., str]) -> None:
    labels_N, other_N = random_pair(4, 4, 24)
    now = write_labels(head(labels_N, 4), head(other_N, 4))
    before = write_labels(
        head(other_N[::-1], 4), head(other_N[::-1], 4), keys=KEYS[::-1], name="before.h5"
    )
    first, second = between_files(read_labels(now), before)
    assert first["changed"] == pytest.approx(np.mean(labels_N != other_N))
    assert first["nmi"] == pytest.approx(agreement(labels_N, other_N)["nmi"])
    assert second["changed"] == 0 and second["accuracy"] == 1.0
    assert "changed" in table([first, second]).splitlines()[0]


def test_rounds_of_other_heads_or_images_are_bad_data(write_labels: Callable[..., str]) -> None:
    labels_N = np.arange(24) % 3
    path = write_labels(head(labels_N, 3))
    two = write_labels(head(labels_N, 3), head(labels_N, 3), name="two.h5")
    with pytest.raises(BadData, match=r"1 heads, .* 2"):
        between_files(read_labels(path), two)
    fewer = write_labels(head(labels_N[:23], 3), keys=KEYS[:23], name="fewer.h5")
    with pytest.raises(BadData, match=r"'23\.png'"):
        between_files(read_labels(path), fewer)


def test_a_table_is_as_wide_as_what_is_in_it() -> None:
    rows = [{"clusters": 3, "nmi": 0.5}, {"clusters": 123456789, "nmi": 1.0}]
    assert table(rows).splitlines() == [
        "head   clusters     nmi",
        "   0          3  0.5000",
        "   1  123456789  1.0000",
    ]
