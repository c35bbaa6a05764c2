"""From potentials to one label a row: the largest entry, or exactly balanced clusters.

N rows (images), K columns (clusters), n rows of one tile. Prices g_K = a_K / lambda are
in units of log-probability; a row prefers the cluster of the largest logp_ik + g_k.

`balanced` starts from what rows prefer and moves as few of them as it can: a minimum-cost
flow on the graph of P = K + 1 nodes, where the arc k -> l costs what the row of k that minds
least would lose by going to l. The last node is the pool of room between the smallest and the
largest sizes, from which clusters take it and give it back for nothing. Prices prove how
good the result is (`certified`).
Sources: successive shortest paths (Ahuja, Magnanti, Orlin, Network Flows, ch. 9);
linear-programming duality of the transportation problem.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sela_cli import parallel
from sela_cli.marginals import Between
from sela_cli.semidual import Problem, Solution, plan_of_some
from sela_cli.tiles import (
    CPU,
    InMemory,
    Resident,
    Rows,
    Some,
    finite_like,
    map_in_pool,
    map_rows,
    map_spans,
    spans_of,
)

# `sharpen`: the share of rows that is cheaper to move than to solve for, where rows are in
# memory and where they are read anew for every look; and its solves.
_EXCESS, _EXCESS_UNKEPT = 0.01, 0.02
_LOOSE = 0.002
_LOOSE_ITER = 20
_SHARPENINGS = 8
# Where rows have so large a largest share, in the mean, and sizes came no nearer, they won't.
_SHARP = 0.5
# `balanced`: clusters looked at beyond twice those that lead to the nearest one with room.
_FURTHER = 32
# Rows looked at first: for each that has to move, and for each cluster, but one part in so many
# of all at most; and so many times as many again where these do not do.
_PER_MOVE, _PER_CLUSTER, _PART, _WIDER = 8, 16, 4, 4
# Rounding of sums of losses.
_TIE = 1e-12
# `between`: the rows of a cluster that has none.
_NO_ROW = 1e-9


class Bounds(NamedTuple):
    """Smallest and largest size of each cluster, int64."""

    low_K: np.ndarray
    high_K: np.ndarray


class Certified(NamedTuple):
    """Labels, their objective, and what no labels of the allowed sizes can go below.

    Objectives are mean_i -logp_i(label), in nats: the paper's E(p, q).
    """

    labels_N: np.ndarray
    objective: float
    lower_bound: float


def size_bounds(count: int, marginal_K: np.ndarray) -> Bounds:
    """floor and ceiling of N r_k."""
    # Rounding noise in N r_k must not turn an exact integer into two bounds.
    sizes_K = np.round(count * marginal_K, 6)
    return Bounds(np.floor(sizes_K).astype(np.int64), np.ceil(sizes_K).astype(np.int64))


def _first_choice(priced_nK: Tensor) -> Tensor:
    # NumPy's argmax takes a fifth of the time of torch's.
    if priced_nK.device.type == "cpu":
        return torch.from_numpy(priced_nK.numpy().argmax(1))
    return priced_nK.argmax(1)


def between(rows: Rows, bounds: Bounds) -> Between:
    """The marginal of sizes within the bounds, those of the rows' first choices first."""
    count, clusters = rows.shape
    chosen_N = preferences(rows, torch.zeros(clusters, dtype=torch.float64)).labels_N
    # Shares are positive. What stands for no row is to be none after it has been scaled.
    sizes_K = np.maximum(np.bincount(chosen_N, minlength=clusters), _NO_ROW)
    low_K, high_K = np.maximum(bounds.low_K, _NO_ROW), bounds.high_K.astype(np.float64)
    return Between(*(torch.from_numpy(values_K / count) for values_K in (sizes_K, low_K, high_K)))


def random_balanced(count: int, clusters: int, generator: torch.Generator) -> np.ndarray:
    """i mod K, shuffled: sizes differ by one at most. Returns labels_N, int64."""
    return (torch.randperm(count, generator=generator) % clusters).numpy()


def certified(
    rows: Rows, prices_K: Tensor, bounds: Bounds | None, labels_N: np.ndarray | None = None
) -> Certified:
    """The objective of `labels_N` and a bound to it, in one read of the matrix.

    Without `labels_N`, those that the rows prefer at these prices; without `bounds`, no
    bound (NaN). The bound is the transport dual: min over allowed sizes n of
    sum_k (n_k / N) g_k - mean_i max_k (logp_ik + g_k).
    """
    count = rows.shape[0]
    chosen_N = np.empty(count, np.int64) if labels_N is None else labels_N

    def work(tiles: Iterator[tuple[int, Tensor]]) -> np.ndarray:
        losses = np.zeros(2)
        for start, tile_nK in tiles:
            part_n = chosen_N[start : start + len(tile_nK)]
            priced_nK = tile_nK + finite_like(prices_K, tile_nK)
            first_n = _first_choice(priced_nK)
            if labels_N is None:
                part_n[:] = first_n.cpu().numpy()
            labels_n1 = torch.from_numpy(part_n[:, None]).to(rows.device)
            # The maximum of each row is 0. Torch's own is slow where rows are short.
            own_n1 = tile_nK.gather(1, labels_n1)
            loss_n1 = tile_nK.exp().sum(1, keepdim=True).log_() - own_n1
            less_n1 = own_n1 - priced_nK.gather(1, first_n[:, None])
            losses += float(loss_n1.sum()), float((loss_n1 + less_n1).sum())
        return losses

    objective, relaxed = sum(map_spans(rows, work), np.zeros(2)) / count
    bound = float("nan")
    if bounds:
        bound = float(_cheapest_sizes(count, prices_K, bounds) @ prices_K.numpy()) / count + relaxed
    return Certified(chosen_N, float(objective), float(bound))


def _cheapest_sizes(count: int, prices_K: Tensor, bounds: Bounds) -> np.ndarray:
    """Sizes within the bounds that sum to `count`: room goes to the lowest prices first,
    which are those of the clusters in demand."""
    order = np.argsort(prices_K.numpy(), kind="stable")
    room = (bounds.high_K - bounds.low_K)[order]
    before = np.cumsum(room) - room
    sizes_K = bounds.low_K.copy()
    sizes_K[order] += np.clip(count - bounds.low_K.sum() - before, 0, room)
    return sizes_K


def _aims(sizes_K: np.ndarray, prices_K: np.ndarray, bounds: Bounds) -> tuple[np.ndarray, float]:
    """Sizes to aim at first, and the price of room: clusters that cost less take all they may,
    those that cost more none, and those of that price keep what they have."""
    low_K, high_K = bounds
    order = np.argsort(prices_K, kind="stable")
    taken = np.cumsum((high_K - low_K)[order])
    last = np.searchsorted(taken, sizes_K.sum() - low_K.sum())
    price = float(prices_K[order[last]])
    aims_K = np.clip(sizes_K, low_K, high_K)
    aims_K[prices_K < price] = high_K[prices_K < price]
    aims_K[prices_K > price] = low_K[prices_K > price]
    return aims_K, price


class Preferences(NamedTuple):
    """The cluster that each row prefers at some prices, and by how much, in nats."""

    labels_N: np.ndarray
    margin_N: np.ndarray


def preferences(rows: Rows, prices_K: Tensor, dtype: torch.dtype = torch.float64) -> Preferences:
    """What rows prefer at prices, in one read."""
    # Written in place: small results among large tiles would keep the heap from shrinking.
    labels_N, margin_N = np.empty(rows.shape[0], np.int64), np.empty(rows.shape[0])

    def work(tiles: Iterator[tuple[int, Tensor]]) -> None:
        for start, tile_nK in tiles:
            priced_nK = tile_nK + finite_like(prices_K, tile_nK)
            own_n1 = _first_choice(priced_nK)[:, None]
            own_n = priced_nK.gather(1, own_n1)[:, 0]
            others_n = priced_nK.scatter_(1, own_n1, -torch.inf).amax(1)
            part = slice(start, start + len(tile_nK))
            labels_N[part] = own_n1[:, 0].cpu().numpy()
            margin_N[part] = (own_n - others_n).cpu().numpy()

    deque(map_spans(rows, work, dtype), maxlen=0)
    return Preferences(labels_N, margin_N)


def balanced(
    rows: Rows,
    prices_K: Tensor,
    bounds: Bounds,
    slack: float = 0.0,
    progress: Callable[[int], None] = lambda left: None,
    memory: int = 1 << 28,
    preferred: Preferences | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Labels whose cluster sizes lie within `bounds`, of least objective.

    They are optimal where `slack` is 0. Otherwise a moved row may lose up to `slack` nats
    more than the one that minds least, which moves many rows at a time. Returns labels_N and
    the prices that go with them. `progress` is told how many rows are still too many;
    `memory`: bytes that may be kept of the rows that are looked at; `preferred`:
    `preferences` at these prices, where they are known, which it takes over.

    Only rows of small margins are looked at. No other loses less than `margin` by going
    anywhere, so that a path is the cheapest as long as all its arcs cost less than that;
    where none does, more rows are taken.
    """
    count, clusters = rows.shape
    assert bounds.low_K.sum() <= count <= bounds.high_K.sum()
    labels_N, margin_N = preferred or preferences(rows, prices_K)
    sizes_K = np.bincount(labels_N, minlength=clusters)
    aims_K, price = _aims(sizes_K, prices_K.numpy(), bounds)
    prices_P, surplus_K = np.append(prices_K.numpy(), price), sizes_K - aims_K
    # What others take from the pool or give back to it.
    surplus_P = np.append(surplus_K, -surplus_K.sum())
    by_cluster = min(_PER_CLUSTER * clusters, count // _PART)
    wanted = max(_PER_MOVE * int(surplus_P.clip(0).sum()), by_cluster)
    while surplus_P.any():
        looked_N = np.ones(count, bool)
        if wanted < count / 2:
            looked_N = margin_N <= np.partition(margin_N, wanted)[wanted]
        chosen_n, margin = np.flatnonzero(looked_N), margin_N.min(where=~looked_N, initial=np.inf)
        movable = rows if len(chosen_n) == count else Some(rows, chosen_n)
        # A cluster's rows are read for every path through it.
        size = movable.tile(0, 0, None).element_size()
        fits = len(chosen_n) * clusters * size <= memory
        if isinstance(rows, InMemory) and not fits:
            # All of them are there, without a copy.
            chosen_n, margin, movable = np.arange(count), np.inf, rows
        if fits or isinstance(movable, InMemory):
            movable = Resident.of(movable, CPU)
        flow = _Flow(movable, labels_N[chosen_n], prices_P, margin, aims_K, bounds)
        while surplus_P.any() and flow.advance(surplus_P, slack):
            progress(int(surplus_P.clip(0).sum()))
        labels_N[chosen_n] = flow.labels_N
        # What others' margins are at least, at the new prices, and these are looked at again.
        margin_N += flow.risen_K[labels_N] - flow.risen_K.max()
        margin_N[chosen_n] = -np.inf
        wanted = _WIDER * max(wanted, len(chosen_n))
        # Before more are kept: there is no memory for both.
        del flow, movable
    return labels_N, torch.from_numpy(prices_P[:-1])


class _Flow:
    """Rows on their way between clusters; the prices and the sizes that are aimed at, which it
    changes in place."""

    def __init__(
        self,
        rows: Rows,
        labels_N: np.ndarray,
        prices_P: np.ndarray,
        margin: float,
        aims_K: np.ndarray,
        bounds: Bounds,
    ) -> None:
        self.rows, self.labels_N, self.prices_P = rows, labels_N, prices_P
        self._aims_K, self._bounds, self._pool = aims_K, bounds, len(aims_K)
        self._margin, self._start_K = margin, prices_P[:-1].copy()
        order = np.argsort(labels_N, kind="stable")
        ends = np.cumsum(np.bincount(labels_N, minlength=len(aims_K)))
        # Of each cluster, ascending.
        self._members = np.split(order, ends[:-1])
        # From each node to each other, infinity where nothing can go; of clusters what rows
        # lose that are looked at, or that others lose at least where that is less.
        self._loss_PP = np.full((self._pool + 1, self._pool + 1), np.inf)
        self._kept = None
        loss_KK = self._loss_PP[:-1, :-1]
        if rows.device.type != "cpu":
            loss_KK[:] = _least_losses_on_device(rows, labels_N)
        elif isinstance(rows, Resident):
            maximum_N1 = rows.stored_NK.amax(1, keepdim=True).double()
            self._kept = rows.stored_NK.numpy(), maximum_N1.numpy()
            _least_losses_of_kept(rows, self._members, loss_KK)
        else:
            _least_losses(rows, labels_N, loss_KK)
        for cluster in range(self._pool):
            self._settle(cluster)

    @property
    def risen_K(self) -> np.ndarray:
        """By how much prices are above those at the start."""
        return self.prices_P[:-1] - self._start_K

    def advance(self, surplus_P: np.ndarray, slack: float) -> bool:
        """Move rows along the cheapest paths; false where rows of others might be cheaper."""
        paths = self._cheapest_paths(surplus_P)
        for path in paths:
            # Several may begin or end at the pool.
            most = min(surplus_P[path[0]], -surplus_P[path[-1]])
            if most > 0:
                moved = self._move_along(path, most, slack)
                surplus_P[path[0]] -= moved
                surplus_P[path[-1]] += moved
        return bool(paths)

    def _cheapest_paths(self, surplus_P: np.ndarray) -> list[list[int]]:
        """Paths from nodes with a surplus to the nearest ones that lack; updates the prices.

        Dijkstra from all of the former, on past the first of the latter for as long again.
        At the new prices every arc of its trees costs nothing, so that paths without a
        cluster in common can all be used.
        """
        prices_P, pool, over_P = self.prices_P, self._pool, surplus_P > 0
        distance_P = np.where(over_P, 0.0, np.inf)
        open_P = distance_P.copy()
        previous_P = np.full(len(prices_P), -1)
        visited: list[int] = []
        ends: list[list[int]] = []
        last = len(prices_P)
        while len(visited) < last:
            here = int(open_P.argmin())
            if not np.isfinite(open_P[here]):
                break
            visited.append(here)
            cost_P = self._loss_PP[here] - prices_P
            cost_P += prices_P[here]
            # Rounding, and rows moved within the slack, leave costs a little below zero.
            np.maximum(cost_P, 0.0, out=cost_P)
            cost_P += distance_P[here]
            end = []
            if surplus_P[here] < 0:
                end = [here]
            elif surplus_P[pool] < 0 and cost_P[pool] <= min(distance_P[[here, pool]]) + _TIE:
                # Others are as near to the pool.
                end = [here, pool]
            if end:
                if not ends:
                    last = min(last, 2 * len(visited) + _FURTHER)
                ends.append(end)
            nearer = cost_P < distance_P
            np.copyto(distance_P, cost_P, where=nearer)
            np.copyto(open_P, cost_P, where=nearer)
            np.copyto(previous_P, here, where=nearer)
            open_P[here] = np.inf
        assert ends, "every cluster with a row reaches every other"
        prices_P[visited] -= distance_P[visited[-1]] - distance_P[visited]
        paths: list[list[int]] = []
        used: set[int] = set()
        for end in ends:
            path = end[::-1]
            while not over_P[path[-1]]:
                path.append(int(previous_P[path[-1]]))
            path.reverse()
            known = all(
                self._loss_PP[arc] < self._least_elsewhere(arc[0])[arc[1]]
                for arc in pairwise(path)
                if pool not in arc
            )
            if known and used.isdisjoint(path):
                used.update(node for node in path if node != pool)
                paths.append(path)
        return paths

    def _settle(self, cluster: int) -> None:
        """Arcs from a cluster, and those to and from the pool, after a change."""
        (low_K, high_K), aim = self._bounds, self._aims_K[cluster]
        loss_K = self._loss_PP[cluster, :-1]
        np.minimum(loss_K, self._least_elsewhere(cluster), out=loss_K)
        self._loss_PP[cluster, self._pool] = 0.0 if aim < high_K[cluster] else np.inf
        self._loss_PP[self._pool, cluster] = 0.0 if aim > low_K[cluster] else np.inf

    def _least_elsewhere(self, cluster: int) -> np.ndarray:
        """What rows of a cluster that are not looked at lose at least by leaving it."""
        return self._margin + self._start_K - self._start_K[cluster]

    def _move_along(self, path: list[int], most: int, slack: float) -> int:
        """Send as many rows along each arc as `slack` and `most` allow, the same number on
        all. Returns that number.
        """
        (low_K, high_K), pool = self._bounds, self._pool
        arcs, willing = [], []
        for source, target in pairwise(path):
            if source == pool:
                most = min(most, self._aims_K[target] - low_K[target])
            elif target == pool:
                most = min(most, high_K[source] - self._aims_K[source])
            else:
                members = self._members[source]
                scores_m2 = self._scores(members, np.array([source, target]))
                loss_m = scores_m2[:, 0] - scores_m2[:, 1]
                order = np.argsort(loss_m, kind="stable")
                least = loss_m[order[0]]
                # The least goes, though what it loses may have been rounded otherwise before.
                worst = max(least, min(least + slack, self._least_elsewhere(source)[target]))
                most = min(most, int(np.searchsorted(loss_m[order], worst, side="right")))
                arcs.append((source, target))
                willing.append(members[order])
        for source, target in pairwise(path):
            if source == pool:
                self._aims_K[target] -= most
            elif target == pool:
                self._aims_K[source] += most
        moving = [np.sort(members[:most]) for members in willing]
        for (source, target), rows_m in zip(arcs, moving, strict=True):
            self.labels_N[rows_m] = target
            self._members[source] = np.setdiff1d(self._members[source], rows_m, assume_unique=True)
            self._members[target] = np.union1d(self._members[target], rows_m)
        for (source, target), rows_m in zip(arcs, moving, strict=True):
            scores_mK = self._scores(rows_m)
            self._forget(source, (scores_mK[:, [source]] - scores_mK).min(0))
            loss_K = self._loss_PP[target, :-1]
            np.minimum(loss_K, (scores_mK[:, [target]] - scores_mK).min(0), out=loss_K)
        for cluster in set(path) - {pool}:
            self._settle(cluster)
        return most

    def _forget(self, cluster: int, least_K: np.ndarray) -> None:
        """Rows have left a cluster that would lose at least so much by going elsewhere."""
        members, loss_K = self._members[cluster], self._loss_PP[cluster, :-1]
        if self._kept is None or not len(members):
            loss_K.fill(np.inf)

            # Whole rows in one read. They may be products, rounded otherwise in every batch.
            def work(block_nK: Tensor) -> np.ndarray:
                return (block_nK[:, [cluster]] - block_nK).amin(0).cpu().numpy()

            for part_K in map_rows(self.rows, members, work):
                np.minimum(loss_K, part_K, out=loss_K)
            return
        # Where theirs was the least loss, it is another row's now.
        stale = np.flatnonzero(least_K <= loss_K)
        own_m1 = self._scores(members, np.array([cluster]))
        loss_K[stale] = (own_m1 - self._scores(members, stale)).min(0)

    def _scores(self, rows_n: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
        """Of some rows (ascending), in some columns or all."""
        if self._kept is None:
            chosen = slice(None) if columns is None else torch.from_numpy(columns)
            blocks = map_rows(self.rows, rows_n, lambda block_nK: block_nK[:, chosen].cpu().numpy())
            return np.concatenate(list(blocks))
        kept_NK, maximum_N1 = self._kept
        chosen_nk = kept_NK[rows_n] if columns is None else kept_NK[rows_n[:, None], columns]
        return chosen_nk.astype(np.float64) - maximum_N1[rows_n]


def _least_losses(rows: Rows, labels_N: np.ndarray, loss_KK: np.ndarray) -> None:
    """Lower loss_KK[k, l] to the least logp_ik - logp_il over the rows i of cluster k."""
    # One for all workers: of minima the order does not matter.
    ours = Lock()

    def work(tiles: Iterator[tuple[int, Tensor]]) -> None:
        for start, tile_nK in tiles:
            labels_n = labels_N[start : start + len(tile_nK)]
            tile = tile_nK.numpy()
            order = np.argsort(labels_n, kind="stable")
            present, first = np.unique(labels_n[order], return_index=True)
            loss_nK = (tile[np.arange(len(tile)), labels_n][:, None] - tile)[order]
            lowest = np.minimum.reduceat(loss_nK, first, axis=0)
            with ours:
                loss_KK[present] = np.minimum(loss_KK[present], lowest)

    deque(map_spans(rows, work), maxlen=0)


def _least_losses_of_kept(rows: Resident, members: list[np.ndarray], loss_KK: np.ndarray) -> None:
    """The same by the cluster, for which no row is read twice: three times as fast."""
    clusters = rows.shape[1]
    parts = [(k, part_n) for k in range(clusters) for part_n in spans_of(members[k], clusters)]

    def work(part: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
        scores_nK = rows.take(part[1])
        return part[0], (scores_nK[:, part[0], None] - scores_nK).amin(0).numpy()

    for k, least_K in map_in_pool(work, parts, CPU):
        np.minimum(loss_KK[k], least_K, out=loss_KK[k])


def _least_losses_on_device(rows: Rows, labels_N: np.ndarray) -> np.ndarray:
    """Those of a GPU, which has no use for sorted rows; infinity where there are none."""
    clusters = rows.shape[1]

    def work(tiles: Iterator[tuple[int, Tensor]]) -> Tensor:
        loss_KK = torch.full((clusters, clusters), torch.inf, device=rows.device).double()
        for start, tile_nK in tiles:
            labels_n1 = torch.from_numpy(labels_N[start : start + len(tile_nK), None])
            labels_n1 = labels_n1.to(rows.device)
            loss_nK = tile_nK.gather(1, labels_n1) - tile_nK
            loss_KK.scatter_reduce_(0, labels_n1.expand_as(loss_nK), loss_nK, "amin")
        return loss_KK

    return reduce(torch.minimum, map_spans(rows, work)).cpu().numpy()


def _excess(sizes_K: np.ndarray, prices_K: np.ndarray, bounds: Bounds) -> int:
    """How many rows have to move, but for those that settle which clusters get the ceiling."""
    low_K, high_K = bounds
    aims_K, _ = _aims(sizes_K, prices_K, bounds)
    wide_K = high_K - low_K > 1
    over_K = sizes_K - np.where(wide_K, aims_K, high_K)
    under_K = np.where(wide_K, aims_K, low_K) - sizes_K
    return int(max(over_K.clip(0).sum(), under_K.clip(0).sum()))


def sharpen(
    rows: Rows,
    problem: Problem,
    potentials_K: Tensor,
    refine: Callable[[Problem, Tensor], Solution],
    bounds: Bounds,
) -> tuple[Tensor, Preferences]:
    """Prices at which what rows prefer is closer to balance than at potentials / lambda, and
    what they prefer there.

    Entropic potentials balance the soft plan, not its argmax: with flat scores most rows
    would have to move. Solving again, loosely, at 4, 16, ... times lambda brings the
    prices to those of the unregularised problem. `rows`: all of them, where the problem
    has a share. `refine`: of `newton`, or another solver.
    """
    lamb = problem.lamb
    prices_K = potentials_K / lamb
    before = rows.shape[0]
    # Rows that are in memory in single precision would be read anew for every look.
    kept = isinstance(rows, InMemory)
    dtype = torch.float32 if kept else torch.float64
    few = (_EXCESS if kept else _EXCESS_UNKEPT) * rows.shape[0]
    for left in range(_SHARPENINGS, -1, -1):
        prices_K = problem.marginal.levelled(prices_K * lamb) / lamb
        preferred = preferences(rows, prices_K, dtype)
        sizes_K = np.bincount(preferred.labels_N, minlength=rows.shape[1])
        excess = _excess(sizes_K, prices_K.numpy(), bounds)
        if not left or excess <= few or parallel.any_of(problem.stop()):
            break
        if excess > before / 2:
            q_nK = plan_of_some(rows, lamb, prices_K * lamb, torch.float32)
            if float(q_nK.amax(1).mean()) > _SHARP:
                break
        before = excess
        lamb *= 4
        sharper = problem.at(problem.rows, lamb, _LOOSE, _LOOSE_ITER)
        prices_K = refine(sharper, prices_K * lamb).potentials_K / lamb
    return prices_K, preferred if dtype == torch.float64 else preferences(rows, prices_K)
