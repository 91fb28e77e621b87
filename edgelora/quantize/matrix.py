"""Quantized matrices as arrays: one code for each weight, not yet packed for the kernels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

BLOCK_SIZES = (32, 64, 128)  # of int4 and int8

NF4_BLOCK = 64  # weights that share an absmax
NF4_GROUP = 256  # absmax codes that share a nested absmax
CODEBOOKS = ("nf4", "fp4")
ROUNDINGS = ("float32", "bfloat16", "float16")  # what bitsandbytes rounds a weight to


@dataclass(frozen=True)
class Int4Matrix:
    """w = scale·(code − 8), or scale·(code − zero_point), or scale·code + offset.

    codes uint8 [out_features, in_features] in 0…15; scales float16 [out_features, blocks];
    zero_points uint8 [out_features, blocks] in 0…15 or None; offsets float16 or float32
    [out_features, blocks] or None (never both). blocks = ceil(in_features / block_size),
    block_size 32, 64 or 128.
    ValueError: another shape or dtype, a scale or offset that is not finite.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    block_size: int
    zero_points: NDArray[np.uint8] | None = None
    offsets: NDArray[np.float16 | np.float32] | None = None

    def __post_init__(self) -> None:
        _check_blockwise(self.codes, np.uint8, self.scales, self.block_size)
        if self.zero_points is not None and self.offsets is not None:
            raise ValueError("zero_points and offsets exclude each other")
        if self.zero_points is not None:
            check_array("zero_points", self.zero_points, np.uint8, self.scales.shape)
        if self.offsets is not None:
            dtype = offset_dtype(self.offsets)
            check_array("offsets", self.offsets, dtype, self.scales.shape)


@dataclass(frozen=True)
class Int8Matrix:
    """w = scale·code.

    codes int8 [out_features, in_features]; scales float16 [out_features, blocks], as Int4Matrix.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    block_size: int

    def __post_init__(self) -> None:
        _check_blockwise(self.codes, np.int8, self.scales, self.block_size)


@dataclass(frozen=True)
class Nf4Matrix:
    """bitsandbytes' NF4 or FP4 with double quantization: w = codebook[code]·absmax.

    Blocks of 64 run over the flattened matrix. codes uint8 [out_features, in_features] in 0…15;
    absmax_codes uint8 [ceil(size / 64)]; nested_absmax float32 [ceil(len(absmax_codes) / 256)];
    absmax_offset float32 scalar; absmax_table float32 [256].
    absmax[b] = absmax_table[absmax_codes[b]]·nested_absmax[b // 256] + absmax_offset, in float32.
    rounded_to: w is rounded to it, to nearest, ties to even, as bitsandbytes' quant_state says.
    ValueError: another shape or dtype, a statistic that is not finite.
    """

    codes: NDArray[np.uint8]
    absmax_codes: NDArray[np.uint8]
    nested_absmax: NDArray[np.float32]
    absmax_offset: np.float32
    absmax_table: NDArray[np.float32]
    rounded_to: str = "float32"
    codebook: str = "nf4"

    def __post_init__(self) -> None:
        check_rounding(self.rounded_to)
        check_codebook(self.codebook)
        check_matrix("codes", self.codes, np.uint8)
        blocks = ceil_div(self.codes.size, NF4_BLOCK)
        check_array("absmax_codes", self.absmax_codes, np.uint8, (blocks,))
        groups = (ceil_div(blocks, NF4_GROUP),)
        check_array("nested_absmax", self.nested_absmax, np.float32, groups)
        check_array("absmax_table", self.absmax_table, np.float32, (256,))
        check_array("absmax_offset", np.asarray(self.absmax_offset), np.float32, ())


@dataclass(frozen=True)
class PlainNf4Matrix:
    """bitsandbytes' NF4 or FP4 without double quantization, as Nf4Matrix else.

    codes uint8 [out_features, in_features] in 0…15; absmax float32 [ceil(size / 64)].
    """

    codes: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    rounded_to: str = "float32"
    codebook: str = "nf4"

    def __post_init__(self) -> None:
        check_rounding(self.rounded_to)
        check_codebook(self.codebook)
        check_matrix("codes", self.codes, np.uint8)
        check_array("absmax", self.absmax, np.float32, (ceil_div(self.codes.size, NF4_BLOCK),))


@dataclass(frozen=True)
class FloatMatrix:
    """weights float32 [out_features, in_features]."""

    weights: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_matrix("weights", self.weights, np.float32)


CodedMatrix = Int4Matrix | Int8Matrix | Nf4Matrix | PlainNf4Matrix
"""What a base can hold in codes of ours."""
Matrix = CodedMatrix | FloatMatrix


def ceil_div(count: int, size: int) -> int:
    """Pieces of `size` that hold `count`; the last may be partial."""
    return -(-count // size)


def offset_dtype(offsets: NDArray[Any]) -> DTypeLike:
    """float32 or float16, which is what GGUF has."""
    return np.float32 if offsets.dtype == np.float32 else np.float16


def check_block_size(block_size: int) -> None:
    """ValueError unless 32, 64 or 128."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be 32, 64 or 128, not {block_size}")


def _check_blockwise(
    codes: NDArray[Any], dtype: DTypeLike, scales: NDArray[np.float16], block_size: int
) -> None:
    check_block_size(block_size)
    check_matrix("codes", codes, dtype)
    rows, columns = codes.shape
    check_array("scales", scales, np.float16, (rows, ceil_div(columns, block_size)))


def check_codebook(codebook: str) -> None:
    """ValueError unless it is one of CODEBOOKS."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, not {codebook!r}")


def check_rounding(rounded_to: str) -> None:
    """ValueError unless it is one of ROUNDINGS."""
    if rounded_to not in ROUNDINGS:
        raise ValueError(f"rounded_to must be one of {', '.join(ROUNDINGS)}, not {rounded_to!r}")


def check_matrix(name: str, array: NDArray[Any], dtype: DTypeLike) -> None:
    """ValueError unless it has two dimensions, an element and the dtype."""
    if array.ndim != 2 or not array.size or array.dtype != dtype:
        wanted = f"{np.dtype(dtype)} [out_features, in_features]"
        raise ValueError(f"{name} must be {wanted}, not {array.dtype} {list(array.shape)}")


def check_array(name: str, array: NDArray[Any], dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    """ValueError unless it has the dtype and shape, and finite values."""
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{name} must be {np.dtype(dtype)} {list(shape)}, not {found}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds a value that is not finite")
