"""Matrix products and attention by ONNX Runtime, each a graph of one node.

Its results do not depend on the number of threads, bit for bit, which a BLAS's do (numpy's
`matmul`): equal inputs must give equal bundles. Attention is the operator that the bundle's own
graph of stock operators has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgelora.config import ModelConfig
from edgelora.graph import rotary_tables
from edgelora.graph.nodes import DOMAINS, IR_VERSION

_TILE = 512  # columns: of a Gram matrix only the tiles on and above the diagonal are computed

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Past = tuple[Float32, Float32]  # keys, as attention multiplies them, and values


@dataclass(frozen=True, eq=False)
class Beside:
    """A weight W with an adapter at its side: factors ⊙ (W·x) + scaling·B·(A·x)."""

    weight: Float32  # [out_features, in_features]
    factors: Float32 | None  # [out_features], or all 1
    lora_a: Float32  # [rank, in_features], rank may be 0
    lora_b: Float32  # [out_features, rank], times scaling

    def __len__(self) -> int:
        return len(self.weight)


Weight = Float32 | Beside


class Arithmetic:
    """Sessions are made when they are first needed; safe to call from several threads."""

    def __init__(
        self,
        config: ModelConfig,
        positions: int,
        rotary: tuple[Float32, Float32] | None = None,
    ) -> None:
        """positions: the most that attention sees, those of a past included; rotary: cos and sin
        [positions, head_dim / 2], None for the config's.
        """
        self.config = config
        self.positions = positions
        self._given_rotary = rotary

    def product(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        """[M, K] @ [K, N], float32 or float64."""
        session = self._double if a.dtype == np.float64 else self._single
        return _run(session, a=a, b=b)

    def linear(self, x: Float32, weight: Weight, bias: Float32) -> Float32:
        """x·Wᵀ + bias: [rows, in_features], [out_features, in_features], [out_features] or [0]."""
        if isinstance(weight, Beside):
            y = self._beside(x, weight)
        else:
            y = _run(self._transposed_right, a=x, b=weight)
        if bias.size:
            y += bias
        return y

    def _beside(self, x: Float32, beside: Beside) -> Float32:
        y = _run(self._transposed_right, a=x, b=beside.weight)
        with np.errstate(over="ignore", invalid="ignore"):  # refused with the logits
            if beside.factors is not None:
                y *= beside.factors
            if len(beside.lora_a):
                y += self.side_branch(x, beside.lora_a, beside.lora_b)
        return y

    def side_branch(self, x: Float32, lora_a: Float32, lora_b: Float32) -> Float32:
        """B·(A·x), [rows, out_features]."""
        t = _run(self._transposed_right, a=x, b=lora_a)
        return np.asarray(_run(self._transposed_right, a=t, b=lora_b), np.float32)

    def gram(self, x: Float32) -> Float64:
        """xᵀ·x of [rows, features]."""
        size = x.shape[1]
        total = np.empty((size, size))
        tiles = [np.ascontiguousarray(x[:, at : at + _TILE]) for at in range(0, size, _TILE)]
        for i, left in enumerate(tiles):
            for j in range(i, len(tiles)):
                rows, columns = slice(i * _TILE, (i + 1) * _TILE), slice(j * _TILE, (j + 1) * _TILE)
                total[rows, columns] = self.cross(left, tiles[j])
                total[columns, rows] = total[rows, columns].T
        return total

    def cross(self, x: Float32, y: Float32) -> Float32:
        """xᵀ·y of [rows, features] each."""
        return np.asarray(_run(self._transposed_left, a=x, b=y), np.float32)

    def attention(self, q: Float32, k: Float32, v: Float32, past: Past | None = None) -> Float32:
        """Causal, with rotary embedding: [windows, positions, features] each. past: keys and values
        [kv_heads, positions, head_dim] that stand before each window.
        """
        if past is None:
            return self.attended(q, k, v)[0]
        rows = (slice(i, i + 1) for i in range(len(q)))  # the operator takes one behind a past
        return np.concatenate([self.attended(q[i], k[i], v[i], past)[0] for i in rows])

    def attended(
        self, q: Float32, k: Float32, v: Float32, past: Past | None = None
    ) -> tuple[Float32, Float32, Float32]:
        """Attention, and the keys (rotated) and values [windows, kv_heads, positions, head_dim]."""
        windows, positions, _ = q.shape
        config = self.config
        empty = np.empty((windows, config.num_key_value_heads, 0, config.head_dim), np.float32)
        past_key, past_value = (past[0][None], past[1][None]) if past else (empty, empty)
        total = past_key.shape[2] + positions
        cos, sin = self._rotary
        inputs = {"query": q, "key": k, "value": v, "cos": cos, "sin": sin}
        inputs |= {"past_key": past_key, "past_value": past_value}
        inputs |= {"seqlens_k": np.full(windows, total - 1, np.int32)}
        inputs |= {"total_sequence_length": np.array(total, np.int32)}
        y, keys, values = self._attention.run(["y", "present_key", "present_value"], inputs)
        return y, keys, values

    @cached_property
    def _rotary(self) -> tuple[Float32, Float32]:
        return self._given_rotary or rotary_tables(self.config, self.positions)

    @cached_property
    def _single(self) -> onnxruntime.InferenceSession:
        return _gemm(TensorProto.FLOAT)

    @cached_property
    def _double(self) -> onnxruntime.InferenceSession:
        return _gemm(TensorProto.DOUBLE)

    @cached_property
    def _transposed_left(self) -> onnxruntime.InferenceSession:
        return _gemm(TensorProto.FLOAT, transA=1)

    @cached_property
    def _transposed_right(self) -> onnxruntime.InferenceSession:
        return _gemm(TensorProto.FLOAT, transB=1)

    @cached_property
    def _attention(self) -> onnxruntime.InferenceSession:
        config, floats, ints = self.config, TensorProto.FLOAT, TensorProto.INT32
        rows, cache = ["w", "s", "f"], ["w", "h", "p", "d"]
        inputs = {
            **dict.fromkeys(["query", "key", "value"], (floats, rows)),
            **dict.fromkeys(["past_key", "past_value"], (floats, cache)),
            "seqlens_k": (ints, ["w"]),
            "total_sequence_length": (ints, []),
            **dict.fromkeys(["cos", "sin"], (floats, ["t", "r"])),
        }
        return _session(
            "GroupQueryAttention",
            inputs,
            ["y", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            local_window_size=config.sliding_window or -1,
        )


def _gemm(dtype: int, **attributes: int) -> onnxruntime.InferenceSession:
    return _session("Gemm", {n: (dtype, [f"{n}0", f"{n}1"]) for n in "ab"}, ["y"], **attributes)


def _session(
    op_type: str,
    inputs: Mapping[str, tuple[int, Sequence[str]]],
    outputs: Sequence[str],
    **attributes: Any,
) -> onnxruntime.InferenceSession:
    node = helper.make_node(op_type, list(inputs), list(outputs), **attributes)
    kind = next(iter(inputs.values()))[0]
    graph = helper.make_graph(
        [node],
        op_type,
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    settings = onnxruntime.SessionOptions()
    # Between two products other threads work: numpy's, or another session's.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def _run(session: onnxruntime.InferenceSession, **inputs: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any]
    (result,) = session.run(["y"], inputs)
    return result
