"""What `pack` makes and takes: a weight in panels, and the slices of one projection."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelora.quantize.matrix import (
    CODEBOOKS,
    NF4_BLOCK,
    NF4_GROUP,
    FloatMatrix,
    Int8Matrix,
    Matrix,
    Nf4Matrix,
    PlainNf4Matrix,
    ceil_div,
    check_array,
    check_block_size,
    check_rounding,
    offset_dtype,
)
from edgelora.quantize.panels import K_STEP, PANEL

Layout = dict[str, tuple[DTypeLike, tuple[int, ...]]]  # field → dtype and shape


@dataclass(frozen=True)
class PackedLinear:
    """The weights of one operator `Linear` or `Embedding` (ARCHITECTURE.md, "Weights: formats").

    P panels of 16 rows; in_features K is padded to a multiple of 32, Kp, in codes.
    format: int4, int8, nf4, fp4 or float; block_size: weights that share a scale, 0 for float;
    slices: out_features of each slice, top to bottom.
    codes: uint8 [P, Kp/8, 64], int8 [P, Kp/4, 64], or the weights, float32 [P, K, 16].
    nf4, fp4: the nested groups of the slices lie one after another, G of them in all.
    ValueError: an array that is missing, superfluous, or not as ARCHITECTURE.md has it.
    """

    format: str
    block_size: int
    in_features: int
    slices: tuple[int, ...]
    codes: NDArray[Any]
    scales: NDArray[np.float16] | None = None  # [P, blocks, 16]
    zero_points: NDArray[np.uint8] | None = None  # [P, blocks, 8]
    offsets: NDArray[np.float16 | np.float32] | None = None  # [P, blocks, 16]
    nested_absmax: NDArray[np.float32] | None = None  # [G]
    absmax: NDArray[np.uint8] | None = None  # [256·G], zeros after each slice's last code
    absmax_offset: NDArray[np.float32] | None = None  # [slices]
    absmax_table: NDArray[np.float32] | None = None  # [256]
    plain_absmax: NDArray[np.float32] | None = None  # [256·G], in place of the four above
    rounded_to: str = "float32"  # nf4, fp4: as Nf4Matrix

    def __post_init__(self) -> None:
        check_rounding(self.rounded_to)
        self._check_sizes()
        wanted = self._layout()
        for name, array in self._optional_arrays().items():
            if array is not None and name not in wanted:
                raise ValueError(f"{self.format} has no {name}")
            if array is None and name in wanted:
                raise ValueError(f"{self.format} needs {name}")
            if array is not None:
                check_array(name, array, *wanted[name])

    def _check_sizes(self) -> None:
        if self.format not in ("int4", "int8", *CODEBOOKS, "float"):
            raise ValueError(f"format must be int4, int8, nf4, fp4 or float, not {self.format!r}")
        if self.format in ("int4", "int8"):
            check_block_size(self.block_size)
        elif self.block_size != (NF4_BLOCK if self.format in CODEBOOKS else 0):
            raise ValueError(f"{self.format} has no block_size {self.block_size}")
        if self.in_features < 1 or not self.slices or min(self.slices) < 1:
            raise ValueError(f"bad sizes: {list(self.slices)} × {self.in_features}")
        if self.format in CODEBOOKS and self.in_features % K_STEP:
            raise ValueError(
                f"{self.format} needs in_features in multiples of 32, not {self.in_features}"
            )
        check_slices(self.slices)

    def _optional_arrays(self) -> dict[str, NDArray[Any] | None]:
        names = [field.name for field in fields(self)]
        first, end = names.index("codes"), names.index("rounded_to")
        return {name: getattr(self, name) for name in names[first:end]}

    def _layout(self) -> Layout:
        """dtype and shape of every array that this weight must have."""
        panels = ceil_div(self.out_features, PANEL)
        steps = ceil_div(self.in_features, K_STEP) * K_STEP
        if self.format == "float":
            return {"codes": (np.float32, (panels, self.in_features, PANEL))}
        if self.format in CODEBOOKS:
            codes = (np.uint8, (panels, steps // 8, 64))
            return {"codes": codes, **self._absmax_layout()}
        blocks = ceil_div(self.in_features, self.block_size)
        scales = (np.float16, (panels, blocks, PANEL))
        if self.format == "int8":
            return {"codes": (np.int8, (panels, steps // 4, 64)), "scales": scales}
        layout: Layout = {"codes": (np.uint8, (panels, steps // 8, 64)), "scales": scales}
        if self.zero_points is not None:
            layout["zero_points"] = (np.uint8, (panels, blocks, 8))
        elif self.offsets is not None:
            layout["offsets"] = (offset_dtype(self.offsets), scales[1])
        return layout

    def _absmax_layout(self) -> Layout:
        blocks = [ceil_div(rows * self.in_features, NF4_BLOCK) for rows in self.slices]
        groups = sum(ceil_div(count, NF4_GROUP) for count in blocks)
        if self.plain_absmax is not None:
            return {"plain_absmax": (np.float32, (groups * NF4_GROUP,))}
        return {
            "nested_absmax": (np.float32, (groups,)),
            "absmax": (np.uint8, (groups * NF4_GROUP,)),
            "absmax_offset": (np.float32, (len(self.slices),)),
            "absmax_table": (np.float32, (256,)),
        }

    @property
    def out_features(self) -> int:
        return sum(self.slices)

    @property
    def kind(self) -> str:
        """What the operators call it: the format, of nf4, fp4 with what weights are rounded to."""
        return self.format if self.rounded_to == "float32" else f"{self.format}_{self.rounded_to}"

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is there, by the name and in the order of Linear's inputs 2…6."""
        inputs: dict[str, NDArray[Any] | None] = {
            "codes": self.codes,
            "scales": _first(self.scales, self.nested_absmax, self.plain_absmax),
            "zero_points": _first(self.zero_points, self.offsets, self.absmax),
            "absmax_offset": self.absmax_offset,
            "absmax_table": self.absmax_table,
        }
        return {name: array for name, array in inputs.items() if array is not None}

    @property
    def unpacked(self) -> Set[str]:
        """Those of `arrays` that the runtime computes others from, once."""
        if self.format in CODEBOOKS:
            return {*self.arrays} - {"codes"}
        exact = self.offsets is not None and self.offsets.dtype == np.float32
        return {"zero_points"} if exact else set()


def _first(*arrays: NDArray[Any] | None) -> NDArray[Any] | None:
    return next((array for array in arrays if array is not None), None)


@dataclass(frozen=True)
class Slices:
    """Matrices of one kind that share a projection, top to bottom: q, k, v, or gate, up.

    ValueError: none at all, not of the same kind, or several with out_features no multiple of 16.
    """

    matrices: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if not self.matrices or not same_kind(self.matrices):
            raise ValueError("slices of a projection must share format, block_size and in_features")
        check_slices([out_features(matrix) for matrix in self.matrices])


def check_slices(rows: Sequence[int]) -> None:
    """ValueError where a panel would belong to two slices."""
    if len(rows) > 1 and any(count % PANEL for count in rows):
        raise ValueError(f"slices need out_features in multiples of 16, not {list(rows)}")


def out_features(matrix: Matrix) -> int:
    """Rows of a matrix of any kind."""
    return len(matrix.weights if isinstance(matrix, FloatMatrix) else matrix.codes)


def same_kind(matrices: Sequence[Matrix]) -> bool:
    """Whether the matrices can be slices of one projection.

    They share format, block_size, in_features, and what moves zero: nothing, zero points or
    offsets; for nf4 and fp4 the absmax table.
    """
    return len({_kind(matrix) for matrix in matrices}) <= 1


def _kind(matrix: Matrix) -> tuple[object, ...]:
    if isinstance(matrix, FloatMatrix):
        return "float", matrix.weights.shape[1]
    columns = matrix.codes.shape[1]
    if isinstance(matrix, Nf4Matrix):
        return matrix.codebook, columns, matrix.absmax_table.tobytes(), matrix.rounded_to
    if isinstance(matrix, PlainNf4Matrix):
        return "plain", matrix.codebook, columns, matrix.rounded_to
    if isinstance(matrix, Int8Matrix):
        return "int8", columns, matrix.block_size
    extras = (matrix.zero_points, matrix.offsets)
    dtypes = [None if extra is None else extra.dtype.name for extra in extras]
    return "int4", columns, matrix.block_size, *dtypes
