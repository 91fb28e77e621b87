"""int4 codes with a change that is the same for all weights of a block: the offsets take it up."""

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize.matrix import Int4Matrix

Float32 = NDArray[np.float32]


def move_offsets(matrix: Int4Matrix, change: Float32) -> Int4Matrix:
    """w + change, codes and scales as they are; change float32 [out_features, blocks].

    scale·(code − zero) + change = scale·code + (change − scale·zero); float32 holds scale·zero
    exactly. ValueError: an offset that float16, in which kernels of int8 read it, does not hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        offsets = _offsets(matrix) + change
        finite = np.isfinite(offsets.astype(np.float16)).all(axis=1)
    if not finite.all():
        raise ValueError(f"row {int(np.argmin(finite))}: an offset is beyond float16")
    return Int4Matrix(matrix.codes, matrix.scales, matrix.block_size, offsets=offsets)


def _offsets(matrix: Int4Matrix) -> Float32:
    if matrix.offsets is not None:
        return matrix.offsets.astype(np.float32)
    zeros = np.float32(8) if matrix.zero_points is None else matrix.zero_points.astype(np.float32)
    return -matrix.scales.astype(np.float32) * zeros
