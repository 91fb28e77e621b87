"""Matrices ↔ the constant inputs of operator `Linear`: panels of one or more slices."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import panels
from edgelora.quantize.matrix import (
    CODEBOOKS,
    NF4_BLOCK,
    NF4_GROUP,
    FloatMatrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    Nf4Matrix,
    PlainNf4Matrix,
    ceil_div,
)
from edgelora.quantize.packed import PackedLinear, Slices

Element = TypeVar("Element", bound=np.generic)


def concatenate(matrices: Sequence[Matrix]) -> Slices:
    """The matrices as slices of one projection, top to bottom; ValueError as Slices says."""
    return Slices(tuple(matrices))


def pack(weights: Matrix | Slices) -> PackedLinear:
    """One matrix, or several slices. ValueError: codes over 15; nf4, fp4 of K no multiple of 32."""
    matrices = weights.matrices if isinstance(weights, Slices) else (weights,)
    parts = [_pack_one(matrix) for matrix in matrices]
    if len(parts) == 1:
        return parts[0]
    return PackedLinear(
        format=parts[0].format,
        block_size=parts[0].block_size,
        in_features=parts[0].in_features,
        slices=tuple(part.out_features for part in parts),
        codes=np.concatenate([part.codes for part in parts]),
        scales=_join([part.scales for part in parts]),
        zero_points=_join([part.zero_points for part in parts]),
        offsets=_join([part.offsets for part in parts]),
        nested_absmax=_join([part.nested_absmax for part in parts]),
        absmax=_join([part.absmax for part in parts]),
        absmax_offset=_join([part.absmax_offset for part in parts]),
        absmax_table=parts[0].absmax_table,
        plain_absmax=_join([part.plain_absmax for part in parts]),
        rounded_to=parts[0].rounded_to,
    )


def _join(arrays: Sequence[NDArray[Element] | None]) -> NDArray[Element] | None:
    """All or none of the slices have the array."""
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None


def _pack_one(matrix: Matrix) -> PackedLinear:
    if isinstance(matrix, Int4Matrix):
        return _pack_int4(matrix)
    if isinstance(matrix, Int8Matrix):
        return _pack_int8(matrix)
    if isinstance(matrix, Nf4Matrix):
        return _pack_nf4(matrix)
    if isinstance(matrix, PlainNf4Matrix):
        return _pack_plain_nf4(matrix)
    rows, columns = matrix.weights.shape
    return PackedLinear("float", 0, columns, (rows,), panels.interleave(matrix.weights))


def _pack_int4(matrix: Int4Matrix) -> PackedLinear:
    rows, columns = matrix.codes.shape
    zeros, offsets = matrix.zero_points, matrix.offsets
    return PackedLinear(
        format="int4",
        block_size=matrix.block_size,
        in_features=columns,
        slices=(rows,),
        codes=panels.pack_nibbles(matrix.codes),
        scales=panels.interleave(matrix.scales),
        zero_points=None if zeros is None else panels.pack_zero_points(zeros),
        offsets=None if offsets is None else panels.interleave(offsets),
    )


def _pack_int8(matrix: Int8Matrix) -> PackedLinear:
    rows, columns = matrix.codes.shape
    return PackedLinear(
        format="int8",
        block_size=matrix.block_size,
        in_features=columns,
        slices=(rows,),
        codes=panels.pack_bytes(matrix.codes),
        scales=panels.interleave(matrix.scales),
    )


def _pack_nf4(matrix: Nf4Matrix) -> PackedLinear:
    rows, columns = matrix.codes.shape
    absmax = np.zeros(len(matrix.nested_absmax) * NF4_GROUP, np.uint8)
    absmax[: len(matrix.absmax_codes)] = matrix.absmax_codes
    return PackedLinear(
        format=matrix.codebook,
        block_size=NF4_BLOCK,
        in_features=columns,
        slices=(rows,),
        codes=panels.pack_nibbles(matrix.codes),
        nested_absmax=matrix.nested_absmax,
        absmax=absmax,
        absmax_offset=np.array([matrix.absmax_offset], np.float32),
        absmax_table=matrix.absmax_table,
        rounded_to=matrix.rounded_to,
    )


def _pack_plain_nf4(matrix: PlainNf4Matrix) -> PackedLinear:
    rows, columns = matrix.codes.shape
    return PackedLinear(
        format=matrix.codebook,
        block_size=NF4_BLOCK,
        in_features=columns,
        slices=(rows,),
        codes=panels.pack_nibbles(matrix.codes),
        plain_absmax=np.pad(matrix.absmax, (0, -len(matrix.absmax) % NF4_GROUP)),
        rounded_to=matrix.rounded_to,
    )


def unpack(packed: PackedLinear) -> list[Matrix]:
    """Inverse of pack: one matrix for each slice."""
    rows, columns, codes = packed.out_features, packed.in_features, packed.codes
    ends = np.cumsum(packed.slices)
    parts = [
        slice(int(end) - size, int(end)) for end, size in zip(ends, packed.slices, strict=True)
    ]
    if packed.format == "float":
        weights = panels.deinterleave(codes, rows)
        return [FloatMatrix(weights[part]) for part in parts]
    if packed.format in CODEBOOKS:
        return _unpack_nf4(packed, panels.unpack_nibbles(codes, rows, columns), parts)
    assert packed.scales is not None  # PackedLinear has checked it
    scales = panels.deinterleave(packed.scales, rows)
    if packed.format == "int8":
        values = panels.unpack_bytes(codes, rows, columns)
        return [Int8Matrix(values[part], scales[part], packed.block_size) for part in parts]
    return _unpack_int4(packed, scales, parts)


def _unpack_int4(
    packed: PackedLinear, scales: NDArray[np.float16], parts: list[slice]
) -> list[Matrix]:
    rows = packed.out_features
    codes = panels.unpack_nibbles(packed.codes, rows, packed.in_features)
    zeros = (
        None if packed.zero_points is None else panels.unpack_zero_points(packed.zero_points, rows)
    )
    offsets = None if packed.offsets is None else panels.deinterleave(packed.offsets, rows)
    return [
        Int4Matrix(
            codes[part],
            scales[part],
            packed.block_size,
            zero_points=None if zeros is None else zeros[part],
            offsets=None if offsets is None else offsets[part],
        )
        for part in parts
    ]


def _unpack_nf4(packed: PackedLinear, codes: NDArray[np.uint8], parts: list[slice]) -> list[Matrix]:
    if packed.plain_absmax is not None:
        return _unpack_plain_nf4(packed, packed.plain_absmax, codes, parts)
    assert packed.nested_absmax is not None and packed.absmax is not None  # checked, as above
    assert packed.absmax_offset is not None and packed.absmax_table is not None
    matrices: list[Matrix] = []
    group = 0  # where this slice's nested groups start
    for part, offset in zip(parts, packed.absmax_offset, strict=True):
        blocks = ceil_div((part.stop - part.start) * packed.in_features, NF4_BLOCK)
        groups = ceil_div(blocks, NF4_GROUP)
        absmax = packed.absmax[group * NF4_GROUP : group * NF4_GROUP + blocks]
        nested = packed.nested_absmax[group : group + groups]
        statistics = (absmax, nested, offset, packed.absmax_table)
        matrices.append(Nf4Matrix(codes[part], *statistics, packed.rounded_to, packed.format))
        group += groups
    return matrices


def _unpack_plain_nf4(
    packed: PackedLinear,
    absmax: NDArray[np.float32],
    codes: NDArray[np.uint8],
    parts: list[slice],
) -> list[Matrix]:
    matrices: list[Matrix] = []
    start = 0  # of this slice's absmax
    for part in parts:
        blocks = ceil_div((part.stop - part.start) * packed.in_features, NF4_BLOCK)
        own = absmax[start : start + blocks]
        matrices.append(PlainNf4Matrix(codes[part], own, packed.rounded_to, packed.format))
        start += ceil_div(blocks, NF4_GROUP) * NF4_GROUP
    return matrices
