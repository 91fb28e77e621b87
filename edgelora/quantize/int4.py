"""Float weights → int4 codes: w ≈ scale·(code − 8), or scale·(code − zero_point).

Symmetric: scale = (signed weight of largest magnitude) / −8, so that this weight gets code 0 and
all 16 codes are used: the rule of GGUF's Q4_0 (ggml-quants.c, quantize_row_q4_0_ref). Unlike there,
codes are the nearest for the scale *as stored*, in float16.
"""

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import blocks, chunks
from edgelora.quantize.matrix import Int4Matrix, ceil_div, check_block_size, check_matrix

ZERO_CODE = np.float32(8)
LAST_CODE = 15

Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]
Uint8 = NDArray[np.uint8]


def quantize_int4(weights: Float32, block_size: int, *, zero_points: bool = False) -> Int4Matrix:
    """Round-to-nearest int4 of float32 [out_features, in_features]; block_size 32, 64 or 128.

    ValueError, with row and block: a weight that is not finite, a scale beyond float16's range.
    A block of zeros has scale 0 and dequantizes to exactly 0.
    """
    check_matrix("weights", weights, np.float32)
    check_block_size(block_size)
    rows, columns = weights.shape
    grid = (rows, ceil_div(columns, block_size))
    codes, scales = np.empty((rows, columns), np.uint8), np.empty(grid, np.float16)
    zeros = np.empty(grid, np.uint8) if zero_points else None

    def work(part: slice) -> blocks.Vanished | None:
        values = blocks.split(weights[part], block_size)
        low, high = blocks.bounds(values, part.start)
        if zeros is None:
            exact = _signed_scales(values, low, high)
            scales[part], vanished = blocks.round_scales(exact, part.start)
            rounded = _codes(values, scales[part], ZERO_CODE)
        else:
            scales[part], vanished = blocks.round_scales(_range_scales(low, high), part.start)
            zeros[part] = _zero_points(low, scales[part])
            rounded = _codes(values, scales[part], zeros[part].astype(np.float32)[..., None])
        codes[part] = rounded[:, :columns]
        return vanished

    blocks.refuse_underflow(scales, chunks.over(work, rows, columns))
    return Int4Matrix(codes, scales, block_size, zero_points=zeros)


def _signed_scales(values: Float32, low: Float32, high: Float32) -> Float32:
    """Weight of largest magnitude / −8, [rows, blocks]; of two with equal magnitude the first."""
    extreme = np.where(high > -low, high, low)
    tied = np.nonzero((high == -low) & (high != 0))
    if tied[0].size:
        block = values[tied]
        extreme[tied] = block[np.arange(len(block)), np.abs(block).argmax(axis=-1)]
    return np.asarray(extreme / np.float32(-8), np.float32)


def _range_scales(low: Float32, high: Float32) -> Float32:
    """(high − low) / 15 of the range extended to 0, [rows, blocks]."""
    with np.errstate(over="ignore"):  # an infinite scale is refused with its row and block
        width = np.maximum(high, 0) - np.minimum(low, 0)
        return np.asarray(width / np.float32(LAST_CODE), np.float32)


def _zero_points(low: Float32, scales: Float16) -> Uint8:
    """The code of 0, [rows, blocks]."""
    steps = np.minimum(low, 0) / blocks.divisors(scales)[..., 0]
    return np.clip(np.rint(-steps), 0, LAST_CODE).astype(np.uint8)


def _codes(values: Float32, scales: Float16, zeros: Float32 | np.float32) -> Uint8:
    """Nearest codes [rows, columns]; overwrites `values` [rows, blocks, block_size]."""
    np.divide(values, blocks.divisors(scales), out=values)
    np.rint(values, out=values)
    values += zeros
    np.clip(values, 0, LAST_CODE, out=values)
    return values.reshape(len(values), -1).astype(np.uint8)
