"""merge: against float64, and the same bytes whatever BLAS does with threads."""

import os
import subprocess
import sys

import numpy as np
import pytest

from edgelora.merge import merge

THREADED = """
import hashlib, numpy as np
from edgelora.merge import merge
rng = np.random.default_rng(0)
for rows, columns, rank in ((1536, 576, 8), (3000, 2048, 64), (1000, 1111, 3)):
    shapes = (rows, columns), (rank, columns), (rows, rank)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    print(hashlib.sha256(merge(*arrays, 1.7).tobytes()).hexdigest())
"""


def factors(rows: int, columns: int, rank: int) -> list[np.ndarray]:
    rng = np.random.default_rng([rows, columns, rank])
    shapes = (rows, columns), (rank, columns), (rows, rank)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (513, 96, 8), (1200, 64, 64)])
def test_merge_is_the_formula(shape: tuple[int, int, int]) -> None:
    weight, lora_a, lora_b = factors(*shape)
    merged = merge(weight, lora_a, lora_b, 0.75)
    assert merged.dtype == np.float32
    wide = [array.astype(np.float64) for array in (weight, lora_a, lora_b)]
    expected = wide[0] + 0.75 * (wide[2] @ wide[1])
    # Each of `rank` products, the sum, the factor and the last addition round once.
    bound = (
        (shape[2] + 3) * 2.0**-24 * (np.abs(wide[0]) + 0.75 * (np.abs(wide[2]) @ np.abs(wide[1])))
    )
    assert (np.abs(merged - expected) <= bound).all()


def test_merge_sums_in_the_order_of_the_ranks() -> None:
    weight, lora_a, lora_b = factors(9, 33, 6)
    merged = merge(weight, lora_a, lora_b, 0.3)
    for row, column in np.ndindex(9, 33):
        total = np.float32(0)
        for rank in range(6):
            total += lora_b[row, rank] * lora_a[rank, column]
        assert merged[row, column] == weight[row, column] + np.float32(0.3) * total


def test_factors_in_float16_are_widened() -> None:
    weight, lora_a, lora_b = factors(9, 33, 6)
    half_a, half_b = lora_a.astype(np.float16), lora_b.astype(np.float16)
    expected = merge(weight, half_a.astype(np.float32), half_b.astype(np.float32), 0.5)
    np.testing.assert_array_equal(merge(weight, half_a, half_b, 0.5), expected)


def test_merge_of_nothing_changes_nothing() -> None:
    weight, lora_a, lora_b = factors(40, 30, 4)
    before = weight.copy()
    np.testing.assert_array_equal(merge(weight, lora_a, np.zeros_like(lora_b), 2.0), weight)
    np.testing.assert_array_equal(merge(weight, lora_a, lora_b, 0.0), weight)
    merge(weight, lora_a, lora_b, 1.0)
    np.testing.assert_array_equal(weight, before)


def test_merge_does_not_depend_on_the_layout_of_its_inputs() -> None:
    weight, lora_a, lora_b = factors(600, 100, 16)
    expected = merge(weight, lora_a, lora_b, 1.5)
    turned = [np.asfortranarray(array) for array in (weight, lora_a, lora_b)]
    np.testing.assert_array_equal(merge(*turned, 1.5), expected)


def test_merge_gives_the_same_bytes_for_any_number_of_blas_threads() -> None:
    # lora_b @ lora_a by numpy's OpenBLAS fails this.
    digests = {run_with_blas_threads(threads) for threads in ("1", "2", "4")}
    assert len(digests) == 1


def run_with_blas_threads(threads: str) -> str:
    env = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-c", THREADED]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert len(done.stdout.split()) == 3
    return done.stdout


def test_factors_that_do_not_fit_are_refused() -> None:
    weight, lora_a, lora_b = factors(16, 8, 4)
    with pytest.raises(ValueError, match=r"weight \[16, 8\], lora_a \[4, 7\]"):
        merge(weight, lora_a[:, :7], lora_b, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        merge(weight, lora_a, lora_b[:, :3], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        merge(weight, lora_a, lora_b[:1], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        merge(weight[0], lora_a, lora_b, 1.0)
    with pytest.raises(ValueError, match="must be float32"):
        merge(weight, lora_a.astype(np.float64), lora_b, 1.0)


def test_a_merged_weight_that_is_not_finite_is_refused_with_its_row() -> None:
    weight, lora_a, lora_b = factors(600, 8, 4)
    lora_b[555] = 3e38
    lora_a[:] = 3e38
    lora_b[:555] = 0
    lora_b[556:] = 0
    with pytest.raises(ValueError, match="row 555: the merged weight is not finite"):
        merge(weight, lora_a, lora_b, 1.0)


def test_a_magnitude_gives_each_row_its_length() -> None:
    weight, lora_a, lora_b = factors(700, 64, 4)
    magnitude = np.linspace(-2, 3, 700).astype(np.float16)
    merged = merge(weight, lora_a, lora_b, 0.5, magnitude)
    plain = merge(weight, lora_a, lora_b, 0.5).astype(np.float64)
    expected = magnitude[:, None] * plain / np.linalg.norm(plain, axis=1, keepdims=True)
    assert (np.abs(merged - expected) <= 2.0**-22 * np.abs(expected)).all()


def test_a_magnitude_that_does_not_fit_or_has_no_row_to_scale_is_refused() -> None:
    weight, lora_a, lora_b = factors(16, 8, 4)
    with pytest.raises(ValueError, match=r"weight \[16, 8\], magnitude \[15\] do not fit"):
        merge(weight, lora_a, lora_b, 1.0, np.ones(15, np.float32))
    weight[3] = lora_b[3] = 0
    with pytest.raises(ValueError, match="row 3: the merged weight is not finite"):
        merge(weight, lora_a, lora_b, 1.0, np.ones(16, np.float32))
