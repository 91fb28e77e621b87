"""Packing against the index formulas of ARCHITECTURE.md, element by element, and back."""

from dataclasses import replace

import numpy as np
import pytest

from edgelora.quantize import (
    FloatMatrix,
    Int4Matrix,
    Int8Matrix,
    Matrix,
    Nf4Matrix,
    PlainNf4Matrix,
    concatenate,
    dequantize,
    pack,
    same_kind,
    unpack,
)

SHAPES = [(1, 1), (16, 32), (17, 33), (37, 100), (48, 64), (5, 130), (31, 257)]
NF4_SHAPES = [(1, 32), (16, 32), (37, 96), (48, 64), (300, 96)]


def random_int4(rows: int, columns: int, block_size: int, *, zero: str = "none") -> Int4Matrix:
    rng = np.random.default_rng([rows, columns, block_size])
    grid = (rows, -(-columns // block_size))
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    scales = rng.standard_normal(grid).astype(np.float16)
    zero_points = rng.integers(0, 16, grid, np.uint8) if zero == "points" else None
    moved = np.float32 if zero == "float32 offsets" else np.float16
    offsets = rng.standard_normal(grid).astype(moved) if zero.endswith("offsets") else None
    return Int4Matrix(codes, scales, block_size, zero_points, offsets)


def random_int8(rows: int, columns: int, block_size: int) -> Int8Matrix:
    rng = np.random.default_rng([rows, columns, block_size])
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = rng.standard_normal((rows, -(-columns // block_size))).astype(np.float16)
    return Int8Matrix(codes, scales, block_size)


def random_plain_nf4(rows: int, columns: int) -> PlainNf4Matrix:
    nf4 = random_nf4(rows, columns)
    absmax = np.linspace(0.1, 1, len(nf4.absmax_codes), dtype=np.float32)
    return PlainNf4Matrix(nf4.codes, absmax, "bfloat16", "fp4")


def random_nf4(rows: int, columns: int, seed: int = 0) -> Nf4Matrix:
    rng = np.random.default_rng([rows, columns, seed])
    blocks = -(-rows * columns // 64)
    return Nf4Matrix(
        codes=rng.integers(0, 16, (rows, columns), np.uint8),
        absmax_codes=rng.integers(1, 256, blocks).astype(np.uint8),
        nested_absmax=rng.random(-(-blocks // 256), np.float32),
        absmax_offset=np.float32(rng.random()),
        absmax_table=np.linspace(-1, 1, 256, dtype=np.float32),
    )


def random_float(rows: int, columns: int) -> FloatMatrix:
    rng = np.random.default_rng([rows, columns])
    return FloatMatrix(rng.standard_normal((rows, columns), np.float32))


def code_at(codes: np.ndarray, row: int, column: int) -> int:
    """The documented padding: rows and columns beyond the matrix hold code 0."""
    inside = row < codes.shape[0] and column < codes.shape[1]
    return int(codes[row, column]) if inside else 0


def assert_nibbles(packed: np.ndarray, codes: np.ndarray) -> None:
    panels, steps = -(-codes.shape[0] // 16), -(-codes.shape[1] // 32) * 4
    assert packed.dtype == np.uint8 and packed.shape == (panels, steps, 64)
    for p, q, r, j in np.ndindex(panels, steps, 16, 4):
        low = code_at(codes, 16 * p + r, 8 * q + j)
        high = code_at(codes, 16 * p + r, 8 * q + 4 + j)
        assert packed[p, q, 4 * r + j] == low | high << 4


def assert_per_block(packed: np.ndarray, rows: np.ndarray) -> None:
    panels, blocks = -(-rows.shape[0] // 16), rows.shape[1]
    assert packed.dtype == rows.dtype and packed.shape == (panels, blocks, 16)
    for p, b, r in np.ndindex(panels, blocks, 16):
        expected = rows[16 * p + r, b] if 16 * p + r < len(rows) else 0
        assert packed[p, b, r] == expected


def assert_same(first: Matrix, second: Matrix) -> None:
    assert type(first) is type(second)
    for name, value in vars(first).items():
        other = vars(second)[name]
        assert (value is None) == (other is None), name
        if value is not None:
            assert np.asarray(value).dtype == np.asarray(other).dtype, name
            np.testing.assert_array_equal(value, other, err_msg=name)


@pytest.mark.parametrize("zero", ["none", "points", "offsets", "float32 offsets"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_layout_follows_the_index_formula(
    shape: tuple[int, int], block_size: int, zero: str
) -> None:
    matrix = random_int4(*shape, block_size, zero=zero)
    packed = pack(matrix)
    assert (packed.format, packed.block_size) == ("int4", block_size)
    assert (packed.out_features, packed.in_features) == shape
    assert_nibbles(packed.codes, matrix.codes)
    assert_per_block(packed.scales, matrix.scales)
    assert (packed.zero_points is None) == (zero != "points")
    assert (packed.offsets is None) == (not zero.endswith("offsets"))
    if zero.endswith("offsets"):
        assert_per_block(packed.offsets, matrix.offsets)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_points_layout_follows_the_index_formula(shape: tuple[int, int]) -> None:
    matrix = random_int4(*shape, 32, zero="points")
    packed = pack(matrix).zero_points
    panels, blocks = -(-shape[0] // 16), -(-shape[1] // 32)
    assert packed.dtype == np.uint8 and packed.shape == (panels, blocks, 8)
    for p, b, i in np.ndindex(panels, blocks, 8):
        low = code_at(matrix.zero_points, 16 * p + i, b)
        high = code_at(matrix.zero_points, 16 * p + 8 + i, b)
        assert packed[p, b, i] == low | high << 4


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_layout_follows_the_index_formula(shape: tuple[int, int]) -> None:
    matrix = random_int8(*shape, 32)
    packed = pack(matrix)
    panels, steps = -(-shape[0] // 16), -(-shape[1] // 32) * 8
    assert packed.codes.dtype == np.int8 and packed.codes.shape == (panels, steps, 64)
    for p, q, r, j in np.ndindex(panels, steps, 16, 4):
        assert packed.codes[p, q, 4 * r + j] == code_at(matrix.codes, 16 * p + r, 4 * q + j)
    assert_per_block(packed.scales, matrix.scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_float_layout_does_not_pad_k(shape: tuple[int, int]) -> None:
    matrix = random_float(*shape)
    packed = pack(matrix)
    assert (packed.format, packed.block_size) == ("float", 0)
    assert_per_block(packed.codes, matrix.weights)  # [p, k, r] = W[16p+r, k]
    assert list(packed.arrays) == ["codes"]


@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_layout_keeps_the_statistics_and_pads_absmax(shape: tuple[int, int]) -> None:
    matrix = random_nf4(*shape)
    packed = pack(matrix)
    assert_nibbles(packed.codes, matrix.codes)
    blocks = len(matrix.absmax_codes)
    assert len(packed.absmax) == 256 * len(packed.nested_absmax)
    np.testing.assert_array_equal(packed.absmax[:blocks], matrix.absmax_codes)
    assert not packed.absmax[blocks:].any()
    np.testing.assert_array_equal(packed.nested_absmax, matrix.nested_absmax)
    np.testing.assert_array_equal(packed.absmax_offset, [matrix.absmax_offset])
    assert packed.absmax_offset.dtype == np.float32
    np.testing.assert_array_equal(packed.absmax_table, matrix.absmax_table)


def test_nf4_slices_start_their_groups_on_a_boundary() -> None:
    slices = [random_nf4(512, 96, 1), random_nf4(16, 96, 2), random_nf4(32, 96, 3)]
    packed = pack(concatenate(slices))
    assert packed.slices == (512, 16, 32)
    assert packed.absmax_offset.tolist() == [m.absmax_offset for m in slices]
    start = 0
    for matrix in slices:
        blocks, groups = len(matrix.absmax_codes), len(matrix.nested_absmax)
        codes = packed.absmax[256 * start : 256 * (start + groups)]
        np.testing.assert_array_equal(codes[:blocks], matrix.absmax_codes)
        assert not codes[blocks:].any()
        nested = packed.nested_absmax[start : start + groups]
        np.testing.assert_array_equal(nested, matrix.nested_absmax)
        start += groups
    assert len(packed.nested_absmax) == start and len(packed.absmax) == 256 * start


def test_slices_lie_in_the_panels_as_one_taller_matrix() -> None:
    slices = [random_int4(rows, 100, 64, zero="points") for rows in (32, 16, 48)]
    packed = pack(concatenate(slices))
    assert packed.slices == (32, 16, 48)
    tall = Int4Matrix(
        np.concatenate([m.codes for m in slices]),
        np.concatenate([m.scales for m in slices]),
        64,
        np.concatenate([m.zero_points for m in slices]),
    )
    assert_nibbles(packed.codes, tall.codes)
    assert_per_block(packed.scales, tall.scales)
    np.testing.assert_array_equal(packed.zero_points, pack(tall).zero_points)


@pytest.mark.parametrize(
    "matrices",
    [
        [random_int4(37, 100, 32)],
        [random_int4(37, 100, 64, zero="points")],
        [random_int4(16, 33, 128, zero="offsets"), random_int4(32, 33, 128, zero="offsets")],
        [random_int4(16, 33, 128, zero="float32 offsets")],
        [random_int8(17, 35, 32)],
        [random_int8(16, 64, 32), random_int8(48, 64, 32)],
        [random_nf4(37, 96)],
        [random_plain_nf4(37, 96)],
        [random_plain_nf4(512, 96), random_plain_nf4(16, 96)],
        [random_nf4(512, 96, 1), random_nf4(16, 96, 2)],
        [random_float(33, 7)],
        [random_float(16, 31), random_float(32, 31)],
    ],
)
def test_unpack_gives_back_what_was_packed(matrices: list[Matrix]) -> None:
    unpacked = unpack(pack(concatenate(matrices)))
    assert len(unpacked) == len(matrices)
    for before, after in zip(matrices, unpacked, strict=True):
        assert_same(before, after)
        np.testing.assert_array_equal(dequantize(before), dequantize(after))


def test_a_tall_matrix_survives_the_cut_into_pieces() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (1000, 2080), np.uint8)
    matrix = Int4Matrix(codes, rng.random((1000, 65)).astype(np.float16), 32)
    assert_same(matrix, unpack(pack(matrix))[0])
    assert_same(random_int8(999, 2079, 32), unpack(pack(random_int8(999, 2079, 32)))[0])


def test_arrays_are_named_after_the_inputs_of_linear() -> None:
    points, offsets = (
        random_int4(16, 32, 32, zero="points"),
        random_int4(16, 32, 32, zero="offsets"),
    )
    assert list(pack(random_int4(16, 32, 32)).arrays) == ["codes", "scales"]
    assert pack(points).arrays["zero_points"].dtype == np.uint8
    assert pack(offsets).arrays["zero_points"].dtype == np.float16
    nf4 = pack(random_nf4(16, 32))
    names = ["codes", "scales", "zero_points", "absmax_offset", "absmax_table"]
    assert list(nf4.arrays) == names
    assert nf4.arrays["scales"] is nf4.nested_absmax
    assert nf4.arrays["zero_points"] is nf4.absmax


def test_packing_reads_a_matrix_that_is_not_contiguous() -> None:
    matrix = random_int4(32, 64, 32)
    turned = Int4Matrix(np.asfortranarray(matrix.codes), np.asfortranarray(matrix.scales), 32)
    np.testing.assert_array_equal(pack(turned).codes, pack(matrix).codes)
    np.testing.assert_array_equal(pack(turned).scales, pack(matrix).scales)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (random_int4(48, 64, 32), True),
        (random_int4(16, 64, 64), False),
        (random_int4(16, 96, 32), False),
        (random_int4(16, 64, 32, zero="points"), False),
        (random_int4(16, 64, 32, zero="offsets"), False),
        (random_int4(16, 64, 32, zero="float32 offsets"), False),
        (random_int8(16, 64, 32), False),
        (random_nf4(16, 64), False),
        (random_float(16, 64), False),
    ],
)
def test_same_kind_compares_what_slices_must_share(other: Matrix, *, same: bool) -> None:
    first = random_int4(16, 64, 32)
    assert same_kind([first, other]) is same
    if not same:
        with pytest.raises(ValueError, match="must share"):
            concatenate([first, other])


def test_slices_beyond_the_first_need_whole_panels() -> None:
    with pytest.raises(ValueError, match=r"multiples of 16, not \[16, 20\]"):
        concatenate([random_int8(16, 64, 32), random_int8(20, 64, 32)])
    with pytest.raises(ValueError, match="must share"):
        concatenate([])


def test_a_code_above_15_is_refused_with_its_row() -> None:
    matrix = random_int4(40, 64, 32)
    matrix.codes[33, 7] = 16
    with pytest.raises(ValueError, match="row 33"):
        pack(matrix)
    points = random_int4(40, 64, 32, zero="points")
    assert points.zero_points is not None
    points.zero_points[3, 1] = 16
    with pytest.raises(ValueError, match="zero point 16"):
        pack(points)


def test_nf4_of_a_width_that_32_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32, not 33"):
        pack(random_nf4(16, 33))


def test_a_matrix_checks_its_arrays() -> None:
    good = random_int4(16, 64, 32, zero="points")
    with pytest.raises(ValueError, match=r"scales must be float16 \[16, 1\]"):
        Int4Matrix(good.codes, good.scales, 64)
    with pytest.raises(ValueError, match="block_size"):
        Int4Matrix(good.codes, good.scales, 16)
    with pytest.raises(ValueError, match="exclude"):
        Int4Matrix(good.codes, good.scales, 32, good.zero_points, good.scales)
    with pytest.raises(ValueError, match="codes must be int8"):
        Int8Matrix(good.codes, good.scales, 32)
    with pytest.raises(ValueError, match="not finite"):
        Int4Matrix(good.codes, np.full_like(good.scales, np.nan), 32)
    nf4 = random_nf4(16, 64)
    with pytest.raises(ValueError, match=r"absmax_codes must be uint8 \[16\]"):
        Nf4Matrix(
            nf4.codes, nf4.absmax_codes[1:], nf4.nested_absmax, nf4.absmax_offset, nf4.absmax_table
        )


def test_a_packed_linear_checks_its_arrays_against_the_layout() -> None:
    good = pack(random_int4(17, 100, 32, zero="points"))
    with pytest.raises(ValueError, match=r"codes must be uint8 \[2, 16, 64\]"):
        replace(good, codes=good.codes[:1])
    with pytest.raises(ValueError, match="int4 needs scales"):
        replace(good, scales=None)
    with pytest.raises(ValueError, match="int4 has no offsets"):
        replace(good, offsets=good.scales)
    with pytest.raises(ValueError, match=r"scales must be float16 \[2, 2, 16\]"):
        replace(good, block_size=64)
    with pytest.raises(ValueError, match="not 'int2'"):
        replace(good, format="int2")
    with pytest.raises(ValueError, match="multiples of 16"):
        replace(good, slices=(16, 1))
    nf4 = pack(random_nf4(300, 96))
    with pytest.raises(ValueError, match=r"absmax must be uint8 \[512\]"):
        replace(nf4, absmax=nf4.absmax[:450])
    with pytest.raises(ValueError, match="nf4 has no block_size 32"):
        replace(nf4, block_size=32)
