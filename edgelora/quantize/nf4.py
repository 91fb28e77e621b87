"""Float weights → NF4 with double quantization, code for code as bitsandbytes 0.50 on a CPU.

QLoRA, arXiv:2305.14314, section 3 and appendix E; bitsandbytes backends/default/ops.py and
functional.py (quantize_4bit, create_dynamic_map), csrc/cpu_ops.cpp (quantize_cpu_impl).
"""

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import chunks
from edgelora.quantize.dequantize import NF4_VALUES
from edgelora.quantize.matrix import NF4_BLOCK, NF4_GROUP, Nf4Matrix, ceil_div, check_matrix

Float32 = NDArray[np.float32]
Uint8 = NDArray[np.uint8]

# A value on a threshold gets the lower code.
THRESHOLDS = np.float32(0.5) * (NF4_VALUES[:-1] + NF4_VALUES[1:])
SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes divides by no less
LAST_BIN = 65535  # bitsandbytes sorts [-1, 1] into 65536 bins, each with one code


def quantize_nf4(weights: Float32) -> Nf4Matrix:
    """NF4 of float32 [out_features, in_features], blocks of 64 over the flattened matrix.

    absmax_offset is the exact mean of absmax rounded once. bitsandbytes takes torch's float32 mean,
    whose last bit or two depend on torch's number of threads. ValueError names a weight that is
    not finite.
    """
    check_matrix("weights", weights, np.float32)
    codes, absmax = _codes(weights)
    offset = np.float32(absmax.mean(dtype=np.float64))
    absmax_codes, nested = double_quantize(absmax, offset)
    return Nf4Matrix(codes, absmax_codes, nested, offset, dynamic_map())


def _codes(weights: Float32) -> tuple[Uint8, Float32]:
    """(codes uint8 [N, K], absmax float32 [blocks])."""
    flat = np.ascontiguousarray(weights).reshape(-1)
    codes = np.empty(flat.size, np.uint8)
    absmax = np.empty(ceil_div(flat.size, NF4_BLOCK), np.float32)

    def work(part: slice) -> None:
        span = slice(part.start * NF4_BLOCK, min(part.stop * NF4_BLOCK, flat.size))
        values = _blocks(flat[span])
        absmax[part] = np.maximum(values.max(axis=1), -values.min(axis=1))
        _refuse_nonfinite(absmax[part], values, span.start, weights.shape[1])
        partial = (span.stop - span.start) % NF4_BLOCK
        _scale(values, absmax[part])
        if partial:
            absmax[-1] = max(absmax[-1], SMALLEST_ABSMAX)
            np.clip(flat[-partial:] / absmax[-1], -1, 1, out=values[-1, :partial])
        codes[span] = _nearest(values.reshape(-1)[: span.stop - span.start])

    chunks.over(work, absmax.size, NF4_BLOCK)
    return codes.reshape(weights.shape), absmax


def _blocks(flat: Float32) -> Float32:
    """A copy [blocks, 64], the last block filled with zeros."""
    values = np.zeros((ceil_div(flat.size, NF4_BLOCK), NF4_BLOCK), np.float32)
    values.reshape(-1)[: flat.size] = flat
    return values


def _refuse_nonfinite(absmax: Float32, values: Float32, first: int, columns: int) -> None:
    if not np.isfinite(absmax).all():
        bad = int(np.argmin(np.isfinite(values.reshape(-1))))
        row, column = divmod(first + bad, columns)
        raise ValueError(f"row {row}, column {column}: weight is {values.reshape(-1)[bad]}")


def _scale(values: Float32, absmax: Float32) -> None:
    """values · (1 / absmax) into [-1, 1], in place; a partial last block is divided instead."""
    values *= (np.float32(1) / np.maximum(absmax, SMALLEST_ABSMAX))[:, None]
    np.clip(values, -1, 1, out=values)


def _nearest(values: Float32) -> Uint8:
    """Index of the nearest NF4 value: how many thresholds lie below.

    15 passes over a cached piece beat a search.
    """
    codes = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, np.bool_)
    for threshold in THRESHOLDS:
        np.greater(values, threshold, out=above)
        codes += above.view(np.uint8)
    return codes


def double_quantize(absmax: Float32, offset: np.float32) -> tuple[Uint8, Float32]:
    """absmax − offset in groups of 256 → (codes uint8 [blocks], nested_absmax float32 [groups])."""
    centred = absmax - offset
    groups = ceil_div(centred.size, NF4_GROUP)
    padded = np.zeros((groups, NF4_GROUP), np.float32)
    padded.reshape(-1)[: centred.size] = centred
    nested = np.abs(padded).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = padded * (np.float32(1) / nested)[:, None]
    codes = _bin_codes()[_bins(scaled)]
    codes[nested == 0] = 0
    return codes.reshape(-1)[: centred.size], nested


def _bins(scaled: Float32) -> NDArray[np.uint16]:
    """Bin of each value: (v + 1)/2·65535 + 1/2 truncated; multiply and add are rounded once."""
    half = (np.clip(np.nan_to_num(scaled), -1, 1) + np.float32(1)) * np.float32(0.5)
    return (half.astype(np.float64) * LAST_BIN + 0.5).astype(np.float32).astype(np.uint16)


def _bin_codes() -> Uint8:
    """Code of each bin, uint8 [65536]: how many midpoints of the map lie below the bin's value."""
    table = dynamic_map()
    midpoints = np.float32(0.5) * (table[:-1] + table[1:])
    bins = np.arange(LAST_BIN + 1, dtype=np.float32)
    values = np.float32(-1) + np.float32(2) * bins / np.float32(LAST_BIN)
    return np.searchsorted(midpoints, values, side="left").astype(np.uint8)


def dynamic_map() -> Float32:
    """The 256 values of the signed 8-bit dynamic data type, ascending, as float32.

    Dettmers et al., arXiv:2110.02861, section 2.1: for each decimal exponent i − 6, i in 0…6, the
    magnitudes are the midpoints of 2^i equal intervals of [0.1, 1]; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _edges(2**i)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (i - 6)) * means
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return np.array(sorted(values), np.float32)


def _edges(intervals: int) -> Float32:
    """intervals + 1 points from 0.1 to 1 as torch.linspace gives them in float32.

    The step is rounded; each point is reached from the nearer end, multiply and add rounded once.
    """
    start = np.float64(np.float32(0.1))
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(intervals))
    index = np.arange(intervals + 1)
    from_start = index < (intervals + 1) // 2
    edges = np.where(from_start, start + step * index, 1.0 - step * (intervals - index))
    return edges.astype(np.float32)
