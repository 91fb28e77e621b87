"""NF4: bit for bit what bitsandbytes writes and reads on a CPU."""

import numpy as np
import pytest
import torch
from bitsandbytes import functional

import oracle
from edgelora.quantize import NF4_VALUES, Nf4Matrix, dequantize, pack, quantize_nf4
from edgelora.quantize.nf4 import THRESHOLDS, double_quantize, dynamic_map

SHAPES = [(1, 32), (3, 50), (37, 33), (16, 64), (300, 96), (129, 640), (1100, 1024)]


def random_weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([rows, columns, seed])
    magnitudes = 10.0 ** rng.uniform(-2, 1, (rows, 1))
    return (rng.standard_normal((rows, columns)) * magnitudes).astype(np.float32)


def bitsandbytes_nf4(weights: np.ndarray) -> tuple[torch.Tensor, functional.QuantState]:
    return functional.quantize_4bit(
        torch.from_numpy(weights), blocksize=64, compress_statistics=True, quant_type="nf4"
    )


def as_matrix(packed: torch.Tensor, state: functional.QuantState) -> Nf4Matrix:
    """bitsandbytes' bytes, high nibble first, as a matrix."""
    both = packed.numpy().reshape(-1)
    codes = np.stack([both >> 4, both & 15], axis=1).reshape(-1)
    return Nf4Matrix(
        codes[: state.shape.numel()].reshape(state.shape),
        state.absmax.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
        state.state2.code.numpy(),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_bitsandbytes_bit_for_bit(shape: tuple[int, int]) -> None:
    packed, state = bitsandbytes_nf4(random_weights(*shape))
    expected = oracle.dequantize_4bit(packed, state).numpy()
    weights = dequantize(as_matrix(packed, state))
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.view(np.uint32), expected.view(np.uint32))


def test_dequantize_nf4_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    shape = (700, 33)  # blocks cross rows, the last is partial, two groups
    blocks = -(-700 * 33 // 64)
    matrix = Nf4Matrix(
        codes=rng.integers(0, 16, shape, np.uint8),
        absmax_codes=rng.integers(0, 256, blocks).astype(np.uint8),
        nested_absmax=rng.random(-(-blocks // 256), np.float32),
        absmax_offset=np.float32(0.7),
        absmax_table=np.sort(rng.random(256, np.float32)),
    )
    weights = dequantize(matrix).reshape(-1)
    for index in rng.integers(0, weights.size, 500):
        block = index // 64
        product = (
            matrix.absmax_table[matrix.absmax_codes[block]] * matrix.nested_absmax[block // 256]
        )
        absmax = np.float32(product + matrix.absmax_offset)
        assert weights[index] == NF4_VALUES[matrix.codes.flat[index]] * absmax


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_equals_bitsandbytes_code_for_code(shape: tuple[int, int], seed: int) -> None:
    weights = random_weights(*shape, seed)
    theirs = as_matrix(*bitsandbytes_nf4(weights))
    ours = quantize_nf4(weights)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.absmax_table, theirs.absmax_table)
    # torch's float32 mean is off by a unit or two, depending on its number of threads; that moves
    # nested_absmax as much, and now and then an absmax beside a border into the next code.
    unit = np.spacing(max(theirs.absmax_offset, theirs.nested_absmax.max()))
    assert abs(ours.absmax_offset - theirs.absmax_offset) <= 2 * unit
    assert (np.abs(ours.nested_absmax - theirs.nested_absmax) <= 4 * unit).all()
    assert (ours.absmax_codes != theirs.absmax_codes).mean() < 2e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_is_exact_with_the_same_offset(shape: tuple[int, int]) -> None:
    weights = random_weights(*shape, seed=9)
    _, single = functional.quantize_4bit(
        torch.from_numpy(weights), blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    theirs = as_matrix(*bitsandbytes_nf4(weights))
    codes, nested = double_quantize(single.absmax.numpy(), theirs.absmax_offset)
    np.testing.assert_array_equal(codes, theirs.absmax_codes)
    np.testing.assert_array_equal(nested.view(np.uint32), theirs.nested_absmax.view(np.uint32))


def test_every_absmax_code_is_the_one_of_bitsandbytes() -> None:
    values = np.linspace(-1, 1, 1 << 20).astype(np.float32).reshape(-1, 256)
    values[:, 0] = 1  # every group's nested absmax
    flat = values.reshape(-1)
    expected, _ = functional.quantize_blockwise(torch.from_numpy(flat), blocksize=256)
    codes, nested = double_quantize(flat, np.float32(0))
    assert (nested == 1).all()
    np.testing.assert_array_equal(codes, expected.numpy())


def test_dynamic_map_equals_bitsandbytes_bit_for_bit() -> None:
    expected = functional.create_dynamic_map().numpy()
    np.testing.assert_array_equal(dynamic_map().view(np.uint32), expected.view(np.uint32))


def test_nf4_values_equal_bitsandbytes() -> None:
    expected = functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(NF4_VALUES, expected)


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((4, 64), np.float32),
        np.zeros((3, 50), np.float32),
        np.full((4, 64), 1e-39, np.float32),
        np.full((3, 50), 1e-39, np.float32),
        np.full((300, 64), -1.5, np.float32),
        np.eye(300, 64, dtype=np.float32),
    ],
)
def test_degenerate_blocks_equal_bitsandbytes(weights: np.ndarray) -> None:
    theirs, ours = as_matrix(*bitsandbytes_nf4(weights)), quantize_nf4(weights)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_array_equal(ours.absmax_codes, theirs.absmax_codes)
    np.testing.assert_allclose(dequantize(ours), dequantize(theirs), rtol=1e-6, atol=1e-38)


def test_ties_go_where_bitsandbytes_puts_them() -> None:
    rows = np.zeros((3, 64), np.float32)
    rows[:, :15] = THRESHOLDS
    rows[1] = np.nextafter(rows[1], np.float32(2))
    rows[2] = np.nextafter(rows[2], np.float32(-2))
    rows[:, 15] = 1
    codes = quantize_nf4(rows).codes
    np.testing.assert_array_equal(codes, as_matrix(*bitsandbytes_nf4(rows)).codes)
    assert codes[0, :15].tolist() == list(range(15))


def test_a_weight_that_is_not_finite_is_refused_with_its_place() -> None:
    weights = random_weights(900, 700)
    weights[811, 13] = np.nan
    with pytest.raises(ValueError, match="row 811, column 13: weight is nan"):
        quantize_nf4(weights)
    with pytest.raises(ValueError, match="weights must be float32"):
        quantize_nf4(weights.astype(np.float16))


def test_a_packed_weight_takes_4_127_bits() -> None:
    """4, an eighth for absmax codes, 1/512 for their absmax; the table is 1 KB for a matrix."""
    rng = np.random.default_rng(0)
    packed = pack(quantize_nf4(rng.standard_normal((1024, 512)).astype(np.float32)))
    table = 4 * 256 + 4
    stored = sum(values.nbytes for values in packed.arrays.values()) - table
    assert 8 * stored / (1024 * 512) == 4 + 8 / 64 + 32 / (64 * 256)
