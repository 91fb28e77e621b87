"""From a config and a plan to ONNX nodes. Nothing here opens a file."""

from edgelora.graph.decoder import Decoder
from edgelora.graph.own_ops import OwnOps
from edgelora.graph.rotary import rotary_tables
from edgelora.graph.stock_ops import StockOps
from edgelora.graph.tensors import COS, SIN, WEIGHT_FILE, StoredMatrix, StoredTensor

__all__ = [
    "COS",
    "SIN",
    "WEIGHT_FILE",
    "Decoder",
    "OwnOps",
    "StockOps",
    "StoredMatrix",
    "StoredTensor",
    "rotary_tables",
]
