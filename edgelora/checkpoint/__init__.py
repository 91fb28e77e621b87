"""A base checkpoint: its config and its tensors, read one at a time under their Hugging Face names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.config import ModelConfig
from edgelora.quantize.matrix import Int4Matrix, Int8Matrix, Nf4Matrix


class Checkpoint(Protocol):
    """What every kind of base offers. Tensor names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`)."""

    path: Path
    name: str  # for people and for comparison with an adapter's base_model_name_or_path
    config: ModelConfig

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted; a tied lm_head is not among them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """[out_features, in_features] of a matrix, [features] of a norm or bias."""

    def read(self, name: str) -> NDArray[np.float32]:
        """The values, dequantized where the file holds codes."""

    def read_quantized(self, name: str) -> Int4Matrix | Int8Matrix | Nf4Matrix | None:
        """The codes as the file holds them, where our formats carry them losslessly; else None."""
