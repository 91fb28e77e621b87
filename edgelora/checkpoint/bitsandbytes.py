"""A bitsandbytes 4-bit folder (NF4 or FP4, with or without double quantization) as a Checkpoint.

A 4-bit X.weight is uint8 codes, flattened, two to a byte, the first in the high nibble; beside it:
  .absmax          float32 [blocks], or uint8 codes of it when nested (double quantization)
  .quant_map       float32 [16], the codebook
  .nested_absmax   float32 [ceil(blocks / nested_blocksize)], .nested_quant_map float32 [256]
  .quant_state.bitsandbytes__nf4 (or __fp4)   JSON: shape, blocksize, dtype, nested_offset …
absmax = nested_quant_map[code]·nested_absmax + nested_offset, w = quant_map[code]·absmax, both in
float32; then w is rounded to the state's dtype. Source: bitsandbytes/functional.py (QuantState,
dequantize_4bit).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.checkpoint.layout import check_layout
from edgelora.checkpoint.protocol import StoredAs
from edgelora.checkpoint.quant_state import STATE, QuantState, read_state
from edgelora.checkpoint.safetensors import (
    StoredTensor,
    check_floats,
    check_tied_head,
    read_float,
    read_folder,
)
from edgelora.config import ModelConfig
from edgelora.layout import expected_tensors
from edgelora.quantize import NF4_BLOCK, NF4_GROUP, VALUES, Nf4Matrix, PlainNf4Matrix, round_to

_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class BitsAndBytesCheckpoint:
    """A folder that transformers saved with load_in_4bit. See `Checkpoint`.

    `read` gives what bitsandbytes' dequantize_4bit gives: with a state of dtype bfloat16 or float16
    each weight is rounded to it. `read_quantized` gives codes that dequantize to the same.
    """

    def __init__(self, path: Path, name: str, config: ModelConfig) -> None:
        self.path, self.name, self.config = path, name, config
        self._tensors = read_folder(path)
        self._states = {
            key.partition(STATE)[0]: read_state(self._tensors, key, path)
            for key in self._tensors
            if STATE in key
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
        values = VALUES[state.kind][self._codes(name)]
        blocks = self._absmax(name)
        whole = values.size // state.block_size * state.block_size
        values[:whole].reshape(-1, state.block_size)[...] *= blocks[
            : whole // state.block_size, None
        ]
        values[whole:] *= blocks[-1]
        return round_to(values, state.dtype).reshape(state.shape)

    def stored_as(self, name: str) -> StoredAs | None:
        state = self._states.get(name)
        return state.kind if state and not _obstacle(state) else None

    def obstacle(self, name: str) -> str | None:
        """What our formats cannot hold of a 4-bit matrix; None where it can, and for floats."""
        state = self._states.get(name)
        return _obstacle(state) if state else None

    def is_plain(self, name: str) -> bool:
        """Whether it is in codes whose absmax is not quantized in its turn."""
        state = self._states.get(name)
        return state is not None and state.nested_block_size is None and not _obstacle(state)

    def read_quantized(self, name: str) -> Nf4Matrix | PlainNf4Matrix | None:
        if self.stored_as(name) is None:
            return None
        state = self._states[name]
        if self.is_plain(name):
            codes = self._codes(name).reshape(state.shape)
            return PlainNf4Matrix(codes, self._absmax(name), state.dtype, state.kind)
        return Nf4Matrix(
            codes=self._codes(name).reshape(state.shape),
            absmax_codes=self._tensors[f"{name}.absmax"].raw(),
            nested_absmax=read_float(self._tensors[f"{name}.nested_absmax"]).reshape(-1),
            absmax_offset=np.float32(state.nested_offset),
            absmax_table=read_float(self._tensors[f"{name}.nested_quant_map"]).reshape(-1),
            rounded_to=state.dtype,
            codebook=state.kind,
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
            if name not in self._states and name not in beside and STATE not in name
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._shapes_of(name) for name in (*self._floats, *self._states)}

    def _shapes_of(self, name: str) -> tuple[int, ...]:
        state = self._states.get(name)
        return state.shape if state else self._floats[name].shape


def _obstacle(state: QuantState) -> str | None:
    """Ours have blocks of 64, double-quantized in groups of 256 or not at all."""
    if state.block_size != NF4_BLOCK:
        return f"blocks of {state.block_size}"
    if state.nested_block_size not in (None, NF4_GROUP):
        return f"absmax groups of {state.nested_block_size}"
    return None
