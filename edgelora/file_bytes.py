"""Bytes of a file, read piece by piece. Never mapped: mapped pages count as resident memory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoraError


class FileBytes:
    """A file of known size. Every read is checked against it before anything is allocated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size  # bytes
            path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from None

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """uint8 [size], owned by the caller. Raises EdgeLoraError where the file is shorter."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self._truncated(offset + size)
        buffer = np.empty(size, dtype=np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                self._fill(file.readinto, buffer)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return buffer

    def _fill(self, readinto: Any, buffer: NDArray[np.uint8]) -> None:
        """One call gives at most 2 GiB on Linux."""
        view = memoryview(buffer.data)
        while len(view):
            count = readinto(view)
            if not count:
                raise self._truncated(self.size)
            view = view[count:]

    def _truncated(self, end: int) -> EdgeLoraError:
        return EdgeLoraError(
            f"{self.path}: truncated: {end} bytes are needed and the file has {self.size}; "
            "copy or download it again"
        )


def read_all(path: Path) -> bytes:
    """A whole small file."""
    file = FileBytes(path)
    return file.read(0, file.size).tobytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises EdgeLoraError for anything else, repeated keys included."""
    return parse_json(read_all(path), path)


def parse_json(data: bytes, source: Path) -> dict[str, Any]:
    """The JSON object in `data`. Raises EdgeLoraError for anything else, repeated keys included."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise EdgeLoraError(
            f"{source}: not valid JSON ({error}); copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise EdgeLoraError(f"{source}: must hold a JSON object, not a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"given twice: {', '.join(n for n, c in counts.items() if c > 1)}")
    return values


def _unreadable(path: Path, error: OSError) -> EdgeLoraError:
    reason = error.strerror or str(error)
    return EdgeLoraError(f"{path}: cannot be read ({reason}); check the path and its permissions")
