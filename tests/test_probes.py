"""Probes: scikit-learn's kNN and accuracies, separable images, a network left as it was."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.autograd.profiler import profile

from sela_cli import envelope, formats, interrupt, parallel, passes, probes, unfinished
from sela_cli.envelope import Provenance
from sela_cli.errors import BadData, CannotCreate, StoppedEarly, UsageError
from sela_cli.images.augment import ten_views
from sela_cli.images.batches import Images
from sela_cli.images.sources import Source, open_source
from sela_cli.networks import Network, build
from sela_cli.presets import protocol
from sela_cli.probes import (
    KnnRecipe,
    LinearProbe,
    LinearRecipe,
    holdout,
    plan,
    principal_components,
    probe_stage,
    recipes,
    top_hits,
    votes,
)
from sela_cli.progress import silent
from sela_cli.unfinished import Unfinished

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
        """Recipes from options by the names that `sela probe` gives them."""
        path = str(tmp_path / "probe.h5")
        linear, knn = recipes(options)
        stage = {name: options[name] for name in ("method", "layers", "force") if name in options}
        provenance = Provenance("test", {})
        return probe_stage(train, test, network, path, provenance, linear=linear, knn=knn, **stage)

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


def knn_scores(
    bank: Tensor, truth_N: Tensor, query: Tensor, classes: int, k: int, sigma: float
) -> Tensor:
    """One setting of weighted kNN."""
    similarity, nearest = probes.neighbours(bank, bank.norm(dim=1), query, k)
    return votes(similarity, truth_N[nearest], classes, sigma)


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


def as_features(monkeypatch: pytest.MonkeyPatch, *all_of: Tensor) -> list[Images]:
    """Images of two classes for each of the tensors, which is what networks make of them."""
    images = [coloured(len(each), seed, ("green", "red")) for seed, each in enumerate(all_of)]
    made = {each.dataset_id: points for each, points in zip(images, all_of, strict=True)}

    def forward(network: Network, of: Images, *_: Any, **__: Any) -> Iterator[list[Tensor]]:
        return ([block] for block in made[of.dataset_id].split(16))

    monkeypatch.setattr(probes, "forward", forward)
    return images


def test_knn_needs_the_bank_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """With principal components too: nothing else of its size is there at any time."""
    bank = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    images = as_features(monkeypatch, bank, bank[:40] + 0.1)
    monkeypatch.setattr(network, "width", 64)
    monkeypatch.setattr(probes, "_ROWS", 16)
    with profile(use_kineto=False, profile_memory=True) as seen:
        rows = probes.knn_rows(*images, network, KnnRecipe((1,), pca=8))
    large = [
        each.name for each in seen.function_events if each.self_cpu_memory_usage >= bank.nbytes
    ]
    assert large == ["aten::empty"] and len(rows) == 2


def test_a_signal_ends_the_search_and_its_progress_is_told(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.randn(9, network.width)
    images = as_features(monkeypatch, points, points + 0.1)
    monkeypatch.setattr(probes, "_ROWS", 4)
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int, note: str) -> None:
        if note == "nearest neighbours":
            told.append((done, total))

    probes.knn_rows(*images, network, KnnRecipe((1,)), progress=progress)
    assert told == [(4, 9), (8, 9), (9, 9)]
    told.clear()
    monkeypatch.setattr(interrupt, "requested", lambda: len(told) == 2)
    with pytest.raises(StoppedEarly):
        probes.knn_rows(*images, network, KnnRecipe((1,)), progress=progress)
    assert told == [(4, 9), (8, 9)]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_the_queries(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left out, none is counted twice, wherever the last block falls."""
    bank, classes_N, query = neighbours()
    truth_M = torch.arange(1000) % 5
    given = (bank, classes_N, query, truth_M, [(1, 0.1), (10, 0.5)])
    monkeypatch.setattr(probes, "_ROWS", 70)
    alone = probes.knn_hits(*given)
    monkeypatch.setattr(parallel, "size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(probes.knn_hits(*given))
    assert torch.equal(torch.stack(parts).sum(0), alone)
    assert all(bool((part[:, 0] < 0.7 * alone[:, 0]).all()) for part in parts)


def test_a_class_without_votes_is_not_among_the_five() -> None:
    """Of one neighbour the five highest classes are one."""
    bank, classes_N, query = neighbours()
    truth_M = torch.arange(1000) % 5
    (one, two) = probes.knn_hits(bank, classes_N, query, truth_M, [(1, 0.1), (2, 0.1)])
    assert one[0] == one[1] < 1000
    _, nearest = probes.neighbours(bank, bank.norm(dim=1), query, 2)
    assert two[1] == (classes_N[nearest] == truth_M[:, None]).any(1).sum() > one[1]


@pytest.mark.parametrize("classes", [3, 5, 8, 100])
def test_accuracies_are_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    truth_N, scores = rng.integers(classes, size=400), rng.normal(size=(400, classes))
    scores[np.arange(400), truth_N] += 1
    top1, top5 = top_hits(torch.from_numpy(scores), torch.from_numpy(truth_N)) / 400
    known = np.arange(classes)
    assert float(top1) == pytest.approx(top_k_accuracy_score(truth_N, scores, k=1, labels=known))
    expected = top_k_accuracy_score(truth_N, scores, k=5, labels=known) if classes > 5 else 1.0
    assert float(top5) == pytest.approx(expected)


@pytest.mark.parametrize("which", [0, 1])
def test_features_that_are_not_finite_are_bad_data(
    which: int, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their nearest neighbours would be of some class in any case."""
    points = [torch.randn(20, network.width) for _ in range(2)]
    points[which][17, 3] = (math.nan, math.inf)[which]
    images = as_features(monkeypatch, *points)
    with pytest.raises(BadData, match=rf"checkpoint.*'{which}/17' are not finite; use another"):
        probes.knn_rows(*images, network)


# ---- the stage --------------------------------------------------------------


def test_separable_images_are_told_apart_and_the_network_is_untouched(
    probe: Callable[..., list[dict[str, Any]]], network: Network, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rows = probe(coloured(48, 1), coloured(30, 2), epochs=6, batch_size=12, k=(1, 5), aug="none")
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
        digests.add(envelope.read_header(str(tmp_path / "probe.h5")).digest)
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
    which: int, probe: Callable[..., list[dict[str, Any]]], network: Network
) -> None:
    pair = [coloured(12, 1), coloured(6, 2)]
    pair[which].truth_N = None
    with pytest.raises(BadData, match="no true classes"):
        probe(*pair)
    with pytest.raises(BadData, match="no true classes"):
        plan(*pair, network, "both", "all", LinearRecipe(), KnnRecipe())


def test_images_without_a_class_are_counted_in_the_whole_folder(
    probe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Not only among those of a limit or of a holdout."""
    names = ["a/0.png", "b/0.png", "c/0.png", *(f"{number}.png" for number in range(5))]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = Images(open_source(str(tmp_path)), 32, np.arange(8))
    with pytest.raises(BadData, match="move or remove the 5 such"):
        probe(images.subset(np.arange(2)), images.subset(np.array([2])))


def test_classes_of_other_names_are_bad_data(
    probe: Callable[..., list[dict[str, Any]]], network: Network
) -> None:
    """They would all be counted as wrong, as of a network that has learned nothing."""
    train, test = coloured(12, 1), coloured(6, 2)
    test.classes = ("azul", "verde", "rojo")
    with pytest.raises(BadData, match="no class in common: one has 'blue', the other 'azul'"):
        probe(train, test)
    with pytest.raises(BadData, match="no class in common"):
        plan(train, test, network, "both", "all", LinearRecipe(), KnnRecipe())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers", "conv9"),
        ("layers", "conv1,fc6"),
        ("layers", "conv1,conv5,conv1"),
        ("method", "svm"),
        ("aug", "mirror"),
        ("k", (0,)),
        ("k", (-1,)),
        ("sigma", (0.0,)),
        ("sigma", (-0.1,)),
        ("pca", 0),
        ("pca", 13),
        ("lr", ()),
        ("lr", (0.1, 0.0)),
        ("lr", (0.1, 0.1)),
        ("crops", 5),
        ("validation", 1.0),
        ("lr_milestones", (10, 20, 30)),
        ("lr_milestones", (math.nan,)),
    ],
)
def test_options_without_meaning(
    option: str, value: Any, probe: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        probe(coloured(12, 1), coloured(6, 2), **{"epochs": 1, "batch_size": 6, option: value})
    assert not (tmp_path / "probe.h5").exists()


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"batch_size": 1}, {"weight_decay": -1.0}, {"weight_decay": math.nan}]
)
def test_a_number_out_of_range_is_named_by_its_option(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} {wrong[name]} "):
        LinearRecipe(**wrong).check()


def test_batches_that_leave_a_process_without_images_are_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 9)
    recipe = LinearRecipe(epochs=1, batch_size=8, aug="none")
    with (
        LinearProbe(network, ["conv1"], 3, recipe, "cpu", "float32") as probe,
        pytest.raises(UsageError, match=r"9 processes share batches of 8; .* --batch-size"),
    ):
        probe.fit(coloured(12, 1), silent, Unfinished("-", "probe", {}))


def test_linear_probes_have_their_next_batches_decoded_meanwhile(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ahead of the one at work, and none twice."""
    images, asked, seen = coloured(40, 1), [], []
    decoding = images._decoding
    monkeypatch.setattr(images, "_decoding", lambda rows_n: asked.append(1) or decoding(rows_n))
    recipe = LinearRecipe(epochs=1, batch_size=8)
    with LinearProbe(network, ["conv1"], 3, recipe, "cpu", "float32") as probe:
        probe.fit(images, lambda *_: seen.append(len(asked)), Unfinished("-", "probe", {}))
    assert seen == [3, 4, 5, 5, 5]


def test_rates_fall_tenfold_at_the_milestones(network: Network) -> None:
    rates: list[list[float]] = []
    recipe = LinearRecipe(epochs=4, lrs=(0.1, 0.03), milestones=(0.5, 0.75), batch_size=8)
    with LinearProbe(network, ["conv1"], 3, recipe, "cpu", "float32") as probe:

        def note(*_: Any) -> None:
            rates.append([group["lr"] for group in probe.optimizer.param_groups])

        probe.fit(coloured(8, 1), note, Unfinished("-", "probe", {}))
    falls = np.array([1, 1, 0.1, 0.01])[:, None]
    np.testing.assert_allclose(rates, falls * [0.1, 0.03])


def test_papers_pooling_leaves_about_9600_inputs() -> None:
    with torch.device("meta"):
        network = build("alexnet", 224, [2], seed=0)
        probe = LinearProbe(
            network, [*network.layers(), "features"], 10, LinearRecipe(), "meta", "float32"
        )
    widths = {name: linears[0].in_features for name, linears in probe.classifiers.items()}
    assert widths.pop("features") == 4096
    # Channels times the side that is left, squared.
    assert widths == {
        "conv1": 96 * 10**2,
        "conv2": 256 * 6**2,
        "conv3": 384 * 5**2,
        "conv4": 384 * 5**2,
        "conv5": 256 * 6**2,
    }
    assert all(9200 <= width <= 9600 for width in widths.values())
    pools = [module for module in probe.inputs.modules() if isinstance(module, nn.MaxPool2d)]
    windows = [(pool.kernel_size, pool.stride, pool.padding) for pool in pools]
    assert windows == [(6, 6, 3), (4, 4, 0), (3, 3, 1), (3, 3, 1), (2, 2, 0)]


@pytest.mark.parametrize("arch", ["alexnet-small", "resnet18", "resnet50", "resnet50-v2"])
def test_other_pooling_leaves_at_most_9600_inputs(arch: str) -> None:
    with torch.device("meta"):
        network = build(arch, 32, [2], seed=0)
        probe = LinearProbe(network, list(network.layers()), 10, LinearRecipe(), "meta", "float32")
    widths = [linears[0].in_features for linears in probe.classifiers.values()]
    assert all(1024 <= width <= 9600 for width in widths)


def test_alexnet_between_the_sizes_is_pooled_to_as_much_as_the_papers() -> None:
    """Its maps at 112 pixels are half as wide: the paper's kernels would leave a sixth."""
    with torch.device("meta"):
        network = build("alexnet-small", 112, [2], seed=0)
        probe = LinearProbe(network, list(network.layers()), 10, LinearRecipe(), "meta", "float32")
    widths = [linears[0].in_features for linears in probe.classifiers.values()]
    assert all(9200 <= width <= 9600 for width in widths)


# ---- stopped and given again ------------------------------------------------------


def test_stopped_after_every_step_it_goes_on_and_gives_the_same_digest(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the classifiers learn, and while they are measured."""
    whole, parts = str(tmp_path / "whole.h5"), str(tmp_path / "parts.h5")
    train, test = coloured(24, 1), coloured(12, 2)
    recipe = LinearRecipe(epochs=2, lrs=(0.1, 0.01), batch_size=8, milestones=(0.5,))

    def call(path: str, **options: Any) -> list[int]:
        counted: dict[str, list[int]] = defaultdict(list)
        probe_stage(
            *(train, test, network, path, Provenance("test", {})),
            method="linear",
            linear=options.get("linear", recipe),
            progress=lambda done, total, note: counted[note].append(done // 8),
        )
        return counted["linear classifiers"]

    assert call(whole) == [1, 2, 3, 4]
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    for last in ("step 1 of 4", "step 2 of 4", "step 3 of 4", "probe stopped"):
        with pytest.raises(StoppedEarly, match=last):
            call(parts)
        assert [path.name for path in tmp_path.glob("parts*")] == ["parts.h5.unfinished"]
    monkeypatch.setattr(interrupt, "requested", lambda: False)
    assert call(parts) == []
    assert envelope.read_header(parts).digest == envelope.read_header(whole).digest
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.h5"]


def test_killed_it_goes_on_from_the_last_state_saved(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = str(tmp_path / "whole.h5"), str(tmp_path / "parts.h5")
    recipe = LinearRecipe(epochs=2, lrs=(0.1,), batch_size=8, milestones=(0.5,))
    steps: list[int] = []

    def call(path: str, killed_at: int = 0) -> None:
        def progress(done: int, total: int, note: str) -> None:
            if note == "linear classifiers":
                steps.append(done // 8)
                if steps[-1] == killed_at:
                    raise KeyboardInterrupt

        stage = (coloured(24, 1), coloured(12, 2), network, path, Provenance("test", {}))
        probe_stage(*stage, method="linear", linear=recipe, progress=progress)

    call(whole)
    steps.clear()
    with monkeypatch.context() as patch:
        # Always due.
        patch.setattr(unfinished, "_SAVE_SECONDS", -1.0)
        for killed_at in (3, 6):
            with pytest.raises(KeyboardInterrupt):
                call(parts, killed_at)
    call(parts)
    # What was not saved yet is made again.
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]
    assert envelope.read_header(parts).digest == envelope.read_header(whole).digest
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.h5"]


def test_the_state_of_another_probe_is_not_taken_up(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = str(tmp_path / "probe.h5"), []
    train, test = coloured(24, 1), coloured(12, 2)

    def call(test: Images, **recipe: Any) -> None:
        probe_stage(
            *(train, test, network, path, Provenance("test", {})),
            method="linear",
            linear=LinearRecipe(epochs=2, batch_size=8, **recipe),
            force=True,
            progress=lambda done, total, note: notes.append(note),
        )

    renamed = coloured(12, 2)
    renamed.truth_N = renamed.truth_N[::-1].copy() if renamed.truth_N is not None else None
    for other in ({"lrs": (0.2,)}, {"seed": 1}, {"test": coloured(12, 3)}, {"test": renamed}):
        with monkeypatch.context() as patch, pytest.raises(StoppedEarly):
            patch.setattr(interrupt, "requested", lambda: True)
            call(test)
        notes.clear()
        call(**({"test": test} | other))
        assert notes.count("linear classifiers") == 6


@pytest.mark.parametrize("lost", ["totals", "classifiers.conv1.0.weight"])
def test_a_damaged_state_is_named(
    lost: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path / "probe.h5")

    def call() -> None:
        stage = (coloured(24, 1), coloured(12, 2), network, output, Provenance("test", {}))
        probe_stage(*stage, method="linear", linear=LinearRecipe(epochs=2, batch_size=8))

    with monkeypatch.context() as patch, pytest.raises(StoppedEarly):
        patch.setattr(interrupt, "requested", lambda: True)
        call()
    with h5py.File(f"{output}.unfinished", "r+") as file:
        del file[f"model/{lost}"]
    with pytest.raises(BadData, match=rf"probe\.h5\.unfinished.*{lost}"):
        call()
    Path(f"{output}.unfinished").write_bytes(b"no HDF5")
    with pytest.raises(BadData, match=r"probe\.h5\.unfinished"):
        call()
    assert not Path(output).exists()


# ---- several rates, ten crops, principal components ----------------------------


def test_a_rate_trains_the_same_alone_and_beside_others(network: Network) -> None:
    """One pass over the data for all rates changes none of them."""
    train = coloured(24, 1)

    def trained(*lrs: float) -> dict[float, Tensor]:
        recipe = LinearRecipe(epochs=2, lrs=lrs, batch_size=8)
        with LinearProbe(network, ["conv5"], 3, recipe, "cpu", "float32") as probe:
            probe.fit(train, silent, Unfinished("-", "probe", {}))
            weights = probe.classifiers["conv5"].parameters()
            return dict(zip(lrs, [w.detach() for w in weights if w.ndim == 2], strict=True))

    together = trained(0.1, 0.01, 0.001)
    for lr in together:
        assert torch.equal(trained(lr)[lr], together[lr])


def test_the_rate_is_chosen_on_held_out_training_images(
    probe: Callable[..., list[dict[str, Any]]],
) -> None:
    """The same choice whatever the test images' classes are."""
    lrs, train, test = (1e-7, 1.0), coloured(60, 1), coloured(30, 2)
    options = {"layers": "conv1,features", "method": "linear", "lr": lrs, "epochs": 3}
    options |= {"batch_size": 12, "aug": "none", "force": True, "validation": 0.2}
    rows = probe(train, test, **options)
    assert test.truth_N is not None
    test.truth_N = (test.truth_N + 1) % 3
    spoilt = probe(train, test, **options)
    for layer in ("conv1", "features"):
        tried, reported = (
            [r for r in rows if r["layer"] == layer and (r["split"] == "test") is last]
            for last in (False, True)
        )
        assert [(row["lr"], row["n"], row["split"]) for row in tried] == [
            (lr, 12, "validation 0.2") for lr in lrs
        ]
        (row,) = reported
        assert row["lr"] == max(tried, key=lambda row: row["top1"])["lr"]
    chosen = [[(row["layer"], row["lr"]) for row in each] for each in (rows, spoilt)]
    assert chosen[0] == chosen[1]
    # At 1e-7 the random start is all there is.
    assert dict(chosen[0][-1:]) == {"features": 1.0}


def test_what_has_diverged_has_no_accuracy_and_is_not_chosen(
    probe: Callable[..., list[dict[str, Any]]],
) -> None:
    options = {"method": "linear", "layers": "conv5", "epochs": 3, "batch_size": 12, "force": True}
    train, test = coloured(24, 1), coloured(9, 2)
    (row,) = probe(train, test, lr=(1e38,), **options)
    assert all(math.isnan(row[name]) for name in ("loss", "top1", "top5"))
    spoilt, good, chosen = probe(train, test, lr=(1e38, 1e-9), validation=0.2, **options)
    assert math.isnan(spoilt["top1"]) and 0 <= good["top1"] <= 1
    assert chosen["lr"] == 1e-9 and 0 <= chosen["top1"] <= 1


def test_ten_crops_give_the_mean_of_ten_views(network: Network) -> None:
    recipe = LinearRecipe(epochs=1, batch_size=10, crops=10)
    with LinearProbe(network, ["conv3"], 3, recipe, "cpu", "float32") as probe:
        images = coloured(3, 5)
        probe.inputs.eval()
        view = ten_views(images.batch(torch.arange(3)), 32)
        logits = probe._logits(view, {"conv3": [0.01]})["conv3", 0.01]
        mean_3C = torch.stack([logits[row::3] for row in range(3)]).mean(1)
        images.truth_N = mean_3C.argmax(1).numpy()
        assert probe.accuracies(images, {"conv3": [0.01]})["conv3", 0.01][0] == 1.0
        images.truth_N = mean_3C.argmin(1).numpy()
        assert probe.accuracies(images, {"conv3": [0.01]})["conv3", 0.01][0] == 0.0


def test_linear_probes_are_measured_without_keeping_their_logits(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of many images, classes and rates would fill memory."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def in_order(*given: Any) -> Iterator[list[Tensor]]:
        for _ in range(6):
            logits_nC = torch.randn(10, 3)
            made.append(weakref.ref(logits_nC))
            alive.append(sum(each() is not None for each in made))
            yield [logits_nC]

    monkeypatch.setattr(passes, "in_order", in_order)
    recipe = LinearRecipe(batch_size=10)
    with LinearProbe(network, ["conv3"], 3, recipe, "cpu", "float32") as probe:
        probe.accuracies(coloured(60, 5), {"conv3": [0.01]})
    # The one before is let go of when the next is there.
    assert len(alive) == 6 and max(alive) <= 3


def test_all_principal_components_keep_the_distances_and_few_are_orthogonal() -> None:
    bank, _, query = neighbours()
    whole, turned = principal_components(bank, query, 12)
    torch.testing.assert_close(
        torch.cdist(turned, whole), torch.cdist(query, bank), atol=1e-3, rtol=0
    )
    few, _ = principal_components(bank, query, 3)
    covariance = few.T @ few / len(few)
    variances = torch.linalg.eigvalsh(torch.cov(bank.T)).flip(0)[:3] * (299 / 300)
    torch.testing.assert_close(covariance, variances.diag(), atol=1e-3, rtol=1e-3)


def test_knn_sweeps_k_and_sigma_with_and_without_pca(
    probe: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = probe(coloured(24, 1), coloured(9, 2), method="knn", k=(5, 1), sigma=(0.1, 0.5), pca=4)
    assert [row["setting"] for row in rows] == [
        f"k={k} sigma={sigma}{pca}"
        for pca in ("", " pca=4")
        for k in (5, 1)
        for sigma in (0.1, 0.5)
    ]
    assert all(row["top1"] > 0.9 for row in rows)


def test_knn_reports_the_neighbours_that_there_are(
    probe: Callable[..., list[dict[str, Any]]],
) -> None:
    rows = probe(coloured(24, 1), coloured(9, 2), method="knn", k=(200, 50, 24, 5))
    assert [row["setting"] for row in rows] == ["k=24 sigma=0.1", "k=5 sigma=0.1"]


# ---- the paper's protocols -------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet-linear", "places-linear"])
def test_large_scale_protocols_follow_the_network(name: str) -> None:
    """AlexNet: 36 epochs at 0.01 of conv1..conv5; ResNet: 146 at 0.1 of the pooled features."""
    linear, _ = recipes(protocol(name, "alexnet"))
    assert (linear.epochs, linear.lrs, linear.batch_size, linear.crops) == (36, (0.01,), 192, 10)
    assert [round(linear.epochs * part) for part in linear.milestones] == [10, 20, 30]
    assert protocol(name, "alexnet")["layers"] == "all"
    linear, _ = recipes(protocol(name, "resnet50"))
    assert (linear.epochs, linear.lrs, linear.batch_size) == (146, (0.1,), 1024)
    assert [round(linear.epochs * part) for part in linear.milestones] == [85, 128]
    assert protocol(name, "resnet50")["layers"] == "features" and linear.weight_decay == 0


def test_knn_protocol_sweeps() -> None:
    _, knn = recipes(protocol("knn", "alexnet"))
    assert (knn.ks, knn.sigmas, knn.pca) == ((200, 50, 10, 5, 1), (0.1, 0.5), 128)


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


def test_one_image_is_not_held_out_from_itself() -> None:
    """The advice is of use wherever images are split, with or without an option of its own."""
    with pytest.raises(BadData, match=r"one image can't be split.*; use more images"):
        holdout(coloured(1, 1), 0.2, seed=0)


def test_holdout_is_a_function_of_the_seed() -> None:
    images = coloured(60, 1)
    parts = [holdout(images, 0.3, seed)[1].keys for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
