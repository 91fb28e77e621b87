"""What an export leaves behind: the bundle whole, the same bytes each time, or nothing."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgelora
import tiny
from edgelora import EdgeLoraError
from edgelora.manifest import NAME, read_manifest

EXPORT = "import sys, edgelora; edgelora.export(sys.argv[1], sys.argv[2], force=True)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_same_inputs_give_the_same_bytes_at_any_thread_count(base: Path, tmp_path: Path) -> None:
    results = []
    for threads in ("1", "2"):
        out = tmp_path / threads / "bundle"
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", EXPORT, base, out], check=True, env=environment)
        results.append(digests(out))
    assert results[0] == results[1]


def test_no_path_or_time_is_in_the_files(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle")
    for path in (tmp_path / "bundle").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()
            assert str(base).encode() not in path.read_bytes()


def test_existing_folder_is_refused_without_force(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious.txt").write_text("mine")
    with pytest.raises(EdgeLoraError, match=r"exists already.*--force"):
        edgelora.export(base, tmp_path / "bundle")
    with pytest.raises(EdgeLoraError, match="no bundle"):
        edgelora.export(base, tmp_path / "bundle", force=True)
    assert (tmp_path / "bundle" / "precious.txt").read_text() == "mine"


def test_force_replaces_a_bundle(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", format="float")
    edgelora.export(base, tmp_path / "bundle", format="int4", force=True)
    assert read_manifest(tmp_path / "bundle")["plan"]["format"] == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_failed_export_leaves_the_old_bundle_and_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgelora.export(base, tmp_path / "bundle")
    before = digests(tmp_path / "bundle")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(EdgeLoraError, match=r"bundle: no space left on the device"):
        edgelora.export(base, tmp_path / "bundle", format="float", force=True)
    assert digests(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_device_is_one_line_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(EdgeLoraError, match="no space left"):
            edgelora.export(base, small / "bundle")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_killed_export_leaves_no_bundle(base: Path, tmp_path: Path) -> None:
    """kill -9 at moments spread over the whole run: whatever is there is a whole bundle or none."""
    out = tmp_path / "bundle"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", EXPORT, base, tmp_path / "timing"], check=True)
    whole = time.monotonic() - started
    for share in (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0):
        process = subprocess.Popen([sys.executable, "-c", EXPORT, base, out])
        time.sleep(whole * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            read_manifest(out)
    edgelora.export(base, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "timing"]


def test_force_keeps_the_old_bundle_through_a_kill(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    edgelora.export(base, out)
    for delay in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen([sys.executable, "-c", EXPORT, base, out])
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        read_manifest(out)


def test_manifest_names_every_file(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle")
    names = set(digests(tmp_path / "bundle")) - {NAME}
    fields = json.loads((tmp_path / "bundle" / NAME).read_text())
    assert set(fields["files"]) == names
    assert list(fields)[:3] == ["format", "format_version", "digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, "format 'int5'"),
        ({"block_size": 48}, "block size 48"),
        ({"format": "nf4", "block_size": 32}, "nf4 has blocks of 64"),
        ({"context_length": 100_000}, "at most 256"),
        ({"mode": "merge"}, "exactly one adapter"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_impossible_options_are_refused(
    base: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(EdgeLoraError, match=message):
        edgelora.export(base, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
