"""The only writer of bundles: into a temporary folder, flushed, renamed."""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
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
    """Raises EdgeLoraError when `out` exists and may not be replaced, or cannot be made."""
    try:
        if not out.exists() and not out.is_symlink():
            _check_parent(out)
        elif not force:
            raise EdgeLoraError(f"{out}: exists already: choose another folder or pass --force")
        elif not (out / NAME).is_file():
            raise EdgeLoraError(f"{out}: exists and is no bundle: --force replaces bundles only")
    except OSError as error:
        raise _disk_error(out, out, error) from error


def _check_parent(out: Path) -> None:
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise EdgeLoraError(f"{out}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EdgeLoraError(f"{out}: {parent} may not be written: choose another folder")


@contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill; on leaving without an error it becomes `out`, at once and whole.

    On an error it is removed and `out` stays as it was. A full disk becomes an EdgeLoraError.
    """
    place = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    partial = _beside(place, "partial")
    try:
        _clear_abandoned(place)
        check_target(out, force=force)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _replace(partial, place)
    except OSError as error:
        raise _disk_error(out, partial, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, fields: dict[str, Any]) -> None:
    """The last file of a bundle: without it, the folder is none."""
    valid_adapter_names(fields["adapters"])
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
        "base_model_name_or_path": None if base is None else model_name(base),
        "ranks": sorted({branch.rank for branch in branches.values() if branch.rank}),
        "scalings": sorted({branch.scaling for branch in branches.values() if branch.rank}),
        "targets": len(branches),
    }


def free_adapter_path(manifest: Mapping[str, Any], name: str, data: bytes) -> str:
    """Where an adapter can be written while the bundle is in use.

    The plain path; if the manifest holds other content there, one with digits of the SHA-256.
    """
    digest = hashlib.sha256(data).hexdigest()
    plain = PurePosixPath(adapter_path(name))
    paths = [plain, *(plain.with_stem(f"{plain.stem}-{digest[:n]}") for n in (8, len(digest)))]
    taken = {path: entry["sha256"] for path, entry in manifest["files"].items()}
    return next(str(path) for path in paths if taken.get(str(path), digest) == digest)


def exchange_adapter(bundle: Path, path: str, data: bytes, fields: Mapping[str, Any]) -> None:
    """Writes an adapter's file, exchanges the manifest (`fields` of the old one, changed), and
    only then deletes what was in the adapter's folder before.

    Killed in between, the bundle is the old or the new one, and perhaps holds a file that its
    manifest does not name, which the next call for that adapter deletes.
    """
    folder = PurePosixPath(path).parent
    files = {n: entry for n, entry in fields["files"].items() if PurePosixPath(n).parent != folder}
    files[path] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    kept = {key: value for key, value in fields.items() if key not in HEAD_FIELDS}
    try:
        _write_in_place(bundle / path, data)
        for parent in (bundle / folder.parent, bundle):
            _sync(parent)
        _write_in_place(
            bundle / NAME, manifest_bytes(kept | {"files": dict(sorted(files.items()))})
        )
    except OSError as error:
        raise _disk_error(bundle, bundle, error) from error
    _delete_others(bundle / path)


@contextmanager
def locked(bundle: Path) -> Iterator[None]:
    """Keeps other calls that change this bundle waiting; the lock goes with the process."""
    descriptor = os.open(bundle, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_others(path: Path) -> None:
    """The earlier files of an adapter, and what a killed call left."""
    for pattern in ("adapter*.safetensors", ".adapter*.partial"):
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
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _beside(out: Path, kind: str) -> Path:
    """This process's hidden folder next to `out`."""
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def _clear_abandoned(out: Path) -> None:
    """Removes folders of exports that were killed; puts back a bundle that one had set aside."""
    prefix = f".{out.name}."
    for path in list(out.parent.iterdir()) if out.parent.is_dir() else []:
        kind, _, pid = path.name.removeprefix(prefix).rpartition("-")
        if not path.name.startswith(prefix) or not pid.isdecimal() or _is_alive(int(pid)):
            continue
        if kind == "old" and not out.exists():
            path.rename(out)
        elif kind in ("old", "partial"):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether another process has that id; what carries our own was left by a predecessor."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """For a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    """Renames partial to out.

    An old bundle is exchanged in one step, so that one of the two is always there. Where the
    system cannot, it is set aside for a moment, and put back by the next export if that was killed.
    """
    if not out.exists():
        partial.rename(out)
    elif not _exchange(partial, out):
        old = _beside(out, "old")
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _disk_error(out: Path, partial: Path, error: OSError) -> EdgeLoraError:
    """Names `out`, as it was given, for whatever went wrong in or above `partial`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeLoraError(f"{out}: no space left on the device: nothing was written, free some")
    place = Path(error.filename or out)
    ours = place in (out, partial, *partial.parents) or partial in place.parents
    reason = error.strerror or str(error)
    return EdgeLoraError(f"{out if ours else place}: {reason}: nothing was written")
