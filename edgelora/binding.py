"""An adapter meets its base's weights: merged into them, or given the factors of their rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Branch
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import weight_name
from edgelora.merge import merge, row_factors

Float32 = NDArray[np.float32]


def merged(target: str, weight: Float32, branch: Branch) -> Float32:
    """The weight [out_features, in_features] with the branch in it. Raises EdgeLoraError."""
    with _naming(target):
        return merge(weight, branch.lora_a, branch.lora_b, branch.scaling, branch.magnitude)


def bound(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """Its magnitudes (DoRA) as factors of this base's rows, which are read for them.

    Raises EdgeLoraError.
    """
    branches = {
        target: branch if branch.magnitude is None else _bound(target, branch, checkpoint)
        for target, branch in adapter.branches.items()
    }
    return replace(adapter, branches=branches)


def _bound(target: str, branch: Branch, checkpoint: Checkpoint) -> Branch:
    assert branch.magnitude is not None
    weight = checkpoint.read(weight_name(checkpoint.config, target))
    with _naming(target):
        factors = row_factors(
            weight, branch.lora_a, branch.lora_b, branch.scaling, branch.magnitude
        )
    lora_b = factors[:, None] * branch.lora_b.astype(np.float32)
    return Branch(branch.lora_a, lora_b, branch.scaling, row_factor=factors)


@contextmanager
def _naming(target: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise EdgeLoraError(f"{target}: {error}; train the adapter again") from error
