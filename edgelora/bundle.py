"""The only writer of bundles: into a temporary folder, flushed, renamed."""

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgelora.adapter import Branch
from edgelora.errors import EdgeLoraError
from edgelora.graph.tensors import WEIGHT_FILE, StoredTensor
from edgelora.manifest import HEAD_FIELDS, NAME, file_entries, manifest_bytes

ALIGNMENT = 64  # bytes; a kernel's cache line
SHARED = 1 << 20  # bytes from which equal arrays are stored once
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class WeightFile:
    """Appends arrays to a bundle's weight file and remembers where they lie."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHT_FILE
        self._file = self.path.open("wb")
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
        offset = -self._file.tell() % ALIGNMENT + self._file.tell()
        self._file.write(bytes(offset - self._file.tell()))
        self._file.write(array.data)
        return offset

    def close(self) -> None:
        self._file.close()


def check_target(out: Path, *, force: bool) -> None:
    """Raises EdgeLoraError when `out` exists and may not be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise EdgeLoraError(f"{out}: exists already: choose another folder or pass --force")
    if not (out / NAME).is_file():
        raise EdgeLoraError(f"{out}: exists and is no bundle: --force replaces bundles only")


@contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill; on leaving without an error it becomes `out`, at once and whole.

    On an error it is removed and `out` stays as it was. A full disk becomes an EdgeLoraError.
    """
    check_target(out, force=force)
    _remove_abandoned(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _replace(partial, out)
    except OSError as error:
        raise _disk_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """The last file of a bundle: without it, the folder is none."""
    (folder / NAME).write_bytes(manifest_bytes(fields | {"files": file_entries(folder)}))


def adapter_path(name: str, flavor: str = "edgelora") -> str:
    """Where a bundle keeps an adapter, relative to its folder."""
    kind = "onnx_adapter" if flavor == "ort" else "safetensors"
    return f"adapters/{name}/adapter.{kind}"


def adapter_entry(
    path: str, branches: Mapping[str, Branch], source: str | None, base: str | None
) -> dict[str, Any]:
    """An adapter's line in the manifest.

    Source: fingerprint of its PEFT folder; base: the name it gave.
    """
    return {
        "path": path,
        "source": source,
        "base_model_name_or_path": base,
        "ranks": sorted({branch.rank for branch in branches.values()}),
        "scalings": sorted({branch.scaling for branch in branches.values()}),
        "targets": len(branches),
    }


def add_files(bundle: Path, files: Mapping[str, bytes], fields: dict[str, Any]) -> None:
    """Puts files into a bundle, then exchanges its manifest (`fields` of the old one, changed).

    Killed in between, the bundle is as before, with a file that its manifest does not name.
    """
    entries = dict(fields["files"])
    try:
        for name, data in files.items():
            write_in_place(bundle / name, data)
            digest = hashlib.sha256(data).hexdigest()
            entries[name] = {"size": len(data), "sha256": digest}
        kept = {key: value for key, value in fields.items() if key not in HEAD_FIELDS}
        new = manifest_bytes(kept | {"files": dict(sorted(entries.items()))})
        write_in_place(bundle / NAME, new)
    except OSError as error:
        raise _disk_error(bundle, error) from error


def write_in_place(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_abandoned(out: Path) -> None:
    """Folders left by exports that were killed."""
    for partial in out.parent.glob(f".{out.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    """Renames partial to out.

    An old bundle is exchanged in one step, so that one of the two is always there.
    """
    if not out.exists():
        partial.rename(out)
    elif not _exchange(partial, out):
        old = out.with_name(f".{out.name}.partial-old")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _disk_error(out: Path, error: OSError) -> EdgeLoraError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeLoraError(f"{out}: no space left on the device: nothing was written, free some")
    return EdgeLoraError(f"{error.filename or out}: {error.strerror}: nothing was written")
