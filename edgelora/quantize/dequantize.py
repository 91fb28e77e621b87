"""Codes → float32 weights, operation for operation as ARCHITECTURE.md states them."""

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import chunks
from edgelora.quantize.matrix import (
    NF4_BLOCK,
    NF4_GROUP,
    FloatMatrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    Nf4Matrix,
    PlainNf4Matrix,
)

# QLoRA (Dettmers et al., arXiv:2305.14314), appendix E: quantiles of N(0, 1) scaled to [-1, 1].
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

# bitsandbytes' FP4 (sign, two bits of exponent, one of mantissa) over its maximum 12, csrc/common.h
_FP4_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4_VALUES = np.concatenate([_FP4_POSITIVE, -_FP4_POSITIVE])

VALUES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}  # codebook → what its codes stand for

Float32 = NDArray[np.float32]


def dequantize(matrix: Matrix) -> Float32:
    """float32 [out_features, in_features]; for FloatMatrix the weights themselves, not a copy."""
    if isinstance(matrix, FloatMatrix):
        return matrix.weights
    if isinstance(matrix, Nf4Matrix | PlainNf4Matrix):
        return _coded(matrix)
    return _scaled(matrix)


def _scaled(matrix: Int4Matrix | Int8Matrix) -> Float32:
    rows, columns = matrix.codes.shape
    weights = np.empty((rows, columns), np.float32)

    def work(part: slice) -> None:
        values = weights[part]
        values[...] = matrix.codes[part]
        if isinstance(matrix, Int4Matrix) and matrix.offsets is None:
            values -= _zeros(matrix, part)
        values *= _spread(matrix.scales[part], matrix.block_size, columns)
        if isinstance(matrix, Int4Matrix) and matrix.offsets is not None:
            values += _spread(matrix.offsets[part], matrix.block_size, columns)

    chunks.over(work, rows, columns)
    return weights


def _zeros(matrix: Int4Matrix, part: slice) -> Float32 | np.float32:
    """What is subtracted from the codes of these rows: the zero points, or 8."""
    if matrix.zero_points is None:
        return np.float32(8)
    return _spread(matrix.zero_points[part], matrix.block_size, matrix.codes.shape[1])


def _spread(
    per_block: NDArray[np.float16 | np.float32] | NDArray[np.uint8],
    block_size: int,
    columns: int,
) -> Float32:
    """[rows, blocks] → float32 [rows, columns]."""
    return np.repeat(per_block.astype(np.float32), block_size, axis=1)[:, :columns]


def nf4_absmax(matrix: Nf4Matrix | PlainNf4Matrix) -> Float32:
    """absmax float32 [ceil(size / 64)]: product, then sum, each rounded to float32."""
    if isinstance(matrix, PlainNf4Matrix):
        return matrix.absmax
    nested = np.repeat(matrix.nested_absmax, NF4_GROUP)[: matrix.absmax_codes.size]
    return matrix.absmax_table[matrix.absmax_codes] * nested + matrix.absmax_offset


def round_to(values: Float32, dtype: str) -> Float32:
    """float32 values rounded to `dtype` (to nearest, ties to even) and back. Changes `values`."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)
        bits &= 0xFFFF0000
    return values


def _coded(matrix: Nf4Matrix | PlainNf4Matrix) -> Float32:
    codes = matrix.codes.reshape(-1)
    weights = np.empty(codes.size, np.float32)
    absmax = nf4_absmax(matrix)

    def work(part: slice) -> None:
        flat = slice(part.start * NF4_BLOCK, part.stop * NF4_BLOCK)
        values = VALUES[matrix.codebook][codes[flat]]
        product = values * np.repeat(absmax[part], NF4_BLOCK)[: values.size]
        weights[flat] = round_to(product, matrix.rounded_to)

    chunks.over(work, absmax.size, NF4_BLOCK)
    return weights.reshape(matrix.codes.shape)
