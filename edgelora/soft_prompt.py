"""Soft embeddings → the keys and values that the base makes of them, layer by layer."""

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Prefix, SoftPrompt
from edgelora.calibration import Arithmetic, Past, Stream
from edgelora.checkpoint import Checkpoint
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.layout import Linear, projections, weight_name

Float32 = NDArray[np.float32]


class _Keeping(Arithmetic):
    """Keeps what the kv_cache would hold of the positions that it has attended."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__(config, positions)
        self.keys: list[Float32] = []  # of each layer [heads, positions, head_dim]
        self.values: list[Float32] = []

    def attention(self, q: Float32, k: Float32, v: Float32, past: Past | None = None) -> Float32:
        """Of one window."""
        y, keys, values = self.attended(q, k, v, past)
        self.keys.append(keys[0])
        self.values.append(values[0])
        return y


def prefix_of(prompt: SoftPrompt, checkpoint: Checkpoint) -> Prefix:
    """Reads the base once, in float; memory: one projection. Raises EdgeLoraError."""
    config, rows = checkpoint.config, np.asarray(prompt.embeddings, np.float32)
    arithmetic = _Keeping(config, len(rows))
    positions = np.arange(len(rows))[None]
    stream = Stream(config, arithmetic, positions, rows, checkpoint.read)
    *inner, _ = projections(config)
    for projection in inner[:-3]:  # up to the last layer's keys and values
        weights = [checkpoint.read(weight_name(config, each.target)) for each in projection.linears]
        stream.advance(weights, [_bias(checkpoint, each) for each in projection.linears])
    prefix = Prefix(np.stack(arithmetic.keys), np.stack(arithmetic.values))
    if not np.isfinite(prefix.keys).all() or not np.isfinite(prefix.values).all():
        raise EdgeLoraError("prompt_embeddings: the base makes keys of them that are not finite")
    return prefix


def _bias(checkpoint: Checkpoint, linear: Linear) -> Float32:
    return checkpoint.read(f"{linear.target}.bias") if linear.bias else np.zeros(0, np.float32)
