"""Flavor `edgelora`: our operators.

Norm, side branch, SwiGLU and residual are inside `Linear`, rotary embedding and the kv_cache inside
`Attention`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto

from edgelora.config import ModelConfig
from edgelora.graph.nodes import Nodes, value
from edgelora.graph.tensors import COS, SIN, Around, AttentionInputs, LayerPart, StoredMatrix
from edgelora.layout import Linear

DOMAIN = "edgelora"
ROLES = (  # operator inputs 2…7, by position
    "codes",
    "scales",
    "zero_points",
    "absmax_offset",
    "absmax_table",
    "bias",
)


class OwnOps:
    """`Layer`, `Linear`, `Attention`, `Embedding`, `SwiGlu` (ARCHITECTURE.md, "Operators")."""

    packs = True  # several linears that read the same row may share a node

    def __init__(self, kv_format: str = "int8") -> None:
        """kv_format: "int8", or "float" for a model that is to compute exactly."""
        self.kv_format = kv_format

    def linear(
        self,
        nodes: Nodes,
        x: str,
        name: str,
        linears: Sequence[Linear],
        matrix: StoredMatrix,
        around: Around,
    ) -> str:
        """y [batch, sequence, Σ out_features] of the linears packed in `matrix`; half of that
        behind SwiGLU.
        """
        return nodes.add(
            "Linear",
            _trimmed([x, "adapter_ids", *_part_inputs(matrix, around), around.residual]),
            name,
            domain=DOMAIN,
            **_part_attributes(linears, matrix, around),
        )

    def attention(self, nodes: Nodes, config: ModelConfig, inputs: AttentionInputs) -> str:
        """Attended heads [batch, sequence, num_attention_heads · head_dim]."""
        qkv = [*inputs.qkv, *[""] * (3 - len(inputs.qkv))]
        return nodes.add(
            "Attention",
            _trimmed([*qkv, *_attention_inputs(config, inputs)]),
            inputs.path,
            domain=DOMAIN,
            outputs=[inputs.path, *inputs.present],
            **self._attention_attributes(config),
        )

    def _attention_attributes(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "num_heads": config.num_attention_heads,
            "kv_num_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "local_window_size": config.sliding_window or -1,
            "epsilon": config.rms_norm_eps,
            "kv_format": self.kv_format,
        }

    def layer(
        self,
        nodes: Nodes,
        config: ModelConfig,
        x: str,
        inputs: AttentionInputs,
        parts: Mapping[str, LayerPart],
        kept: str,
    ) -> str:
        """A whole layer of qkv, o, gate_up and down, all packed: [batch, sequence, hidden_size], or
        of the rows that `kept` names.
        """
        name = inputs.path.removesuffix(".self_attn")
        values = [x, "adapter_ids", *_attention_inputs(config, inputs)]
        attributes = self._attention_attributes(config)
        for prefix in ("qkv", "o", "gate_up", "down"):
            part = parts[prefix]
            values += _part_inputs(part.matrix, part.around)
            of_part = _part_attributes(part.linears, part.matrix, part.around)
            attributes |= {f"{prefix}_{key}": value for key, value in of_part.items()}
        values.append(kept)
        return nodes.add(
            "Layer",
            _trimmed(values),
            name,
            domain=DOMAIN,
            outputs=[name, *inputs.present],
            **attributes,
        )

    def cache(self, config: ModelConfig, name: str, kind: str, length: str) -> onnx.ValueInfoProto:
        """Bytes of the keys or values of one layer, laid out by the runtime.

        How many a position has depends on how an int8 model is loaded: that dimension is open.
        """
        width = config.head_dim if kind == "key" else -(-config.head_dim // 16) * 16
        row: str | int = 4 * width if self.kv_format == "float" else f"{kind}_bytes"
        dims: list[str | int] = ["batch", config.num_key_value_heads, length, row]
        return value(f"{name}.{kind}", TensorProto.UINT8, dims)

    def embedding(self, nodes: Nodes, input_ids: str, name: str, matrix: StoredMatrix) -> str:
        """Rows of the embedding, float32 [batch, sequence, hidden_size]."""
        return nodes.add(
            "Embedding",
            _trimmed([input_ids, *(matrix.inputs.get(role, "") for role in ROLES[:3])]),
            name,
            domain=DOMAIN,
            **_attributes(matrix),
        )

    def swiglu(self, nodes: Nodes, parts: Sequence[str], name: str) -> str:
        """silu(gate)·up of gate ‖ up in one value or in two."""
        whole = (
            parts[0]
            if len(parts) == 1
            else nodes.add("Concat", list(parts), f"{name}.input", axis=-1)
        )
        return nodes.add("SwiGlu", [whole], name, domain=DOMAIN)

    def adapter_inputs(self) -> list[onnx.ValueInfoProto]:
        """One handle for each sequence, 0 for the base."""
        return [value("adapter_ids", TensorProto.INT64, ["batch"])]


def _attributes(matrix: StoredMatrix) -> dict[str, Any]:
    """What both operators on a packed weight say of it."""
    return {
        "format": matrix.format,
        "block_size": matrix.block_size,
        "in_features": matrix.in_features,
        "out_features": matrix.out_features,
    }


def _part_inputs(matrix: StoredMatrix, around: Around) -> list[str]:
    return [*(matrix.inputs.get(role, "") for role in ROLES), around.norm]


def _part_attributes(
    linears: Sequence[Linear], matrix: StoredMatrix, around: Around
) -> dict[str, Any]:
    return _attributes(matrix) | {
        "targets": ",".join(linear.target for linear in linears),
        "slices": [linear.out_features for linear in linears],
        "activation": around.activation,
        "epsilon": around.epsilon,
    }


def _attention_inputs(config: ModelConfig, inputs: AttentionInputs) -> list[str]:
    norms = [f"{inputs.path}.{kind}_norm.weight" if config.qk_norm else "" for kind in "qk"]
    return [*inputs.past, "seqlens_k", COS, SIN, *norms]


def _trimmed(inputs: list[str]) -> list[str]:
    """Nothing after the last input that is there."""
    while not inputs[-1]:
        inputs.pop()
    return inputs
