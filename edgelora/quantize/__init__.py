"""Values ↔ codes, and codes ↔ panels. Arrays only: no files, no framework but numpy."""

from edgelora.quantize.compensated import compensate_int4
from edgelora.quantize.curvature import Curvature, Product, factorize
from edgelora.quantize.dequantize import NF4_VALUES, VALUES, dequantize, round_to
from edgelora.quantize.int4 import quantize_int4
from edgelora.quantize.int8 import quantize_int8
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
from edgelora.quantize.moved import move_offsets
from edgelora.quantize.nbits import (
    NBitsLinear,
    dequantize_nbits,
    dequantize_rows,
    to_nbits,
    to_rows,
)
from edgelora.quantize.nf4 import quantize_nf4
from edgelora.quantize.packed import PackedLinear, Slices, same_kind
from edgelora.quantize.packing import concatenate, pack, unpack

__all__ = [
    "NF4_BLOCK",
    "NF4_GROUP",
    "NF4_VALUES",
    "VALUES",
    "Curvature",
    "FloatMatrix",
    "Int4Matrix",
    "Int8Matrix",
    "Matrix",
    "NBitsLinear",
    "Nf4Matrix",
    "PackedLinear",
    "PlainNf4Matrix",
    "Product",
    "Slices",
    "compensate_int4",
    "concatenate",
    "dequantize",
    "dequantize_nbits",
    "dequantize_rows",
    "factorize",
    "move_offsets",
    "pack",
    "quantize_int4",
    "quantize_int8",
    "quantize_nf4",
    "round_to",
    "same_kind",
    "to_nbits",
    "to_rows",
    "unpack",
]
