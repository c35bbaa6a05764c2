"""What steps go by: the semi-dual's Hessian, and the change of potentials that follows from it.

K columns (clusters) of the score matrix, m columns of a right-hand side.

A step minimises the quadratic model of F in a box about the potentials, or nearly. The
Hessian is there as a Cholesky factor and what later steps say of it; as its products with
vectors, by conjugate gradients; or as the diagonal of the plan's marginal and what steps
say. The last two need no matrix of K x K. Source: Nocedal and Wright, ch. 5 to 7.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sela_cli.semidual import Point

# How often the bounds that hold are looked for.
_BOX_ROUNDS = 6
# With more of the coordinates at the sides, and more than half, the rest is not solved for.
_MANY_HELD = 64
# A step along which F falls by less than this for each unit of gradient is no good.
_DESCENT = 0.1
_DAMPING = 1e-6
# The least cosine of a step and of how the gradient turned that says anything.
_TURN = 1e-12
_LEAST_SHARE = 1e-4
# Steps that `Metric` remembers.
_MEMORY = 20
# Conjugate gradients: by how much the residual is to fall, and products at most.
_FALL, _PRODUCTS = 0.1, 100


class Curvature(Protocol):
    """What is known of the Hessian."""

    def step(self, point: Point, gradient_K: Tensor, box: float) -> Tensor:
        """The change that leads down, each coordinate within `box` of zero."""
        ...

    def update(self, moved_K: Tensor, turned_K: Tensor) -> None:
        """It is to explain how the gradient turned in a step."""
        ...


class _Secant:
    """The steps that have been made, for the two loops of L-BFGS (Nocedal and Wright,
    algorithm 7.4) about a metric."""

    def __init__(self, memory: int | None = None) -> None:
        self._steps: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=memory)

    def update(self, moved_K: Tensor, turned_K: Tensor) -> None:
        """It is to explain how the gradient turned in a step."""
        across = float(moved_K @ turned_K)
        if across > _TURN * float(moved_K.norm() * turned_K.norm()):
            self._steps.append((moved_K, turned_K, across))

    def _solve(self, sides_Km: Tensor, metric: Callable[[Tensor], Tensor]) -> Tensor:
        """H^-1 of some columns."""
        answers_Km, shares = sides_Km.clone(), []
        for moved_K, turned_K, across in reversed(self._steps):
            shares.append((moved_K @ answers_Km) / across)
            answers_Km -= torch.outer(turned_K, shares[-1])
        answers_Km = metric(answers_Km)
        for (moved_K, turned_K, across), share in zip(self._steps, reversed(shares), strict=True):
            answers_Km += torch.outer(moved_K, share - (turned_K @ answers_Km) / across)
        return answers_Km


class Metric(_Secant):
    """diag(s), which is Sinkhorn's metric, and the last steps (L-BFGS)."""

    def __init__(self) -> None:
        super().__init__(_MEMORY)

    def step(self, point: Point, gradient_K: Tensor, box: float) -> Tensor:
        """The change, cut to the box."""
        change_K = self._solve(-gradient_K[:, None], lambda x_Km: x_Km / point.s_K[:, None])[:, 0]
        return (change_K - change_K.mean()).clamp(-box, box)


class Factored(_Secant):
    """A Hessian by its factor, and by what the steps since it was taken say of it (BFGS).

    It stays on the device that the Hessian is on.
    """

    def __init__(self, hessian_KK: Tensor, s_K: Tensor) -> None:
        """Takes the Hessian over."""
        super().__init__()
        self._device = hessian_KK.device
        self._weights_K = _weights(s_K.to(self._device))
        # Clusters that hardly any row is undecided about leave it singular to rounding.
        self._system_KK = hessian_KK.add_(_level(len(s_K)))
        self._system_KK.diagonal().add_(_DAMPING * self._weights_K)
        self._factor_KK = torch.linalg.cholesky(self._system_KK)

    def update(self, moved_K: Tensor, turned_K: Tensor) -> None:
        """It is to explain how the gradient turned in a step."""
        super().update(moved_K.to(self._device), turned_K.to(self._device))

    def step(self, point: Point, gradient_K: Tensor, box: float) -> Tensor:
        """The change: coordinates that leave the box are held at its side, and the others
        follow, by one factor for all rounds."""
        clusters, gradient_K = len(gradient_K), gradient_K.to(self._device)
        free_K = self._answers(-gradient_K[:, None])[:, 0]
        free_K -= free_K.median()
        change_K, held = free_K, torch.zeros_like(free_K, dtype=torch.bool)
        for _ in range(_BOX_ROUNDS):
            outside = change_K.abs() > box * (1 + 1e-9)
            held |= outside
            if not outside.any() or int(held.sum()) > max(clusters / 2, _MANY_HELD):
                break
            units_KK = torch.eye(clusters, dtype=gradient_K.dtype, device=gradient_K.device)
            answers = self._answers(units_KK[:, held])
            excess = free_K[held] - change_K[held].clamp(-box, box)
            change_K = free_K - answers @ torch.linalg.solve(answers[held], excess)
        change_K = change_K.clamp(-box, box)
        return self._downhill(change_K, gradient_K, box, bool(held.any())).cpu()

    def _answers(self, sides_Km: Tensor) -> Tensor:
        return self._solve(sides_Km, lambda x_Km: torch.cholesky_solve(x_Km, self._factor_KK))

    def _downhill(self, change_K: Tensor, gradient_K: Tensor, box: float, held: bool) -> Tensor:
        """The change, or where it leads nowhere a shorter one, in which nothing is held: held
        coordinates are never let go."""
        damping = _DAMPING
        while (
            held
            and damping < 1
            and float(gradient_K @ change_K) > -_DESCENT * float(gradient_K.abs().sum())
        ):
            damping *= 10
            change_K = self._damped(damping, gradient_K)
            change_K -= change_K.mean()
            change_K *= min(1.0, box / float(change_K.abs().max()))
        return change_K

    def _damped(self, damping: float, gradient_K: Tensor) -> Tensor:
        """Where the Hessian alone leads, with more on its diagonal."""
        system_KK = self._system_KK.clone()
        system_KK.diagonal().add_(damping * self._weights_K)
        factor_KK = torch.linalg.cholesky(system_KK)
        return torch.cholesky_solve(-gradient_K[:, None], factor_KK)[:, 0]


class Products:
    """The Hessian at one point by its products with vectors: conjugate gradients on the scale
    of its diagonal, whose first steps are those that matter (Steihaug 1983)."""

    def __init__(self, product: Callable[[Tensor], Tensor], diagonal_K: Tensor, s_K: Tensor):
        self._bare, self._damping_K = product, _DAMPING * _weights(s_K)
        self._level = _level(len(s_K))
        self._diagonal_K = diagonal_K + self._damping_K + self._level

    def update(self, moved_K: Tensor, turned_K: Tensor) -> None:
        """Nothing is kept: it is of one point."""

    def step(self, point: Point, gradient_K: Tensor, box: float) -> Tensor:
        """The change: coordinates that come to a side of the box stay there, and the others
        go on."""
        change_K, left_K = torch.zeros_like(gradient_K), -gradient_K
        held = torch.zeros_like(gradient_K, dtype=torch.bool)
        along_K, norm, enough = None, 0.0, 0.0
        for _ in range(_PRODUCTS):
            free_K = left_K.masked_fill(held, 0.0)
            scaled_K = free_K / self._diagonal_K
            before, norm = norm, float(free_K @ scaled_K)
            enough = enough or norm * _FALL**2
            if norm <= enough:
                break
            along_K = scaled_K if along_K is None else scaled_K + norm / before * along_K
            turned_K = self._product(along_K)
            length = norm / float(along_K @ turned_K)
            reached_K = change_K + length * along_K
            if not (reached_K.abs() > box).any():
                change_K, left_K = reached_K, left_K - length * turned_K
                continue
            # All that go too far are stopped, or where that leads up, the first of them.
            cut_K = reached_K.clamp(-box, box)
            cut_left_K = left_K - self._product(cut_K - change_K)
            if cut_K @ (gradient_K - cut_left_K) > change_K @ (gradient_K - left_K):
                side_K = box * along_K.sign()
                lengths_K = (side_K - change_K) / along_K
                lengths_K.masked_fill_(along_K == 0, torch.inf)
                length = float(lengths_K.min())
                cut_K = (change_K + length * along_K).clamp(-box, box)
                # Exactly there, whatever the rounding.
                cut_K = torch.where(lengths_K == length, side_K, cut_K)
                cut_left_K = left_K - length * turned_K
            change_K, left_K, along_K = cut_K, cut_left_K, None
            held |= change_K.abs() == box
        return change_K

    def _product(self, x_K: Tensor) -> Tensor:
        return self._bare(x_K) + self._damping_K * x_K + self._level * x_K.sum()


def _level(clusters: int) -> float:
    """What is added to all of a Hessian: F does not change along (1, ..., 1), so it is
    singular there, and where some coordinates are held the others would go far together."""
    return 1 / clusters**2


def _weights(s_K: Tensor) -> Tensor:
    """Scales of the coordinates, for damping."""
    return s_K.clamp(min=_LEAST_SHARE / len(s_K) ** 2)
