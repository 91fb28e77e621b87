"""Collects nodes and initializers of one ONNX graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from edgelora.graph.tensors import WEIGHT_FILE, StoredTensor

OPSET = 21
IR_VERSION = 10
DOMAINS = {"": OPSET, "com.microsoft": 1, "edgelora": 1}


class Nodes:
    """A graph in the making. Values are named by the node that makes them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Appends a node.

        Returns its first output, named as the node unless `outputs` says otherwise.
        """
        outputs = outputs or [name]
        self.nodes.append(
            helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def constant(self, name: str, values: Sequence[int]) -> str:
        """A small int64 vector inside the graph file."""
        if all(tensor.name != name for tensor in self.constants):
            self.constants.append(
                helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            )
        return name

    def empty(self, name: str, dims: Sequence[int]) -> None:
        """A float32 constant without elements: the default of an input that may be left away."""
        self.constants.append(helper.make_tensor(name, TensorProto.FLOAT, dims, []))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        stored: Mapping[str, StoredTensor],
    ) -> onnx.ModelProto:
        """The finished model; `stored` are its external initializers."""
        used = {name for node in self.nodes for name in node.input}
        external = [_external(name, tensor) for name, tensor in stored.items() if name in used]
        graph = helper.make_graph(
            self.nodes, "decoder", inputs, outputs, initializer=self.constants + external
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in DOMAINS.items()]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelora"
        )


def value(name: str, dtype: int, dims: Sequence[str | int]) -> onnx.ValueInfoProto:
    """An input or output of the graph; a string names a dimension."""
    return helper.make_tensor_value_info(name, dtype, list(dims))


def _external(name: str, stored: StoredTensor) -> TensorProto:
    tensor = TensorProto(name=name, data_type=stored.data_type, dims=stored.dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", WEIGHT_FILE),
        ("offset", str(stored.offset)),
        ("length", str(stored.length)),
    ):
        tensor.external_data.add(key=key, value=value)
    return tensor
