"""The label solve and the assignment, against closed forms and independent solvers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog, minimize
from scipy.special import log_softmax, logsumexp, softmax
from torch import Tensor

from sela_cli import assignment, lbfgs, newton, semidual, sinkhorn, tiles
from sela_cli.curvature import Products
from sela_cli.dense import DensePlan
from sela_cli.marginals import Between
from sela_cli.plans import WHOLE, Take
from sela_cli.semidual import Point, Problem, Solution, laplacian, soft_sizes
from sela_cli.shares import marginal
from sela_cli.tiles import CPU, InMemory, Rows, by_itself, map_in_pool

Solver = Callable[..., Solution]


def by(module: ModuleType, **how: Any) -> Solver:
    """A solver as a function of the rows and all else of a problem."""

    def solve(
        rows: Rows,
        marginal_K: Tensor,
        lamb: float,
        tol: float,
        max_iter: int,
        init_K: Tensor | None = None,
        **hooks: Any,
    ) -> Solution:
        problem = Problem(rows, marginal_K, lamb, tol, max_iter, **how, **hooks)
        return module.solve(problem, init_K)

    solve.__name__ = "-".join([module.__name__.rpartition(".")[2], *how])
    return solve


by_sinkhorn, by_newton, by_lbfgs = by(sinkhorn), by(newton), by(lbfgs)
by_products = by(newton, square=False)
SOLVERS = [by_sinkhorn, by_newton, by_products, by_lbfgs]


class ArrayRows:
    """An array in memory as rows of scores."""

    def __init__(self, scores_NK: np.ndarray) -> None:
        self.scores_NK = scores_NK
        self.shape = scores_NK.shape
        self.device = torch.device("cpu")

    def tile(self, start: int, stop: int, dtype: torch.dtype | None = torch.float64) -> Tensor:
        return self.take(np.arange(start, stop), dtype)

    def take(self, rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        scores_nK = torch.from_numpy(self.scores_NK[rows_n].astype(np.float64))
        if dtype is None:
            return scores_nK
        return (scores_nK - scores_nK.amax(1, keepdim=True)).to(dtype)


def logits(count: int, clusters: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Scores with structure: a few features times random heads, so that clusters correlate."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, 8))
    return scale * features @ rng.standard_normal((8, clusters)) / 8**0.5


def uniform(clusters: int) -> Tensor:
    return marginal("uniform", clusters)


def shares(scores_NK: np.ndarray, lamb: float, a_K: Tensor) -> np.ndarray:
    """Soft cluster shares, by scipy."""
    return softmax(lamb * scores_NK + a_K.numpy(), axis=1).mean(0)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("kind", ["uniform", "zipf:1", "gaussian:0.3"])
def test_soft_sizes_reach_the_marginal(solve: Solver, kind: str) -> None:
    scores_NK = logits(300, 7)
    r_K = marginal(kind, 7)
    solution = solve(ArrayRows(scores_NK), r_K, 10.0, 1e-8, 5000)
    assert solution.converged
    np.testing.assert_allclose(shares(scores_NK, 10.0, solution.potentials_K), r_K, atol=2e-8)


@pytest.mark.parametrize("solve", SOLVERS)
def test_the_plan_is_that_of_the_paper_in_linear_space(solve: Solver) -> None:
    """Sinkhorn-Knopp as published: alpha, beta scale P^lambda to the marginals."""
    log_p_NK = logits(60, 5)
    log_p_NK -= logsumexp(log_p_NK, axis=1, keepdims=True)
    kernel_KN = np.exp(3.0 * log_p_NK).T
    beta = np.ones(60)
    for _ in range(2000):
        alpha = (1 / 5) / (kernel_KN @ beta)
        beta = (1 / 60) / (alpha @ kernel_KN)
    plan_KN = alpha[:, None] * kernel_KN * beta
    a_K = solve(ArrayRows(log_p_NK), uniform(5), 3.0, 1e-12, 5000).potentials_K
    np.testing.assert_allclose(
        softmax(3.0 * log_p_NK + a_K.numpy(), axis=1).T / 60, plan_KN, atol=1e-11
    )


@pytest.mark.parametrize("solve", SOLVERS)
def test_potentials_minimise_the_semi_dual(solve: Solver) -> None:
    """scipy's L-BFGS on F finds no lower value, and the same potentials."""
    scores_NK = logits(200, 6, scale=2.0)
    scores_NK -= scores_NK.max(1, keepdims=True)
    r = np.full(6, 1 / 6)

    def semi_dual(a: np.ndarray) -> tuple[float, np.ndarray]:
        z = 5.0 * scores_NK + a
        return logsumexp(z, axis=1).mean() - r @ a, softmax(z, axis=1).mean(0) - r

    best = minimize(
        semi_dual, np.zeros(6), jac=True, method="L-BFGS-B", options={"gtol": 1e-12, "ftol": 1e-16}
    )
    solution = solve(ArrayRows(scores_NK), uniform(6), 5.0, 1e-11, 5000)
    assert semi_dual(solution.potentials_K.numpy())[0] <= best.fun + 1e-12
    np.testing.assert_allclose(solution.potentials_K, best.x - best.x.mean(), atol=1e-5)


def test_newton_finds_sinkhorns_optimum_in_fewer_reads() -> None:
    rows = ArrayRows(logits(2000, 40, scale=3.0))
    slow = by_sinkhorn(rows, uniform(40), 25.0, 1e-7, 20000)
    quick = by_newton(rows, uniform(40), 25.0, 1e-7, 200)
    assert slow.converged and quick.converged
    np.testing.assert_allclose(quick.potentials_K, slow.potentials_K, atol=1e-3)
    assert quick.trace[-1].iteration < slow.trace[-1].iteration / 5


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_solver_raises_the_semi_dual(solve: Solver) -> None:
    """From a near start, so that no other lambda comes in between."""
    scores_NK = logits(300, 20, scale=3.0)
    rows = ArrayRows(scores_NK)
    start_K = by_sinkhorn(rows, uniform(20), 25.0, 0.015, 9999).potentials_K
    z_NK = 25.0 * (scores_NK - scores_NK.max(1, keepdims=True))
    values = []
    for reads in range(1, 30):
        a = solve(rows, uniform(20), 25.0, 1e-9, reads, start_K).potentials_K.numpy()
        values.append(logsumexp(z_NK + a, axis=1).mean() - a.mean())
    assert values[-1] < values[0]
    assert (np.diff(values) <= 1e-12).all()


def test_the_laplacian_is_the_hessian_of_the_semi_dual() -> None:
    """diag(s) - mean q q^T, in closed form; sparse, it leaves out what is negligible."""
    scores_NK = logits(400, 9, scale=2.0)
    a_K = torch.from_numpy(np.random.default_rng(3).normal(0, 1, 9))
    q_NK = softmax(4.0 * scores_NK + a_K.numpy(), axis=1)
    expected = np.diag(q_NK.mean(0)) - q_NK.T @ q_NK / 400
    for sparse in (False, True):
        found = laplacian(ArrayRows(scores_NK), 4.0, a_K, sparse).numpy()
        np.testing.assert_allclose(found, expected, atol=2e-3)
        np.testing.assert_allclose(found.sum(1), 0, atol=1e-12)
        assert np.linalg.eigvalsh(found).min() > -1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_read_may_give_the_plans_too(dtype: torch.dtype) -> None:
    """With them soft sizes and Hessians elsewhere, as another read gives them."""
    rows, clusters = ArrayRows(logits(3000, 30, scale=2.0)), 30
    generator = np.random.default_rng(3)
    a_K, b_K = (torch.from_numpy(generator.normal(0, 1, clusters)) for _ in range(2))
    plain, read = (soft_sizes(rows, 4.0, a_K, dtype, take) for take in (None, Take()))
    assert plain.plans is None and read.plans is not None and read.plans.rows == 3000
    torch.testing.assert_close(read.s_K, plain.s_K, rtol=1e-6, atol=0)
    elsewhere = soft_sizes(rows, 4.0, b_K, torch.float64)
    found_K = read.plans.soft_sizes(b_K)
    torch.testing.assert_close(found_K, elsewhere.s_K, rtol=0, atol=1e-4)
    torch.testing.assert_close(found_K.sum(), torch.tensor(1.0).double())
    q_NK = softmax(4.0 * rows.scores_NK + b_K.numpy(), axis=1)
    expected = np.diag(q_NK.mean(0)) - q_NK.T @ q_NK / 3000
    for sparse in (False, True):
        found = read.plans.laplacian(b_K, 1, sparse)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        # Of a third of the rows.
        third = soft_sizes(rows, 4.0, b_K, dtype, Take(every=3)).plans
        assert third is not None and third.rows == 1000
        torch.testing.assert_close(third.laplacian(b_K, 1, sparse), found, rtol=0, atol=1e-2)
    product, diagonal_K = read.plans.products(b_K)
    columns = [product(unit_K) for unit_K in torch.eye(clusters, dtype=torch.float64)]
    np.testing.assert_allclose(torch.stack(columns), expected, atol=1e-3)
    np.testing.assert_allclose(product(torch.ones(clusters).double()), 0, atol=1e-12)
    torch.testing.assert_close(diagonal_K, torch.stack(columns).diagonal())


def quadratic(seed: int, clusters: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A Hessian as plans have it, sparse and nearly in two parts; a gradient; the marginal."""
    rng = np.random.default_rng(seed)
    scores_NK = logits(900, clusters, scale=3.0, seed=seed)
    scores_NK[:450, : clusters // 2] += 8.0
    scores_NK[450:, clusters // 2 :] += 8.0
    q_NK = softmax(4.0 * scores_NK, axis=1)
    s = q_NK.mean(0)
    hessian_KK = torch.from_numpy(np.diag(s) - q_NK.T @ q_NK / 900)
    moved_K = rng.normal(0, 3, clusters)
    return hessian_KK, hessian_KK @ torch.from_numpy(moved_K), torch.from_numpy(s)


@pytest.mark.parametrize("box", [0.3, 2.0, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_by_products_goes_down_within_its_box(seed: int, box: float) -> None:
    """Nearly as far as scipy's minimum there."""
    hessian_KK, gradient_K, s_K = quadratic(seed)
    H, g = hessian_KK.numpy(), gradient_K.numpy()

    def model(x: np.ndarray) -> tuple[float, np.ndarray]:
        return g @ x + x @ H @ x / 2, g + H @ x

    best = minimize(
        model,
        np.zeros(len(g)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-box, box)] * len(g),
        options={"maxiter": 20_000, "maxfun": 50_000, "gtol": 1e-12, "ftol": 1e-15},
    )
    curvature = Products(lambda x_K: hessian_KK @ x_K, hessian_KK.diagonal(), s_K)
    change = curvature.step(Point(torch.zeros(len(g)), s_K.log()), gradient_K, box).numpy()
    assert np.abs(change).max() <= box
    value, _ = model(change)
    assert value <= 0.95 * best.fun < 0
    assert g @ change < 0


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("rows_each", [2, 20])
def test_many_clusters_need_few_reads(square: bool, rows_each: int) -> None:
    """Rows near prototypes, nearly decided: Sinkhorn would take thousands of reads."""
    rng, clusters = np.random.default_rng(0), 700
    centres_KD = rng.standard_normal((clusters, 32))
    rows_ND = centres_KD[rng.integers(0, clusters, rows_each * clusters)]
    rows_ND = rows_ND + 1.5 * rng.standard_normal(rows_ND.shape)
    rows = InMemory.of(ArrayRows(rows_ND @ centres_KD.T / 6))
    solution = by_newton(rows, uniform(clusters), 25.0, 1e-5, 60, square=square)
    assert solution.converged
    shares_K = soft_sizes(rows, 25.0, solution.potentials_K).s_K
    assert 0.5 * float((shares_K - 1 / clusters).abs().sum()) <= 1.1e-5


@pytest.mark.parametrize("lamb", [10.0, 33.3])
@pytest.mark.parametrize("solve", SOLVERS)
def test_single_precision_reads_end_at_the_same_optimum(solve: Solver, lamb: float) -> None:
    """Large enough to be read in float32 first; the judge is float64 throughout.

    Rounding is let stand where it moves less than a quarter of the tolerance.
    """
    scores_NK = logits(30_000, 40, scale=3.0)
    rows = ArrayRows(scores_NK)
    tol = 1e-7 * lamb / 10
    solution = solve(InMemory.of(rows), uniform(40), lamb, tol, 5000)
    assert solution.converged
    off = np.abs(shares(scores_NK, lamb, solution.potentials_K) - 1 / 40)
    assert 0.5 * off.sum() <= 1.25 * tol
    assert abs(0.5 * off.sum() - solution.residual) <= tol / 4


@pytest.mark.parametrize("count", [40_000, 70_000])
def test_a_sample_decides_only_where_to_start(count: int) -> None:
    """So many rows that one or two samples are drawn; the last steps are over all rows."""
    scores_NK = logits(count, 16, scale=2.0)
    rows = InMemory.of(ArrayRows(scores_NK))
    quick = by_newton(rows, uniform(16), 25.0, 1e-6, 200)
    slow = by_sinkhorn(rows, uniform(16), 25.0, 1e-6, 20_000)
    assert quick.converged and slow.converged
    assert len(quick.trace) < len(slow.trace) / 3
    np.testing.assert_allclose(quick.potentials_K, slow.potentials_K, atol=1e-2)


@pytest.mark.parametrize("solve", SOLVERS)
def test_row_shifts_change_nothing(solve: Solver) -> None:
    scores_NK = logits(150, 8)
    shifted_NK = scores_NK + np.random.default_rng(1).uniform(-1e3, 1e3, (150, 1))
    plain, moved = (
        solve(ArrayRows(s), uniform(8), 10.0, 1e-9, 5000) for s in (scores_NK, shifted_NK)
    )
    np.testing.assert_allclose(moved.potentials_K, plain.potentials_K, atol=1e-7)


@pytest.mark.parametrize("solve", SOLVERS)
def test_half_and_single_precision_scores_agree_with_double(solve: Solver) -> None:
    scores_NK = logits(400, 10)
    wanted = solve(ArrayRows(scores_NK), uniform(10), 25.0, 1e-9, 9000).potentials_K
    for dtype, allowed in ((np.float32, 1e-4), (np.float16, 0.2)):
        rows = ArrayRows(scores_NK.astype(dtype))
        found = solve(rows, uniform(10), 25.0, 1e-9, 9000).potentials_K
        np.testing.assert_allclose(found, wanted, atol=allowed)


@pytest.mark.parametrize("lamb", [0.1, 1.0, 25.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_newton_is_finite_for_any_lambda_and_magnitude(lamb: float, scale: float) -> None:
    rows = ArrayRows(logits(300, 12, scale=scale))
    solution = by_newton(rows, uniform(12), lamb, 1e-4, 300)
    assert solution.potentials_K.isfinite().all()
    labels_N, _ = assignment.balanced(
        rows, solution.potentials_K / lamb, assignment.size_bounds(300, uniform(12).numpy())
    )
    assert np.bincount(labels_N, minlength=12).tolist() == [25] * 12


@pytest.mark.parametrize("mask", [float(np.finfo(np.float32).min), -1e200])
@pytest.mark.parametrize("solve", SOLVERS)
def test_masked_scores_are_never_chosen(solve: Solver, mask: float) -> None:
    scores_NK = logits(300, 12)
    masked_NK = np.random.default_rng(1).random((300, 12)) < 0.3
    scores_NK[masked_NK] = mask
    solution = solve(ArrayRows(scores_NK), uniform(12), 5.0, 1e-6, 2000)
    assert solution.converged
    labels_N = (5 * scores_NK + solution.potentials_K.numpy()).argmax(1)
    assert not masked_NK[np.arange(300), labels_N].any()


@pytest.mark.parametrize("weight", [1e-8, 1e-20, 1e-40])
@pytest.mark.parametrize("lamb", [0.1, 25.0, 1000.0])
def test_clusters_of_hardly_any_weight_are_no_hindrance(lamb: float, weight: float) -> None:
    weights_K = np.r_[np.full(5, weight), np.ones(15)]
    marginal_K = torch.from_numpy(weights_K / weights_K.sum())
    solution = by_newton(ArrayRows(logits(500, 20, scale=3.0)), marginal_K, lamb, 1e-4, 500)
    assert solution.converged and solution.potentials_K.isfinite().all()


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("depth", [10.0, 1e3, 1e5])
def test_a_cluster_that_nobody_wants_comes_back(solve: Solver, depth: float) -> None:
    """At the deepest its softmax entries are zero in float64."""
    scores_NK = logits(200, 5)
    scores_NK[:, 3] -= depth
    solution = solve(ArrayRows(scores_NK), uniform(5), 5.0, 1e-8, 2000)
    assert solution.converged
    even = solve(ArrayRows(logits(200, 5)), uniform(5), 5.0, 1e-8, 2000)
    lift_K = torch.tensor([0, 0, 0, 5.0 * depth, 0], dtype=torch.float64)
    expected_K = even.potentials_K + lift_K - lift_K.mean()
    np.testing.assert_allclose(solution.potentials_K, expected_K, atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_warm_start_at_the_solution_ends_at_once(solve: Solver) -> None:
    rows = ArrayRows(logits(200, 6))
    found = solve(rows, uniform(6), 10.0, 1e-8, 5000)
    again = solve(rows, uniform(6), 10.0, 1e-7, 5000, found.potentials_K)
    assert again.converged and len(again.trace) == 1


def test_a_far_start_is_left_with_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """There all rows are decided, and plans next to nothing; where it goes on they are not."""
    taken: list[bool] = []

    class Watched(Problem):
        def read(self, a_K: torch.Tensor, take: Take | None = None) -> Point:
            taken.append(take not in (None, WHOLE))
            return super().read(a_K, take)

    rows = ArrayRows(logits(5000, 100))
    start_K = torch.arange(100.0, dtype=torch.float64) * 100
    solution = newton.solve(Watched(rows, uniform(100), 0.5, 1e-4, 100), start_K)
    assert solution.converged and taken[0] and not any(taken[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "clusters"), [(1000, 7), (257, 100), (3, 5), (0, 4)])
def test_a_plan_kept_whole_tells_soft_sizes_nearby(
    dtype: torch.dtype, count: int, clusters: int
) -> None:
    """As the scores themselves do; and of some rows."""
    rng = np.random.default_rng(5)
    scores_NK = logits(count, clusters, scale=5.0)
    a_K, moved_K = (torch.from_numpy(rng.normal(0, 3, clusters)) for _ in range(2))
    plan = DensePlan(ArrayRows(scores_NK), 4.0, a_K, dtype)
    q_NK = softmax(4.0 * scores_NK + (a_K + moved_K).numpy(), axis=1)
    close = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-6 * count}
    np.testing.assert_allclose(plan.sums(a_K + moved_K), q_NK.sum(0), **close)
    some_n = np.arange(0, count, 2)
    found_K = plan.sums_of(some_n, a_K + moved_K)
    np.testing.assert_allclose(found_K, q_NK[some_n].sum(0), **close)
    assert plan.near(a_K + moved_K) and not plan.near(a_K + 21.0)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_plan_kept_whole_changes_no_optimum(solve: Solver) -> None:
    """With room for it and without; potentials go far from where they start."""
    rows = InMemory.of(ArrayRows(logits(2000, 12, scale=6.0)))
    found = []
    for memory in (1 << 30, 0):
        assert bool(Problem(rows, uniform(12), 20.0, 1.0, 1, memory=memory).whole) == (memory > 0)
        found.append(solve(rows, uniform(12), 20.0, 1e-10, 20_000, memory=memory))
    assert found[0].converged and found[1].converged
    np.testing.assert_allclose(found[0].potentials_K, found[1].potentials_K, atol=1e-6)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_whole_plan_in_double_precision_is_kept_only_where_it_fits(
    solve: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set()

    class Watched(DensePlan):
        def __init__(self, rows: Rows, lamb: float, a_K: Tensor, dtype: torch.dtype) -> None:
            super().__init__(rows, lamb, a_K, dtype)
            made.add(dtype)

    monkeypatch.setattr(semidual, "DensePlan", Watched)
    rows = InMemory.of(ArrayRows(logits(30_000, 40)))
    for size, kinds in ((8, {torch.float32, torch.float64}), (4, {torch.float32})):
        made.clear()
        solution = solve(rows, uniform(40), 10.0, 1e-10, 5000, memory=size * 30_000 * 40)
        assert solution.converged and made == kinds


@pytest.mark.parametrize("clusters", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_of_short_rows_is_torchs(clusters: int, dtype: torch.dtype) -> None:
    score_nK = torch.randn(301, clusters, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected_nK = torch.softmax(40 * score_nK, 1)
    torch.testing.assert_close(tiles.softmax(40 * score_nK), expected_nK)
    out_nK = torch.full_like(score_nK, torch.nan)
    assert tiles.softmax(40 * score_nK, out=out_nK) is out_nK
    torch.testing.assert_close(out_nK, expected_nK)


def test_plans_are_as_fine_as_memory_has_room_for() -> None:
    """Coarse ones are better than none: they too save reads."""
    taken: list[float] = []

    class Watched(Problem):
        def read(self, a_K: torch.Tensor, take: Take | None = None) -> Point:
            taken.append(take.least if take else math.inf)
            return super().read(a_K, take)

    rows, finest, reads = InMemory.of(ArrayRows(logits(3000, 200, scale=10.0))), [], []
    for memory in (2_000_000, 400_000, 0):
        taken.clear()
        solution = newton.solve(Watched(rows, uniform(200), 4.0, 1e-6, 100, memory=memory))
        assert solution.converged
        finest.append(min(taken))
        reads.append(len(solution.trace))
    assert finest[0] < finest[1] < finest[2] == math.inf
    assert max(reads[:2]) < reads[2]


@pytest.mark.parametrize("solve", SOLVERS)
def test_the_cap_on_iterations_is_kept_and_told(solve: Solver) -> None:
    rows = ArrayRows(logits(500, 30, scale=5.0))
    solution = solve(rows, uniform(30), 50.0, 1e-12, 3)
    assert not solution.converged and solution.residual > 1e-12
    assert solution.potentials_K.isfinite().all()


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_request_to_stop_is_heard(solve: Solver) -> None:
    solution = solve(
        ArrayRows(logits(500, 30, scale=5.0)), uniform(30), 50.0, 1e-12, 9999, stop=lambda: True
    )
    assert len(solution.trace) == 1 and not solution.converged


def test_between_passes_the_calling_thread_is_alone() -> None:
    """And passes have as many workers as ever, of one thread each."""
    threads, met = torch.get_num_threads(), threading.Barrier(3)

    def work(item: int) -> int:
        met.wait(60)
        return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with by_itself():
            assert torch.get_num_threads() == 1
            assert list(map_in_pool(work, range(3), CPU)) == [1, 1, 1]
        assert torch.get_num_threads() == 3
        assert list(map_in_pool(work, range(3), CPU)) == [1, 1, 1]
    finally:
        torch.set_num_threads(threads)


def test_the_number_of_threads_changes_no_bit() -> None:
    rows = ArrayRows(logits(60_000, 64))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            solution = by_newton(rows, uniform(64), 10.0, 1e-6, 100)
            found.append(
                (
                    solution.potentials_K,
                    assignment.certified(rows, solution.potentials_K / 10, None).objective,
                )
            )
    finally:
        torch.set_num_threads(threads)
    for potentials_K, objective in found[1:]:
        assert torch.equal(potentials_K, found[0][0]) and objective == found[0][1]


# ---- exactly balanced labels --------------------------------------------------


def cost_of_optimal_matching(scores_NK: np.ndarray, sizes_K: np.ndarray) -> float:
    """The least objective for these cluster sizes, by scipy's Hungarian method."""
    cost_NK = logsumexp(scores_NK, axis=1, keepdims=True) - scores_NK
    seats = np.repeat(np.arange(len(sizes_K)), sizes_K)
    rows, columns = linear_sum_assignment(cost_NK[:, seats])
    return cost_NK[:, seats][rows, columns].mean()


def cost_of_optimal_sizes(scores_NK: np.ndarray, bounds: assignment.Bounds) -> float:
    """The least objective over all sizes within bounds, by scipy's Hungarian method: seats
    that may stay empty are filled for nothing, those that may not at a forbidding price."""
    cost_NK = logsumexp(scores_NK, axis=1, keepdims=True) - scores_NK
    seats = np.repeat(np.arange(len(bounds.high_K)), bounds.high_K)
    place = np.concatenate([np.arange(size) for size in bounds.high_K])
    must_be_taken = place < bounds.low_K[seats]
    nobody = np.where(must_be_taken, 1e6, 0.0)[None].repeat(len(seats) - len(cost_NK), 0)
    cost = np.vstack([cost_NK[:, seats], nobody])
    return float(cost[linear_sum_assignment(cost)].sum()) / len(cost_NK)


@pytest.mark.parametrize("seed", range(40))
def test_sizes_within_bounds_are_the_best_ones(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any prices, with ties, with few rows looked at, kept in memory or not."""
    rng = np.random.default_rng(seed)
    count, clusters = int(rng.integers(20, 80)), int(rng.integers(2, 9))
    scores_NK = rng.normal(size=(count, clusters)) * rng.choice([0.1, 3]) + rng.normal(
        size=clusters
    )
    scores_NK = np.round(scores_NK) if seed % 3 == 0 else scores_NK
    prices_K = torch.from_numpy(rng.normal(size=clusters)).round()
    low_K = rng.multinomial(count // 2, np.ones(clusters) / clusters)
    bounds = assignment.Bounds(low_K, low_K + rng.multinomial(count, np.ones(clusters) / clusters))
    if seed % 4 == 0:
        bounds = assignment.size_bounds(count, np.full(clusters, 1 / clusters))
    monkeypatch.setattr(assignment, "_PER_MOVE", int(rng.integers(0, 3)))
    monkeypatch.setattr(assignment, "_PER_CLUSTER", 1)
    rows = ArrayRows(scores_NK)
    best = cost_of_optimal_sizes(rows.scores_NK, bounds)
    for memory in (0, 1 << 28):
        labels_N, final_K = assignment.balanced(rows, prices_K, bounds, memory=memory)
        sizes_K = np.bincount(labels_N, minlength=clusters)
        assert (bounds.low_K <= sizes_K).all() and (sizes_K <= bounds.high_K).all()
        found = assignment.certified(rows, final_K, bounds, labels_N)
        assert found.objective == pytest.approx(best, abs=1e-9)
        assert found.lower_bound == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (6, 6), (40, 4), (60, 12), (200, 8)])
@pytest.mark.parametrize("start", ["solved", "zero"])
@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_balanced_labels_are_optimal_and_proved_so(
    shape: tuple[int, int], start: str, memory: int
) -> None:
    rows = ArrayRows(logits(*shape, scale=3.0))
    count, clusters = shape
    bounds = assignment.size_bounds(count, uniform(clusters).numpy())
    prices_K = torch.zeros(clusters, dtype=torch.float64)
    if start == "solved":
        prices_K = by_newton(rows, uniform(clusters), 10.0, 1e-6, 100).potentials_K / 10
    labels_N, prices_K = assignment.balanced(rows, prices_K, bounds, memory=memory)
    sizes_K = np.bincount(labels_N, minlength=clusters)
    assert (sizes_K >= bounds.low_K).all() and (sizes_K <= bounds.high_K).all()
    _, objective, bound = assignment.certified(rows, prices_K, bounds, labels_N)
    assert objective == pytest.approx(cost_of_optimal_matching(rows.scores_NK, sizes_K), abs=1e-9)
    assert bound <= objective + 1e-9
    if count % clusters == 0:
        assert bound == pytest.approx(objective, abs=1e-9)


def test_uneven_sizes_come_close_to_the_linear_programme() -> None:
    """With floor and ceiling both allowed, scipy's HiGHS is the judge."""
    count, clusters = 47, 5
    rows = ArrayRows(logits(count, clusters, scale=2.0))
    cost_NK = logsumexp(rows.scores_NK, axis=1, keepdims=True) - rows.scores_NK
    each_row = np.kron(np.eye(count), np.ones(clusters))
    each_cluster = np.kron(np.ones(count), np.eye(clusters))
    best = linprog(
        cost_NK.ravel() / count,
        A_eq=each_row,
        b_eq=np.ones(count),
        A_ub=np.vstack([each_cluster, -each_cluster]),
        b_ub=np.concatenate([np.full(clusters, 10.0), np.full(clusters, -9.0)]),
    )
    bounds = assignment.size_bounds(count, uniform(clusters).numpy())
    prices_K = by_newton(rows, uniform(clusters), 100.0, 1e-6, 100).potentials_K / 100
    labels_N, prices_K = assignment.balanced(rows, prices_K, bounds)
    _, objective, bound = assignment.certified(rows, prices_K, bounds, labels_N)
    assert bound <= best.fun + 1e-9 and best.fun <= objective + 1e-9
    assert objective <= 1.001 * best.fun


def test_any_prices_give_a_lower_bound() -> None:
    rows = ArrayRows(logits(30, 6, scale=2.0))
    bounds = assignment.size_bounds(30, uniform(6).numpy())
    best = cost_of_optimal_matching(rows.scores_NK, np.full(6, 5))
    rng = np.random.default_rng(0)
    for _ in range(50):
        prices_K = torch.from_numpy(rng.normal(0, 2, 6))
        assert assignment.certified(rows, prices_K, bounds).lower_bound <= best + 1e-12


@pytest.mark.parametrize("kind", ["identical", "two values", "duplicated"])
def test_ties_are_shared_out(kind: str) -> None:
    count, clusters = 5000, 50
    scores_NK = {
        "identical": np.zeros((count, clusters)),
        "two values": np.tile(logits(2, clusters), (count // 2, 1)),
        "duplicated": np.repeat(logits(count // 50, clusters), 50, axis=0),
    }[kind]
    rows = ArrayRows(scores_NK)
    prices_K = torch.zeros(clusters, dtype=torch.float64)
    bounds = assignment.size_bounds(count, uniform(clusters).numpy())
    labels_N, prices_K = assignment.balanced(rows, prices_K, bounds)
    assert np.bincount(labels_N, minlength=clusters).tolist() == [100] * clusters
    _, objective, bound = assignment.certified(rows, prices_K, bounds, labels_N)
    assert objective == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("start", ["solved", "zero"])
def test_rows_of_large_margins_are_not_needed(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are looked at first, the labels are the best there are."""
    rows = ArrayRows(logits(240, 8, scale=3.0))
    bounds = assignment.size_bounds(240, uniform(8).numpy())
    prices_K = torch.zeros(8, dtype=torch.float64)
    if start == "solved":
        prices_K = by_newton(rows, uniform(8), 2.0, 1e-6, 100).potentials_K / 2
    best = cost_of_optimal_matching(rows.scores_NK, np.full(8, 30))
    looked_at = []
    flow = assignment._Flow
    monkeypatch.setattr(
        assignment,
        "_Flow",
        lambda rows, *rest: looked_at.append(rows.shape[0]) or flow(rows, *rest),
    )
    monkeypatch.setattr(assignment, "_PART", 1)
    for each, least in ((0, 1), (1, 1), (8, 64)):
        monkeypatch.setattr(assignment, "_PER_MOVE", each)
        monkeypatch.setattr(assignment, "_PER_CLUSTER", least)
        monkeypatch.setattr(assignment, "_WIDER", 2)
        labels_N, final_K = assignment.balanced(rows, prices_K, bounds)
        assert np.bincount(labels_N, minlength=8).tolist() == [30] * 8
        _, objective, bound = assignment.certified(rows, final_K, bounds, labels_N)
        assert objective == pytest.approx(best, abs=1e-9)
        assert bound == pytest.approx(best, abs=1e-9)
    assert looked_at[0] < 20 and looked_at[-1] == 240 and len(looked_at) > 3


@pytest.mark.parametrize("each_cluster", [1, 64])
def test_rows_in_memory_are_balanced_without_another_read(
    each_cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there is no room for a copy of those that are looked at."""
    source = ArrayRows(logits(240, 8, scale=3.0))
    rows = InMemory.of(source)
    bounds = assignment.size_bounds(240, uniform(8).numpy())
    prices_K = torch.zeros(8, dtype=torch.float64)
    preferred = assignment.preferences(rows, prices_K)
    monkeypatch.setattr(assignment, "_PER_MOVE", 0)
    monkeypatch.setattr(assignment, "_PER_CLUSTER", each_cluster)
    reading = source.take

    def take(rows_n: np.ndarray, dtype: torch.dtype | None = torch.float64) -> Tensor:
        assert not len(rows_n)
        return reading(rows_n, dtype)

    with monkeypatch.context() as patched:
        patched.setattr(source, "take", take)
        labels_N, _ = assignment.balanced(rows, prices_K, bounds, memory=0, preferred=preferred)
    assert np.bincount(labels_N, minlength=8).tolist() == [30] * 8
    objective = assignment.certified(rows, prices_K, None, labels_N).objective
    best = cost_of_optimal_matching(source.scores_NK, np.full(8, 30))
    assert objective == pytest.approx(best, abs=1e-6)


def test_slack_costs_at_most_what_it_says() -> None:
    rows = ArrayRows(logits(800, 40, scale=0.05))
    bounds = assignment.size_bounds(800, uniform(40).numpy())
    prices_K = torch.zeros(40, dtype=torch.float64)
    exact, _ = assignment.balanced(rows, prices_K, bounds)
    rough, _ = assignment.balanced(rows, prices_K, bounds, slack=1e-3)
    assert np.bincount(rough, minlength=40).tolist() == [20] * 40
    least = assignment.certified(rows, prices_K, None, exact).objective
    found = assignment.certified(rows, prices_K, None, rough).objective
    assert least - 1e-12 <= found <= least + 1e-3


def test_first_choices_and_their_objective() -> None:
    rows = ArrayRows(logits(500, 7))
    prices_K = torch.linspace(-1, 1, 7, dtype=torch.float64)
    labels_N, objective, bound = assignment.certified(rows, prices_K, None)
    priced_NK = np.sort(rows.scores_NK + prices_K.numpy(), axis=1)
    preferred = assignment.preferences(rows, prices_K)
    np.testing.assert_array_equal(labels_N, preferred.labels_N)
    np.testing.assert_array_equal(labels_N, (rows.scores_NK + prices_K.numpy()).argmax(1))
    np.testing.assert_allclose(preferred.margin_N, priced_NK[:, -1] - priced_NK[:, -2], atol=1e-12)
    logp_NK = log_softmax(rows.scores_NK, axis=1)
    assert objective == pytest.approx(-logp_NK[np.arange(500), labels_N].mean(), abs=1e-12)
    assert np.isnan(bound)


def some_between(seed: int) -> tuple[Between, Tensor]:
    """A marginal of nine clusters, and potentials at which some meet a bound and some don't."""
    generator = torch.Generator().manual_seed(seed)
    prior_K = torch.rand(9, generator=generator, dtype=torch.float64)
    low_K, high_K = torch.full((9,), 0.08).double(), torch.full((9,), 0.15).double()
    a_K = torch.randn(9, generator=generator, dtype=torch.float64)
    return Between(prior_K / prior_K.sum(), low_K, high_K), a_K


@pytest.mark.parametrize("seed", range(5))
def test_the_curvature_of_a_marginal_is_its_derivative(seed: int) -> None:
    between, a_K = some_between(seed)
    step_K = 1e-6 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    change_K = between.at(a_K + step_K) - between.at(a_K - step_K)
    free_K = between.free(a_K)
    assert free_K is not None
    turned_K = free_K * step_K - free_K * (free_K @ step_K) / free_K.sum()
    torch.testing.assert_close(change_K, -2 * turned_K, rtol=1e-5, atol=1e-15)
    torch.testing.assert_close(between.at(a_K + 3), between.at(a_K))


@pytest.mark.parametrize("seed", range(5))
def test_sinkhorns_step_gives_a_marginal_its_own_shares(seed: int) -> None:
    """With s(a) e^d = r(a + d), up to the constant that potentials are free in."""
    between, a_K = some_between(seed)
    s_K = torch.softmax(torch.linspace(-1, 1, 9, dtype=torch.float64), 0)
    r_K = between.scaled_to(a_K, s_K.log())
    assert float(r_K.sum()) == pytest.approx(1)
    torch.testing.assert_close(between.at(a_K + r_K.log() - s_K.log()), r_K)


def test_levelled_potentials_have_one_price_within_bounds() -> None:
    between, a_K = some_between(3)
    r_K, level_K = between.at(a_K), between.levelled(a_K)
    free_K = (r_K > 0.0801) & (r_K < 0.1499)
    assert 1 < free_K.sum() < 9
    assert len(level_K[free_K].unique()) == 1 and torch.equal(level_K[~free_K], a_K[~free_K])


@pytest.mark.parametrize("scale", [0.05, 0.002])
@pytest.mark.parametrize("share", [0.02, 0.01])
def test_sharper_prices_leave_fewer_rows_to_move(scale: float, share: float) -> None:
    """Also where the first sharper solves change little, as for a fresh network; and fewer
    where rows are in memory."""
    rows: Rows = ArrayRows(logits(4000, 40, scale=scale))
    if share == 0.01:
        rows = InMemory.of(rows)
    bounds = assignment.size_bounds(4000, uniform(40).numpy())
    potentials_K = by_newton(rows, uniform(40), 10.0, 1e-6, 100).potentials_K

    def excess(prices_K: Tensor) -> int:
        sizes_K = np.bincount(assignment.preferences(rows, prices_K).labels_N, minlength=40)
        return int((sizes_K - bounds.high_K).clip(0).sum())

    problem = Problem(rows, uniform(40), 10.0, 1e-6, 100)
    sharp_K, preferred = assignment.sharpen(rows, problem, potentials_K, newton.refine, bounds)
    assert excess(sharp_K) <= share * 4000 < excess(potentials_K / 10)
    for found, wanted in zip(preferred, assignment.preferences(rows, sharp_K), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_stop_ends_the_sharpening() -> None:
    rows = ArrayRows(logits(4000, 40, scale=0.002))
    potentials_K = by_newton(rows, uniform(40), 10.0, 1e-6, 100).potentials_K
    problem = Problem(rows, uniform(40), 10.0, 1e-6, 100, stop=lambda: True)
    bounds = assignment.size_bounds(4000, uniform(40).numpy())
    sharp_K, _ = assignment.sharpen(rows, problem, potentials_K, newton.refine, bounds)
    assert not problem.trace and torch.equal(sharp_K, potentials_K / 10)


@pytest.mark.parametrize(("count", "clusters"), [(10, 3), (1797, 10), (7, 7), (5, 1)])
def test_random_labels_are_balanced_and_seeded(count: int, clusters: int) -> None:
    draw = [
        assignment.random_balanced(count, clusters, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    sizes_K = np.bincount(draw[0], minlength=clusters)
    assert sizes_K.max() - sizes_K.min() <= 1 and sizes_K.sum() == count
    assert (draw[0] == draw[1]).all()
    assert clusters == 1 or (draw[0] != draw[2]).any()


@pytest.mark.parametrize("kind", ["uniform", "zipf:1.5", "gaussian:0.2"])
@pytest.mark.parametrize("count", [7, 100, 12345])
def test_size_bounds_surround_the_marginal(kind: str, count: int) -> None:
    r_K = marginal(kind, 7).numpy()
    bounds = assignment.size_bounds(count, r_K)
    assert bounds.low_K.sum() <= count <= bounds.high_K.sum()
    assert (bounds.low_K <= count * r_K + 1e-6).all() and (
        bounds.high_K >= count * r_K - 1e-6
    ).all()
    assert (bounds.high_K - bounds.low_K <= 1).all()
