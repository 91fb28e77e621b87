"""A decoder-only transformer (Llama, Mistral, Qwen2, Qwen3) as an ONNX graph.

Read from top to bottom, a token meets embedding, then in each layer qkv_proj of its norm,
attention, o_proj onto the residual, gate_up_proj of its norm with SwiGLU, down_proj onto the
residual; at last lm_head of the final norm. Behind the last layer's attention only the rows that
`logits_to_keep` names go on. In flavor `edgelora` a layer is one node, unless its parts are in
formats that cannot be packed.
"""

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto

from edgelora.config import ModelConfig
from edgelora.graph.nodes import Nodes, value
from edgelora.graph.own_ops import OwnOps
from edgelora.graph.stock_ops import StockOps
from edgelora.graph.tensors import Around, AttentionInputs, LayerPart, StoredMatrix, StoredTensor
from edgelora.layout import (
    EMBEDDING,
    FINAL_NORM,
    Projection,
    attention_projections,
    head,
    mlp_projections,
)

KEPT = "logits_to_keep"  # input: rows of a sequence


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
        x = self.ops.embedding(self.nodes, "input_ids", EMBEDDING, self.matrices[EMBEDDING])
        for layer in range(self.config.num_hidden_layers):
            x = self._layer(x, layer)
        self._logits(x)
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

    def _layer(self, x: str, layer: int) -> str:
        """One node, where the flavor has it and all projections are packed."""
        qkv, o_proj = attention_projections(self.config, layer)
        gate_up, down = mlp_projections(self.config, layer)
        packed = all(p.name in self.matrices for p in (qkv, o_proj, gate_up, down))
        if not packed or not isinstance(self.ops, OwnOps):
            return self._mlp(self._attention(x, layer), layer)
        path = f"model.layers.{layer}"
        after = f"{path}.post_attention_layernorm"
        parts = {
            "qkv": self._part(qkv, norm=f"{path}.input_layernorm"),
            "o": self._part(o_proj),
            "gate_up": self._part(gate_up, norm=after, activation="swiglu"),
            "down": self._part(down),
        }
        cached, kept = self._cached([], layer), KEPT if self._is_last(layer) else ""
        return self.ops.layer(self.nodes, self.config, x, cached, parts, kept)

    def _is_last(self, layer: int) -> bool:
        return layer == self.config.num_hidden_layers - 1

    def _part(
        self, projection: Projection, *, norm: str = "", activation: str = "none"
    ) -> LayerPart:
        around = self._around(norm=norm, activation=activation)
        return LayerPart(projection.linears, self.matrices[projection.name], around)

    def _around(self, *, norm: str = "", residual: str = "", activation: str = "none") -> Around:
        weight = f"{norm}.weight" if norm else ""
        return Around(weight, self.config.rms_norm_eps, residual, activation)

    def _cached(self, qkv: Sequence[str], layer: int) -> AttentionInputs:
        return AttentionInputs(
            path=f"model.layers.{layer}.self_attn",
            qkv=qkv,
            past=[f"past_key_values.{layer}.{kind}" for kind in ("key", "value")],
            present=[f"present.{layer}.{kind}" for kind in ("key", "value")],
        )

    def _project(
        self,
        x: str,
        projection: Projection,
        *,
        norm: str = "",
        residual: str = "",
        activation: str = "none",
    ) -> list[str]:
        """One value where the projection is packed, else one for each of its linears."""
        around = self._around(norm=norm, residual=residual, activation=activation)
        if projection.name in self.matrices:
            parts = {projection.name: projection.linears}
        else:
            parts = {linear.target: (linear,) for linear in projection.linears}
        return [
            self.ops.linear(self.nodes, x, name, linears, self.matrices[name], around)
            for name, linears in parts.items()
        ]

    def _attention(self, x: str, layer: int) -> str:
        """x + o_proj of grouped-query attention over the kv_cache."""
        path = f"model.layers.{layer}"
        qkv_proj, o_proj = attention_projections(self.config, layer)
        qkv = self._project(x, qkv_proj, norm=f"{path}.input_layernorm")
        attended = self.ops.attention(self.nodes, self.config, self._cached(qkv, layer))
        if self._is_last(layer):
            attended, x = (self._kept(each) for each in (attended, x))
        return self._project(attended, o_proj, residual=x)[0]

    def _kept(self, x: str) -> str:
        return self.nodes.add("Gather", [x, KEPT], f"{x}.kept", axis=1)

    def _mlp(self, x: str, layer: int) -> str:
        """x + down_proj(silu(gate)·up)."""
        path = f"model.layers.{layer}"
        gate_up, down = mlp_projections(self.config, layer)
        norm = f"{path}.post_attention_layernorm"
        if self.ops.packs and gate_up.name in self.matrices:
            (activated,) = self._project(x, gate_up, norm=norm, activation="swiglu")
        else:
            parts = self._project(x, gate_up, norm=norm)
            activated = self.ops.swiglu(self.nodes, parts, f"{path}.mlp.act")
        return self._project(activated, down, residual=x)[0]

    def _logits(self, x: str) -> None:
        logits = self._project(x, head(self.config), norm=FINAL_NORM)[0]
        self.nodes.nodes[-1].output[0] = "logits"
        assert logits == "lm_head"

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        ids = [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]),
            value(KEPT, TensorProto.INT64, ["rows"]),
        ]
        cache = self._cache("past_key_values", "past_sequence")
        return ids + cache + self.ops.adapter_inputs()

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        logits = value("logits", TensorProto.FLOAT, ["batch", "rows", self.config.vocab_size])
        return [logits, *self._cache("present", "total_sequence")]

    def _cache(self, prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        return [
            self.ops.cache(self.config, f"{prefix}.{layer}", kind, length)
            for layer in range(self.config.num_hidden_layers)
            for kind in ("key", "value")
        ]
