"""Second-order rounding against the textbook: at every step the inverse Hessian of what is left."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelora.quantize import compensate_int4, dequantize, factorize, quantize_int4
from edgelora.quantize.compensated import CANDIDATES, RANGES

DAMPING = 0.01
SHAPES = [(5, 64, 32), (3, 80, 32), (20, 100, 64), (2, 7, 32), (300, 128, 128), (17, 33, 32)]


def product(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(a @ b)


def case(rows: int, columns: int, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights float32 and the Hessian of correlated inputs, whose columns differ in size."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((rows, columns)).astype(np.float32)
    sizes = np.exp(generator.standard_normal(columns))
    inputs = generator.standard_normal((3 * columns, columns)) @ generator.standard_normal(
        (columns, columns)
    )
    inputs = inputs * sizes
    return weights, inputs.T @ inputs / len(inputs)


def damped(hessian: NDArray[Any]) -> NDArray[Any]:
    return hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))


@pytest.mark.parametrize(("columns", "block_size"), [(7, 32), (80, 32), (64, 64), (200, 128)])
def test_solve_inverts_the_damped_hessian(columns: int, block_size: int) -> None:
    wanted, hessian = case(11, columns)
    curvature = factorize(hessian, block_size, product)
    right = (damped(hessian) @ wanted.T.astype(np.float64)).astype(np.float32)
    found = curvature.solve(right, product)
    # float32 factors: what is off is off by their last places times the condition.
    condition = np.linalg.cond(damped(hessian))
    np.testing.assert_allclose(found, wanted.T, rtol=0, atol=2.0**-22 * condition)


def output_error(errors: NDArray[Any], hessian: NDArray[Any]) -> NDArray[Any]:
    """eᵀHe of each row, float64."""
    wide = errors.astype(np.float64)
    return np.einsum("ri,ij,rj->r", wide, damped(hessian), wide)


def order_of(hessian: NDArray[Any], block_size: int) -> list[list[int]]:
    """The columns of each block, the heaviest first."""
    diagonal = np.diag(hessian)
    size = len(diagonal)
    blocks = [list(range(at, min(at + block_size, size))) for at in range(0, size, block_size)]
    blocks.sort(key=lambda block: -sum(diagonal[c] for c in block))
    return [sorted(block, key=lambda c: -diagonal[c]) for block in blocks]


def grids(block: NDArray[Any], *, zero_points: bool) -> list[tuple[float, float]]:
    """(scale, zero) that may be chosen for the wanted values of one row's block."""
    if zero_points:
        low, high = min(block.min(), 0.0), max(block.max(), 0.0)
        scales = [float(np.float16((high - low) * f / 15)) for f in RANGES]
        zeros = [
            float(np.clip(np.rint(-low * f / s), 0, 15))
            for f, s in zip(RANGES, scales, strict=True)
        ]
        return list(zip(scales, zeros, strict=True))
    extreme = max(block, key=abs)
    return [(float(np.float16(extreme / -8 * f)), 8.0) for f in CANDIDATES]


def walk(
    row: NDArray[Any], columns: list[int], left: list[int], hessian: NDArray[Any],
    scale: float, zero: float,
) -> tuple[NDArray[Any], dict[int, int], float]:  # fmt: skip
    """Rounds `columns`, handing each error to all of `left`: the row, its codes, what it cost."""
    row, left, codes, loss = row.copy(), list(left), {}, 0.0
    for column in columns:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        at = left.index(column)
        codes[column] = int(np.clip(np.rint(row[column] / scale + zero), 0, 15))
        error = row[column] - scale * (codes[column] - zero)
        loss += error**2 / inverse[at, at]
        row[left] -= error / inverse[at, at] * inverse[at]
        left.pop(at)
    return row, codes, loss


def if_exact(
    row: NDArray[Any], errors: dict[int, float], columns: list[int], left: list[int],
    hessian: NDArray[Any],
) -> NDArray[Any]:  # fmt: skip
    """What each of `columns` is wanted to be if those before it were kept as they are: its part of
    the best answer of all that comes after them to the errors made so far. Scales follow from it.
    """
    done, answering, wanted = list(errors), list(left), []
    for column in columns:
        pull = hessian[np.ix_(answering, done)] @ [errors[c] for c in done]
        answer = np.linalg.solve(hessian[np.ix_(answering, answering)], pull)
        wanted.append(row[column] + answer[answering.index(column)])
        answering.remove(column)
    return np.array(wanted)


def textbook(
    weights: NDArray[Any], hessian: NDArray[Any], block_size: int, *, zero_points: bool
) -> NDArray[Any]:
    """Dequantized float64 rows."""
    hessian = damped(hessian)
    result = np.empty(weights.shape)
    for index, source in enumerate(weights.astype(np.float64)):
        row, left, errors = source, list(range(len(source))), {}
        for columns in order_of(hessian, block_size):
            wanted = if_exact(source, errors, columns, left, hessian)
            tried = [
                (*walk(row, columns, left, hessian, *grid), grid)
                for grid in grids(wanted, zero_points=zero_points)
            ]
            row, codes, _, (scale, zero) = min(tried, key=lambda each: each[2])
            for column, code in codes.items():
                result[index, column] = scale * (code - zero)
                errors[column] = source[column] - result[index, column]
            left = [column for column in left if column not in codes]
    return result


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(5, 64, 32), (4, 80, 64), (3, 7, 32)])
def test_codes_equal_the_textbook(
    rows: int,
    columns: int,
    block_size: int,
    zero_points: bool,  # noqa: FBT001
) -> None:
    weights, hessian = case(rows, columns)
    curvature = factorize(hessian, block_size, product)
    ours = compensate_int4(weights, curvature, product, zero_points=zero_points, sweeps=0)
    theirs = textbook(weights, hessian, block_size, zero_points=zero_points)
    np.testing.assert_allclose(dequantize(ours), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block_size"), SHAPES)
def test_no_row_loses_more_than_by_plain_rounding(
    rows: int,
    columns: int,
    block_size: int,
    zero_points: bool,  # noqa: FBT001
    seed: int,
) -> None:
    weights, hessian = case(rows, columns, seed)
    curvature = factorize(hessian, block_size, product)
    ours = compensate_int4(weights, curvature, product, zero_points=zero_points)
    plain = quantize_int4(weights, block_size, zero_points=zero_points)
    lost, before = (output_error(dequantize(m) - weights, hessian) for m in (ours, plain))
    # Losses are compared in float32 sums of `columns` terms.
    assert (lost <= before * (1 + columns * 2.0**-23)).all()
    assert lost.sum() < 0.7 * before.sum() or columns < 32


@pytest.mark.parametrize("zero_points", [False, True])
def test_sweeps_end_where_no_code_and_no_scale_can_be_bettered(
    zero_points: bool,  # noqa: FBT001
) -> None:
    weights, hessian = case(6, 80)
    curvature = factorize(hessian, 32, product)
    losses = []
    for sweeps in (0, 1, 3, 60):
        made = compensate_int4(weights, curvature, product, zero_points=zero_points, sweeps=sweeps)
        losses.append(output_error(dequantize(made) - weights, hessian))
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 80 * 2.0**-23)).all()
    assert losses[1].sum() < 0.97 * losses[0].sum()
    slack = 1e-5 * losses[-1]
    for column in range(80):
        for step in (-1, 1):
            codes = made.codes.astype(np.int64)
            codes[:, column] = np.clip(codes[:, column] + step, 0, 15)
            other = replace(made, codes=codes.astype(np.uint8))
            assert (output_error(dequantize(other) - weights, hessian) >= losses[-1] - slack).all()
    for block in range(3):
        for factor in (0.999, 1.001):
            scales = made.scales.copy()
            scales[:, block] *= np.float16(factor)
            other = replace(made, scales=scales)
            assert (output_error(dequantize(other) - weights, hessian) >= losses[-1] - slack).all()


def test_hessian_is_factorized() -> None:
    _, hessian = case(1, 200)
    curvature = factorize(hessian, 32, product)
    upper = curvature.upper.astype(np.float64)
    again = upper @ np.diag(curvature.pivots.astype(np.float64)) @ upper.T
    wanted = damped(hessian)[np.ix_(curvature.order, curvature.order)]
    assert np.array_equal(upper, np.triu(upper)) and (np.diag(upper) == 1).all()
    np.testing.assert_allclose(again, wanted, rtol=0, atol=200 * 2.0**-24 * np.abs(wanted).max())


def test_inputs_that_never_occur_change_nothing() -> None:
    """A dead channel: a zero row and column of the Hessian."""
    weights, hessian = case(6, 64)
    dead = hessian.copy()
    dead[5], dead[:, 5] = 0, 0
    made = compensate_int4(weights, factorize(dead, 32, product), product)
    assert np.isfinite(dequantize(made)).all()
    nothing = compensate_int4(weights, factorize(np.zeros((64, 64)), 32, product), product)
    lost, plain = (
        np.square(dequantize(m) - weights).sum() for m in (nothing, quantize_int4(weights, 32))
    )
    assert lost <= plain, "without inputs every weight counts the same"


def test_zeros_stay_zeros() -> None:
    weights, hessian = case(4, 64)
    weights[1], weights[2, :32] = 0, 0
    values = dequantize(compensate_int4(weights, factorize(hessian, 32, product), product))
    assert not values[1].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    _, hessian = case(1, 40)
    hessian[3, 7] = hessian[7, 3] = bad
    with pytest.raises(ValueError, match=r"column 3 of the hessian holds NaN or Inf"):
        factorize(hessian, 32, product)


def test_hessian_of_no_inputs_is_refused() -> None:
    """No XᵀX has a negative eigenvalue."""
    _, hessian = case(1, 40)
    with pytest.raises(ValueError, match="negative"):
        factorize(hessian - 2 * np.diag(np.diag(hessian)), 32, product)
    mixed = np.full((40, 40), 5.0) - 4 * np.eye(40)
    with pytest.raises(ValueError, match="not positive definite"):
        factorize(mixed, 32, product)


def test_equal_inputs_give_equal_codes() -> None:
    weights, hessian = case(600, 96)
    first, second = (
        compensate_int4(weights, factorize(hessian, 32, product), product) for _ in range(2)
    )
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scales, second.scales)
