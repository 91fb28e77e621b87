"""Rows ↔ panels of 16 rows, the layout that every kernel reads in place.

ARCHITECTURE.md, "Weights: formats". Rows become words first (8 int4 codes, 4 int8 codes, one scale,
one float), then 16 rows interleave word by word: rows [N, W] → panels [ceil(N/16), W, 16], element
[p, w, r] = rows[16p+r, w]; rows beyond N are zero.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import chunks
from edgelora.quantize.matrix import ceil_div

PANEL = 16  # rows
K_STEP = 32  # codes of a row are padded with zeros to a multiple of this

Uint8 = NDArray[np.uint8]
Int8 = NDArray[np.int8]
Words = NDArray[np.uint32]
Element = TypeVar("Element", bound=np.generic)


def interleave(rows: NDArray[Element]) -> NDArray[Element]:
    """[N, W] → [ceil(N/16), W, 16]."""
    count, width = rows.shape
    full = count // PANEL
    panels = np.zeros((ceil_div(count, PANEL), width, PANEL), rows.dtype)

    def work(part: slice) -> None:
        block = rows[part.start * PANEL : part.stop * PANEL].reshape(-1, PANEL, width)
        panels[part] = block.transpose(0, 2, 1)

    chunks.over(work, full, PANEL * width)
    if count % PANEL:
        panels[full, :, : count % PANEL] = rows[full * PANEL :].T
    return panels


def deinterleave(panels: NDArray[Element], count: int) -> NDArray[Element]:
    """[P, W, 16] → the first `count` rows, [count, W]."""
    panel_count, width, _ = panels.shape
    rows = np.empty((panel_count, PANEL, width), panels.dtype)

    def work(part: slice) -> None:
        rows[part] = panels[part].transpose(0, 2, 1)

    chunks.over(work, panel_count, PANEL * width)
    return rows.reshape(-1, width)[:count]


def pack_nibbles(codes: Uint8) -> Uint8:
    """uint8 [N, K] in 0…15 → [P, Kp/8, 64].

    Byte 4r+j of [p, q] = code[16p+r, 8q+j] | code[16p+r, 8q+4+j] << 4.
    """
    rows, columns = codes.shape
    words = np.empty((rows, _padded(columns) // 8), "<u4")

    def work(part: slice) -> None:
        eight = _pad_columns(codes[part]).view("<u8")
        if np.bitwise_and(eight, np.uint64(0xF0F0F0F0F0F0F0F0)).any():
            row = part.start + int(np.argmax(codes[part].max(axis=1) > 15))
            raise ValueError(f"row {row}: a 4-bit code is greater than 15")
        words[part] = eight | (eight >> np.uint64(28))  # the low half now holds both nibbles

    chunks.over(work, rows, columns)
    return _bytes(interleave(words))


def unpack_nibbles(panels: Uint8, rows: int, columns: int) -> Uint8:
    """Inverse of pack_nibbles: uint8 [rows, columns]."""
    words = deinterleave(_words(panels), rows)
    halves = np.empty((rows, words.shape[1], 2), "<u4")
    np.bitwise_and(words, np.uint32(0x0F0F0F0F), out=halves[..., 0])
    np.bitwise_and(words >> np.uint32(4), np.uint32(0x0F0F0F0F), out=halves[..., 1])
    return np.ascontiguousarray(halves.view(np.uint8).reshape(rows, -1)[:, :columns])


def pack_bytes(codes: Int8) -> Int8:
    """int8 [N, K] → [P, Kp/4, 64]: byte 4r+j = code[16p+r, 4q+j]."""
    return _bytes(interleave(_pad_columns(codes).view("<u4"))).view(np.int8)


def unpack_bytes(panels: Int8, rows: int, columns: int) -> Int8:
    """Inverse of pack_bytes: int8 [rows, columns]."""
    words = deinterleave(_words(panels), rows)
    return np.ascontiguousarray(words.view(np.int8).reshape(rows, -1)[:, :columns])


def pack_zero_points(zero_points: Uint8) -> Uint8:
    """uint8 [N, blocks] in 0…15 → [P, blocks, 8]: byte i = zp[16p+i] | zp[16p+8+i] << 4."""
    if zero_points.size and zero_points.max() > 15:
        raise ValueError(f"zero point {zero_points.max()} is greater than 15")
    panels = interleave(zero_points)
    return panels[..., :8] | (panels[..., 8:] << np.uint8(4))


def unpack_zero_points(panels: Uint8, rows: int) -> Uint8:
    """Inverse of pack_zero_points: uint8 [rows, blocks]."""
    both = np.concatenate([panels & np.uint8(15), panels >> np.uint8(4)], axis=-1)
    return deinterleave(both, rows)


def _padded(columns: int) -> int:
    return ceil_div(columns, K_STEP) * K_STEP


def _pad_columns(codes: NDArray[Element]) -> NDArray[Element]:
    """Contiguous rows of Kp codes; a copy only where needed."""
    rows, columns = codes.shape
    if columns % K_STEP == 0:
        return np.ascontiguousarray(codes)
    padded = np.zeros((rows, _padded(columns)), codes.dtype)
    padded[:, :columns] = codes
    return padded


def _bytes(words: Words) -> Uint8:
    """[P, Q, 16] words → [P, Q, 64] bytes, not a copy."""
    return words.view(np.uint8)


def _words(panels: Uint8 | Int8) -> Words:
    """[P, Q, 64] bytes → [P, Q, 16] words, not a copy."""
    return np.ascontiguousarray(panels).view("<u4")
