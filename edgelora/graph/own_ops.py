"""Flavor `edgelora`: our operators; the side branch is inside `Linear`."""

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto

from edgelora.graph.nodes import Nodes, value
from edgelora.graph.tensors import StoredMatrix
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
    """Operators `Linear`, `Embedding` and `SwiGlu` (ARCHITECTURE.md, "Operators")."""

    packs = True  # several linears that read the same row may share a node

    def linear(
        self, nodes: Nodes, x: str, name: str, linears: Sequence[Linear], matrix: StoredMatrix
    ) -> str:
        """y [batch, sequence, Σ out_features] of the linears packed in `matrix`."""
        return nodes.add(
            "Linear",
            [x, "adapter_ids", *_present(matrix, ROLES)],
            name,
            domain=DOMAIN,
            **_attributes(matrix),
            targets=",".join(linear.target for linear in linears),
            slices=[linear.out_features for linear in linears],
        )

    def embedding(self, nodes: Nodes, input_ids: str, name: str, matrix: StoredMatrix) -> str:
        """Rows of the embedding, float32 [batch, sequence, hidden_size]."""
        return nodes.add(
            "Embedding",
            [input_ids, *_present(matrix, ROLES[:3])],
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


def _present(matrix: StoredMatrix, roles: Sequence[str]) -> list[str]:
    """The initializers of the roles, "" for an absent one, nothing after the last."""
    inputs = [matrix.inputs.get(role, "") for role in roles]
    while not inputs[-1]:
        inputs.pop()
    return inputs
