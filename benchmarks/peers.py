"""Other solvers of the same problem, each as (scores_NK, lamb, tol, init) -> Result.

N rows, K clusters. Each is given log-probabilities in memory, as float32.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Result(NamedTuple):
    """Potentials of mean zero, reads of the matrix, seconds, and whether it stopped by itself."""

    potentials_K: Tensor
    reads: int
    seconds: float
    converged: bool


def reference(logp_NK: Tensor, lamb: float, most: int, dtype: torch.dtype) -> Result:
    """Sinkhorn-Knopp on P^lambda with two products an iteration, as in the paper's code.

    Equations of SeLa section 3.1; its stop test, the sum over the rows of
    |c / c_new - 1| < 0.1 every ten iterations, in float64 (or, to compare, float32).
    """
    start = time.perf_counter()
    count, clusters = logp_NK.shape
    kernel_KN = (logp_NK.to(dtype).T * lamb).exp()
    r_K = torch.full((clusters, 1), 1 / clusters, dtype=dtype)
    c_N = torch.full((count, 1), 1 / count, dtype=dtype)
    iterations, error = 0, np.inf
    beta_N = torch.full((count, 1), 1 / count, dtype=dtype)
    alpha_K = r_K
    while error > 0.1 and iterations < most:
        alpha_K = r_K / (kernel_KN @ beta_N)
        new_N = c_N / (kernel_KN.T @ alpha_K)
        if iterations % 10 == 0:
            error = float((beta_N / new_N - 1).abs().nansum())
        beta_N = new_N
        iterations += 1
    seconds = time.perf_counter() - start
    a_K = alpha_K[:, 0].log().double()
    return Result(a_K - a_K.mean(), 2 * iterations, seconds, error <= 0.1)


def pot(logp_NK: Tensor, lamb: float, tol: float, most: int) -> Result:
    """POT's log-domain Sinkhorn on the torch backend, float32."""
    import ot

    start = time.perf_counter()
    count, clusters = logp_NK.shape
    threshold = 2 * tol / clusters**0.5
    rows, columns = torch.full((count,), 1 / count), torch.full((clusters,), 1 / clusters)
    _, log = ot.bregman.sinkhorn_log(
        rows, columns, -logp_NK, 1 / lamb, numItermax=most, stopThr=threshold, log=True, warn=False
    )
    seconds = time.perf_counter() - start
    a_K = log["log_v"].double()
    return Result(
        a_K - a_K.mean(), 2 * int(log["niter"]), seconds, float(log["err"][-1]) <= threshold
    )


def ott(logp_NK: Tensor, lamb: float, tol: float, most: int) -> Result:
    """OTT-JAX's Sinkhorn with Anderson acceleration, float32, compiled beforehand."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    cost_NK = jnp.asarray(-logp_NK.numpy())
    solver = sinkhorn.Sinkhorn(
        threshold=2 * tol,
        max_iterations=most,
        anderson=acceleration.AndersonAcceleration(memory=5, refresh_every=1),
    )

    @jax.jit
    def solve(cost_NK: jax.Array) -> sinkhorn.SinkhornOutput:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_NK, epsilon=1 / lamb)))

    solve.lower(cost_NK).compile()
    start = time.perf_counter()
    found = jax.block_until_ready(solve(cost_NK))
    seconds = time.perf_counter() - start
    a_K = torch.from_numpy(np.array(found.g, dtype=np.float64)) * lamb
    return Result(a_K - a_K.mean(), 2 * int(found.n_iters), seconds, bool(found.converged))
