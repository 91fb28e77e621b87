"""The container of a GGUF file: its fields and where its tensors lie. No tensor is read here.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:
  "GGUF", uint32 version, uint64 tensor count, uint64 field count
  fields: string key, uint32 type, value
  tensors: string name, uint32 n, uint64 dims [n] (fastest first), uint32 type, uint64 offset
and, from the next multiple of the alignment on, the data that the offsets count in.
`gguf.GGUFReader` is not used: it maps the file and makes an array of every token (200 MB and 4 s
for a vocabulary of 49152).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import FileBytes

_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
_WINDOW = 1 << 20  # bytes of the header held at a time
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """`size` bytes at `offset` of the file; shape as numpy has it (rows first)."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """Fields (key → int, float, bool, str or a list of these) and tensors by GGUF's name."""

    file: FileBytes
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """uint8 [rows, bytes of a row]; a vector has one row."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        return self.file.read(tensor.offset, tensor.size).reshape(rows, -1)


class _Cursor:
    """Reads the header forwards, a window at a time."""

    def __init__(self, file: FileBytes) -> None:
        self.file = file
        self.position = 0
        self._start = 0
        self._window = b""

    def take(self, size: int) -> bytes:
        begin = self.position - self._start
        if begin + size > len(self._window):
            left = self.file.size - self.position
            self._window = self.file.read(self.position, max(size, min(_WINDOW, left))).tobytes()
            self._start, begin = self.position, 0
        self.position += size
        return self._window[begin : begin + size]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self._code(kind))

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            self._check_count(count, 8)
            return [self.string() for _ in range(count)]
        code = self._code(kind)
        self._check_count(count, struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    def _check_count(self, count: int, least: int) -> None:
        """Before anything is allocated: `count` elements of at least `least` bytes must fit."""
        if count * least > self.file.size - self.position:
            raise EdgeLoraError(
                f"{self.file.path}: truncated: {count} values announced in the header"
            )

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise EdgeLoraError(f"{self.file.path}: a field of the unknown type {kind}")
        return _SCALARS[kind]


def read_gguf(path: Path) -> GgufFile:
    """Raises EdgeLoraError unless the header is sound and every tensor lies inside the file."""
    file = FileBytes(path)
    try:
        return _read(file)
    except (UnicodeDecodeError, struct.error) as error:
        raise EdgeLoraError(
            f"{path}: corrupt header ({error}); copy or download it again"
        ) from None


def _read(file: FileBytes) -> GgufFile:
    cursor = _Cursor(file)
    if file.size < 24 or cursor.take(4) != b"GGUF":
        raise EdgeLoraError(f"{file.path}: not a GGUF file")
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise EdgeLoraError(
            f"{file.path}: GGUF {kind} is not supported (only little-endian 2 and 3)"
        )
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        _check_new(key, fields, file)
        fields[key] = cursor.value(cursor.scalar("I"))
    infos: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        _check_new(name, infos, file)
        infos[name] = _tensor_info(cursor, name)
    tensors = _place(file, infos, fields.get("general.alignment", _ALIGNMENT), cursor.position)
    return GgufFile(file, fields, tensors)


def _check_new(name: str, seen: Mapping[str, object], file: FileBytes) -> None:
    if name in seen:
        raise EdgeLoraError(f"{file.path}: {name} is there twice; the file is corrupt")


def _tensor_info(cursor: _Cursor, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    count = cursor.scalar("I")
    if not 1 <= count <= _MAX_DIMS:
        raise EdgeLoraError(f"{cursor.file.path}: {name} has {count} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(count)]))
    number = cursor.scalar("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise EdgeLoraError(f"{cursor.file.path}: {name} has the unknown type {number}") from None
    return kind, shape, cursor.scalar("Q")


def _place(
    file: FileBytes,
    infos: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...], int]],
    alignment: Any,
    end_of_header: int,
) -> dict[str, GgufTensor]:
    """Tensors with absolute offsets, each inside the file and none over another."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise EdgeLoraError(
            f"{file.path}: general.alignment = {alignment!r}: must be a power of two"
        )
    start = -(-end_of_header // alignment) * alignment
    tensors = {
        name: GgufTensor(kind, shape, start + offset, _size(file, name, kind, shape))
        for name, (kind, shape, offset) in infos.items()
    }
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < position:
            raise EdgeLoraError(f"{file.path}: {name} overlaps another tensor; the file is corrupt")
        position = tensor.offset + tensor.size
        if position > file.size:
            raise EdgeLoraError(
                f"{file.path}: truncated: {name} ends at byte {position} and the file has "
                f"{file.size}; copy or download it again"
            )
    return tensors


def _size(file: FileBytes, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block or 0 in shape:
        raise EdgeLoraError(f"{file.path}: {name} {list(shape)} does not fit its type {kind.name}")
    return math.prod(shape) // block * block_bytes
