"""What the graph knows of its initializers: where they lie, not what they hold."""

from collections.abc import Mapping
from dataclasses import dataclass

WEIGHT_FILE = "model.onnx.data"


@dataclass(frozen=True)
class StoredTensor:
    """An initializer in the weight file: ONNX element type, dims, byte offset and length."""

    data_type: int
    dims: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class StoredMatrix:
    """A packed weight: its format and the initializers that are its operator inputs, by role."""

    format: str  # "int4", "int8", "nf4", "float"
    block_size: int
    in_features: int
    out_features: int
    inputs: Mapping[str, str]  # role ("codes", "scales", "zero_points"…) → initializer name
