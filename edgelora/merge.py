"""W0 + scaling·B·A: the delta of an adapter written into a base weight."""

import numpy as np
from numpy.typing import NDArray

ROWS = 512  # rows of delta at a time: 4 MB for 2048 columns instead of a second copy of the weight

Float32 = NDArray[np.float32]


def merge(weight: Float32, lora_a: Float32, lora_b: Float32, scaling: float) -> Float32:
    """weight + scaling·(lora_b @ lora_a), a new float32 [out_features, in_features].

    lora_a [rank, in_features], lora_b [out_features, rank]; all arithmetic in float32, in the order
    of PEFT's merge: product, times scaling, plus weight. Each element of the product is a sum over
    `rank` alone, which BLAS threads do not split: the bytes do not depend on their number.
    ValueError: shapes that do not fit, a result that is not finite.
    """
    _check(weight, lora_a, lora_b)
    merged = np.empty(weight.shape, np.float32)
    lora_a = np.ascontiguousarray(lora_a, np.float32)
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, with its row
            delta = np.ascontiguousarray(lora_b[part], np.float32) @ lora_a
            delta *= np.float32(scaling)
            np.add(weight[part], delta, out=merged[part])
        _refuse_nonfinite(merged[part], start)
    return merged


def _check(weight: Float32, lora_a: Float32, lora_b: Float32) -> None:
    shapes = [list(weight.shape), list(lora_a.shape), list(lora_b.shape)]
    fits = [len(shape) for shape in shapes] == [2, 2, 2] and (
        weight.shape == (lora_b.shape[0], lora_a.shape[1]) and lora_a.shape[0] == lora_b.shape[1]
    )
    if not fits:
        raise ValueError("weight {}, lora_a {}, lora_b {} do not fit".format(*shapes))


def _refuse_nonfinite(rows: Float32, first_row: int) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise ValueError(f"row {row}: the merged weight is not finite")
