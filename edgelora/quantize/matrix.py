"""Quantized matrices as arrays: one code for each weight, not yet packed for the kernels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NF4_BLOCK = 64  # weights that share an absmax
NF4_GROUP = 256  # absmax codes that share a nested absmax


@dataclass(frozen=True)
class Int4Matrix:
    """w = scale·(code − 8), or scale·(code − zero_point), or scale·code + offset.

    codes uint8 [out_features, in_features] in 0…15; scales float16 [out_features, blocks];
    zero_points uint8 [out_features, blocks] in 0…15 or None; offsets float16 [out_features, blocks] or None
    (never both). blocks = ceil(in_features / block_size), block_size 32, 64 or 128.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    block_size: int
    zero_points: NDArray[np.uint8] | None = None
    offsets: NDArray[np.float16] | None = None


@dataclass(frozen=True)
class Int8Matrix:
    """w = scale·code. codes int8 [out_features, in_features]; scales float16 [out_features, blocks]."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    block_size: int


@dataclass(frozen=True)
class Nf4Matrix:
    """bitsandbytes' NF4 with double quantization: w = nf4[code]·absmax, blocks of 64 over the flattened matrix.

    codes uint8 [out_features, in_features] in 0…15; absmax_codes uint8 [ceil(size / 64)];
    nested_absmax float32 [ceil(len(absmax_codes) / 256)]; absmax_offset float32 scalar; absmax_table float32 [256].
    absmax[b] = absmax_table[absmax_codes[b]]·nested_absmax[b // 256] + absmax_offset (float32 arithmetic).
    """

    codes: NDArray[np.uint8]
    absmax_codes: NDArray[np.uint8]
    nested_absmax: NDArray[np.float32]
    absmax_offset: np.float32
    absmax_table: NDArray[np.float32]


@dataclass(frozen=True)
class FloatMatrix:
    """weights float32 [out_features, in_features]."""

    weights: NDArray[np.float32]


Matrix = Int4Matrix | Int8Matrix | Nf4Matrix | FloatMatrix
