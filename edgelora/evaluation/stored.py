"""The weights of a bundle that was just written, read back from its file and dequantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgelora.graph import COS, SIN, StoredMatrix
from edgelora.graph.tensors import StoredTensor
from edgelora.layout import EMBEDDING, Projection
from edgelora.quantize import (
    VALUES,
    NBitsLinear,
    PackedLinear,
    dequantize,
    dequantize_nbits,
    dequantize_rows,
    unpack,
)

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class StoredWeights:
    """matrices: by the name of a projection, or of a linear that is stored alone."""

    path: Path  # the weight file
    tensors: Mapping[str, StoredTensor]
    matrices: Mapping[str, StoredMatrix]
    flavor: str

    def linears(self, projection: Projection) -> list[Float32]:
        """[out_features, in_features] of each linear."""
        if projection.name in self.matrices:
            return self._read(projection.name, [each.out_features for each in projection.linears])
        return [
            weight
            for linear in projection.linears
            for weight in self._read(linear.target, [linear.out_features])
        ]

    def matrix(self, name: str) -> Float32:
        """One that is stored alone: the embedding."""
        (weight,) = self._read(name, [self.matrices[name].out_features])
        return weight

    def vector(self, name: str) -> Float32:
        """A norm or a bias."""
        return np.array(self._array(name), np.float32)

    def rotary(self, positions: int) -> tuple[Float32, Float32]:
        """cos and sin of the first positions."""
        cos, sin = (np.array(self._array(name)[:positions], np.float32) for name in (COS, SIN))
        return cos, sin

    def _read(self, name: str, slices: Sequence[int]) -> list[Float32]:
        matrix = self.matrices[name]
        arrays = {
            role: self._array(tensor) for role, tensor in matrix.inputs.items() if role != "bias"
        }
        if self.flavor == "ort":
            values = dequantize_rows if name == EMBEDDING else dequantize_nbits
            return [values(_nbits(matrix, arrays))]
        return [dequantize(each) for each in unpack(_packed(matrix, arrays, slices))]

    def _array(self, name: str) -> NDArray[Any]:
        tensor = self.tensors[name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self.path, dtype, "r", tensor.offset, tensor.dims)


def _nbits(matrix: StoredMatrix, arrays: Mapping[str, NDArray[Any]]) -> NBitsLinear:
    size = (matrix.in_features, matrix.out_features)
    return NBitsLinear(matrix.format, matrix.block_size, *size, dict(arrays))


def _packed(
    matrix: StoredMatrix, arrays: Mapping[str, NDArray[Any]], slices: Sequence[int]
) -> PackedLinear:
    """Inverse of PackedLinear.arrays and kind."""
    named: dict[str, Any] = dict(arrays)
    name, _, rounded_to = matrix.format.partition("_")
    if name in VALUES:
        named["rounded_to"] = rounded_to or "float32"
        if "zero_points" in named:
            named["nested_absmax"], named["absmax"] = named.pop("scales"), named.pop("zero_points")
        else:
            named["plain_absmax"] = named.pop("scales")
    elif "zero_points" in named and named["zero_points"].dtype != np.uint8:
        named["offsets"] = named.pop("zero_points")
    shape = (name, matrix.block_size, matrix.in_features, tuple(slices))
    return PackedLinear(*shape, **named)
