"""From a config and a plan to ONNX nodes. Nothing here opens a file."""

from edgelora.graph.decoder import COS, EMBEDDING, FINAL_NORM, SIN, Decoder
from edgelora.graph.layout import Linear, Projection, head, projections, targets
from edgelora.graph.own_ops import OwnOps
from edgelora.graph.rotary import rotary_tables
from edgelora.graph.stock_ops import StockOps
from edgelora.graph.tensors import WEIGHT_FILE, StoredMatrix, StoredTensor

__all__ = [
    "COS",
    "EMBEDDING",
    "FINAL_NORM",
    "SIN",
    "WEIGHT_FILE",
    "Decoder",
    "Linear",
    "OwnOps",
    "Projection",
    "StockOps",
    "StoredMatrix",
    "StoredTensor",
    "head",
    "projections",
    "rotary_tables",
    "targets",
]
