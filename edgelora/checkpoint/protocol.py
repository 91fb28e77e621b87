"""What every kind of base offers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.config import ModelConfig
from edgelora.quantize.matrix import CodedMatrix

StoredAs = Literal["int4", "int8", "nf4", "fp4"]


class Checkpoint(Protocol):
    """A base's config and tensors, under Hugging Face's names (`model.norm.weight`).

    Reading is safe from several threads; nothing of a tensor is kept.
    """

    path: Path
    name: str  # for people and for comparison with an adapter's base_model_name_or_path
    config: ModelConfig

    def names(self) -> Sequence[str]:
        """Names of all tensors, sorted; a tied lm_head is not among them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """[out_features, in_features] of a matrix, [features] of a norm or bias."""

    def read(self, name: str) -> NDArray[np.float32]:
        """The values, dequantized where the file holds codes."""

    def stored_as(self, name: str) -> StoredAs | None:
        """The format that `read_quantized` gives; None where it gives None. Reads nothing."""

    def read_quantized(self, name: str) -> CodedMatrix | None:
        """The codes as the file holds them, where our formats carry them losslessly; else None."""
