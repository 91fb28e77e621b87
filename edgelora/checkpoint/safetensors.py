"""A Hugging Face folder of safetensors, one file or sharded, as a Checkpoint.

safetensors (https://github.com/huggingface/safetensors): uint64 n, n bytes of JSON, data. The JSON
maps name → {dtype, shape, data_offsets [begin, end)}; the tensors cover the data without gaps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.checkpoint.float_values import TO_FLOAT32
from edgelora.checkpoint.layout import EMBEDDING, HEAD, check_layout
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import FileBytes, parse_json, read_json
from edgelora.layout import expected_tensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_PIECE = 1 << 24  # bytes compared at a time
_ITEM_SIZE = {  # bytes of an element
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `size` bytes at `offset` of `file`."""

    file: FileBytes
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def raw(self) -> NDArray[np.uint8]:
        """uint8 [size]."""
        return self.file.read(self.offset, self.size)

    def piece(self, start: int, length: int) -> NDArray[np.uint8]:
        """At most `length` bytes from byte `start` of the tensor on."""
        return self.file.read(self.offset + start, min(length, self.size - start))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name → tensor. Raises EdgeLoraError unless the header describes exactly this file."""
    file = FileBytes(path)
    length = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if length > _MAX_HEADER:
        raise EdgeLoraError(f"{path}: not a safetensors file (a header of {length} bytes)")
    header = parse_json(file.read(8, length).tobytes(), path)
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_covers(file, tensors, 8 + length)
    return tensors


def _stored(file: FileBytes, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        integers = all(type(i) is int and i >= 0 for i in (*shape, begin, end))
        item_size = _ITEM_SIZE.get(dtype)
    except (TypeError, ValueError, KeyError):
        integers, item_size, dtype = False, 1, ""
    if not integers:
        raise EdgeLoraError(f"{file.path}: the header's entry for {name} is malformed")
    if item_size is None:
        raise EdgeLoraError(f"{file.path}: {name} has the unknown dtype {dtype}")
    if end - begin != math.prod(shape) * item_size:
        raise EdgeLoraError(f"{file.path}: {name} has {end - begin} bytes, not {dtype} {shape}")
    return StoredTensor(file, dtype, tuple(shape), start + begin, end - begin)


def _check_covers(file: FileBytes, tensors: Mapping[str, StoredTensor], start: int) -> None:
    """The tensors follow one another from `start` to the end of the file."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != position:
            what = (
                "overlaps another tensor" if tensor.offset < position else "leaves a gap before it"
            )
            raise EdgeLoraError(f"{file.path}: {name} {what}; the file is corrupt")
        position += tensor.size
    if position != file.size:
        what = "truncated" if position > file.size else "longer than its header says"
        raise EdgeLoraError(
            f"{file.path}: {what}: {position} bytes expected, {file.size} found; "
            "copy or download it again"
        )


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: `model.safetensors`, or the shards that the index names."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    index_path = folder / INDEX
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise EdgeLoraError(f"{index_path}: has no weight_map")
    weight_map = {name: str(shard) for name, shard in weight_map.items()}
    shards = {s: read_header(_shard_path(index_path, s)) for s in sorted({*weight_map.values()})}
    _check_index(index_path, weight_map, shards)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _shard_path(index_path: Path, shard: str) -> Path:
    """The shard's file, which must lie beside or below the index."""
    parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
    absolute = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).anchor
    if absolute or ".." in parts or not parts:
        raise EdgeLoraError(f"{index_path}: the shard {shard!r} lies outside the folder")
    path = index_path.parent / shard
    if not path.is_file():
        raise EdgeLoraError(f"{index_path}: names the shard {shard}, which is missing")
    return path


def _check_index(
    index_path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, object]]
) -> None:
    absent = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if absent:
        raise EdgeLoraError(f"{index_path}: not in the shards it names: {', '.join(absent)}")
    stray = sorted(
        f"{name} in {shard}"
        for shard, tensors in shards.items()
        for name in tensors
        if weight_map.get(name) != shard
    )
    if stray:
        raise EdgeLoraError(f"{index_path}: tensors that it does not name: {', '.join(stray)}")


class SafetensorsCheckpoint:
    """A Hugging Face folder with float weights. See `Checkpoint`."""

    def __init__(self, path: Path, name: str, config: ModelConfig) -> None:
        self.path, self.name, self.config = path, name, config
        self._tensors = read_folder(path)
        check_layout({n: t.shape for n, t in self._tensors.items()}, config, path)
        check_floats(self._tensors, path)
        check_tied_head(self._tensors, config, path)
        self._names = sorted(expected_tensors(config))

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> NDArray[np.float32]:
        return read_float(self._tensors[name])

    def stored_as(self, name: str) -> None:
        return None

    def read_quantized(self, name: str) -> None:
        return None


def read_float(tensor: StoredTensor) -> NDArray[np.float32]:
    """The values of a float tensor, in its shape."""
    return TO_FLOAT32[tensor.dtype](tensor.raw()).reshape(tensor.shape)


def check_floats(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    others = sorted(f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in TO_FLOAT32)
    if others:
        raise EdgeLoraError(
            f"{path}: not float tensors: {', '.join(others)}; EdgeLoRA reads F32, F16, BF16 and F64"
        )


def check_tied_head(tensors: Mapping[str, StoredTensor], config: ModelConfig, path: Path) -> None:
    """A head that is stored although it is tied must be the embedding, byte for byte."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return
    if not _same_values(tensors[HEAD], tensors[EMBEDDING]):
        raise EdgeLoraError(
            f"{path}: {HEAD} differs from {EMBEDDING} although tie_word_embeddings is true; "
            "set it to false in config.json if the head is its own"
        )


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Byte for byte, a piece at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = range(0, one.size, _PIECE)
    return all(np.array_equal(one.piece(at, _PIECE), other.piece(at, _PIECE)) for at in pieces)
