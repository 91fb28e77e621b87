"""Flavor `ort`: ONNX Runtime's own operators; each linear's side branch is two MatMuls.

The factors are inputs of the graph that default to rank 0, so that without an adapter the base
runs. Their names are `<target>.lora_a` [in_features, rank] and `<target>.lora_b` [rank,
out_features], scaling in lora_b, as `.onnx_adapter` files name them.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto

from edgelora.graph.nodes import Nodes, value
from edgelora.graph.tensors import StoredMatrix
from edgelora.layout import Linear

DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level


class StockOps:
    """MatMulNBits, GatherBlockQuantized and plain ONNX."""

    packs = False

    def __init__(self) -> None:
        self._factors: list[onnx.ValueInfoProto] = []

    def linear(
        self, nodes: Nodes, x: str, name: str, linears: Sequence[Linear], matrix: StoredMatrix
    ) -> str:
        """y [batch, sequence, out_features] of the one linear, side branch added."""
        (linear,) = linears
        base = self._base(nodes, x, f"{name}.base", matrix)
        a, b = self._default_factors(nodes, linear)
        down = nodes.add("MatMul", [x, a], f"{name}.down")
        up = nodes.add("MatMul", [down, b], f"{name}.up")
        return nodes.add("Add", [base, up], name)

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
