"""The base of a bundle as its own files hold it: what can be told without the checkpoint."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgelora.config import ModelConfig
from edgelora.evaluation import StoredWeights
from edgelora.graph import WEIGHT_FILE, StoredMatrix, StoredTensor
from edgelora.graph.own_ops import ROLES
from edgelora.layout import Projection, expected_tensors, projections

Attributes = Mapping[str, Any]
_ALONE = {"Linear": 2, "Embedding": 1}  # operator → input of its codes
_IN_LAYER = {"qkv_": 9, "o_": 16, "gate_up_": 23, "down_": 30}


@dataclass
class BundleBase:
    """A Checkpoint of flavor edgelora's norms and biases; its weights are `stored`."""

    path: Path
    name: str
    config: ModelConfig
    stored: StoredWeights

    def names(self) -> Sequence[str]:
        return sorted(expected_tensors(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return expected_tensors(self.config)[name]

    def read(self, name: str) -> NDArray[np.float32]:
        """A norm or a bias; KeyError for a weight."""
        if not name.endswith(".bias"):
            return self.stored.vector(name)
        target = name.removesuffix(".bias")
        projection = next(
            each
            for each in projections(self.config)
            if target in (linear.target for linear in each.linears)
        )
        return self._bias(projection, target)

    def _bias(self, projection: Projection, target: str) -> NDArray[np.float32]:
        if target in self.stored.matrices:
            return self.stored.vector(f"{target}.bias")
        rows = 0
        for linear in projection.linears:
            if linear.target == target:
                break
            rows += linear.out_features
        return self.stored.vector(f"{projection.name}.bias")[rows : rows + linear.out_features]

    def biased(self) -> set[str]:
        """The targets whose outputs get a bias."""
        return {
            linear.target
            for projection in projections(self.config)
            for linear in projection.linears
            if self.stored.tensors.keys() & {f"{linear.target}.bias", f"{projection.name}.bias"}
        }

    def stored_as(self, name: str) -> None:
        return None

    def read_quantized(self, name: str) -> None:
        return None


def open_bundle_base(bundle: Path, manifest: Mapping[str, Any]) -> BundleBase:
    """Of a bundle whose manifest has been read, flavor edgelora."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    tensors = {each.name: _tensor(each) for each in graph.initializer if each.external_data}
    matrices: dict[str, StoredMatrix] = {}
    attention: Attributes = {}
    for node in graph.node:
        values = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if "kv_num_heads" in values:
            attention = values
        matrices |= _matrices(node, values)
    stored = StoredWeights(bundle / WEIGHT_FILE, tensors, matrices, manifest["flavor"])
    config = _config(manifest, attention, tensors.keys())
    return BundleBase(bundle, manifest["base"]["name"], config, stored)


def _tensor(tensor: onnx.TensorProto) -> StoredTensor:
    place = {each.key: each.value for each in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    return StoredTensor(tensor.data_type, tuple(tensor.dims), offset, length)


def _matrices(node: onnx.NodeProto, values: Attributes) -> dict[str, StoredMatrix]:
    if node.op_type in _ALONE:
        return {node.name: _matrix(node, values, "", _ALONE[node.op_type])}
    if node.op_type != "Layer":
        return {}
    found = (_matrix(node, values, *place) for place in _IN_LAYER.items())
    return {each.inputs["codes"].removesuffix(".codes"): each for each in found}


def _matrix(node: onnx.NodeProto, values: Attributes, prefix: str, first: int) -> StoredMatrix:
    roles = ROLES[:3] if node.op_type == "Embedding" else ROLES
    names = dict(zip(roles, node.input[first : first + len(roles)], strict=False))
    return StoredMatrix(
        values[f"{prefix}format"].decode(),
        values[f"{prefix}block_size"],
        values[f"{prefix}in_features"],
        values[f"{prefix}out_features"],
        {role: name for role, name in names.items() if name},
    )


def _config(
    manifest: Mapping[str, Any], attention: Attributes, tensors: Collection[str]
) -> ModelConfig:
    """rope_theta is not told, nor needed: the tables are stored."""
    model = manifest["model"]
    sizes = {each["name"]: each["out_features"] for each in manifest["targets"]}
    has_bias = {name.split(".")[-2] for name in tensors if name.endswith(".bias")}
    window = attention["local_window_size"]
    return ModelConfig(
        architecture=model["architecture"],
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=sizes["model.layers.0.mlp.gate_proj"],
        num_hidden_layers=model["num_hidden_layers"],
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["kv_num_heads"],
        head_dim=attention["head_dim"],
        max_position_embeddings=model["context_length"],
        rms_norm_eps=attention["epsilon"],
        rope_theta=1.0,
        tie_word_embeddings=False,
        sliding_window=None if window < 0 else window,
        attention_bias=bool(has_bias & {"qkv_proj", "q_proj"}),
        attention_output_bias="o_proj" in has_bias,
        mlp_bias="down_proj" in has_bias,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in tensors,
    )
