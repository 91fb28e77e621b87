"""int8: references are the formulas of ARCHITECTURE.md written out here."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from edgelora.quantize import Int8Matrix, dequantize, quantize_int8

SHAPES = [(1, 1), (7, 31), (16, 32), (37, 100), (64, 256)]
BLOCK_SIZES = [32, 64, 128]


def random_weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([rows, columns, seed])
    magnitudes = 10.0 ** rng.uniform(-3, 3, (rows, 1))
    return (rng.standard_normal((rows, columns)) * magnitudes).astype(np.float32)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_int8_is_the_formula(shape: tuple[int, int], block_size: int) -> None:
    rng = np.random.default_rng([*shape, block_size])
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    scales = rng.standard_normal((shape[0], -(-shape[1] // block_size))).astype(np.float16)
    weights = dequantize(Int8Matrix(codes, scales, block_size))
    assert weights.dtype == np.float32
    for row, column in np.ndindex(*shape):
        scale = np.float32(scales[row, column // block_size])
        assert weights[row, column] == scale * np.float32(codes[row, column])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_the_formula_and_codes_the_nearest(
    shape: tuple[int, int], block_size: int, seed: int
) -> None:
    weights = random_weights(*shape, seed)
    matrix = quantize_int8(weights, block_size)
    assert matrix.codes.min() >= -127
    error = np.abs(dequantize(matrix).astype(np.float64) - weights)
    for row, block in np.ndindex(*matrix.scales.shape):
        span = slice(block * block_size, (block + 1) * block_size)
        largest = np.abs(weights[row, span]).max()
        assert matrix.scales[row, block] == np.float16(largest / np.float32(127))
        # Half a step, or 127·2^-11 = 0.06 of a step where the scale was rounded down.
        assert error[row, span].max() <= float(matrix.scales[row, block]) * 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_scales_equal_q8_0_and_codes_are_nearer(seed: int) -> None:
    weights = random_weights(64, 512, seed)
    packed = quants.quantize(weights, GGMLQuantizationType.Q8_0).reshape(64, -1, 34)
    scales = np.ascontiguousarray(packed[..., :2]).view(np.float16)[..., 0]
    codes = packed[..., 2:].view(np.int8).reshape(weights.shape)
    matrix = quantize_int8(weights, 32)
    np.testing.assert_array_equal(matrix.scales.view(np.uint16), scales.view(np.uint16))
    # Q8_0 rounds for the scale before its rounding to float16: up to 127·2^-12 of a step apart.
    different = matrix.codes != codes
    assert different.mean() < 0.03
    assert np.abs(matrix.codes.astype(int) - codes).max() <= 1
    ours = np.abs(dequantize(matrix) - weights)
    theirs = np.abs(dequantize(Int8Matrix(codes, scales, 32)) - weights)
    assert (ours[different] <= theirs[different]).all()


def test_quantizing_what_was_dequantized_changes_nothing() -> None:
    first = dequantize(quantize_int8(random_weights(37, 100), 32))
    np.testing.assert_array_equal(dequantize(quantize_int8(first, 32)), first)


def test_a_block_of_zeros_is_exactly_zero() -> None:
    weights = random_weights(3, 96)
    weights[1, 64:] = 0
    matrix = quantize_int8(weights, 64)
    assert matrix.scales[1, 1] == 0 and not matrix.codes[1, 64:].any()
    assert not dequantize(matrix)[1, 64:].any()


def test_bad_weights_are_refused_with_their_place() -> None:
    weights = random_weights(5, 96)
    weights[3, 40] = np.nan
    with pytest.raises(ValueError, match="row 3, column 40: weight is nan"):
        quantize_int8(weights, 32)
    weights[3, 40] = 1e8
    with pytest.raises(ValueError, match="row 3, block 1: scale 787402 exceeds"):
        quantize_int8(weights, 32)
    with pytest.raises(ValueError, match=r"row 0, block 0: scale .* underflows"):
        quantize_int8(np.full((2, 32), 1e-7, np.float32), 32)
    with pytest.raises(ValueError, match="block_size"):
        quantize_int8(weights, 256)
