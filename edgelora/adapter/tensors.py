"""The bytes of a safetensors file as named arrays, with every size checked before it is used.

Format: https://github.com/huggingface/safetensors#format.
Eight bytes of header length, a JSON header, the values.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoraError

Factor = NDArray[np.float32 | np.float16]

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ITEM_SIZES |= {"U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes
_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, not yet converted."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: memoryview

    def values(self) -> Factor:
        """float16 stays, float32 stays, bfloat16 becomes float32 (exactly).

        Raises KeyError for any other dtype: ask `is_float` first.
        """
        raw = np.frombuffer(
            self.data, dtype={"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.dtype]
        )
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.reshape(self.shape).copy()

    @property
    def is_float(self) -> bool:
        """Whether `values` reads this dtype."""
        return self.dtype in ("F32", "F16", "BF16")


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (an object_pairs_hook). Raises ValueError naming a key that occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"key {twice!r} occurs twice")
    return result


def parse_safetensors(data: bytes, source: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name and the `__metadata__` strings. `source` names the file in errors.

    Raises EdgeLoraError on a truncated file, a bad header, or tensors that do not fill the file.
    """
    header, values = _split(data, source)
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise EdgeLoraError(f"{source}: __metadata__ must be an object of strings")
    spans = {name: _span(name, entry, source) for name, entry in header.items()}
    _check_coverage(spans, len(values), source)
    tensors = {
        name: StoredTensor(header[name]["dtype"], tuple(header[name]["shape"]), values[begin:end])
        for name, (begin, end) in spans.items()
    }
    return tensors, metadata


def _split(data: bytes, source: str) -> tuple[dict[str, Any], memoryview]:
    """The header as a dict, and the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise EdgeLoraError(
            f"{source}: truncated or not a safetensors file ({len(data)} bytes); copy it again"
        )
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        raise EdgeLoraError(f"{source}: the safetensors header is corrupt ({error})") from error
    if not isinstance(header, dict):
        raise EdgeLoraError(f"{source}: the safetensors header is not a JSON object")
    return header, memoryview(data)[8 + length :]


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _span(name: str, entry: object, source: str) -> tuple[int, int]:
    """Begin and end of a tensor's bytes, checked against its dtype and shape."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise EdgeLoraError(f"{source}: tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise EdgeLoraError(
            f"{source}: tensor {name!r} has a bad shape or bad offsets in the header"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise EdgeLoraError(
            f"{source}: tensor {name!r} ({dtype} {shape}) does not fit its offsets {offsets}"
        )
    return begin, end


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_coverage(spans: dict[str, tuple[int, int]], size: int, source: str) -> None:
    """The format's own rule: tensors follow each other without gap or overlap, up to the end."""
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position or end > size:
            raise EdgeLoraError(
                f"{source}: tensor {name!r} has wrong offsets, or the file is truncated"
            )
        position = end
    if position != size:
        raise EdgeLoraError(
            f"{source}: {size - position} bytes belong to no tensor; the file is corrupt"
        )


def safetensors_bytes(tensors: Mapping[str, Factor], metadata: Mapping[str, str]) -> bytes:
    """A file with names and metadata sorted (the package orders metadata by chance)."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, position = [], 0
    for name in sorted(tensors):
        values = tensors[name]
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        offsets = [position, position + len(data)]
        header[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])
