"""A linear of the `edgelora` flavor: one node of our operator, side branch inside."""

from collections.abc import Sequence

from edgelora.graph.layout import Linear
from edgelora.graph.nodes import Nodes
from edgelora.graph.tensors import StoredMatrix

ROLES = (  # operator inputs 2…7, by position
    "codes",
    "scales",
    "zero_points",
    "absmax_offset",
    "absmax_table",
    "bias",
)


def linear(nodes: Nodes, x: str, name: str, linears: Sequence[Linear], matrix: StoredMatrix) -> str:
    """y [batch, sequence, Σ out_features] of the linears packed in `matrix`."""
    inputs = [x, "adapter_ids", *(matrix.inputs.get(role, "") for role in ROLES)]
    while not inputs[-1]:
        inputs.pop()
    return nodes.add(
        "Linear",
        inputs,
        name,
        domain="edgelora",
        format=matrix.format,
        block_size=matrix.block_size,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
        targets=",".join(linear.target for linear in linears),
        slices=[linear.out_features for linear in linears],
    )


def embedding(nodes: Nodes, input_ids: str, name: str, matrix: StoredMatrix) -> str:
    """Rows of the embedding, float32 [batch, sequence, hidden_size]."""
    inputs = [input_ids, *(matrix.inputs.get(role, "") for role in ROLES[:3])]
    while not inputs[-1]:
        inputs.pop()
    return nodes.add(
        "Embedding",
        inputs,
        name,
        domain="edgelora",
        format=matrix.format,
        block_size=matrix.block_size,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
    )
