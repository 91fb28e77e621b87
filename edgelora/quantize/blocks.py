"""Blocks of consecutive weights, their float16 scales, and the weights that have no scale."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize.matrix import ceil_div

SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)  # 2^-14
LARGEST = float(np.finfo(np.float16).max)  # 65504

Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]


@dataclass(frozen=True)
class Vanished:
    """The first block of a piece that is not zero but whose scale rounds to zero in float16."""

    row: int
    block: int
    scale: float


def split(weights: Float32, block_size: int) -> Float32:
    """A copy [rows, blocks, block_size]; zeros fill a partial block and change no scale."""
    rows, columns = weights.shape
    blocks = ceil_div(columns, block_size)
    copy = np.zeros((rows, blocks * block_size), np.float32)
    copy[:, :columns] = weights
    return copy.reshape(rows, blocks, block_size)


def bounds(blocks: Float32, first_row: int) -> tuple[Float32, Float32]:
    """(low, high) of each block, [rows, blocks]; ValueError names a NaN or an infinity."""
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    finite = np.isfinite(low) & np.isfinite(high)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=-1)))
        values = blocks[row].ravel()
        column = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"row {first_row + row}, column {column}: weight is {values[column]}")
    return low, high


def round_scales(exact: Float32, first_row: int) -> tuple[Float16, Vanished | None]:
    """Float16 scales [rows, blocks], and the first that vanished; ValueError: one overflows."""
    with np.errstate(over="ignore", under="ignore"):
        scales = exact.astype(np.float16) + np.float16(0)  # + 0 turns -0 into 0
    if not np.isfinite(scales).all():
        row, block = np.argwhere(~np.isfinite(scales))[0]
        value = abs(float(exact[row, block]))
        place = f"row {first_row + row}, block {block}"
        raise ValueError(f"{place}: scale {value:g} exceeds float16's largest, {LARGEST:g}")
    return scales, _first_vanished(exact, scales, first_row)


def _first_vanished(exact: Float32, scales: Float16, first_row: int) -> Vanished | None:
    gone = (scales == 0) & (exact != 0)
    if not gone.any():
        return None
    row, block = np.argwhere(gone)[0]
    return Vanished(first_row + int(row), int(block), abs(float(exact[row, block])))


def divisors(scales: Float16) -> Float32:
    """The rounded scales as float32 [rows, blocks, 1]; infinity for 0, so that weights give 0."""
    wide = scales.astype(np.float32)[..., None]
    return np.where(wide == 0, np.float32(np.inf), wide)


def refuse_underflow(scales: Float16, vanished: list[Vanished | None]) -> None:
    """ValueError if a block vanished in a matrix whose every scale is below float16's normal range.

    Beside a normal scale a vanished block counts for nothing: its scale is at most 2^-25, so its
    weights are at most 2^-11 of the matrix's largest, and become exact zeros. Rows of an embedding
    that were never trained look like that.
    """
    first = next((block for block in vanished if block), None)
    if first and np.abs(scales).max() < SMALLEST_NORMAL:
        raise ValueError(
            f"row {first.row}, block {first.block}: scale {first.scale:g} underflows float16, "
            f"and no scale of the matrix reaches {SMALLEST_NORMAL:g}"
        )
