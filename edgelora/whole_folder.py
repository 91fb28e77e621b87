"""A folder that appears whole or not at all: filled beside its place, flushed, renamed."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from edgelora.errors import EdgeLoraError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class FolderKind(NamedTuple):
    """What --force may replace."""

    name: str
    marker: str  # the file by which such a folder is known
    files: frozenset[str] | None = None  # all that it may hold; None: anything


def check_target(out: Path, kind: FolderKind, *, force: bool) -> None:
    """Raises EdgeLoraError when `out` exists and may not be replaced, or cannot be made."""
    try:
        if not out.exists() and not out.is_symlink():
            _check_parent(out)
        elif not force:
            raise EdgeLoraError(f"{out}: exists already: choose another folder or pass --force")
        else:
            _check_kind(out, kind)
    except OSError as error:
        raise disk_error(out, out, error) from error


def _check_kind(out: Path, kind: FolderKind) -> None:
    if not (out / kind.marker).is_file():
        raise EdgeLoraError(
            f"{out}: exists and is no {kind.name}: --force replaces {kind.name}s only"
        )
    names = {path.name for path in out.iterdir()}
    if kind.files is not None and (others := sorted(names - kind.files)):
        raise EdgeLoraError(
            f"{out}: --force would delete {', '.join(others)} too: choose another folder"
        )


def _check_parent(out: Path) -> None:
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise EdgeLoraError(f"{out}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EdgeLoraError(f"{out}: {parent} may not be written: choose another folder")


@contextmanager
def new_folder(out: Path, kind: FolderKind, *, force: bool) -> Iterator[Path]:
    """A folder to fill; on leaving without an error it becomes `out`, at once and whole.

    On an error it is removed and `out` stays as it was. A full disk becomes an EdgeLoraError.
    """
    place = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    partial = _beside(place, "partial")
    try:
        _clear_abandoned(place)
        check_target(out, kind, force=force)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        _replace(partial, place)
    except OSError as error:
        raise disk_error(out, partial, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(out: Path, kind: str) -> Path:
    """This process's hidden folder next to `out`."""
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def _clear_abandoned(out: Path) -> None:
    """Removes folders of calls that were killed; puts back what one of them had set aside."""
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
        sync(path)


def sync(path: Path) -> None:
    """For a folder: the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, out: Path) -> None:
    """Renames partial to out.

    An old folder is exchanged in one step, so that one of the two is always there. Where the
    system cannot, it is set aside for a moment, and put back by the next call if that was killed.
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
    sync(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE); False where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    done = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def disk_error(out: Path, partial: Path, error: OSError) -> EdgeLoraError:
    """Names `out`, as it was given, for whatever went wrong in or above `partial`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EdgeLoraError(f"{out}: no space left on the device: nothing was written, free some")
    place = Path(error.filename or out)
    ours = place in (out, partial, *partial.parents) or partial in place.parents
    reason = error.strerror or str(error)
    return EdgeLoraError(f"{out if ours else place}: {reason}: nothing was written")
