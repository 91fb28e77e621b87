"""The index of a bundle: its fields, its digest, and the checks of a reader."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from edgelora.errors import EdgeLoraError
from edgelora.manifest_fields import mismatches

NAME = "manifest.json"
FORMAT = "edgelora-bundle"
FORMAT_VERSION = 1
SELFCHECK = "selfcheck.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
HEAD_FIELDS = ("format", "format_version", "digest")
SHOWN = 8  # of the problems in an error's line
_NO_DIGEST = "0" * 64


def manifest_bytes(fields: dict[str, Any]) -> bytes:
    """The file's bytes; `fields` follow `format`, `format_version` and `digest`.

    Equal fields, equal bytes.
    """
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "digest": _NO_DIGEST}
    text = json.dumps(head | fields, indent=2, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(_NO_DIGEST, digest, 1).encode()


def read_manifest(bundle: Path) -> dict[str, Any]:
    """The fields of a bundle whose manifest is whole and whose files are there, in the size it
    states.

    Raises EdgeLoraError naming the file and what is wrong. Contents are not hashed (see `verify`).
    """
    path = bundle / NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise EdgeLoraError(f"{path}: {error.strerror}: not a bundle of edgelora export") from error
    fields = _parse(path, raw)
    _check_version(path, fields)
    _check_digest(path, raw, fields)
    _check_fields(path, fields)
    for name, entry in fields["files"].items():
        _check_file(bundle, name, entry)
    return fields


REPORT = {"json": "report.json", "html": "report.html"}


def report_paths(fields: Mapping[str, Any]) -> dict[str, str]:
    """By kind, relative; empty if the bundle has no report."""
    paths: dict[str, str] = fields.get("report", REPORT)
    return paths if paths["json"] in fields["files"] else {}


def selfcheck_path(fields: Mapping[str, Any]) -> str:
    """Relative; not always among the bundle's files."""
    return str(fields.get("selfcheck", SELFCHECK))


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise EdgeLoraError(f"{path}: not JSON ({error}): export the bundle again") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise EdgeLoraError(f"{path}: not the manifest of an EdgeLoRA bundle")
    return fields


def _check_version(path: Path, fields: dict[str, Any]) -> None:
    version = fields.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise EdgeLoraError(f"{path}: format_version {version!r} is not a version")
    if version > FORMAT_VERSION:
        raise EdgeLoraError(
            f"{path}: format version {version} is newer than {FORMAT_VERSION}: update edgelora"
        )


def _check_digest(path: Path, raw: bytes, fields: dict[str, Any]) -> None:
    digest = str(fields.get("digest", ""))
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise EdgeLoraError(f"{path}: digest is not 64 hex digits: copy the bundle again")
    zeroed = raw.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    if hashlib.sha256(zeroed).hexdigest() != digest:
        raise EdgeLoraError(f"{path}: digest does not match: changed or damaged, copy it again")


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    problems = mismatches(fields)
    if not problems:
        problems = [
            f"adapters.{name}.path: {entry['path']!r} is not among the files"
            for name, entry in fields["adapters"].items()
            if entry["path"] not in fields["files"]
        ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise EdgeLoraError(f"{path}: {'; '.join(problems[:SHOWN])}{more}: export the bundle again")


def _check_file(bundle: Path, name: str, entry: Any) -> None:
    parts = PurePosixPath(name)
    if "\0" in name or not is_unicode(name):
        raise EdgeLoraError(f"{bundle / NAME}: path {name!r} is not one: refused")
    inside = (bundle / name).resolve().is_relative_to(bundle.resolve())
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not inside:
        raise EdgeLoraError(f"{bundle / NAME}: path {name!r} leaves the bundle: refused")
    try:
        size = (bundle / name).stat().st_size
    except OSError as error:
        raise EdgeLoraError(f"{bundle / name}: {error.strerror}: copy the bundle again") from error
    if size != entry["size"]:
        raise EdgeLoraError(
            f"{bundle / name}: {size} bytes, {entry['size']} expected: copy the bundle again"
        )


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can say it: false for the half characters that stand for undecodable bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def bound_adapter_file(path: Path) -> Path:
    """`path`, or in a folder its one adapter*.safetensors that is not PEFT's adapter_model."""
    if not path.is_dir():
        return path
    found = [file for file in path.glob("adapter*.safetensors") if file.name != PEFT_WEIGHTS]
    return found[0] if len(found) == 1 else path / "adapter.safetensors"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_content(bundle: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Raises EdgeLoraError if a file of the bundle is not the one that the manifest lists."""
    if sha256_file(bundle / name) != manifest["files"][name]["sha256"]:
        raise EdgeLoraError(
            f"{bundle / name}: SHA-256 does not match: damaged, copy the bundle again"
        )


def file_entries(bundle: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of the folder but the manifest, by relative path."""
    paths = sorted(path for path in bundle.rglob("*") if path.is_file())
    return {
        path.relative_to(bundle).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in paths
        if path != bundle / NAME
    }
