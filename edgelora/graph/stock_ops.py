"""Flavor `ort`: ONNX Runtime's own operators; each linear's side branch is two MatMuls.

The factors are inputs of the graph that default to rank 0, so that without an adapter the base
runs. Their names are `<target>.lora_a` [in_features, rank] and `<target>.lora_b` [rank,
out_features], scaling in lora_b, as `.onnx_adapter` files name them.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto

from edgelora.config import ModelConfig
from edgelora.graph.nodes import Nodes, value
from edgelora.graph.tensors import COS, SIN, Around, AttentionInputs, StoredMatrix
from edgelora.layout import Linear

DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level


class StockOps:
    """MatMulNBits, GroupQueryAttention, GatherBlockQuantized and plain ONNX."""

    packs = False

    def __init__(self) -> None:
        self._factors: list[onnx.ValueInfoProto] = []
        self._normed: dict[str, str] = {}  # weight of a norm → the value that it made

    def linear(
        self,
        nodes: Nodes,
        x: str,
        name: str,
        linears: Sequence[Linear],
        matrix: StoredMatrix,
        around: Around,
    ) -> str:
        """y [batch, sequence, out_features] of the one linear, side branch added."""
        assert around.activation == "none", "a flavor that does not pack has no gate ‖ up"
        (linear,) = linears
        if around.norm:
            x = self._norm(nodes, x, around)
        base = self._base(nodes, x, f"{name}.base", matrix)
        a, b = self._default_factors(nodes, linear)
        down = nodes.add("MatMul", [x, a], f"{name}.down")
        up = nodes.add("MatMul", [down, b], f"{name}.up")
        if not around.residual:
            return nodes.add("Add", [base, up], name)
        changed = nodes.add("Add", [base, up], f"{name}.changed")
        return nodes.add("Add", [changed, around.residual], name)

    def _norm(self, nodes: Nodes, x: str, around: Around) -> str:
        """RMS norm of x, made once for all linears that read it."""
        if around.norm not in self._normed:
            self._normed[around.norm] = nodes.add(
                "SimplifiedLayerNormalization",
                [x, around.norm],
                around.norm.removesuffix(".weight"),
                epsilon=around.epsilon,
                axis=-1,
            )
        return self._normed[around.norm]

    def attention(self, nodes: Nodes, config: ModelConfig, inputs: AttentionInputs) -> str:
        """Attended heads [batch, sequence, num_attention_heads · head_dim]."""
        name = inputs.path
        q, k, v = inputs.qkv
        if config.qk_norm:
            q, k = (
                _head_norm(nodes, config, x, f"{name}.{kind}_norm")
                for x, kind in ((q, "q"), (k, "k"))
            )
        return nodes.add(
            "GroupQueryAttention",
            [q, k, v, *inputs.past, "seqlens_k", "total_sequence_length", COS, SIN],
            name,
            domain=DOMAIN,
            outputs=[name, *inputs.present],
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            local_window_size=config.sliding_window or -1,
        )

    def cache(self, config: ModelConfig, name: str, kind: str, length: str) -> onnx.ValueInfoProto:
        """Keys or values of one layer."""
        dims: list[str | int] = ["batch", config.num_key_value_heads, length, config.head_dim]
        return value(f"{name}.{kind}", TensorProto.FLOAT, dims)

    def _base(self, nodes: Nodes, x: str, name: str, matrix: StoredMatrix) -> str:
        inputs = matrix.inputs
        if matrix.format == "float":
            product = nodes.add("MatMul", [x, inputs["codes"]], name)
            bias = inputs.get("bias")
            return nodes.add("Add", [product, bias], f"{name}.bias") if bias else product
        slots = [x, inputs["codes"], inputs["scales"], inputs.get("zero_points", ""), ""]
        slots.append(inputs.get("bias", ""))
        while not slots[-1]:
            slots.pop()
        return nodes.add(
            "MatMulNBits",
            slots,
            name,
            domain=DOMAIN,
            K=matrix.in_features,
            N=matrix.out_features,
            bits=8 if matrix.format == "int8" else 4,
            block_size=matrix.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _default_factors(self, nodes: Nodes, linear: Linear) -> tuple[str, str]:
        """Names of A and B, which are inputs with a default of rank 0."""
        a, b = f"{linear.target}.lora_a", f"{linear.target}.lora_b"
        nodes.empty(a, [linear.in_features, 0])
        nodes.empty(b, [0, linear.out_features])
        self._factors += [
            value(a, TensorProto.FLOAT, [linear.in_features, f"{linear.target}.rank"]),
            value(b, TensorProto.FLOAT, [f"{linear.target}.rank", linear.out_features]),
        ]
        return a, b

    def embedding(self, nodes: Nodes, input_ids: str, name: str, matrix: StoredMatrix) -> str:
        """Rows of the embedding, float32 [batch, sequence, hidden_size]."""
        inputs = matrix.inputs
        if matrix.format == "float":
            return nodes.add("Gather", [inputs["codes"], input_ids], name, axis=0)
        slots = [inputs["codes"], input_ids, inputs["scales"]]
        if "zero_points" in inputs:
            slots.append(inputs["zero_points"])
        return nodes.add(
            "GatherBlockQuantized",
            slots,
            name,
            domain=DOMAIN,
            bits=8 if matrix.format == "int8" else 4,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def swiglu(self, nodes: Nodes, parts: Sequence[str], name: str) -> str:
        """silu(gate)·up."""
        gate, up = parts
        gated = nodes.add("Sigmoid", [gate], f"{name}.sigmoid")
        silu = nodes.add("Mul", [gate, gated], f"{name}.silu")
        return nodes.add("Mul", [silu, up], name)

    def adapter_inputs(self) -> list[onnx.ValueInfoProto]:
        """The factors of every linear that the graph has."""
        return self._factors


def _head_norm(nodes: Nodes, config: ModelConfig, x: str, name: str) -> str:
    """RMS norm over each head of q or k (Qwen3)."""
    by_head = nodes.constant("by_head", [0, 0, -1, config.head_dim])
    heads = nodes.add("Reshape", [x, by_head], f"{name}.heads")
    normed = nodes.add(
        "SimplifiedLayerNormalization",
        [heads, f"{name}.weight"],
        f"{name}.normed",
        epsilon=config.rms_norm_eps,
        axis=-1,
    )
    return nodes.add("Reshape", [normed, nodes.constant("by_row", [0, 0, -1])], name)
