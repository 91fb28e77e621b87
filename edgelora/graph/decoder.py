"""A decoder-only transformer (Llama, Mistral, Qwen2, Qwen3) as an ONNX graph.

Read from top to bottom, a token meets the nodes in this order: embedding, then in each layer
norm, qkv_proj, attention, o_proj, norm, gate_up_proj, SwiGlu, down_proj; at last the norm and
lm_head of the rows that `logits_to_keep` names.
"""

from collections.abc import Mapping

import onnx
from onnx import TensorProto

from edgelora.config import ModelConfig
from edgelora.graph.nodes import Nodes, value
from edgelora.graph.own_ops import OwnOps
from edgelora.graph.stock_ops import StockOps
from edgelora.graph.tensors import StoredMatrix, StoredTensor
from edgelora.layout import (
    EMBEDDING,
    FINAL_NORM,
    Projection,
    attention_projections,
    head,
    mlp_projections,
)

COS, SIN = "rotary.cos", "rotary.sin"


class Decoder:
    """Builds the graph of one config from the names of its stored matrices and tensors."""

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, StoredMatrix],
        ops: OwnOps | StockOps,
    ) -> None:
        self.config = config
        self.ops = ops
        self.matrices = matrices
        self.nodes = Nodes()

    def build(self, stored: Mapping[str, StoredTensor]) -> onnx.ModelProto:
        """The whole model; `stored` are the tensors of the weight file by name."""
        self._lengths()
        residual = ""
        table = self.matrices[EMBEDDING]
        out = self.ops.embedding(self.nodes, "input_ids", EMBEDDING, table)
        for layer in range(self.config.num_hidden_layers):
            path = f"model.layers.{layer}"
            normed, residual = self._norm(out, residual, f"{path}.input_layernorm")
            attended = self._attention(normed, layer)
            normed, residual = self._norm(attended, residual, f"{path}.post_attention_layernorm")
            out = self._mlp(normed, layer)
        self._logits(out, residual)
        return self.nodes.model(self._inputs(), self._outputs(), stored)

    def _lengths(self) -> None:
        """seqlens_k (positions − 1 of each sequence) and total_sequence_length from
        attention_mask.
        """
        add, constant = self.nodes.add, self.nodes.constant
        ones = constant("one", [1])
        positions = add("ReduceSum", ["attention_mask", ones], "positions", keepdims=0)
        last = add("Sub", [positions, ones], "last_position")
        add("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        total = add("Shape", ["attention_mask"], "mask_length", start=1, end=2)
        total = add("Squeeze", [total], "mask_length_scalar")
        add("Cast", [total], "total_sequence_length", to=TensorProto.INT32)

    def _norm(self, x: str, residual: str, path: str) -> tuple[str, str]:
        """RMS norm of x + residual (residual may be ""); returns it and the sum."""
        epsilon, weight = self.config.rms_norm_eps, f"{path}.weight"
        if not residual:
            normed = self.nodes.add(
                "SimplifiedLayerNormalization", [x, weight], path, epsilon=epsilon, axis=-1
            )
            return normed, x
        outputs = [path, "", "", f"{path}.residual"]
        self.nodes.add(
            "SkipSimplifiedLayerNormalization",
            [x, residual, weight],
            path,
            domain="com.microsoft",
            outputs=outputs,
            epsilon=epsilon,
        )
        return path, outputs[3]

    def _project(self, x: str, projection: Projection) -> list[str]:
        """One value where the projection is packed, else one for each of its linears."""
        if projection.name in self.matrices:
            matrix = self.matrices[projection.name]
            return [self.ops.linear(self.nodes, x, projection.name, projection.linears, matrix)]
        return [
            self.ops.linear(self.nodes, x, part.target, [part], self.matrices[part.target])
            for part in projection.linears
        ]

    def _attention(self, x: str, layer: int) -> str:
        """Grouped-query attention with rotary embedding over the kv_cache, then o_proj."""
        config, path = self.config, f"model.layers.{layer}.self_attn"
        qkv_proj, o_proj = attention_projections(config, layer)
        qkv = self._project(x, qkv_proj)
        if config.qk_norm:
            qkv = self._head_norms(qkv, qkv_proj, path)
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        self.nodes.add(
            "GroupQueryAttention",
            [*qkv, *[""] * (3 - len(qkv)), *past, "seqlens_k", "total_sequence_length", COS, SIN],
            path,
            domain="com.microsoft",
            outputs=[path, *present],
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            local_window_size=config.sliding_window or -1,
        )
        return self._project(path, o_proj)[0]

    def _head_norms(self, qkv: list[str], projection: Projection, path: str) -> list[str]:
        """RMS norm over each head of q and k (Qwen3)."""
        if len(qkv) == 1:
            sizes = self.nodes.constant("qkv_slices", [p.out_features for p in projection.linears])
            parts = [f"{path}.{kind}" for kind in "qkv"]
            self.nodes.add("Split", [*qkv, sizes], f"{path}.split", outputs=parts, axis=-1)
            qkv = parts
        return [self._head_norm(qkv[0], path, "q"), self._head_norm(qkv[1], path, "k"), qkv[2]]

    def _head_norm(self, x: str, path: str, kind: str) -> str:
        add, constant, name = self.nodes.add, self.nodes.constant, f"{path}.{kind}_norm"
        heads = add(
            "Reshape", [x, constant("by_head", [0, 0, -1, self.config.head_dim])], f"{name}.heads"
        )
        normed = add(
            "SimplifiedLayerNormalization",
            [heads, f"{name}.weight"],
            f"{name}.normed",
            epsilon=self.config.rms_norm_eps,
            axis=-1,
        )
        return add("Reshape", [normed, constant("by_row", [0, 0, -1])], name)

    def _mlp(self, x: str, layer: int) -> str:
        """down_proj(silu(gate)·up)."""
        gate_up, down = mlp_projections(self.config, layer)
        parts = self._project(x, gate_up)
        activated = self.ops.swiglu(self.nodes, parts, f"model.layers.{layer}.mlp.act")
        return self._project(activated, down)[0]

    def _logits(self, x: str, residual: str) -> None:
        """Only the rows that are asked for reach the last norm and lm_head."""
        kept, kept_residual = (
            self.nodes.add("Gather", [value, "logits_to_keep"], f"kept.{kind}", axis=1)
            for value, kind in ((x, "x"), (residual, "residual"))
        )
        normed, _ = self._norm(kept, kept_residual, FINAL_NORM)
        logits = self._project(normed, head(self.config))[0]
        self.nodes.nodes[-1].output[0] = "logits"
        assert logits == "lm_head"

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        ids = [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]),
            value("logits_to_keep", TensorProto.INT64, ["rows"]),
        ]
        cache = self._cache("past_key_values", "past_sequence")
        return ids + cache + self.ops.adapter_inputs()

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        logits = value("logits", TensorProto.FLOAT, ["batch", "rows", self.config.vocab_size])
        return [logits, *self._cache("present", "total_sequence")]

    def _cache(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        config = self.config
        dims: list[str | int] = ["batch", config.num_key_value_heads, length, config.head_dim]
        return [
            value(f"{prefix}.{layer}.{kind}", TensorProto.FLOAT, dims)
            for layer in range(self.config.num_hidden_layers)
            for kind in ("key", "value")
        ]
