"""Probes: scikit-learn's kNN and accuracies, separable images, a network left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from sela_cli import formats
from sela_cli.errors import BadData, CannotCreate, UsageError
from sela_cli.formats import Provenance
from sela_cli.images.batches import Images
from sela_cli.images.sources import Source
from sela_cli.networks import Network, build
from sela_cli.probes import LinearProbe, holdout, knn_scores, probe_stage, top_accuracies

COLOURS = np.array([[230, 30, 30], [30, 230, 30], [30, 30, 230]])


def coloured(count: int, seed: int, names: tuple[str, ...] = ("blue", "green", "red")) -> Images:
    """Noisy squares of three colours; their classes are those of `names` that occur."""
    rng = np.random.default_rng(seed)
    colour = {"red": 0, "green": 1, "blue": 2}
    truth_N = np.arange(count) % len(names)
    base = COLOURS[[colour[names[label]] for label in truth_N]][:, None, None]
    pixels = (base + rng.integers(-25, 26, (count, 32, 32, 3))).astype(np.uint8)
    keys = [f"{seed}/{number}" for number in range(count)]
    return Images(Source("made", keys, pixels.__getitem__, truth_N, names), 32, np.arange(count))


@pytest.fixture(scope="module")
def network() -> Network:
    return build("alexnet-small", 32, [4], seed=0)


@pytest.fixture
def probe(network: Network, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def call(train: Images, test: Images, **options: Any) -> list[dict[str, Any]]:
        path = str(tmp_path / "probe.h5")
        return probe_stage(train, test, network, path, Provenance("test", {}), **options)

    return call


# ---- kNN --------------------------------------------------------------------


def neighbours(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of a bank of five classes, their classes, and queries: overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    truth_N = torch.randint(5, (300,), generator=generator)
    centres = torch.randn(5, 12, generator=generator)
    bank = centres[truth_N] + 1.2 * torch.randn(300, 12, generator=generator)
    query = centres.repeat(200, 1) + 1.2 * torch.randn(1000, 12, generator=generator)
    return bank, truth_N, query


@pytest.mark.parametrize("k", [1, 10, 37, 300])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 1.0])
def test_knn_is_scikit_learns(k: int, sigma: float) -> None:
    bank, truth_N, query = neighbours()
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / sigma)
    ).fit(bank.double().numpy(), truth_N.numpy())
    scores = knn_scores(bank, truth_N, query, 5, k, sigma)
    np.testing.assert_array_equal(scores.argmax(1).numpy(), theirs.predict(query.double().numpy()))
    shares = (scores / scores.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares, theirs.predict_proba(query.double().numpy()), atol=1e-4)


def test_knn_with_sharp_weights_still_votes() -> None:
    """Also where every neighbour is so far away that its own weight is no float32."""
    bank, truth_N, query = neighbours()

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((distance.min(axis=1, keepdims=True) - distance) / 1e-3)

    theirs = KNeighborsClassifier(10, metric="cosine", weights=weights)
    theirs.fit(bank.double().numpy(), truth_N.numpy())
    scores = knn_scores(bank, truth_N, query, 5, 10, 1e-3)
    np.testing.assert_array_equal(scores.argmax(1).numpy(), theirs.predict(query.double().numpy()))


def test_knn_takes_no_more_neighbours_than_there_are() -> None:
    bank, truth_N, query = neighbours()
    all_of_them = knn_scores(bank, truth_N, query, 5, 300, 0.1)
    assert torch.equal(knn_scores(bank, truth_N, query, 5, 5000, 0.1), all_of_them)


@pytest.mark.parametrize("classes", [3, 5, 8, 100])
def test_accuracies_are_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    truth_N, scores = rng.integers(classes, size=400), rng.normal(size=(400, classes))
    scores[np.arange(400), truth_N] += 1
    top1, top5 = top_accuracies(torch.from_numpy(scores), torch.from_numpy(truth_N))
    known = np.arange(classes)
    assert top1 == pytest.approx(top_k_accuracy_score(truth_N, scores, k=1, labels=known))
    expected = top_k_accuracy_score(truth_N, scores, k=5, labels=known) if classes > 5 else 1.0
    assert top5 == pytest.approx(expected)


# ---- the stage --------------------------------------------------------------


def test_separable_images_are_told_apart_and_the_network_is_untouched(
    probe: Callable[..., list[dict[str, Any]]], network: Network, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rows = probe(coloured(48, 1), coloured(30, 2), epochs=6, batch_size=12, ks=(1, 5), aug="none")
    after = network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in network.parameters())
    linear = {row["layer"]: row for row in rows if row["method"] == "linear"}
    assert list(linear) == list(network.layers())
    for row in rows:
        assert row["top1"] > 0.95 and row["top5"] == 1.0 and row["n"] == 30
    assert [row["setting"] for row in rows if row["method"] == "knn"] == [
        "k=1 sigma=0.1",
        "k=5 sigma=0.1",
    ]
    stored = formats.read_probe(str(tmp_path / "probe.h5"))
    assert [(row["layer"], row["top1"]) for row in stored] == [
        (row["layer"], row["top1"]) for row in rows
    ]


def test_shuffled_classes_are_not_learned(probe: Callable[..., list[dict[str, Any]]]) -> None:
    """Nothing of the test images' classes leaks."""
    train, test = coloured(48, 1), coloured(90, 2)
    assert test.truth_N is not None
    test.truth_N = np.random.default_rng(0).permutation(test.truth_N)
    rows = probe(train, test, epochs=2, batch_size=12, layers="conv5")
    # A third by chance; 0.55 is 4.3 standard deviations above.
    assert all(row["top1"] < 0.55 for row in rows)


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_classes_are_matched_by_name(
    method: str, probe: Callable[..., list[dict[str, Any]]]
) -> None:
    """A test set that lacks the first class numbers the others from 0."""
    train, test = coloured(48, 1), coloured(20, 2, ("green", "red"))
    rows = probe(train, test, method=method, layers="conv1", epochs=6, batch_size=12, aug="none")
    assert all(row["top1"] > 0.95 for row in rows)


def test_probing_repeats_bit_for_bit(
    probe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    digests = set()
    for _ in range(2):
        torch.manual_seed(len(digests))
        probe(coloured(24, 1), coloured(9, 2), epochs=1, batch_size=8, force=True)
        digests.add(formats.read_header(str(tmp_path / "probe.h5")).digest)
    assert len(digests) == 1


def test_probing_leaves_no_hooks(
    probe: Callable[..., list[dict[str, Any]]], network: Network
) -> None:
    before = [len(module._forward_hooks) for module in network.modules()]
    probe(coloured(12, 1), coloured(6, 2), method="linear", epochs=1, batch_size=6)
    assert [len(module._forward_hooks) for module in network.modules()] == before


def test_existing_output_is_kept(
    probe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    (tmp_path / "probe.h5").write_text("mine")
    with pytest.raises(CannotCreate, match="--force"):
        probe(coloured(12, 1), coloured(6, 2))


@pytest.mark.parametrize("which", [0, 1])
def test_unknown_classes_are_bad_data(
    which: int, probe: Callable[..., list[dict[str, Any]]]
) -> None:
    pair = [coloured(12, 1), coloured(6, 2)]
    pair[which].truth_N = None
    with pytest.raises(BadData, match="no true classes"):
        probe(*pair)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers", "conv9"),
        ("layers", "conv1,fc6"),
        ("method", "svm"),
        ("aug", "mirror"),
        ("ks", (0,)),
        ("ks", (-1,)),
        ("sigmas", (0.0,)),
        ("sigmas", (-0.1,)),
    ],
)
def test_options_without_meaning(
    option: str, value: Any, probe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        probe(coloured(12, 1), coloured(6, 2), **{"epochs": 1, "batch_size": 6, option: value})
    assert not (tmp_path / "probe.h5").exists()


def test_papers_pooling_leaves_about_9600_inputs() -> None:
    with torch.device("meta"):
        network = build("alexnet", 224, [2], seed=0)
        probe = LinearProbe(network, list(network.layers()), 10, "meta", "float32")
    widths = {name: linear[1].in_features for name, linear in probe.classifiers.items()}
    # Channels times the side that is left, squared.
    assert widths == {
        "conv1": 96 * 10**2,
        "conv2": 256 * 6**2,
        "conv3": 384 * 5**2,
        "conv4": 384 * 5**2,
        "conv5": 256 * 6**2,
    }
    assert all(9200 <= width <= 9600 for width in widths.values())


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18", "resnet50", "resnet50-v2"])
def test_other_pooling_leaves_at_most_9600_inputs(arch: str) -> None:
    with torch.device("meta"):
        network = build(arch, 32, [2], seed=0)
        probe = LinearProbe(network, list(network.layers()), 10, "meta", "float32")
    widths = [linear[1].in_features for linear in probe.classifiers.values()]
    assert all(1024 <= width <= 9600 for width in widths)


# ---- holdout ----------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_holdout_is_disjoint_and_covers(fraction: float) -> None:
    images = coloured(60, 1)
    bank, tested = holdout(images, fraction, seed=4)
    assert len(tested) == max(1, round(60 * fraction)) and len(bank)
    rows = np.concatenate([bank.index_N, tested.index_N])
    assert sorted(rows) == list(range(60))
    assert sorted(bank.keys + tested.keys) == sorted(images.keys)
    for part in (bank, tested):
        assert part.truth_N is not None and images.truth_N is not None
        np.testing.assert_array_equal(part.truth_N, images.truth_N[part.index_N])


def test_holdout_is_a_function_of_the_seed() -> None:
    images = coloured(60, 1)
    parts = [holdout(images, 0.3, seed)[1].keys for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
