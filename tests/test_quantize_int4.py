"""int4: references are the formulas of ARCHITECTURE.md written out here, in float64 where exact."""

import os

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from edgelora.quantize import Int4Matrix, dequantize, quantize_int4

SHAPES = [(1, 1), (7, 31), (16, 32), (37, 100), (64, 256)]
BLOCK_SIZES = [32, 64, 128]


def random_weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of different magnitude, from 1e-3 to 1e3."""
    rng = np.random.default_rng([rows, columns, seed])
    magnitudes = 10.0 ** rng.uniform(-3, 3, (rows, 1))
    return (rng.standard_normal((rows, columns)) * magnitudes).astype(np.float32)


def per_weight(per_block: np.ndarray, matrix: Int4Matrix) -> np.ndarray:
    """[rows, blocks] → float64 [rows, columns] by index."""
    columns = matrix.codes.shape[1]
    return per_block.astype(np.float64)[:, np.arange(columns) // matrix.block_size]


@pytest.mark.parametrize("zero", ["none", "points", "offsets"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_int4_is_the_formula(shape: tuple[int, int], block_size: int, zero: str) -> None:
    rng = np.random.default_rng([*shape, block_size])
    rows, columns = shape
    grid = (rows, -(-columns // block_size))
    matrix = Int4Matrix(
        codes=rng.integers(0, 16, shape, np.uint8),
        scales=rng.standard_normal(grid).astype(np.float16),
        block_size=block_size,
        zero_points=rng.integers(0, 16, grid, np.uint8) if zero == "points" else None,
        offsets=rng.standard_normal(grid).astype(np.float16) if zero == "offsets" else None,
    )
    weights = dequantize(matrix)
    assert weights.dtype == np.float32 and weights.shape == shape
    for row, column in np.ndindex(rows, columns):
        block = column // block_size
        code, scale = int(matrix.codes[row, column]), np.float32(matrix.scales[row, block])
        if zero == "offsets":
            expected = scale * np.float32(code) + np.float32(matrix.offsets[row, block])
        else:
            zero_code = 8 if matrix.zero_points is None else int(matrix.zero_points[row, block])
            expected = scale * np.float32(code - zero_code)
        assert weights[row, column] == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_scale_and_codes_are_the_formula(
    shape: tuple[int, int], block_size: int, seed: int
) -> None:
    weights = random_weights(*shape, seed)
    matrix = quantize_int4(weights, block_size)
    assert matrix.zero_points is None and matrix.offsets is None
    for row in range(shape[0]):
        for block in range(-(-shape[1] // block_size)):
            span = slice(block * block_size, (block + 1) * block_size)
            values = weights[row, span]
            extreme = max(values.tolist(), key=abs)
            scale = np.float16(np.float32(extreme) / np.float32(-8))
            assert matrix.scales[row, block] == scale
            steps = values.astype(np.float64) / np.float64(scale)
            codes = matrix.codes[row, span].astype(int)
            nearest = np.clip(steps, -8, 7) + 8  # the distance to the nearest code is at most 1/2
            assert np.abs(codes - nearest).max() <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_error_is_half_a_step_inside_the_range(
    shape: tuple[int, int], block_size: int, seed: int
) -> None:
    weights = random_weights(*shape, seed)
    matrix = quantize_int4(weights, block_size)
    error = np.abs(dequantize(matrix).astype(np.float64) - weights)
    steps = per_weight(matrix.scales, matrix)
    beyond = np.maximum(weights / steps - 7, 0)  # code 8 + 8 does not exist: clipped to 15
    outside = np.maximum(-8 - weights / steps, 0)  # the scale was rounded down
    bound = np.abs(steps) * np.where(beyond + outside > 0.5, beyond + outside, 0.5)
    assert (error <= bound * (1 + 1e-6)).all()
    assert (error <= np.abs(steps) * (1 + 0.008)).all()  # 8·2^-11 of a step for the rounding


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_points_error_is_half_a_step_and_zero_is_exact(
    shape: tuple[int, int], block_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = random_weights(*shape, seed) + rng.normal(0, 3, (shape[0], 1)).astype(np.float32)
    weights[rng.random(shape) < 0.1] = 0
    matrix = quantize_int4(weights, block_size, zero_points=True)
    assert matrix.zero_points is not None and matrix.zero_points.max() <= 15
    for row, block in np.ndindex(*matrix.scales.shape):
        values = weights[row, block * block_size : (block + 1) * block_size]
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        assert matrix.scales[row, block] == np.float16((high - low) / np.float32(15))
    restored = dequantize(matrix).astype(np.float64)
    # half a step of the weight, half of the zero point, 15·2^-11 for the scale's rounding
    assert (np.abs(restored - weights) <= per_weight(matrix.scales, matrix) * 1.008).all()
    assert (restored[weights == 0] == 0).all()


def test_all_16_codes_are_used_and_the_largest_weight_is_code_0() -> None:
    weights = random_weights(64, 4096)
    matrix = quantize_int4(weights, 32)
    assert set(np.unique(matrix.codes)) == set(range(16))
    blocks = weights.reshape(64, -1, 32)
    largest = np.abs(blocks).argmax(axis=-1)[..., None]
    codes = np.take_along_axis(matrix.codes.reshape(blocks.shape), largest, axis=-1)
    assert not codes.any()


@pytest.mark.parametrize("seed", range(3))
def test_scales_equal_q4_0_and_codes_are_nearer(seed: int) -> None:
    weights = random_weights(64, 512, seed)
    scales, codes = q4_0(weights)
    matrix = quantize_int4(weights, 32)
    np.testing.assert_array_equal(matrix.scales.view(np.uint16), scales.view(np.uint16))
    # Q4_0 rounds for the scale before its rounding to float16: codes differ only next to a tie.
    different = matrix.codes != codes
    assert different.mean() < 2e-3
    assert np.abs(matrix.codes.astype(int) - codes).max() <= 1
    ours = np.abs(dequantize(matrix) - weights)
    theirs = np.abs(dequantize(Int4Matrix(codes, scales, 32)) - weights)
    assert (ours[different] <= theirs[different]).all()


def q4_0(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales float16 [rows, blocks], codes uint8 [rows, columns]) of gguf's own quantizer."""
    packed = quants.quantize(weights, GGMLQuantizationType.Q4_0).reshape(len(weights), -1, 18)
    scales = np.ascontiguousarray(packed[..., :2]).view(np.float16)[..., 0]
    nibbles = packed[..., 2:]  # byte j: code j low, code 16+j high
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return scales, codes.reshape(weights.shape)


@pytest.mark.parametrize("zero_points", [False, True])
def test_equal_codes_as_q4_0_when_float16_holds_the_scale(*, zero_points: bool) -> None:
    rng = np.random.default_rng(1)
    scales = rng.choice([0.5, -0.25, 2.0], (8, 4, 1))
    weights = (rng.integers(-8, 8, (8, 4, 32)) * scales).astype(np.float32)
    weights[..., 0], weights[..., 1] = -8 * scales[..., 0], 7 * scales[..., 0]
    weights = weights.reshape(8, 128)
    matrix = quantize_int4(weights, 32, zero_points=zero_points)
    np.testing.assert_array_equal(dequantize(matrix), weights)
    if not zero_points:
        np.testing.assert_array_equal(matrix.codes, q4_0(weights)[1])


def test_quantizing_what_was_dequantized_gives_the_same_matrix() -> None:
    first = quantize_int4(random_weights(37, 100), 32)
    second = quantize_int4(dequantize(first), 32)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)


def test_of_two_equal_magnitudes_the_first_decides_the_sign() -> None:
    weights = np.zeros((2, 32), np.float32)
    weights[0, [3, 9]] = 8, -8
    weights[1, [3, 9]] = -8, 8
    matrix = quantize_int4(weights, 32)
    assert matrix.scales.tolist() == [[-1], [1]]
    np.testing.assert_array_equal(matrix.codes, q4_0(weights)[1])


@pytest.mark.parametrize("zero_points", [False, True])
def test_a_block_of_zeros_is_exactly_zero(*, zero_points: bool) -> None:
    weights = random_weights(4, 96)
    weights[1, 32:64] = 0
    weights[2] = -0.0
    matrix = quantize_int4(weights, 32, zero_points=zero_points)
    zeros = matrix.scales[[1, 2, 2, 2], [1, 0, 1, 2]]
    assert (zeros.view(np.uint16) == 0).all()  # +0
    restored = dequantize(matrix)
    assert not restored[1, 32:64].any() and not restored[2].any()
    assert zero_points or (matrix.codes[2] == 8).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(value: float) -> None:
    weights = random_weights(700, 1000)  # several pieces
    weights[690, 77] = value
    with pytest.raises(ValueError, match="row 690, column 77"):
        quantize_int4(weights, 32)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("value", [1e7, -3e38])
def test_a_scale_too_large_for_float16_is_refused(value: float, *, zero_points: bool) -> None:
    weights = random_weights(40, 100)
    weights[33, 70] = value
    with pytest.raises(ValueError, match=r"row 33, block 2: scale .* exceeds float16's largest"):
        quantize_int4(weights, 32, zero_points=zero_points)


def test_the_largest_scale_of_float16_is_taken() -> None:
    weights = np.full((1, 32), 65504 * 8, np.float32)
    np.testing.assert_array_equal(dequantize(quantize_int4(weights, 32)), weights)


def test_a_subnormal_scale_costs_half_its_unit() -> None:
    rng = np.random.default_rng(0)
    magnitudes = 2.0 ** rng.uniform(-23, -14, (500, 1))  # scales from 2^-26·8 … : subnormal
    weights = (rng.uniform(-8, 8, (500, 32)) * magnitudes).astype(np.float32)
    weights[:, 0] = -8 * magnitudes[:, 0]
    matrix = quantize_int4(weights, 32)
    error = np.abs(dequantize(matrix).astype(np.float64) - weights)
    assert (error <= np.abs(per_weight(matrix.scales, matrix)) + 8 * 2.0**-25).all()


def test_a_matrix_below_float16_is_refused_with_row_and_block() -> None:
    weights = np.full((4, 64), 1e-4, np.float32)
    weights[2, 40] = 1e-4
    weights[2, 32:] = 1e-9
    with pytest.raises(ValueError, match=r"row 2, block 1: scale 1.25e-10 underflows float16"):
        quantize_int4(weights, 32)


def test_a_vanishing_block_beside_normal_ones_becomes_zero() -> None:
    weights = random_weights(4, 64)
    weights[2] = 1e-20
    assert not dequantize(quantize_int4(weights, 32))[2].any()


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(1500, 1056)
    expected = quantize_int4(weights, 64, zero_points=True)
    for threads in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        matrix = quantize_int4(weights, 64, zero_points=True)
        np.testing.assert_array_equal(matrix.codes, expected.codes)
        np.testing.assert_array_equal(matrix.scales, expected.scales)
        np.testing.assert_array_equal(matrix.zero_points, expected.zero_points)


def test_the_weights_stay_as_they_are_and_need_not_be_contiguous() -> None:
    weights = random_weights(64, 96)
    turned = np.asfortranarray(weights)
    before = weights.copy()
    matrix = quantize_int4(weights, 32)
    np.testing.assert_array_equal(weights, before)
    np.testing.assert_array_equal(quantize_int4(turned, 32).codes, matrix.codes)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be 32, 64 or 128, not 16"):
        quantize_int4(random_weights(2, 32), 16)
    with pytest.raises(ValueError, match="weights must be float32"):
        quantize_int4(random_weights(2, 32).astype(np.float64), 32)
    with pytest.raises(ValueError, match="weights must be float32"):
        quantize_int4(np.zeros((2, 0), np.float32), 32)
