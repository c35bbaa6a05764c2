"""The label stage: its options, its memory, and many processes, on files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Barrier, current_thread
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax

from sela_cli import assignment, envelope, formats, tiles
from sela_cli.assignment import Bounds
from sela_cli.budget import Budget
from sela_cli.errors import BadData, StoppedEarly, UsageError
from sela_cli.labels import LabelSettings, label_stage, summary, warning
from sela_cli.score_rows import ScoreRows
from sela_cli.scores import Features, Matrix, Product, open_scores
from sela_cli.shares import marginal

ROOT = Path(__file__).parent.parent


def scores(count: int, clusters: int, seed: int = 0) -> np.ndarray:
    """Float32 scores of a few features, so that clusters correlate."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, 6))
    heads = np.random.default_rng(99).standard_normal((6, clusters))
    return (features @ heads).astype(np.float32)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "scores.npy"
    np.save(path, scores(600, 12))
    return path


def label(path: Path, **options: object) -> formats.HeadLabels:
    output = str(path.parent / f"labels{len(list(path.parent.iterdir()))}.h5")
    init = options.pop("init", None)
    label_stage(str(path), output, LabelSettings(**options), init=init)  # type: ignore[arg-type]
    return formats.read_labels(output).heads[0]


@pytest.mark.parametrize("solver", ["newton", "lbfgs", "sinkhorn"])
def test_every_solver_ends_at_the_same_labels(matrix: Path, solver: str) -> None:
    found = label(matrix, solver=solver, tol=1e-8, max_iter=20_000)
    wanted = label(matrix, tol=1e-8)
    assert found.attributes["converged"]
    assert (found.labels_N == wanted.labels_N).all()
    np.testing.assert_allclose(found.potentials_K, wanted.potentials_K, atol=1e-4)


def test_fixed_labels_follow_the_saved_potentials(matrix: Path) -> None:
    solved = label(matrix, assign="argmax", lamb=10.0)
    again = label(matrix, assign="fixed", init=str(next(matrix.parent.glob("labels*.h5"))))
    assert (again.labels_N == solved.labels_N).all()
    np.save(matrix.parent / "new.npy", scores(50, 12, seed=5))
    new = label(
        matrix.parent / "new.npy",
        assign="fixed",
        init=str(next(matrix.parent.glob("labels1.h5"))),
    )
    expected = (10.0 * scores(50, 12, seed=5) + solved.potentials_K).argmax(1)
    assert (new.labels_N == expected).all()
    assert new.potentials_K.tolist() == solved.potentials_K.tolist()


def test_a_single_new_row_can_be_labelled(matrix: Path) -> None:
    label(matrix)
    np.save(matrix.parent / "one.npy", scores(1, 12, seed=6))
    init = str(next(matrix.parent.glob("labels*.h5")))
    assert label(matrix.parent / "one.npy", assign="fixed", init=init).labels_N.shape == (1,)


@pytest.mark.parametrize(("low", "high"), [(40, 60), (None, 55), (45, None), (50, 50), (0, 600)])
def test_sizes_keep_to_their_bounds(matrix: Path, low: int | None, high: int | None) -> None:
    head = label(matrix, min_size=low, max_size=high)
    assert head.usage_K.min() >= (low or 0) and head.usage_K.max() <= (high or 600)
    objective, bound = head.attributes["objective"], head.attributes["lower-bound"]
    assert bound - 1e-9 <= objective <= bound * (1 + 1e-4)
    equal = label(matrix)
    assert objective <= equal.attributes["objective"] + 1e-4


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_rows_that_round_otherwise_in_every_batch_are_balanced(
    seed: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of features: what a row loses depends on the rows that are read with it."""
    rng = np.random.default_rng(seed)
    features_ND = 10 * rng.standard_normal((90, 64)).clip(0).astype(np.float32)
    weight_KD = rng.standard_normal((8, 64)).astype(np.float32)
    matrix = Matrix(features_ND.shape, lambda rows: features_ND[rows], "features")
    product = Product(Features(matrix), weight_KD, np.zeros(8, np.float32), "head")
    rows = ScoreRows(product, "scores")
    monkeypatch.setattr(assignment, "_PER_MOVE", 1)
    monkeypatch.setattr(assignment, "_PER_CLUSTER", 1)
    bounds = assignment.size_bounds(90, np.full(8, 1 / 8))
    prices_K = torch.from_numpy(rng.normal(size=8))
    labels_N, found_K = assignment.balanced(rows, prices_K, bounds, memory=memory)
    sizes_K = np.bincount(labels_N, minlength=8)
    assert (bounds.low_K <= sizes_K).all() and (sizes_K <= bounds.high_K).all()
    found = assignment.certified(rows, found_K, bounds, labels_N)
    assert found.objective == pytest.approx(found.lower_bound, abs=1e-5)


@pytest.mark.parametrize("largest", [1e30, 1e39, 1e300])
def test_scores_beyond_single_precision_are_balanced(tmp_path: Path, largest: float) -> None:
    """And how far the labels may be from the best is told."""
    array = np.random.default_rng(0).normal(size=(300, 10)) * largest
    np.save(tmp_path / "scores.npy", array)
    head = label(tmp_path / "scores.npy", max_iter=50)
    assert np.bincount(head.labels_N).tolist() == [30] * 10
    loss_NK = array.max(1, keepdims=True) - array
    of_rows, places = linear_sum_assignment(np.repeat(loss_NK, 30, 1))
    best = loss_NK[of_rows, places // 30].mean()
    found = loss_NK[np.arange(300), head.labels_N].mean()
    assert head.attributes["lower-bound"] <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found <= head.attributes["objective"] * (1 + 1e-9)


def test_loose_bounds_are_no_bounds(matrix: Path) -> None:
    head = label(matrix, min_size=0, max_size=600)
    assert (head.labels_N == np.load(matrix).argmax(1)).all()


@pytest.mark.parametrize(("low", "high"), [(51, None), (None, 49), (30, 20)])
def test_impossible_sizes_are_refused(matrix: Path, low: int | None, high: int | None) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        label(matrix, min_size=low, max_size=high)


@pytest.mark.parametrize("rows", [1, 30])
def test_fewer_rows_than_clusters_are_given_one_each(tmp_path: Path, rows: int) -> None:
    """As the assignment problem gives them."""
    array = scores(rows, 100)
    np.save(tmp_path / "few.npy", array)
    head = label(tmp_path / "few.npy", max_size=1)
    assert head.usage_K.max() == 1
    chosen = linear_sum_assignment(-array)[1]
    best, got = (array[range(rows), labels_N].mean() for labels_N in (chosen, head.labels_N))
    assert got == pytest.approx(best, abs=1e-4)


def test_shares_between_bounds_solve_their_own_equations() -> None:
    """r_k is c h_k, with one c wherever no bound is met."""
    array = scores(500, 7)
    rows = ScoreRows(_matrix(array), "scores")
    between = assignment.between(rows, Bounds(np.full(7, 50), np.full(7, 90)))
    r_K = between.at(torch.zeros(7, dtype=torch.float64)).numpy()
    h_K = np.bincount(array.argmax(1), minlength=7) / 500
    free = (r_K > 50.01 / 500) & (r_K < 89.99 / 500)
    assert 0 < free.sum() < 7 and r_K.sum() == pytest.approx(1)
    assert r_K.min() >= 0.1 - 1e-9 and r_K.max() <= 0.18 + 1e-9
    ratio_K = r_K / h_K
    np.testing.assert_allclose(ratio_K[free], ratio_K[free][0], rtol=1e-9)
    assert (ratio_K[r_K <= 50.01 / 500] >= ratio_K[free][0]).all()
    assert (ratio_K[r_K >= 89.99 / 500] <= ratio_K[free][0]).all()


def _matrix(array: np.ndarray):  # type: ignore[no-untyped-def]
    return Matrix(array.shape, lambda rows: array[rows], "scores")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_kept_and_rows_streamed_give_the_same_bits(tmp_path: Path, dtype: type) -> None:
    np.save(tmp_path / "scores.npy", scores(90_000, 64).astype(dtype))
    kept = label(tmp_path / "scores.npy", assign="argmax")
    # Too little for the rows, enough for all else.
    streamed = label(tmp_path / "scores.npy", assign="argmax", max_memory=735 << 20)
    assert (kept.labels_N == streamed.labels_N).all()
    assert kept.potentials_K.tolist() == streamed.potentials_K.tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f4"])
@pytest.mark.parametrize("name", ["scores.npy", "scores.h5"])
def test_stored_rows_come_back(tmp_path: Path, name: str, dtype: str) -> None:
    """Slices and scattered rows, read past the libraries."""
    array = scores(300, 5).astype(dtype)
    path = tmp_path / name
    if name.endswith("npy"):
        np.save(path, array)
    else:
        with h5py.File(path, "w") as file:
            file["scores"] = array
    with open_scores(str(path)) as opened:
        read = opened.heads[0].read
        for rows in (slice(0, 300), slice(17, 18), np.array([0, 1, 2, 9, 200, 299]), np.array([5])):
            np.testing.assert_array_equal(read(rows), array[rows])


def test_one_head_is_labelled_and_the_others_kept(tmp_path: Path) -> None:
    path = str(tmp_path / "logits.h5")
    keys = [str(row) for row in range(200)]
    heads = [scores(200, 4, seed) for seed in (1, 2)]
    with formats.create_logits(
        path,
        keys,
        np.arange(200),
        envelope.Provenance("test", {}),
        columns={"logits/0": 4, "logits/1": 4},
        dtype="float32",
    ) as datasets:
        for dataset, head in zip(datasets.values(), heads, strict=True):
            dataset[:] = head
    before = str(tmp_path / "before.h5")
    label_stage(path, before, LabelSettings(assign="random"))
    after = str(tmp_path / "after.h5")
    table = tmp_path / "after.csv"
    relabelled = label_stage(path, after, LabelSettings(), init=before, head=1, csv_path=str(table))
    relabelled.heads[0].attributes["converged"] = False
    assert warning(relabelled, after) and warning(relabelled, after, 1) is None
    kept, solved = formats.read_labels(after).heads
    written_NT = np.loadtxt(table, int, delimiter=",", skiprows=1, usecols=(1, 2))
    assert ([kept.labels_N, solved.labels_N] == written_NT.T).all()
    assert (kept.labels_N == formats.read_labels(before).heads[0].labels_N).all()
    whole = str(tmp_path / "whole.h5")
    label_stage(path, whole, LabelSettings())
    assert (solved.labels_N == formats.read_labels(whole).heads[1].labels_N).all()
    with pytest.raises(UsageError, match="kmeans"):
        label_stage(path, after, LabelSettings(method="kmeans"), init=before, head=1, force=True)


@pytest.mark.parametrize("memory", [4 << 30, 704 << 20])
def test_every_byte_that_is_read_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Kept in memory, and read again in each pass."""
    np.save(tmp_path / "scores.npy", scores(40_000, 32))
    read = os.preadv
    counted: list[int] = []

    def preadv(*arguments: Any) -> int:
        counted.append(read(*arguments))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    head = label(tmp_path / "scores.npy", assign="argmax", max_memory=memory)
    assert head.attributes["bytes-read"] == sum(counted) >= 4 * 40_000 * 32


def factored(path: Path, dtype: str = "float16") -> str:
    """Features and three heads."""
    rng = np.random.default_rng(4)
    heads = [
        (rng.standard_normal((clusters, 12)).astype(np.float32), np.zeros(clusters, np.float32))
        for clusters in (20, 24, 28)
    ]
    keys = [str(row) for row in range(20_000)]
    with formats.create_logits(
        str(path),
        keys,
        np.arange(len(keys)),
        envelope.Provenance("test", {}),
        columns={"features": 12},
        dtype=dtype,
        heads=heads,
    ) as datasets:
        datasets["features"][:] = rng.standard_normal((len(keys), 12))
    return str(path)


@pytest.mark.parametrize("memory", [4 << 30, 704 << 20])
def test_features_are_read_once_for_all_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Beside the scores of a head, and where those do not fit; labels are the same bits."""
    path = factored(tmp_path / "features.h5")
    settings = LabelSettings(assign="argmax", max_memory=memory)
    once = label_stage(path, str(tmp_path / "once.h5"), settings).heads
    monkeypatch.setattr(Features, "keep", lambda self, device: None)
    again = label_stage(path, str(tmp_path / "again.h5"), settings).heads
    size = 20_000 * 12 * 2
    assert [head.attributes["bytes-read"] for head in once] == [size, 0, 0]
    assert all(head.attributes["bytes-read"] >= size for head in again)
    for kept, read in zip(once, again, strict=True):
        assert (kept.labels_N == read.labels_N).all()
        assert kept.potentials_K.tolist() == read.potentials_K.tolist()


def test_the_status_says_why_a_solve_ended(matrix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert label(matrix).attributes["status"] == "converged"
    assert label(matrix, max_iter=2, tol=1e-12).attributes["status"] == "max-iter"
    assert label(matrix, assign="random").attributes["status"] == "unsolved"
    monkeypatch.setattr("sela_cli.interrupt.requested", lambda: True)
    assert label(matrix, tol=1e-12).attributes["status"] == "stopped"


def test_a_signal_while_sizes_are_balanced_leaves_labels_to_go_on_from(
    matrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that rows prefer, and said to be."""
    wanted = label(matrix)
    with monkeypatch.context() as patch:

        def stopped(*arguments: Any, progress: Any, **options: Any) -> None:
            patch.setattr("sela_cli.interrupt.requested", lambda: True)
            progress(1)

        patch.setattr(assignment, "balanced", stopped)
        part = label(matrix)
    assert part.attributes["assign"] == "argmax" and part.attributes["status"] == "stopped"
    assert not part.attributes["converged"]
    (before,) = (
        path
        for path in matrix.parent.glob("labels*.h5")
        if formats.read_labels(str(path)).heads[0].attributes["status"] == "stopped"
    )
    whole = label(matrix, init=str(before))
    assert whole.attributes["converged"] and whole.attributes["n-iters"] == 1
    assert (whole.labels_N == wanted.labels_N).all()


def test_a_gap_is_told_of_balanced_labels_only(matrix: Path, tmp_path: Path) -> None:
    """Labels of any size can be better than the best balanced ones."""
    for assign in ("balanced", "argmax"):
        labels = label_stage(
            str(matrix), str(tmp_path / f"{assign}.h5"), LabelSettings(assign=assign)
        )
        (values,) = summary(labels, "labels.h5")[0]["heads"]
        assert ("gap" in values) == (assign == "balanced")


def test_output_never_takes_the_place_of_the_scores(matrix: Path, tmp_path: Path) -> None:
    before = matrix.read_bytes()
    same, labels = str(tmp_path / "." / "scores.npy"), str(tmp_path / "labels.h5")
    (tmp_path / "link.npy").symlink_to(matrix)
    for output, table in ((same, None), (labels, str(matrix)), (labels, f"{tmp_path}/./labels.h5")):
        for spec in (str(matrix), str(tmp_path / "link.npy")):
            with pytest.raises(UsageError, match=r"name another output|name two files"):
                label_stage(spec, output, LabelSettings(), csv_path=table, force=True)
    assert matrix.read_bytes() == before


@pytest.mark.parametrize("text", ["1 2 1\n", "1,2,1", "\ufeff1\r\n2\r\n1\r\n", "\ufeff1, 2, 1,"])
def test_weights_may_come_from_a_spreadsheet(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights.csv").write_text(text, "utf-8")
    assert marginal(str(tmp_path / "weights.csv"), 3).tolist() == [0.25, 0.5, 0.25]


@pytest.mark.filterwarnings("error")
def test_a_marginal_of_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").touch()
    with pytest.raises(BadData, match="0 weights for 3 clusters"):
        marginal(str(tmp_path / "weights.txt"), 3)


def test_clusters_that_nobody_wants_stay_empty_within_bounds(tmp_path: Path) -> None:
    """Against scipy's matching, whose sizes may be anything from none to fifty."""
    scores_NK = np.random.default_rng(0).normal([5.0, 4.0, 0.0, 0.0], 0.3, (100, 4))
    np.save(tmp_path / "scores.npy", scores_NK)
    head = label(tmp_path / "scores.npy", max_size=50)
    assert head.usage_K.tolist() == [50, 50, 0, 0]
    cost_NM = np.repeat(-log_softmax(scores_NK, axis=1), 50, axis=1)
    best = cost_NM[linear_sum_assignment(cost_NM)].mean()
    assert head.attributes["objective"] == pytest.approx(best, rel=1e-3)


def test_kmeans_is_a_method_of_the_command(matrix: Path) -> None:
    head = label(matrix, method="kmeans", clusters=(5,))
    assert head.attributes["assign"] == "kmeans" and len(head.usage_K) == 5


@pytest.mark.parametrize(
    "option",
    [
        {"assign": "argmax"},
        {"marginal": "zipf:1"},
        {"min_size": 3},
        {"max_size": 300},
        {"input_kind": "probabilities"},
        {"solver": "lbfgs"},
        {"lamb": 10.0},
        {"tol": 1e-3},
        {"max_memory": 1 << 30},
    ],
)
def test_kmeans_refuses_what_it_would_ignore(matrix: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(option)).replace("_", "-")):
        label(matrix, method="kmeans", **option)


@pytest.mark.parametrize(
    "option",
    [
        {"marginal": "zipf:1"},
        {"min_size": 3},
        {"max_size": 300},
        {"solver": "lbfgs"},
        {"lamb": 10.0},
        {"tol": 1e-3},
        {"max_iter": 5},
    ],
)
@pytest.mark.parametrize(("assign", "named"), [("random", "--assign random"), ("fixed", "--fixed")])
def test_labels_that_no_solve_makes_refuse_its_options(
    assign: str, named: str, option: dict[str, Any]
) -> None:
    refused = next(iter(option)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{refused} is not for {named}; drop"):
        LabelSettings(assign=assign, **option).check()


def test_random_labels_have_no_kind_of_input_and_fixed_ones_no_kmeans() -> None:
    with pytest.raises(UsageError, match="--max-memory is not for --assign random"):
        LabelSettings(assign="random", max_memory=1 << 30).check()
    with pytest.raises(UsageError, match="--input-kind is not for --assign random"):
        LabelSettings(assign="random", input_kind="probabilities").check()
    LabelSettings(assign="fixed", input_kind="probabilities").check()
    with pytest.raises(UsageError, match="--fixed is not for --method kmeans"):
        LabelSettings(assign="fixed", method="kmeans").check()


def test_kmeans_ends_at_a_signal(matrix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sela_cli.interrupt._requested", True)
    with pytest.raises(StoppedEarly, match="clustering"):
        label(matrix, method="kmeans")


@pytest.mark.parametrize("seed", [0, (1 << 32) - 1, (1 << 63) - 1])
def test_kmeans_takes_any_seed(matrix: Path, seed: int) -> None:
    labels = label_stage(
        str(matrix),
        str(matrix.parent / "k.h5"),
        LabelSettings(method="kmeans", clusters=(3, 3), seed=seed),
    )
    assert [head.usage_K.sum() for head in labels.heads] == [600, 600]


def test_kmeans_that_was_stopped_early_converges_with_more_iterations(matrix: Path) -> None:
    def run(most: int) -> formats.Labels:
        settings = LabelSettings(method="kmeans", max_iter=most)
        return label_stage(str(matrix), str(matrix.parent / f"k{most}.h5"), settings)

    problem = warning(run(1), "labels.h5")
    assert (
        problem is not None
        and "--max-iter" in str(problem.mend)
        and "--init" not in str(problem.mend)
    )
    assert warning(run(300), "labels.h5") is None


def test_what_goes_on_in_vain_is_not_advised(matrix: Path) -> None:
    settings = LabelSettings(max_iter=1, tol=1e-12)
    labels = label_stage(str(matrix), str(matrix.parent / "one.h5"), settings)
    for residuals, goes_on in (([0.2], True), ([0.2, 0.1], True), ([0.1, 0.1], False)):
        for head in labels.heads:
            head.trace["residual"] = np.repeat(residuals, 10)
        problem = warning(labels, "labels.h5")
        assert problem is not None and ("--init" in str(problem.mend)) == goes_on


def test_kmeans_of_one_row(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", [[3.0, 1.0]])
    head = label(tmp_path / "one.npy", method="kmeans", clusters=(1,))
    assert head.labels_N.tolist() == [0]


def test_too_little_memory_is_told_with_what_is_enough(matrix: Path) -> None:
    """For all that is there, not for the matrices of K x K alone."""
    for assign in ("balanced", "argmax"):
        with pytest.raises(UsageError, match="--max-memory 10M is too little") as refused:
            label(matrix, assign=assign, max_memory=10 << 20)
        allowed = re.search(r"allow (\d+)M", str(refused.value))
        assert allowed and int(allowed[1]) > 500
        label(matrix, assign=assign, max_memory=int(allowed[1]) << 20)


def test_probabilities_below_the_normal_numbers_of_float32_are_not_zero(tmp_path: Path) -> None:
    """A softmax of a confident network has such; workers flush them elsewhere."""
    shares = np.array([[1, 1e-40, 0], [1, 1e-40, 0], [1, 1e-42, 1e-41]], np.float32)
    for name, array in {"narrow": shares, "wide": shares.astype(np.float64)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    narrow, wide = (
        label(tmp_path / f"{name}.npy", input_kind="probabilities") for name in ("narrow", "wide")
    )
    assert narrow.labels_N.tolist() == wide.labels_N.tolist() == [1, 0, 2]
    for name in ("objective", "lower-bound"):
        assert narrow.attributes[name] == pytest.approx(wide.attributes[name], rel=1e-6)


@pytest.mark.parametrize("masked", [1, 2])
@pytest.mark.parametrize("mask", [-1e30, -1e38, -1e39, -1e300, float(np.finfo(np.float64).min)])
def test_masked_columns_that_have_to_be_filled(mask: float, masked: int, tmp_path: Path) -> None:
    """Such a solve need not converge, and the masks alone matter to the objective."""
    array = np.random.default_rng(0).random((60, 4))
    array[:, -masked:] = mask
    np.save(tmp_path / "scores.npy", array)
    head = label(tmp_path / "scores.npy", max_iter=50)
    assert np.bincount(head.labels_N).tolist() == [15] * 4
    assert np.isfinite(head.potentials_K).all()
    assert head.attributes["lower-bound"] <= head.attributes["objective"] * (1 + 1e-9)


def test_scores_on_both_ends_of_the_numbers(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((60, 4))
    array[0, :2] = 1e308, -1e308
    np.save(tmp_path / "scores.npy", array)
    head = label(tmp_path / "scores.npy")
    assert head.attributes["converged"] and head.labels_N[0] == 0


@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("begun", [False, True])
def test_no_more_iterations_than_are_allowed(most: int, begun: bool, tmp_path: Path) -> None:
    """Of few rows, all are annealed on."""
    np.save(tmp_path / "scores.npy", 8 * scores(600, 12))
    np.save(tmp_path / "others.npy", 8 * scores(600, 12, seed=1))
    init = str(tmp_path / "others.h5") if begun else None
    if init:
        label_stage(str(tmp_path / "others.npy"), init, LabelSettings())
    head = label(tmp_path / "scores.npy", max_iter=most, tol=1e-12, init=init)
    assert head.attributes["n-iters"] <= most


def test_memory_that_is_too_little_is_told_as_it_was_given() -> None:
    for given, most in (("16384M", 16 << 30), ("0.001M", 1 << 10), ("700.5M", 1401 << 19)):
        with pytest.raises(UsageError, match=f"--max-memory {given} is too little"):
            Budget(1 << 40, 10, most, newton=True).check(balanced=True)


def test_scores_that_can_only_be_read_whole_count_as_memory(tmp_path: Path) -> None:
    """Compressed ones are not kept a second time where that is too much, and refused where
    they are too much themselves."""
    stored = scores(30_000, 100).astype(np.float32)
    np.savez_compressed(tmp_path / "scores.npz", scores=stored)
    np.save(tmp_path / "scores.npy", stored)
    size, least = stored.nbytes >> 20, 703
    with pytest.raises(UsageError, match="written by numpy"):
        label(tmp_path / "scores.npz", assign="argmax", max_memory=least << 20)
    read = label(tmp_path / "scores.npz", assign="argmax", max_memory=least + size + 2 << 20)
    assert read.attributes["converged"]
    by_parts = label(tmp_path / "scores.npy", assign="argmax", max_memory=least << 20)
    assert by_parts.attributes["converged"]


def test_solver_and_memory_are_the_same_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the largest preset, with the memory that is allowed by default."""
    budget, found = Budget(1_281_167, 3000, LabelSettings().max_memory, newton=True), []
    for threads in (1, 256):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((budget.square, budget.unused))
    assert found[0] == found[1] and found[0][0] and found[0][1] > 1 << 30


def test_no_more_workers_than_asked_for() -> None:
    """However many threads there are."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        names = set(tiles.map_in_pool(lambda item: current_thread().name, range(500), tiles.CPU, 3))
    finally:
        torch.set_num_threads(before)
    assert 1 <= len(names) <= 3


def test_a_gpu_is_read_for_by_several_threads() -> None:
    """Whatever torch has: torchrun gives it one."""
    before, all_there = torch.get_num_threads(), Barrier(4)

    def work(item: int) -> str:
        all_there.wait(timeout=60)
        return current_thread().name

    try:
        torch.set_num_threads(1)
        names = set(tiles.map_in_pool(work, range(4), torch.device("cuda")))
    finally:
        torch.set_num_threads(before)
    assert len(names) == 4


def test_features_on_a_gpu_take_nothing_of_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[torch.device] = []
    features = SimpleNamespace(shape=(100, 8), size=4, keep=kept.append)
    given: Any = SimpleNamespace(features=features, heads=[None, None])
    monkeypatch.setattr(Budget, "spare", lambda budget, device: 1 << 30)
    budget = Budget(100, 5, 1 << 32, newton=True)
    assert budget.keep_features(given, torch.device("cuda")) == 0
    assert budget.keep_features(given, tiles.CPU) > 100 * 8 * 4
    assert kept == [torch.device("cuda"), tiles.CPU]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_some_of_what_a_device_keeps_are_no_copy(dtype: torch.dtype) -> None:
    whole = tiles.Resident(torch.randn(9, 4).to(dtype))
    some, part = whole.rows(slice(2, 7)), tiles.Part(whole, 2, 7)
    assert some.shape == part.shape == (5, 4)
    assert torch.equal(some.tile(1, 4), part.tile(1, 4))
    rows_n = np.array([0, 3])
    assert torch.equal(some.take(rows_n), part.take(rows_n))
    assert some.stored_NK.data_ptr() == whole.stored_NK[2:].data_ptr()


def run_label(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sela_cli", "label", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("assign", ["balanced", "argmax"])
def test_two_processes_label_as_one(tmp_path: Path, assign: str) -> None:
    """Large enough for samples; by gloo, started as a user would."""
    np.save(tmp_path / "scores.npy", scores(40_001, 16))
    files = [str(tmp_path / name) for name in ("one.h5", "two.h5")]
    launchers = ((), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    for output, launcher in zip(files, launchers, strict=True):
        done = run_label(
            str(tmp_path / "scores.npy"), "-o", output, "--assign", assign, "--tol", "1e-6",
            launcher=launcher,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (formats.read_labels(path).heads[0] for path in files)
    np.testing.assert_allclose(one.potentials_K, two.potentials_K, atol=1e-2)
    assert (one.labels_N == two.labels_N).mean() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "solver"), [(1, "auto"), (1000, "lbfgs")])
def test_more_processes_than_rows(scale: int, solver: str, tmp_path: Path) -> None:
    """The share of one of them is empty; and without annealing one cluster is, at first."""
    np.save(tmp_path / "scores.npy", [[9.0 * scale, 0.0], [8.0 * scale, 0.0]])
    done = run_label(
        str(tmp_path / "scores.npy"), "-o", str(tmp_path / "labels.h5"), "--solver", solver,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    head = formats.read_labels(str(tmp_path / "labels.h5")).heads[0]
    assert head.labels_N.tolist() == [0, 1]


@pytest.mark.slow
def test_what_one_process_finds_is_no_bug_of_the_others(tmp_path: Path) -> None:
    bad = scores(200, 4)
    bad[150] = np.nan
    np.save(tmp_path / "scores.npy", bad)
    done = run_label(
        str(tmp_path / "scores.npy"), "-o", str(tmp_path / "labels.h5"),
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "labels.h5").exists()
    assert "row 150: NaN" in done.stderr and "a bug" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's accounting")
def test_memory_stays_within_what_was_allowed(tmp_path: Path) -> None:
    """A file of more than the limit leaves the process below it."""
    path = tmp_path / "scores.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (250_000, 1000))
    for start in range(0, len(array), 10_000):
        array[start : start + 10_000] = scores(10_000, 1000, seed=start)
    array.flush()
    del array
    # Not ru_maxrss: that of a child counts what its parent was before exec.
    code = (
        "import sys; from sela_cli.cli import main\n"
        "try: main()\n"
        "finally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [
            sys.executable, "-c", code, "label", str(path), "-o", str(tmp_path / "labels.h5"),
            "--max-memory", "900M", "--assign", "argmax", "--lamb", "1", "-q",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.stat().st_size > 900 << 20
    assert int(done.stderr.split()[-1]) << 10 <= 900 << 20


def test_torch_threads_are_left_as_they_were(matrix: Path) -> None:
    before = torch.get_num_threads()
    label(matrix)
    assert torch.get_num_threads() == before
