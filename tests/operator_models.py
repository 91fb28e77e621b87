"""One-node models of our operators: random packed weights, and the float64 matrix they stand for.

Packing is written here from the formulas of ARCHITECTURE.md, element by element: it owes
nothing to edgelora.quantize.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], np.float32)  # fmt: skip
FP4 = np.array(
    [0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)
ROLES = ("codes", "scales", "zero_points", "absmax_offset", "absmax_table")  # inputs 2 to 6


@dataclass
class Packed:
    """What a node's weights are made of; `matrix` [N, K] is what they dequantize to."""

    format: str
    block_size: int
    slices: list[int]
    matrix: NDArray[np.float64]
    arrays: dict[str, NDArray[Any]]
    rounding: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros(())
    )  # of nf4's, fp4's table

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return rows, columns


def up(value: int, step: int) -> int:
    return -(-value // step)


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = codes.shape
    padded = np.zeros((up(rows, 16) * 16, up(columns, 32) * 32), np.uint8)
    padded[:rows, :columns] = codes
    out = np.zeros((padded.shape[0] // 16, padded.shape[1] // 8, 64), np.uint8)
    for p, q, r, j in np.ndindex(*out.shape[:2], 16, 4):
        low, high = padded[16 * p + r, 8 * q + j], padded[16 * p + r, 8 * q + 4 + j]
        out[p, q, 4 * r + j] = low | high << 4
    return out


def pack_bytes(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    rows, columns = codes.shape
    padded = np.zeros((up(rows, 16) * 16, up(columns, 32) * 32), np.int8)
    padded[:rows, :columns] = codes
    out = np.zeros((padded.shape[0] // 16, padded.shape[1] // 4, 64), np.int8)
    for p, q, r, j in np.ndindex(*out.shape[:2], 16, 4):
        out[p, q, 4 * r + j] = padded[16 * p + r, 4 * q + j]
    return out


def pack_rows(values: NDArray[Any]) -> NDArray[Any]:
    """[N, columns] → [P, columns, 16]: scales, offsets and the weights of `float`."""
    rows, columns = values.shape
    padded = np.zeros((up(rows, 16) * 16, columns), values.dtype)
    padded[:rows] = values
    return np.ascontiguousarray(padded.reshape(-1, 16, columns).transpose(0, 2, 1))


def pack_zero_points(zero_points: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows = pack_rows(zero_points)  # [P, blocks, 16]
    return rows[:, :, :8] | rows[:, :, 8:] << 4


def by_column(values: NDArray[Any], block_size: int, columns: int) -> NDArray[np.float64]:
    """A block's value for each of its columns."""
    return np.repeat(values.astype(np.float64), block_size, axis=1)[:, :columns]


def int4(rows: int, columns: int, block_size: int, extra: str = "") -> Packed:
    rng = np.random.default_rng([rows, columns, block_size])
    grid = (rows, up(columns, block_size))
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    scales = rng.uniform(0.01, 0.1, grid).astype(np.float16)
    arrays: dict[str, NDArray[Any]] = {"codes": pack_nibbles(codes), "scales": pack_rows(scales)}
    zero = np.full(grid, 8, np.uint8) if not extra else rng.integers(0, 16, grid, np.uint8)
    offsets = rng.uniform(-1, 1, grid).astype(np.float16)
    scale = by_column(scales, block_size, columns)
    if extra.endswith("offsets"):
        if extra.startswith("float32"):
            offsets = offsets.astype(np.float32) * np.float32(1 + 2**-13)  # no float16
        arrays["zero_points"] = pack_rows(offsets)
        matrix = scale * codes + by_column(offsets, block_size, columns)
    else:
        matrix = scale * (codes - by_column(zero, block_size, columns))
        if extra == "zero_points":
            arrays["zero_points"] = pack_zero_points(zero)
    return Packed("int4", block_size, [rows], matrix, arrays)


def int8(rows: int, columns: int, block_size: int) -> Packed:
    rng = np.random.default_rng([rows, columns, block_size])
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, (rows, up(columns, block_size))).astype(np.float16)
    arrays = {"codes": pack_bytes(codes), "scales": pack_rows(scales)}
    return Packed(
        "int8", block_size, [rows], by_column(scales, block_size, columns) * codes, arrays
    )


def floats(rows: int, columns: int) -> Packed:
    matrix = np.random.default_rng([rows, columns]).standard_normal((rows, columns), np.float32)
    return Packed("float", 0, [rows], matrix.astype(np.float64), {"codes": pack_rows(matrix)})


def nf4(slices: list[int], columns: int, kind: str = "nf4") -> Packed:
    """Or fp4, which differs in the values alone."""
    rng = np.random.default_rng([*slices, columns])
    codes = rng.integers(0, 16, (sum(slices), columns), np.uint8)
    table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    offset = rng.uniform(0.05, 0.1, len(slices)).astype(np.float32)
    absmax_parts, nested_parts, scale_parts = [], [], []
    for rows, shift in zip(slices, offset, strict=True):
        blocks = up(rows * columns, 64)
        absmax = np.zeros(up(blocks, 256) * 256, np.uint8)
        absmax[:blocks] = rng.integers(0, 256, blocks)
        nested = rng.uniform(0.01, 0.05, up(blocks, 256)).astype(np.float32)
        scale = table[absmax].astype(np.float64) * np.repeat(nested, 256) + shift
        scale_parts.append(np.repeat(scale, 64)[: rows * columns].reshape(rows, columns))
        absmax_parts.append(absmax)
        nested_parts.append(nested)
    arrays = {
        "codes": pack_nibbles(codes),
        "scales": np.concatenate(nested_parts),
        "zero_points": np.concatenate(absmax_parts),
        "absmax_offset": offset,
        "absmax_table": table,
    }
    scale = np.concatenate(scale_parts)
    matrix = scale * (NF4 if kind == "nf4" else FP4)[codes]
    return Packed(kind, 64, slices, matrix, arrays, np.abs(scale) * 2 / 250)


def packed_of(kind: str, rows: int, columns: int, block_size: int = 32) -> Packed:
    if kind == "int8":
        return int8(rows, columns, block_size)
    if kind == "float":
        return floats(rows, columns)
    if kind in ("nf4", "fp4"):
        return nf4([rows], -(-columns // 32) * 32, kind)
    return int4(rows, columns, block_size, kind.removeprefix("int4").strip("+"))


def linear_model(
    packed: Packed,
    *,
    bias: NDArray[np.float32] | None = None,
    residual: bool = False,
    **changes: Any,
) -> bytes:
    """A model of one Linear; `changes` replace attributes or, by role, arrays (None: left out)."""
    arrays = {**packed.arrays, **({} if bias is None else {"bias": bias})}
    attributes: dict[str, Any] = {
        "format": packed.format,
        "block_size": packed.block_size,
        "in_features": packed.shape[1],
        "out_features": packed.shape[0],
        "targets": ",".join(f"layer.{i}" for i in range(len(packed.slices))),
        "slices": packed.slices,
        "activation": "none",
        "epsilon": 1e-5,
    }
    for key, value in changes.items():
        (attributes if key in attributes else arrays)[key] = value
    inputs = [("x", TensorProto.FLOAT, ["batch", "sequence", "k"]),
              ("adapter_ids", TensorProto.INT64, ["ids"])]  # fmt: skip
    last = []
    if residual:
        last = [("residual", TensorProto.FLOAT, ["batch", "sequence", "n"])]
    return one_node("Linear", inputs, [*ROLES, "bias", "norm"], arrays, attributes, 3, last)


def layer_model(parts: dict[str, bytes], *, keeps: bool = False, **changes: Any) -> bytes:
    """A model of one Layer that has all inputs and attributes of its parts, and `kept` if it keeps.

    `changes` replace attributes or constants (None: left out); they begin with the prefix.
    """
    graphs = {prefix: onnx.load_from_string(model).graph for prefix, model in parts.items()}
    names = ["x", "adapter_ids"]
    attributes: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for prefix, graph in graphs.items():
        (node,) = graph.node
        first = 2 if prefix else 3  # behind x and adapter_ids, or q, k and v
        own = [*node.input[first:], *[""] * 7][:7]
        names += [prefix + name if name else "" for name in own]
        attributes |= {prefix + a.name: helper.get_attribute_value(a) for a in node.attribute}
        constants |= {prefix + t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for name, change in changes.items():
        (attributes if name in attributes else constants)[name] = change
    names = ["" if constants.get(name, name) is None else name for name in names]
    attributes = {name: value for name, value in attributes.items() if value is not None}
    kept = [helper.make_tensor_value_info("kept", TensorProto.INT64, ["rows"])] if keeps else []
    outputs = list(graphs[""].output)
    node = helper.make_node(
        "Layer",
        [*names, *(each.name for each in kept)],
        [each.name for each in outputs],
        "the_node",
        domain="edgelora",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [*graphs["qkv_"].input[:2], *graphs[""].input[1:], *kept],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()
         if array is not None],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelora", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def embedding_model(packed: Packed, **changes: Any) -> bytes:
    attributes: dict[str, Any] = {
        "format": packed.format,
        "block_size": packed.block_size,
        "in_features": packed.shape[1],
        "out_features": packed.shape[0],
        **changes,
    }
    inputs = [("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    return one_node("Embedding", inputs, list(ROLES[:3]), packed.arrays, attributes, 3)


def swiglu_model() -> bytes:
    inputs = [("x", TensorProto.FLOAT, ["batch", "sequence", "n"])]
    return one_node("SwiGlu", inputs, [], {}, {}, 3)


def one_node(
    op: str,
    inputs: list[tuple[str, int, list[str]]],
    roles: list[str],
    arrays: dict[str, NDArray[Any]],
    attributes: dict[str, Any],
    rank: int,
    last: Sequence[tuple[str, int, list[str]]] = (),
) -> bytes:
    """A graph of one node: its inputs are `inputs`, the arrays by role, then `last`."""
    present = {role: array for role, array in arrays.items() if array is not None}
    names = [name for name, _, _ in inputs] + [role if role in present else "" for role in roles]
    names += [name for name, _, _ in last]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op, names, ["y"], "the_node", domain="edgelora", **attributes)
    values = [helper.make_tensor_value_info(*value) for value in [*inputs, *last]]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"d{i}" for i in range(rank)])
    initializers = [numpy_helper.from_array(array, role) for role, array in present.items()]
    graph = helper.make_graph([node], "one_node", values, [output], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelora", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def open_session(library: str, model: bytes | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the errors of a test are meant
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
