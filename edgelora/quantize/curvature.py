"""How much an error in each weight costs: the Hessian of a linear's output error, factorized.

With inputs X [tokens, in_features] the squared error of one output is eᵀHe, H = XᵀX, e the errors
of the weights in its row. With H = U·D·Uᵀ, U unit upper triangular, that is
Σ_k D_k·(e_k + Σ_{i<k} U_ik·e_i)²: what is lost at column k, rounded after the columns before it,
when the errors of those are there to be made up for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize.matrix import ceil_div

DAMPING = 0.01  # of the mean of the diagonal, added to it
_PANEL = 64  # columns that are factorized before the rest is brought up to date

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Product = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
"""Matrix product [M, K] @ [K, N], float32 or float64. It must not depend on the number of threads,
which numpy's does: equal inputs must give equal bytes."""


@dataclass(frozen=True)
class Curvature:
    """The factors of a Hessian whose columns are taken in `order`.

    Blocks of `block_size` columns are taken from the one that matters most to the one that matters
    least, and likewise the columns inside each: what comes late takes up the errors of what came
    before. `order` int64 [in_features]; `hessian` (damped) and `upper` (unit upper triangular)
    float32 [in_features, in_features] and `pivots` float32 [in_features] in that order.
    """

    order: NDArray[np.int64]
    hessian: Float32
    upper: Float32
    pivots: Float32
    block_size: int

    @property
    def blocks(self) -> list[slice]:
        """Where each block is in `order`."""
        starts = np.flatnonzero(np.diff(self.order // self.block_size, prepend=-1)).tolist()
        ends = [*starts[1:], self.order.size]
        return [slice(start, end) for start, end in zip(starts, ends, strict=True)]

    def solve(self, right: Float32, product: Product) -> Float32:
        """H⁻¹·right, float32 [in_features, columns], in the order of the weight's columns."""
        x, upper = right[self.order], self.upper
        panels = [slice(at, min(at + _PANEL, len(x))) for at in range(0, len(x), _PANEL)]
        for panel in reversed(panels):  # U·y = right
            later = upper[panel, panel.stop :]
            if later.size:
                x[panel] -= product(np.ascontiguousarray(later), x[panel.stop :])
            for row in range(panel.stop - 2, panel.start - 1, -1):
                x[row] -= (upper[row, row + 1 : panel.stop, None] * x[row + 1 : panel.stop]).sum(0)
        x /= self.pivots[:, None]
        for panel in panels:  # Uᵀ·x = D⁻¹·y
            earlier = upper[: panel.start, panel]
            if earlier.size:
                x[panel] -= product(np.ascontiguousarray(earlier.T), x[: panel.start])
            for row in range(panel.start + 1, panel.stop):
                x[row] -= (upper[panel.start : row, row, None] * x[panel.start : row]).sum(0)
        solved = np.empty_like(x)
        solved[self.order] = x
        return solved


def factorize(
    hessian: Float64, block_size: int, product: Product, *, damping: float = DAMPING
) -> Curvature:
    """Of float64 [in_features, in_features]. ValueError unless positive semidefinite, finite."""
    _check(hessian)
    diagonal = np.diag(hessian)
    order = _order(diagonal, block_size)
    turned = hessian[np.ix_(order[::-1], order[::-1])]
    turned[np.diag_indices_from(turned)] += damping * diagonal.mean() or 1.0
    damped = turned[::-1, ::-1].astype(np.float32)
    _cholesky(turned, product)
    root = turned[::-1, ::-1]  # Cholesky's L of the matrix turned around is U·√D turned around
    roots = np.diag(root).copy()
    upper = np.empty(root.shape, np.float32)
    np.divide(root, roots, out=upper, casting="same_kind")
    return Curvature(order, damped, upper, (roots * roots).astype(np.float32), block_size)


def _check(hessian: Float64) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or hessian.dtype != np.float64:
        raise ValueError(f"hessian: float64 [K, K], not {hessian.dtype} {list(hessian.shape)}")
    if not np.isfinite(hessian).all():
        column = int(np.argmin(np.isfinite(hessian).all(axis=0)))
        raise ValueError(f"column {column} of the hessian holds NaN or Inf")
    if (np.diag(hessian) < 0).any():
        raise ValueError(f"column {int(np.argmin(np.diag(hessian)))} of the hessian: negative")


def _order(diagonal: Float64, block_size: int) -> NDArray[np.int64]:
    """Stable sorts: equal columns keep their places."""
    size = diagonal.size
    starts = np.arange(0, size, block_size)
    weight = np.add.reduceat(diagonal, starts)
    parts = []
    for block in np.argsort(-weight, kind="stable"):
        columns = np.arange(starts[block], min(starts[block] + block_size, size))
        parts.append(columns[np.argsort(-diagonal[columns], kind="stable")])
    return np.concatenate(parts)


def _cholesky(matrix: Float64, product: Product) -> None:
    """Makes of it the lower triangular L with L·Lᵀ = matrix."""
    size = len(matrix)
    for panel in range(ceil_div(size, _PANEL)):
        first, last = panel * _PANEL, min((panel + 1) * _PANEL, size)
        for column in range(first, last):
            pivot = matrix[column, column]
            if not pivot > 0:
                raise ValueError(f"the hessian is not positive definite at pivot {column}")
            below = matrix[column:, column]
            below /= np.sqrt(pivot)
            rest = matrix[column + 1 :, column + 1 : last]
            rest -= below[1:, None] * below[1 : last - column]
            matrix[column, column + 1 :] = 0
        done = np.ascontiguousarray(matrix[last:, first:last])
        if done.size:
            matrix[last:, last:] -= product(done, np.ascontiguousarray(done.T))
