"""Float weights → int4 codes whose errors make up for each other (second order).

Columns are rounded one after the other; each later column takes up what the earlier ones lost, as
far as the inputs of the linear are correlated (GPTQ, Frantar et al., arXiv:2210.17323; in the form
of LDLQ, Chee et al., arXiv:2307.13304). The scale of each block of a row is the one of CANDIDATES
that loses least when the whole block is rounded with it in this way. Then sweeps over the columns
move scales and codes, one at a time, wherever the output's error gets smaller.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import blocks, chunks
from edgelora.quantize.curvature import Curvature, Product
from edgelora.quantize.int4 import LAST_CODE, ZERO_CODE, quantize_int4
from edgelora.quantize.matrix import Int4Matrix, check_matrix

# Times the plain scale, which makes the block's weight of largest magnitude code 0. A smaller one
# clips it; a negative one gives it a code at the other end.
CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, -1.143, -1.07, -1.0, -0.93, -0.86, -0.79)
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # times the plain range, with zero points
SWEEPS = 3
_ROWS = 256  # rows at a time: a block of them in all candidates stays in the cache

Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]
Uint8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Grid:
    """The values that a block of each row may take: scale·(code − zero).

    scales, zeros float32 [candidates, rows]; scales exactly those of float16.
    """

    scales: Float32
    zeros: Float32


def compensate_int4(
    weights: Float32,
    curvature: Curvature,
    product: Product,
    *,
    zero_points: bool = False,
    sweeps: int = SWEEPS,
) -> Int4Matrix:
    """int4 of float32 [out_features, in_features] in the curvature's blocks.

    No row's output error is larger than plain rounding's (`quantize_int4`), whose codes a row keeps
    if they are better. ValueError: see `quantize_int4`.
    """
    check_matrix("weights", weights, np.float32)
    size = curvature.block_size
    plain = quantize_int4(weights, size, zero_points=zero_points)
    codes, scales, zeros = plain.codes, plain.scales, plain.zero_points

    def work(part: slice) -> None:
        for first in range(part.start, part.stop, _ROWS):
            rows = slice(first, min(first + _ROWS, part.stop))
            piece = _Piece(weights[rows], curvature, product, zero_points=zero_points)
            better = piece.round() < piece.loss_of(plain, rows)
            for _ in range(sweeps):
                piece.sweep()
            columns, stored = curvature.order[:, None], piece.stored[:, None]
            chosen = rows.start + np.flatnonzero(better)
            codes[chosen, columns] = piece.codes[:, better].astype(np.uint8)
            scales[chosen, stored] = piece.scales[:, better].astype(np.float16)
            if zeros is not None:
                zeros[chosen, stored] = piece.zeros[:, better].astype(np.uint8)

    chunks.over(work, *weights.shape)
    return Int4Matrix(codes, scales, size, zero_points=zeros)


class _Piece:
    """Some rows of a matrix, turned: the rows are the last dimension of every array.

    Columns and blocks come in the curvature's order.
    """

    def __init__(
        self, weights: Float32, curvature: Curvature, product: Product, *, zero_points: bool
    ) -> None:
        self.curvature, self.product, self.zero_points = curvature, product, zero_points
        self.blocks = curvature.blocks
        firsts = [block.start for block in self.blocks]
        self.stored = curvature.order[firsts] // curvature.block_size  # each block's place
        self.weights = np.ascontiguousarray(weights.T[curvature.order])  # [in_features, rows]
        self.codes = np.empty_like(self.weights)
        self.scales = np.empty((len(self.blocks), len(weights)), np.float32)
        self.zeros = np.empty_like(self.scales)

    def round(self) -> Float32:
        """Fills codes, scales and zeros; returns each row's loss."""
        wanted = self.weights.copy()  # each column with what the earlier ones left it to take up
        loss = np.zeros(wanted.shape[1], np.float32)
        for index, block in enumerate(self.blocks):
            grid = _grids(wanted[block], zero_points=self.zero_points)
            codes, losses = self._try(wanted[block], block, grid)
            best = losses.argmin(axis=0)
            row = np.arange(best.size)
            self.scales[index], self.zeros[index] = grid.scales[best, row], grid.zeros[best, row]
            self.codes[block] = codes[:, best, row]
            loss += losses[best, row]
            later = np.ascontiguousarray(self.curvature.upper[block, block.stop :].T)
            if later.size:
                errors = self.weights[block] - self._values(index)
                wanted[block.stop :] += self.product(later, errors)
        return loss

    def _values(self, index: int) -> Float32:
        """What the codes of one block stand for."""
        steps = self.codes[self.blocks[index]] - self.zeros[index]
        return np.asarray(steps * self.scales[index], np.float32)

    def _try(self, wanted: Float32, block: slice, grid: Grid) -> tuple[Float32, Float32]:
        """Codes float32 [columns, candidates, rows] and losses [candidates, rows] of one block."""
        upper, pivots = self.curvature.upper[block, block], self.curvature.pivots[block]
        own = self.weights[block]
        columns, shape = len(wanted), grid.scales.shape
        targets = np.repeat(wanted[:, None, :], shape[0], axis=1)
        codes = np.empty((columns, *shape), np.float32)
        losses = np.zeros(shape, np.float32)
        inverse = _inverse(grid.scales)
        for column in range(columns):
            target, code = targets[column], codes[column]
            _nearest(target, inverse, grid.zeros, out=code)
            value = (code - grid.zeros) * grid.scales
            lost = target - value
            losses += pivots[column] * lost * lost
            error = own[column] - value  # without what the column was asked to take up
            targets[column + 1 :] += upper[column, column + 1 :, None, None] * error
        return codes, losses

    def loss_of(self, matrix: Int4Matrix, rows: slice) -> Float32:
        """Of other codes for the same rows."""
        curvature = self.curvature
        stored = curvature.order // curvature.block_size
        scales = matrix.scales[rows].astype(np.float32)[:, stored].T
        zeros = np.full_like(scales, ZERO_CODE)
        if matrix.zero_points is not None:
            zeros = matrix.zero_points[rows].astype(np.float32)[:, stored].T
        values = (matrix.codes[rows].T[curvature.order] - zeros) * scales
        lost = self.product(np.ascontiguousarray(curvature.upper.T), self.weights - values)
        return np.asarray((curvature.pivots[:, None] * lost * lost).sum(axis=0), np.float32)

    def sweep(self) -> None:
        """Every block's scale and every code once more, all others as they are.

        slope = H·(errors): half of what the loss would fall by if a value rose by 1.
        """
        hessian = self.curvature.hessian
        errors = self.weights - np.concatenate([self._values(i) for i in range(len(self.blocks))])
        slope = self.product(hessian, errors)
        for index, block in enumerate(self.blocks):
            inner = np.ascontiguousarray(hessian[block, block])
            before = self._values(index)
            local = slope[block].copy()
            self._move_scale(index, inner, local)
            self._move_codes(index, inner, local)
            moved = self._values(index) - before
            slope -= self.product(np.ascontiguousarray(hessian[:, block]), moved)

    def _move_scale(self, index: int, inner: Float32, slope: Float32) -> None:
        """To the best for the codes, where its rounding to float16 leaves a gain."""
        steps = self.codes[self.blocks[index]] - self.zeros[index]
        bent = self.product(inner, steps)
        gain, cost = (steps * slope).sum(axis=0), (steps * bent).sum(axis=0)
        scales = self.scales[index]
        better = _rounded(scales + gain * _inverse(cost))
        change = better - scales
        change[2 * change * gain <= change * change * cost] = 0
        self.scales[index] = scales + change
        slope -= change * bent

    def _move_codes(self, index: int, inner: Float32, slope: Float32) -> None:
        scales, zeros = self.scales[index], self.zeros[index]
        inverse, codes = _inverse(scales), self.codes[self.blocks[index]]
        for column, code in enumerate(codes):
            before = (code - zeros) * scales
            target = before + slope[column] / inner[column, column]
            _nearest(target, inverse, zeros, out=code)
            slope -= inner[:, column, None] * ((code - zeros) * scales - before)


def _nearest(target: Float32, inverse: Float32, zeros: Float32, *, out: Float32) -> None:
    """The codes that come nearest to `target`."""
    np.multiply(target, inverse, out=out)
    out += zeros
    np.rint(out, out=out)
    np.clip(out, 0, LAST_CODE, out=out)


def _inverse(scales: Float32) -> Float32:
    """0 for 0."""
    return np.asarray(1 / np.where(scales == 0, np.float32(np.inf), scales), np.float32)


def _grids(wanted: Float32, *, zero_points: bool) -> Grid:
    """Candidates for one block [columns, rows]."""
    low, high = wanted.min(axis=0), wanted.max(axis=0)
    if zero_points:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        factors = np.array(RANGES, np.float32)[:, None]
        scales = _rounded((high - low) * factors / LAST_CODE)
        return Grid(scales, np.clip(np.rint(-low * factors * _inverse(scales)), 0, LAST_CODE))
    extreme = np.where(high > -low, high, low) / np.float32(-8)
    scales = _rounded(extreme * np.array(CANDIDATES, np.float32)[:, None])
    return Grid(scales, np.full_like(scales, ZERO_CODE))


def _rounded(scales: Float32) -> Float32:
    """What float16 makes of them, kept in its range."""
    return np.clip(scales, -blocks.LARGEST, blocks.LARGEST).astype(np.float16).astype(np.float32)
