"""The only writer of bundles, into a folder that appears whole (`whole_folder`)."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgelora.adapter import Branch, model_name, valid_adapter_names
from edgelora.errors import EdgeLoraError
from edgelora.graph.tensors import WEIGHT_FILE, StoredTensor
from edgelora.manifest import HEAD_FIELDS, NAME, file_entries, manifest_bytes
from edgelora.whole_folder import FolderKind, disk_error, sync

ALIGNMENT = 64  # bytes; a kernel's cache line
SHARED = 1 << 20  # bytes from which equal arrays are stored once
PAGE = 2 << 20  # bytes written at once: Linux then keeps the file in pages of that size
BUNDLE = FolderKind("bundle", NAME)


class WeightFile:
    """Appends arrays to a bundle's weight file and remembers where they lie."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHT_FILE
        self._file = self.path.open("wb", buffering=PAGE)
        self._offsets: dict[bytes, int] = {}  # of large arrays, by SHA-256
        self.tensors: dict[str, StoredTensor] = {}

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Writes an array at the next multiple of 64 bytes; returns its name.

        An array with the bytes of an earlier large one is not written again: a tied head costs
        nothing.
        """
        array = np.ascontiguousarray(array)
        digest = hashlib.sha256(array.data.cast("B")).digest() if array.nbytes >= SHARED else b""
        offset = self._offsets.get(digest)
        if offset is None:
            offset = self._append(array)
            if digest:
                self._offsets[digest] = offset
        data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        self.tensors[name] = StoredTensor(data_type, array.shape, offset, array.nbytes)
        return name

    def _append(self, array: NDArray[Any]) -> int:
        self._write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._write(array.reshape(-1).view(np.uint8).data)
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        """In pieces that end where a page does: the buffer is written when it holds just one."""
        while len(data):
            room = PAGE - self._file.tell() % PAGE
            self._file.write(data[:room])
            data = data[room:]

    def close(self) -> None:
        self._file.close()


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """The last file of a bundle: without it, the folder is none."""
    valid_adapter_names(fields["adapters"])
    (folder / NAME).write_bytes(manifest_bytes(fields | {"files": file_entries(folder)}))


def adapter_path(name: str, flavor: str = "edgelora") -> str:
    """Where a bundle keeps an adapter, relative to its folder."""
    kind = "onnx_adapter" if flavor == "ort" else "safetensors"
    return f"adapters/{name}/adapter.{kind}"


def adapter_entry(
    path: str,
    branches: Mapping[str, Branch],
    invocation: Sequence[int],
    source: str | None,
    base: str | None,
    *,
    prefix: int = 0,
) -> dict[str, Any]:
    """An adapter's line in the manifest.

    Source: fingerprint of its PEFT folder; base: the name it gave; prefix: positions, if any.
    """
    waits = {"invocation_tokens": list(invocation)} if invocation else {}
    entry = {
        "path": path,
        "source": source,
        "base_model_name_or_path": None if base is None else model_name(base),
        "ranks": sorted({branch.rank for branch in branches.values() if branch.rank}),
        "scalings": sorted({branch.scaling for branch in branches.values() if branch.rank}),
        "targets": len(branches),
    }
    return waits | entry | ({"prefix": prefix} if prefix else {})


def free_path(manifest: Mapping[str, Any], path: str, data: bytes) -> str:
    """Where a file can be written while the bundle is in use.

    The plain path; if the manifest holds other content there, one with digits of the SHA-256.
    """
    digest = hashlib.sha256(data).hexdigest()
    plain = PurePosixPath(path)
    paths = [plain, *(plain.with_stem(f"{plain.stem}-{digest[:n]}") for n in (8, len(digest)))]
    taken = {path: entry["sha256"] for path, entry in manifest["files"].items()}
    return next(str(path) for path in paths if taken.get(str(path), digest) == digest)


def exchange(bundle: Path, new: Mapping[str, tuple[str, bytes]], fields: Mapping[str, Any]) -> None:
    """Writes new files (plain path → free path, bytes), exchanges the manifest (`fields` of the
    old one, changed), and only then deletes what was in their places before.

    Killed in between, the bundle is the old or the new one, and perhaps holds a file that its
    manifest does not name, which the next call for that place deletes.
    """
    places = [PurePosixPath(plain) for plain in new]
    files = {
        name: entry
        for name, entry in fields["files"].items()
        if not any(_is_in_place_of(PurePosixPath(name), plain) for plain in places)
    }
    for path, data in new.values():
        files[path] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    kept = {key: value for key, value in fields.items() if key not in HEAD_FIELDS}
    try:
        for path, data in new.values():
            _write_in_place(bundle / path, data)
        for parent in {(bundle / path).parent.parent for path, _ in new.values() if "/" in path}:
            sync(parent)
        sync(bundle)
        _write_in_place(
            bundle / NAME, manifest_bytes(kept | {"files": dict(sorted(files.items()))})
        )
    except OSError as error:
        raise disk_error(bundle, bundle, error) from error
    for plain, (path, _) in new.items():
        _delete_others(bundle / plain, bundle / path)


def _is_in_place_of(path: PurePosixPath, plain: PurePosixPath) -> bool:
    """The plain path, or one with digits."""
    same = path.parent == plain.parent and path.suffix == plain.suffix
    return same and (path.stem == plain.stem or path.stem.startswith(f"{plain.stem}-"))


@contextmanager
def locked(bundle: Path) -> Iterator[None]:
    """Keeps other calls that change this bundle waiting; the lock goes with the process."""
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_others(plain: Path, path: Path) -> None:
    """The earlier files in its place, and what a killed call left."""
    for pattern in (f"{plain.stem}*{plain.suffix}", f".{plain.stem}*.partial"):
        for other in path.parent.glob(pattern):
            try:
                if other != path:
                    other.unlink()
            except OSError as error:
                raise EdgeLoraError(
                    f"{other}: {error.strerror}: the adapter is in the bundle, remove this old file"
                ) from error


def _write_in_place(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
