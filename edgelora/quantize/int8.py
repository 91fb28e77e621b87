"""Float weights → int8 codes: w ≈ scale·code.

scale = (largest magnitude) / 127 as in GGUF's Q8_0 (ggml-quants.c, quantize_row_q8_0_ref), but
codes are the nearest for the scale *as stored*, in float16.
Code −128 is never written: a kernel may negate a code.
"""

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import blocks, chunks
from edgelora.quantize.matrix import Int8Matrix, ceil_div, check_block_size, check_matrix

LARGEST_CODE = np.float32(127)


def quantize_int8(weights: NDArray[np.float32], block_size: int) -> Int8Matrix:
    """Round-to-nearest int8 of float32 [out_features, in_features]; block_size 32, 64 or 128.

    ValueError, with row and block: a weight that is not finite, a scale beyond float16's range.
    """
    check_matrix("weights", weights, np.float32)
    check_block_size(block_size)
    rows, columns = weights.shape
    codes = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, ceil_div(columns, block_size)), np.float16)

    def work(part: slice) -> blocks.Vanished | None:
        values = blocks.split(weights[part], block_size)
        low, high = blocks.bounds(values, part.start)
        exact = np.asarray(np.maximum(high, -low) / LARGEST_CODE, np.float32)
        scales[part], vanished = blocks.round_scales(exact, part.start)
        codes[part] = _codes(values, scales[part])[:, :columns]
        return vanished

    blocks.refuse_underflow(scales, chunks.over(work, rows, columns))
    return Int8Matrix(codes, scales, block_size)


def _codes(values: NDArray[np.float32], scales: NDArray[np.float16]) -> NDArray[np.int8]:
    """Nearest codes [rows, columns]; overwrites `values` [rows, blocks, block_size]."""
    np.divide(values, blocks.divisors(scales), out=values)
    np.rint(values, out=values)
    np.clip(values, -LARGEST_CODE, LARGEST_CODE, out=values)
    return values.reshape(len(values), -1).astype(np.int8)
