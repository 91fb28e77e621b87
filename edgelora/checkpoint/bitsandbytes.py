"""A bitsandbytes 4-bit folder (NF4 or FP4, with or without double quantization) as a Checkpoint.

A quantized X.weight is uint8 codes, two to a byte, the first in the high nibble, flattened; beside it lie
  .absmax          float32 [blocks], or uint8 codes of it when nested (double quantization)
  .quant_map       float32 [16], the codebook
  .nested_absmax   float32 [ceil(blocks / nested_blocksize)], .nested_quant_map float32 [256]
  .quant_state.bitsandbytes__nf4 (or __fp4)   JSON: shape, blocksize, dtype, nested_offset …
absmax = nested_quant_map[code]·nested_absmax + nested_offset; w = quant_map[code]·absmax; both in float32, and
then w is rounded to the state's dtype. Source: bitsandbytes/functional.py (QuantState, dequantize_4bit).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.file_bytes import parse_json
from edgelora.checkpoint.layout import check_layout, expected_tensors
from edgelora.checkpoint.protocol import StoredAs
from edgelora.checkpoint.safetensors import (
    StoredTensor,
    check_floats,
    check_tied_head,
    read_float,
    read_folder,
)
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.quantize import NF4_BLOCK, NF4_GROUP, NF4_VALUES, Nf4Matrix

# bitsandbytes' FP4 (sign, two bits of exponent, one of mantissa) over its maximum 12, csrc/common.h
_FP4_POSITIVE = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4_VALUES = np.concatenate([_FP4_POSITIVE, -_FP4_POSITIVE])
_CODEBOOKS = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = ("float32", "bfloat16", "float16")
_CODEBOOK_TOLERANCE = (
    1e-6  # published files differ in the last bit; bitsandbytes uses its own codebook anyway
)
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a quantized weight says, checked against the tensors beside it."""

    kind: str  # nf4 or fp4
    shape: tuple[int, int]
    block_size: int
    dtype: str
    nested_block_size: int | None  # None: absmax is not quantized
    nested_offset: float

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)


class BitsAndBytesCheckpoint:
    """A folder that transformers saved with load_in_4bit. See `Checkpoint`.

    `read` gives what bitsandbytes' dequantize_4bit gives: with a state of dtype bfloat16 or float16 each weight
    is rounded to it. Our nf4 is not rounded, so `read_quantized` gives codes only for a float32 state;
    `read_codes` gives them for the 16-bit ones too, where the weights then differ by that rounding.
    """

    def __init__(self, path: Path, name: str, config: ModelConfig) -> None:
        self.path, self.name, self.config = path, name, config
        self._tensors = read_folder(path)
        self._states = {
            key.partition(_STATE)[0]: _read_state(self._tensors, key, path)
            for key in self._tensors
            if _STATE in key
        }
        self._floats = self._own_floats()
        check_layout(self._shapes(), config, path)
        check_floats(self._floats, path)
        check_tied_head(self._floats, config, path)
        self._names = sorted(expected_tensors(config))

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes_of(name)

    def read(self, name: str) -> NDArray[np.float32]:
        if name not in self._states:
            return read_float(self._floats[name])
        state = self._states[name]
        values = _CODEBOOKS[state.kind][self._codes(name)]
        blocks = self._absmax(name)
        whole = values.size // state.block_size * state.block_size
        values[:whole].reshape(-1, state.block_size)[...] *= blocks[
            : whole // state.block_size, None
        ]
        values[whole:] *= blocks[-1]
        return round_to(values, state.dtype).reshape(state.shape)

    def stored_as(self, name: str) -> StoredAs | None:
        state = self._states.get(name)
        return "nf4" if state and _carried(state) and state.dtype == "float32" else None

    def read_quantized(self, name: str) -> Nf4Matrix | None:
        return self.read_codes(name) if self.stored_as(name) else None

    def read_codes(self, name: str) -> Nf4Matrix | None:
        """NF4 codes whatever the state's dtype; None where the tensor is no double-quantized NF4 in blocks of 64."""
        state = self._states.get(name)
        if state is None or not _carried(state):
            return None
        return Nf4Matrix(
            codes=self._codes(name).reshape(state.shape),
            absmax_codes=self._tensors[f"{name}.absmax"].raw(),
            nested_absmax=read_float(self._tensors[f"{name}.nested_absmax"]).reshape(-1),
            absmax_offset=np.float32(state.nested_offset),
            absmax_table=read_float(self._tensors[f"{name}.nested_quant_map"]).reshape(-1),
        )

    def _codes(self, name: str) -> NDArray[np.uint8]:
        """uint8 [weights], flattened."""
        packed = self._tensors[name].raw()
        codes = np.empty(2 * packed.size, np.uint8)
        codes[0::2] = packed >> 4
        codes[1::2] = packed & 15
        return codes[: math.prod(self._states[name].shape)]

    def _absmax(self, name: str) -> NDArray[np.float32]:
        """float32 [blocks]."""
        state, stored = self._states[name], self._tensors[f"{name}.absmax"]
        if state.nested_block_size is None:
            return read_float(stored).reshape(-1)
        table = read_float(self._tensors[f"{name}.nested_quant_map"]).reshape(-1)
        nested = read_float(self._tensors[f"{name}.nested_absmax"]).reshape(-1)
        spread = np.repeat(nested, state.nested_block_size)[: state.blocks]
        absmax: NDArray[np.float32] = table[stored.raw()] * spread + np.float32(state.nested_offset)
        return absmax

    def _own_floats(self) -> dict[str, StoredTensor]:
        """The tensors that are neither codes nor what lies beside codes."""
        beside = {f"{n}.{c}" for n in self._states for c in _COMPANIONS}
        return {
            name: tensor
            for name, tensor in self._tensors.items()
            if name not in self._states and name not in beside and _STATE not in name
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shapes_of(name) for name in (*self._floats, *self._states)}

    def _shapes_of(self, name: str) -> tuple[int, ...]:
        state = self._states.get(name)
        return state.shape if state else self._floats[name].shape


def _carried(state: QuantState) -> bool:
    """Whether our nf4 can hold it: NF4, blocks of 64, double-quantized in groups of 256."""
    return (state.kind, state.block_size, state.nested_block_size) == ("nf4", NF4_BLOCK, NF4_GROUP)


def round_to(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """float32 values rounded to `dtype` (to nearest, ties to even) and back. Changes `values`."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)
        bits &= 0xFFFF0000
    return values


def _read_state(tensors: Mapping[str, StoredTensor], key: str, path: Path) -> QuantState:
    """Raises EdgeLoraError unless the JSON under `key` is complete and fits the tensors beside it."""
    name, _, kind = key.partition(_STATE)
    values = parse_json(tensors[key].raw().tobytes(), Path(f"{path}: {key}"))
    try:
        state = _parse_state(values, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise EdgeLoraError(f"{path}: {key} is malformed ({error})") from None
    problems = _mismatches(tensors, name, state)
    if problems:
        raise EdgeLoraError(f"{path}: {name}: {'; '.join(problems)}")
    return state


def _parse_state(values: Mapping[str, Any], kind: str) -> QuantState:
    nested = values.get("nested_blocksize")
    rows, columns = values["shape"]
    state = QuantState(
        kind=values["quant_type"],
        shape=(rows, columns),
        block_size=values["blocksize"],
        dtype=values["dtype"],
        nested_block_size=nested,
        nested_offset=float(values["nested_offset"]) if nested is not None else 0.0,
    )
    if state.kind != kind or kind not in _CODEBOOKS:
        raise ValueError(f"quant_type {state.kind}")
    if state.dtype not in _DTYPES:
        raise ValueError(f"dtype {state.dtype}")
    if any(type(i) is not int or i < 1 for i in (rows, columns)):
        raise ValueError(f"shape {values['shape']}")
    if state.block_size not in _BLOCK_SIZES:
        raise ValueError(f"blocksize {state.block_size}")
    if nested is not None and (type(nested) is not int or nested < 1):
        raise ValueError(f"nested_blocksize {nested}")
    return state


def _mismatches(tensors: Mapping[str, StoredTensor], name: str, state: QuantState) -> list[str]:
    """What beside the codes is missing, or has another dtype or size than the state demands."""
    is_nested = state.nested_block_size is not None
    expected = {
        "": (None, -(-math.prod(state.shape) // 2)),
        ".absmax": ("U8" if is_nested else "F32", state.blocks * (1 if is_nested else 4)),
        ".quant_map": ("F32", 16 * 4),
    }
    if state.nested_block_size is not None:
        groups = -(-state.blocks // state.nested_block_size)
        expected |= {".nested_absmax": ("F32", groups * 4), ".nested_quant_map": ("F32", 256 * 4)}
    problems = [f"{name}{suffix} is missing" for suffix in expected if name + suffix not in tensors]
    if problems:
        return problems
    for suffix, (dtype, size) in expected.items():
        tensor = tensors[name + suffix]
        if tensor.size != size or dtype not in (None, tensor.dtype):
            problems.append(
                f"{name}{suffix} has {tensor.size} bytes of {tensor.dtype} instead of {size}"
            )
    if not problems and not _is_codebook(tensors[f"{name}.quant_map"], state.kind):
        problems.append(f"{name}.quant_map is not bitsandbytes' {state.kind} codebook")
    return problems


def _is_codebook(tensor: StoredTensor, kind: str) -> bool:
    return np.allclose(read_float(tensor), _CODEBOOKS[kind], rtol=0, atol=_CODEBOOK_TOLERANCE)
