"""What the graph knows of its initializers: where they lie, not what they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgelora.layout import Linear

WEIGHT_FILE = "model.onnx.data"
COS, SIN = "rotary.cos", "rotary.sin"


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

    format: str  # "int4", "int8", "float"; "nf4", "fp4", of them "…_bfloat16", "…_float16"
    block_size: int
    in_features: int
    out_features: int
    inputs: Mapping[str, str]  # role ("codes", "scales", "zero_points"…) → initializer name


@dataclass(frozen=True)
class Around:
    """What stands around the product of a linear: activation(W · norm(x)) + residual.

    `norm` names the weight of an RMS norm, `residual` a value; "" for neither. `activation` is
    "none", or "swiglu" of a packed gate ‖ up.
    """

    norm: str
    epsilon: float
    residual: str
    activation: str


@dataclass(frozen=True)
class AttentionInputs:
    """Values that meet in attention."""

    path: str  # module path of the attention
    qkv: Sequence[str]  # q ‖ k ‖ v in one value, or three
    past: Sequence[str]  # key, value
    present: Sequence[str]


@dataclass(frozen=True)
class LayerPart:
    """One packed projection of a layer."""

    linears: Sequence[Linear]
    matrix: StoredMatrix
    around: Around  # its residual is the layer's affair
