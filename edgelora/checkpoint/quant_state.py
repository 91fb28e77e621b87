"""The state beside a bitsandbytes weight: parsed, and checked against the tensors it speaks of."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgelora.checkpoint.safetensors import StoredTensor, read_float
from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import parse_json
from edgelora.quantize import VALUES

STATE = ".quant_state.bitsandbytes__"
_DTYPES = ("float32", "bfloat16", "float16")
_CODEBOOK_TOLERANCE = 1e-6  # files differ in the last bit; bitsandbytes uses its own anyway
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a quantized weight says, checked against the tensors beside it."""

    kind: Literal["nf4", "fp4"]
    shape: tuple[int, int]
    block_size: int
    dtype: str
    nested_block_size: int | None  # None: absmax is not quantized
    nested_offset: float

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)


def read_state(tensors: Mapping[str, StoredTensor], key: str, path: Path) -> QuantState:
    """Raises EdgeLoraError unless the JSON under `key` fits the tensors beside it."""
    name, _, kind = key.partition(STATE)
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
    if state.kind != kind or kind not in VALUES:
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
    return np.allclose(read_float(tensor), VALUES[kind], rtol=0, atol=_CODEBOOK_TOLERANCE)
