"""What int8 steps a row of activations has on this CPU (ARCHITECTURE.md, "AVX-512 groups them").

`format`: of the weights that it meets; nf4 and fp4 have the steps of blocks alone everywhere.
"""

import os

import numpy as np
from numpy.typing import NDArray

from edgelora.device import read_cpuinfo

GROUP = 4  # blocks of 32
MOST_HALVINGS = 5


def can_group() -> bool:
    """Whether the CPU's kernels multiply scales of a group that are powers of two apart."""
    forced = os.environ.get("EDGELORA_FORCE_ISA")
    if forced:
        return forced in ("avx512_vnni", "amx_bf16")
    return "avx512_vnni" in read_cpuinfo().features


def groups_scales(format: str) -> bool:
    """Whether activations are rounded so."""
    return can_group() and not format.startswith(("nf4", "fp4"))


def tops(largest: NDArray[np.floating], format: str) -> NDArray[np.floating]:
    """127 steps of each block, from the largest magnitudes [..., blocks]: these, or their group's
    halved while it is not below.
    """
    if not groups_scales(format):
        return largest
    blocks = largest.shape[-1]
    room = [(0, 0)] * (largest.ndim - 1) + [(0, -blocks % GROUP)]
    groups = np.pad(largest, room).reshape(*largest.shape[:-1], -1, GROUP)
    top = np.broadcast_to(groups.max(-1, keepdims=True), groups.shape)
    for _ in range(MOST_HALVINGS):
        top = np.where((groups > 0) & (top / 2 >= groups), top / 2, top)
    flat = np.where(groups > 0, top, 0).reshape(*largest.shape[:-1], -1)
    return flat[..., :blocks].astype(largest.dtype)
