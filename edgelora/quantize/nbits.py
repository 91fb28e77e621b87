"""Matrices in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md: codes [N, blocks,
block_size·bits/8], even elements in the low nibble; w = scale·(code − zero_point), zero_point 8
(or 128) if none is given; scales float32 [N, blocks].
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize.matrix import FloatMatrix, Int4Matrix, Int8Matrix, Matrix

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class NBitsLinear:
    """A matrix as MatMulNBits takes it: `arrays` by role, codes, scales and maybe zero_points.

    A float matrix has codes float32 [in_features, out_features], for MatMul.
    """

    format: str
    block_size: int
    in_features: int
    out_features: int
    arrays: Arrays
    unpacked: ClassVar[Set[str]] = frozenset()  # as PackedLinear's

    @property
    def kind(self) -> str:
        """What the graph calls it."""
        return self.format


def to_nbits(matrix: Matrix) -> NBitsLinear:
    """ValueError for nf4 and fp4, which these operators do not have."""
    match matrix:
        case FloatMatrix():
            rows, columns = matrix.weights.shape
            transposed = np.ascontiguousarray(matrix.weights.T)
            return NBitsLinear("float", 0, columns, rows, {"codes": transposed})
        case Int8Matrix():
            kind, arrays = "int8", _int8(matrix)
        case Int4Matrix():
            kind, arrays = "int4", _int4(matrix)
        case _:
            raise ValueError(f"{matrix.codebook} needs our own operators: choose --flavor edgelora")
    rows, columns = matrix.codes.shape
    return NBitsLinear(kind, matrix.block_size, columns, rows, arrays)


def to_rows(matrix: Matrix) -> NBitsLinear:
    """As GatherBlockQuantized takes it: codes [N, K] not padded; float for Gather: [N, K].

    ValueError for int4, nf4 and fp4: an embedding here is int8 or float.
    """
    if isinstance(matrix, FloatMatrix):
        rows, columns = matrix.weights.shape
        return NBitsLinear("float", 0, columns, rows, {"codes": matrix.weights})
    if not isinstance(matrix, Int8Matrix):
        raise ValueError("an embedding of the ort flavor is int8 or float")
    rows, columns = matrix.codes.shape
    arrays: Arrays = {"codes": _unsigned(matrix), "scales": matrix.scales.astype(np.float32)}
    return NBitsLinear("int8", matrix.block_size, columns, rows, arrays)


def _unsigned(matrix: Int8Matrix) -> NDArray[np.uint8]:
    return np.bitwise_xor(matrix.codes.view(np.uint8), np.uint8(128))


def _int8(matrix: Int8Matrix) -> Arrays:
    codes = _blocks(_unsigned(matrix), matrix.block_size, 128)
    return {"codes": codes, "scales": matrix.scales.astype(np.float32)}


def _int4(matrix: Int4Matrix) -> Arrays:
    blocks = _blocks(matrix.codes, matrix.block_size, 8)
    scales = matrix.scales.astype(np.float32)
    arrays = {"codes": blocks[..., ::2] | blocks[..., 1::2] << 4, "scales": scales}
    if matrix.zero_points is not None:
        arrays["zero_points"] = matrix.zero_points.astype(np.float32)
    elif matrix.offsets is not None:
        _add_offsets(arrays, matrix.offsets.astype(np.float32))
    return arrays


def _add_offsets(arrays: Arrays, offsets: NDArray[np.float32]) -> None:
    """scale·code + offset as scale·(code − zero_point).

    A block of one value becomes offset·(0 + 1).
    """
    scales = arrays["scales"]
    constant = scales == 0
    arrays["codes"] = np.where(constant[..., None], np.uint8(0), arrays["codes"])
    arrays["scales"] = np.where(constant, offsets, scales)
    safe = np.where(constant, np.float32(1), scales)
    arrays["zero_points"] = np.where(constant, np.float32(-1), -offsets / safe)


def _blocks(codes: NDArray[np.uint8], block_size: int, zero: int) -> NDArray[np.uint8]:
    """[N, K] → [N, blocks, block_size], the last block filled up with the code of zero."""
    padding = -codes.shape[1] % block_size
    padded = np.pad(codes, ((0, 0), (0, padding)), constant_values=zero)
    return padded.reshape(codes.shape[0], -1, block_size)


def dequantize_nbits(stored: NBitsLinear) -> NDArray[np.float32]:
    """float32 [out_features, in_features] of what `to_nbits` made."""
    rows, columns, codes = stored.out_features, stored.in_features, stored.arrays["codes"]
    if stored.format == "float":
        return np.ascontiguousarray(codes.T, np.float32)
    if stored.format == "int4":
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    values = codes.reshape(rows, -1)[:, :columns].astype(np.float32)
    zeros = stored.arrays.get("zero_points")
    values -= (8 if stored.format == "int4" else 128) if zeros is None else _wide(stored, zeros)
    return np.asarray(values * _wide(stored, stored.arrays["scales"]))


def dequantize_rows(stored: NBitsLinear) -> NDArray[np.float32]:
    """float32 [out_features, in_features] of what `to_rows` made."""
    if stored.format == "float":
        return np.asarray(stored.arrays["codes"], np.float32)
    return dequantize_nbits(stored)


def _wide(stored: NBitsLinear, per_block: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, blocks] → [N, K]."""
    return np.repeat(per_block, stored.block_size, axis=1)[:, : stored.in_features]
