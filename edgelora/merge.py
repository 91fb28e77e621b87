"""W0 + scaling·B·A, its rows scaled for DoRA; W0 scaled for (IA)³: adapters in base weights."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

FACTORS = {"float32", "float16"}
TILE = 1 << 15  # weights: 128 KB of float32, so that delta and a product stay in the second cache

Float32 = NDArray[np.float32]
Factor = NDArray[np.float32 | np.float16]


def merge(
    weight: Float32,
    lora_a: Factor,
    lora_b: Factor,
    scaling: float,
    magnitude: Factor | None = None,
) -> Float32:
    """weight + scaling·(lora_b @ lora_a), a new float32 [out_features, in_features].

    With a magnitude [out_features] (DoRA) each of its rows is divided by its Euclidean norm and
    multiplied by the row's magnitude, which may be negative; the norm is summed in float64.

    lora_a [rank, in_features], lora_b [out_features, rank], float32 or float16 (which is widened
    exactly). All arithmetic is float32, in the order of PEFT's merge: product, times scaling, plus
    weight. The product is summed rank by rank with numpy's elementwise operations: a BLAS gives
    other last bits for another number of threads (its kernels at the edges of a part sum
    differently), and here equal inputs must give equal bytes.
    ValueError: shapes or dtypes that do not fit, a result that is not finite.
    """
    _check(weight, lora_a, lora_b, magnitude)
    wide_a, wide_b = lora_a.astype(np.float32), lora_b.astype(np.float32)
    merged = np.empty(weight.shape, np.float32)
    step = max(1, TILE // weight.shape[1])

    def work(start: int) -> None:
        part = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, with the row
            delta = _product(wide_b[part], wide_a)
            delta *= np.float32(scaling)
            np.add(weight[part], delta, out=merged[part])
            if magnitude is not None:
                merged[part] *= _row_factors(merged[part], magnitude[part])
        _refuse_nonfinite(merged[part], start)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(work, range(0, len(weight), step)))
    return merged


def scaled(weight: Float32, output_factor: Float32 | None, input_factor: Float32 | None) -> Float32:
    """output_factor [out_features] ⊙ weight ⊙ input_factor [in_features] ((IA)³), a new float32.

    ValueError: factors that do not fit, a result that is not finite.
    """
    result = weight
    with np.errstate(over="ignore", invalid="ignore"):
        for factor, shape in ((output_factor, (-1, 1)), (input_factor, (1, -1))):
            if factor is not None:
                result = result * factor.reshape(shape)
    if result.shape != weight.shape:
        raise ValueError(f"weight {list(weight.shape)} and its factors do not fit")
    _refuse_nonfinite(result, 0)
    return result


def row_factors(
    weight: Float32, lora_a: Factor, lora_b: Factor, scaling: float, magnitude: Factor
) -> Float32:
    """magnitude / ‖row of weight + scaling·(lora_b @ lora_a)‖, [out_features].

    DoRA's result is these factors times that sum. ValueError: as merge, or a row of zeros.
    """
    factors = _row_factors(merge(weight, lora_a, lora_b, scaling), magnitude)
    _refuse_nonfinite(factors, 0)
    return factors[:, 0]


def block_deltas(lora_a: Factor, lora_b: Factor, scaling: float, block_size: int) -> Float32:
    """scaling·(lora_b @ lora_a) of the first input of each block, [out_features, blocks].

    ValueError: a result that is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        firsts = lora_a[:, ::block_size].astype(np.float32)
        delta = _product(lora_b.astype(np.float32), firsts) * np.float32(scaling)
    _refuse_nonfinite(delta, 0)
    return delta


def _product(lora_b: Float32, lora_a: Float32) -> Float32:
    """lora_b @ lora_a, each element summed in the order of the ranks."""
    delta = np.zeros((lora_b.shape[0], lora_a.shape[1]), np.float32)
    product = np.empty_like(delta)
    for column, row in zip(lora_b.T, lora_a, strict=True):
        np.multiply(column[:, None], row, out=product)
        delta += product
    return delta


def _row_factors(rows: Float32, magnitude: Factor) -> Float32:
    """[rows, 1]; not finite for a row of zeros."""
    norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # refused by the caller
        factors: Float32 = (magnitude / norms).astype(np.float32)
    return factors[:, None]


def _check(weight: Float32, lora_a: Factor, lora_b: Factor, magnitude: Factor | None) -> None:
    shapes = [list(array.shape) for array in (weight, lora_a, lora_b)]
    if weight.dtype != np.float32 or not {lora_a.dtype.name, lora_b.dtype.name} <= FACTORS:
        raise ValueError("weight must be float32, lora_a and lora_b float32 or float16")
    fits = [len(shape) for shape in shapes] == [2, 2, 2] and (
        weight.shape == (lora_b.shape[0], lora_a.shape[1]) and lora_a.shape[0] == lora_b.shape[1]
    )
    if not fits or not weight.size:
        raise ValueError("weight {}, lora_a {}, lora_b {} do not fit".format(*shapes))
    if magnitude is not None and magnitude.shape != weight.shape[:1]:
        raise ValueError(f"weight {shapes[0]}, magnitude {list(magnitude.shape)} do not fit")


def _refuse_nonfinite(rows: Float32, first_row: int) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise ValueError(f"row {row}: the merged weight is not finite")
