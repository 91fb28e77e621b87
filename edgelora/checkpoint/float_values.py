"""Stored floats → float32."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def _bfloat16(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    bits = raw.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _float(dtype: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    return lambda raw: raw.view(dtype).astype(np.float32, copy=False)


# safetensors' dtype → from uint8 [bytes] to float32 [elements]; all exact but F64, which is rounded
TO_FLOAT32: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
    "F32": _float("<f4"),
    "F16": _float("<f2"),
    "BF16": _bfloat16,
    "F64": _float("<f8"),
}
