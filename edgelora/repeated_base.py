"""A base whose layers are repeated (PEFT's layer_replication): another checkpoint."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.checkpoint import Checkpoint, StoredAs
from edgelora.errors import EdgeLoraError
from edgelora.layout import expected_tensors
from edgelora.quantize.matrix import CodedMatrix

LAYER = re.compile(r"model\.layers\.(\d+)\.")
Ranges = tuple[tuple[int, int], ...]  # first layer, end


class RepeatedBase:
    """Layer i is the source's layer layers[i]. See `Checkpoint`."""

    def __init__(self, source: Checkpoint, layers: Sequence[int]) -> None:
        self.source, self.layers = source, tuple(layers)
        self.path, self.name = source.path, source.name
        self.config = replace(source.config, num_hidden_layers=len(layers))

    def names(self) -> Sequence[str]:
        return sorted(expected_tensors(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(self.origin(name))

    def read(self, name: str) -> NDArray[np.float32]:
        return self.source.read(self.origin(name))

    def stored_as(self, name: str) -> StoredAs | None:
        return self.source.stored_as(self.origin(name))

    def read_quantized(self, name: str) -> CodedMatrix | None:
        return self.source.read_quantized(self.origin(name))

    def origin(self, name: str) -> str:
        """The source's name of a tensor."""
        return LAYER.sub(lambda found: f"model.layers.{self.layers[int(found[1])]}.", name)


def repeated(checkpoint: Checkpoint, layers: Sequence[int]) -> Checkpoint:
    """The checkpoint with these of its layers, one after another; none: as it is."""
    return RepeatedBase(checkpoint, layers) if layers else checkpoint


def layers_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Those that `repeated` was given."""
    return checkpoint.layers if isinstance(checkpoint, RepeatedBase) else ()


def common_layers(ranges: dict[Path, Ranges], count: int) -> list[int]:
    """The layers that all adapters (folder → layer_replication) mean, of a base of `count`.

    Raises EdgeLoraError.
    """
    if len({*ranges.values()}) > 1:
        other = next(iter(ranges))
        different = next(path for path in ranges if ranges[path] != ranges[other])
        raise EdgeLoraError(
            f"{different}: layer_replication: not that of {other}: each makes a base of its own, "
            "so export a bundle for each"
        )
    for path, pairs in ranges.items():
        for first, end in pairs:
            if end > count:
                raise EdgeLoraError(
                    f"{path}: layer_replication [{first}, {end}]: the base has {count} layers"
                )
        return [layer for first, end in pairs for layer in range(first, end)]
    return []
